"""Rows of a phrase and rows that predict it; short summaries."""

import re

import numpy as np
import pytest
import torch

from tests.helpers.real import real, settled
from tests.helpers.tiny import QUESTION, picture, tiny_vlm
from xmodal_interp.capturing.dataset import capture_dataset
from xmodal_interp.capturing.run import Keep, capture
from xmodal_interp.errors import PhraseError, PositionError
from xmodal_interp.hooks import record
from xmodal_interp.models import VLM

N = 5
STEPS = {"max_new_tokens": N, "generation": {"min_new_tokens": N}}


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "mllama"])
def test_the_rows_that_predict_a_token_have_its_logits(family: str) -> None:
    """Also for the last generated token, which has no row."""
    vlm = tiny_vlm(family)
    sample = capture(vlm, picture(), QUESTION, **STEPS)
    words = sample.answer.split()
    assert len(words) == N
    inputs, _ = vlm.prepare([[picture()]], [QUESTION])
    for n, word in enumerate(words):
        occurrence = -1 - [w.lower() for w in words[n + 1 :]].count(word.lower())
        (row,) = sample.find(word, occurrence, predicts=True)
        assert row == sample.last + n
        with torch.no_grad():
            ids = vlm.generate(inputs, max_new_tokens=n + 1, min_new_tokens=n + 1)[0]
        assert vlm.tokenizer.decode(ids[row + 1 :]).strip() == word  # the token after the row
        if n < N - 1:
            assert sample.find(word, occurrence) == [row + 1]


def test_a_token_that_was_not_fed_back_has_a_row_that_predicts_it(tmp_path) -> None:
    vlm = tiny_vlm("llava")
    item = {"image": picture(), "prompt": QUESTION}
    (stored,) = capture_dataset(vlm, [item], tmp_path, max_new_tokens=1, progress=False)
    prompt_only = capture(vlm, picture(), QUESTION)
    for sample in (capture(vlm, picture(), QUESTION, max_new_tokens=1), stored):
        word = sample.answer
        assert len(word.split()) == 1
        assert len(sample) == sample.n_prompt
        for rows in (
            sample.find(word, predicts=True),
            sample.positions(word, predicts=True),
            sample.positions([word, word], predicts=True),
        ):
            assert rows.tolist() == [sample.last]
            assert torch.equal(sample.probs(0, queries=rows), prompt_only.probs(0, queries="last"))
        message = (
            f"{word!r} has no attention row: its last token was generated last and was "
            f"not fed back to the model. Pass xi.at.predicts({word!r}), the rows that predict it, "
            "or capture more tokens."
        )
        for select in (sample.find, sample.positions, lambda w, of=sample: of.probs(0, queries=w)):
            with pytest.raises(PhraseError) as refusal:
                select(word)
            assert str(refusal.value) == message


def test_a_phrase_that_ends_without_a_row() -> None:
    sample = capture(tiny_vlm("llava"), picture(), QUESTION, **STEPS)
    phrase = " ".join(sample.answer.split()[-2:])
    assert sample.find(phrase, -1, predicts=True).tolist() == [len(sample) - 2, len(sample) - 1]
    with pytest.raises(PhraseError, match="has no attention row: its last token"):
        sample.find(phrase, -1)


def test_a_phrase_before_the_answer() -> None:
    sample = capture(tiny_vlm("llava"), picture(), QUESTION, max_new_tokens=1)
    assert (
        sample.find("red circle", predicts=True).tolist()
        == (sample.find("red circle") - 1).tolist()
    )
    assert sample.positions("last", predicts=True) == sample.last - 1
    assert sample.positions([3, 5], predicts=True).tolist() == [2, 4]
    with pytest.raises(PositionError) as refusal:
        sample.positions(0, predicts=True)
    assert str(refusal.value) == (
        "No position predicts the token at position 0 of sample 'sample-0': it is the first "
        "position. Leave out predicts=True."
    )


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # PaliGemma
@pytest.mark.parametrize(
    ("model_type", "prompt"),
    [
        ("paligemma", "what is the red circle"),
        ("t5gemma2", "<start_of_image> what is the red circle"),
    ],
)
def test_a_prompt_that_is_not_causal_is_not_predicted(model_type: str, prompt: str) -> None:
    """The prompt of PaliGemma is bidirectional; that of an encoder too."""
    vlm = VLM(real(model_type)[0], settled(model_type))
    sample = capture(vlm, picture(), prompt, max_new_tokens=2)
    rows = sample.find("circle")
    with pytest.raises(PositionError) as refusal:
        sample.find("circle", predicts=True)
    assert str(refusal.value) == (
        f"No position predicts the token at position {rows[0]} of sample 'sample-0': the position "
        "before it attends to it. Leave out predicts=True."
    )
    last = sample.positions(np.array([sample.last]))
    assert sample.positions([sample.n_prompt], predicts=True).tolist() == last.tolist()


def test_reprs_are_a_short_line() -> None:
    """Sizes and meaning, no tensors."""
    vlm = tiny_vlm("llava")
    sample = capture(vlm, picture(96, 64), QUESTION)
    assert repr(sample.call(2)) == (
        f"AttentionCall(language self-attention, layer 2, call 0: {sample.call(2).n_heads} heads, "
        f"{len(sample)} queries, {len(sample)} keys; q, k)"
    )
    assert repr(sample.grids) == (
        "(ImageGrid(96 x 64 px; 12 x 12 tokens (row x col), 144 in total; 12 x 12 patches),)"
    )
    inputs, _ = vlm.prepare([[picture()]] * 2, [QUESTION] * 2)
    with record(vlm.model) as recording:
        assert repr(recording) == f"Recording(0 calls, {len(recording.modules)} attention modules)"
        vlm.run(inputs)
    n = len(recording.calls)
    assert repr(recording) == f"Recording({n} calls, {len(recording.modules)} attention modules)"
    assert ": 2 samples, " in repr(recording.calls[-1])
    statistics = capture(vlm, picture(), QUESTION, keep=Keep(statistics=["entropy"])).call(0)
    assert repr(statistics).endswith(" keys; row_entropy, groups, counted)")
    tiled = VLM(real("llava_next")[0], settled("llava_next"))
    (grid,) = capture(tiled, picture(96, 64), QUESTION).grids
    assert re.fullmatch(
        r"ImageGrid\(96 x 64 px; \d+ x \d+ tokens \(row x col\), \d+ in total; \d+ x \d+ patches"
        r"; \d+ tiles; Thumbnail\(\d+ x \d+ tokens\)\)",
        repr(grid),
    )
