"""Items of one shape share a batch; the inputs of an item do not depend on the other items."""

import pandas as pd
import pytest
import torch

from tests.helpers.real import real
from tests.helpers.tiny import QUESTION, picture, tiny_vlm
from xmodal_interp.analysis.answers import answer_scores
from xmodal_interp.errors import InputError
from xmodal_interp.models import VLM, Video
from xmodal_interp.models.known_answers import answer_ids, batches_of, listed

ITEMS = [
    {"image": picture(seed=0), "prompt": QUESTION, "answer": "red"},
    {"image": picture(seed=1), "prompt": "how many shapes ?", "answer": "two"},
    {"images": [picture(seed=2)], "question": QUESTION, "answer": "blue", "kind": "color"},
    {"image": picture(seed=3), "prompt": "where is the red circle ?", "answer": "top left"},
]


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "mllama"])
def test_a_joined_batch_equals_the_batch_of_the_processor(family: str) -> None:
    vlm = tiny_vlm(family)
    batch = batches_of(vlm, ITEMS, batch_size=8, answers=False)[0]
    assert batch.index[:2] == (0, 2)
    whole = vlm.prepare(
        [[item.get("image") or item["images"][0]] for item in (ITEMS[i] for i in batch.index)],
        [ITEMS[i].get("prompt") or ITEMS[i]["question"] for i in batch.index],
    )[0]
    assert set(batch.inputs) == set(whole)
    for name, value in whole.items():
        assert torch.equal(batch.inputs[name], value), name


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "mllama"])
def test_answers_follow_the_prompts(family: str) -> None:
    vlm = tiny_vlm(family)
    batches = batches_of(vlm, ITEMS, batch_size=1)
    assert sorted(i for batch in batches for i in batch.index) == [0, 1, 2, 3]
    for batch in batches:
        (item,) = (ITEMS[i] for i in batch.index)
        ids, n_prompt = batch.inputs["input_ids"][0], len(batch.prompts[0].tokens)
        assert vlm.tokenizer.decode(ids[n_prompt:]) == item["answer"]
        assert tuple(ids[n_prompt:].tolist()) == batch.answers[0]
        assert batch.inputs["attention_mask"].shape == (1, len(ids))
        with torch.no_grad():
            alone = vlm.prepare([[item.get("image") or item["images"][0]]], [batch.prompts[0].text])
            expected = vlm.model(**alone[0], use_cache=False).logits
            logits = vlm.model(**batch.inputs, use_cache=False).logits
        torch.testing.assert_close(logits[:, :n_prompt], expected, atol=2e-5, rtol=1e-4)


@pytest.mark.usefixtures("any_type")
@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([], "There are no items. Give at least one."),
        (
            [ITEMS[0], {"image": picture(), "prompt": "what ?"}],
            "Item 1 has no 'answer' (its entries are image, prompt). Give exactly one that is not "
            "None.",
        ),
        (
            [{"prompt": "what ?"}],
            "Item 0 has no 'image' or 'images' (its entries are prompt). Give exactly one that is "
            "not None.",
        ),
        (
            [ITEMS[0], "red"],
            "Item 1 is a str. Give a dict with image, prompt and answer.",
        ),
        (
            [{**ITEMS[0], "answer": " "}],
            "The answer ' ' is empty, or changes the tokens of the prompt '<bos>user: <image> What "
            "color is the red circle? assistant:'. Give an answer that starts a new token.",
        ),
    ],
)
def test_refusals(items: list, message: str) -> None:
    with pytest.raises(InputError) as refusal:
        batches_of(tiny_vlm("llava"), items, batch_size=2)
    assert str(refusal.value) == message


def test_rows_of_a_table_are_items() -> None:
    named = [{"image": item.get("image"), **item} for item in ITEMS]
    found = listed(pd.DataFrame(named))
    assert found == ITEMS
    batches, expected = (
        batches_of(tiny_vlm("llava"), items, batch_size=4) for items in (pd.DataFrame(named), ITEMS)
    )
    for one, other in zip(batches, expected, strict=True):
        assert one.index == other.index
        assert torch.equal(one.inputs["input_ids"], other.inputs["input_ids"])


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("also", [{}, {"image": picture(seed=5)}], ids=["alone", "and an image"])
def test_videos_of_items_are_read(also: dict) -> None:
    """Other frames give other scores."""
    vlm = VLM(*real("qwen2_vl"))
    clips = [Video([picture(seed=s + i) for i in range(4)], fps=2.0) for s in (0, 9, 0)]
    items = [{"video": clip, "prompt": "what is it?", "answer": "this", **also} for clip in clips]
    (batch,) = batches_of(vlm, items, batch_size=4)
    assert [len(prompt.videos) for prompt in batch.prompts] == [1, 1, 1]
    assert [len(prompt.grids) for prompt in batch.prompts] == [len(also)] * 3
    log_prob = answer_scores(vlm, batch)[1]
    assert log_prob[0] == pytest.approx(log_prob[2], abs=1e-6)
    assert abs(log_prob[0] - log_prob[1]) > 1e-4


def test_batch_size() -> None:
    with pytest.raises(InputError) as refusal:
        batches_of(tiny_vlm("llava"), ITEMS, batch_size=0)
    assert str(refusal.value) == "batch_size must be at least 1; got 0."


def test_answers_with_several_words() -> None:
    vlm = tiny_vlm("llava")
    ids = answer_ids(vlm, "user: where ? assistant:", "top left")
    assert vlm.tokenizer.convert_ids_to_tokens(list(ids)) == ["top", "left"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("model_type", ["git", "florence2"])
def test_positions_without_ids_cannot_be_chosen(model_type: str) -> None:
    vlm = VLM(*real(model_type))
    item = {"image": picture(), "prompt": "where is it?", "answer": "here"}
    (batch,) = batches_of(vlm, [item], batch_size=1)
    message = r"cannot be chosen: its prompts have \d+ positions but \d+ ids"
    with pytest.raises(InputError, match=message):
        _ = batch.n_ids


@pytest.mark.parametrize("name", ["gemma3", "gemma4", "idefics2", "mllama", "lfm2_vl", "qwen2_vl"])
def test_a_batch_may_contain_samples_without_images(name: str) -> None:
    vlm = VLM(*real(name))
    images, questions = [[picture()], [], [picture(seed=1)]], [QUESTION, "how many ?", QUESTION]
    _, prompts = vlm.prepare(images, questions)
    for of, question, prompt in zip(images, questions, prompts, strict=True):
        alone = vlm.prepare([of], [question])[1][0]
        kinds = alone.columns["kind"]
        n_padded = len(prompt.columns["kind"]) - len(kinds)
        assert prompt.columns["kind"] == ["padding"] * n_padded + kinds
        assert len(prompt.grids) == len(of)
