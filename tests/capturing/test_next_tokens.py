"""Probabilities of answer tokens: settings of ``generate``, batches, stores, no answer."""

import numpy as np
import pandas as pd
import torch
from transformers import StoppingCriteria

import xmodal_interp as xi
from tests.helpers.store_samples import items, shipped
from tests.helpers.tiny import QUESTION, picture, tiny_vlm
from tests.helpers.vision import registers_vlm
from xmodal_interp.models.next_tokens import next_tokens
from xmodal_interp.vocabulary import NEXT_COLUMNS


def known(vlm: xi.VLM, image, question: str, ids: list[int]) -> list[float]:
    """Return the probability of each id, from one forward over prompt and answer."""
    inputs = vlm.prepare([[image]], [question])[0]
    n = inputs["input_ids"].shape[1]
    for token in ids:
        row = torch.tensor([[token]])
        inputs["input_ids"] = torch.cat([inputs["input_ids"], row], 1)
        for name in ("attention_mask", "token_type_ids", "mm_token_type_ids"):
            if name in inputs:
                more = torch.ones_like(row) if name == "attention_mask" else torch.zeros_like(row)
                inputs[name] = torch.cat([inputs[name], more], 1)
    with torch.no_grad():
        logits = vlm.run(inputs).logits[0, n - 1 : -1].double()
    return logits.softmax(-1)[range(len(ids)), ids].tolist()


def found(sample: xi.Sample) -> list[float]:
    return sample.tokens["next_probability"].dropna().tolist()


def test_generation_settings_do_not_change_the_probability() -> None:
    """It is the model's own, before the repetition penalty and the temperature."""
    vlm, image = tiny_vlm("llava"), picture()
    changed = {"repetition_penalty": 3.0, "do_sample": True, "temperature": 5.0, "top_k": 7}
    torch.manual_seed(0)
    sample = xi.capture(vlm, image, QUESTION, max_new_tokens=5, generation=changed)
    torch.manual_seed(0)
    inputs = vlm.prepare([[image]], [QUESTION])[0]
    ids = vlm.generate(inputs, max_new_tokens=5, **changed)[0, sample.n_prompt :].tolist()
    np.testing.assert_allclose(found(sample), known(vlm, image, QUESTION, ids), atol=1e-5, rtol=0)


def test_the_last_token_and_the_end_have_a_probability() -> None:
    """The last prompt position predicts the first token; the last row predicts the last token."""
    vlm = shipped()
    item = items(1)[0]
    ended = xi.capture(vlm, item["image"], item["prompt"], max_new_tokens=16)
    names = ended.tokens["next_token"].dropna()
    assert names.index.tolist() == list(range(ended.n_prompt - 1, len(ended)))
    answer = ended.tokens["token"].iloc[ended.n_prompt :].tolist()
    assert names.tolist() == [*answer, vlm.tokenizer.eos_token]
    cut = xi.capture(vlm, item["image"], item["prompt"], max_new_tokens=1)
    assert cut.tokens["next_token"].dropna().tolist() == [cut.answer]
    assert len(cut) == cut.n_prompt
    np.testing.assert_allclose(found(cut), found(ended)[:1], atol=1e-5, rtol=0)


def test_answers_of_a_batch_that_end_early_have_no_probability_of_padding() -> None:
    vlm = shipped()
    asked = ["how many shapes ?", "describe the image ."]
    image = items(1)[0]["image"]
    together = xi.capture_batch(vlm, [[image]] * 2, asked, max_new_tokens=8)
    for sample, question in zip(together, asked, strict=True):
        alone = xi.capture(vlm, image, question, max_new_tokens=8)
        np.testing.assert_allclose(found(sample), found(alone), atol=1e-5, rtol=0)
        assert (
            sample.tokens["next_token"].dropna().tolist()
            == alone.tokens["next_token"].dropna().tolist()
        )
    assert len(found(together[0])) < len(found(together[1]))


def test_a_stopping_criterion_of_the_user_is_used() -> None:
    class Second(StoppingCriteria):
        def __call__(self, input_ids, scores, **_):  # noqa: ARG002
            self.n = getattr(self, "n", 0) + 1
            return torch.full((len(input_ids),), self.n == 2)

    own = [Second()]
    sample = xi.capture(
        tiny_vlm("llava"),
        picture(),
        QUESTION,
        max_new_tokens=6,
        generation={"stopping_criteria": own, "eos_token_id": -1},
    )
    assert len(found(sample)) == 2
    assert len(own) == 1


def test_the_columns_are_stored(tmp_path) -> None:
    store = xi.capture_dataset(
        shipped(), items(2), tmp_path / "store", max_new_tokens=3, progress=False
    )
    item = items(2)[1]
    sample = xi.capture(shipped(), item["image"], item["prompt"], max_new_tokens=3)
    stored = xi.open_store(store.path)[1].tokens
    pd.testing.assert_frame_equal(
        stored[list(NEXT_COLUMNS)], sample.tokens[list(NEXT_COLUMNS)], atol=1e-6
    )


def test_samples_without_an_answer_have_no_columns() -> None:
    assert not {*NEXT_COLUMNS} & {*xi.capture(tiny_vlm("llava"), picture(), QUESTION).tokens}
    assert not {*NEXT_COLUMNS} & {*xi.capture(registers_vlm(), picture(32, 32)).tokens}


def test_a_step_that_was_not_observed_is_missing() -> None:
    """Nothing is guessed: then all probabilities are missing."""
    vlm = tiny_vlm("llava")
    inputs = vlm.prepare([[picture()]], [QUESTION])[0]
    with torch.no_grad(), next_tokens(vlm.model) as observed:
        output = vlm.generate(inputs, max_new_tokens=3, **observed.with_criterion({}))
    n_steps = output.shape[1] - inputs["input_ids"].shape[1]
    assert observed.probabilities(n_steps).shape == (1, n_steps)
    assert observed.probabilities(n_steps + 1) is None
    assert not vlm.model._forward_hooks
    assert not vlm.model._forward_pre_hooks
