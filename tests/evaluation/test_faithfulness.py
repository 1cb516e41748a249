"""Deletion and insertion curves."""

import dataclasses

import numpy as np
import pytest
import torch

from tests.helpers.tiny import picture, tiny_vlm
from xmodal_interp.analysis.answers import answer_scores
from xmodal_interp.errors import CaptureError, InputError, UnsupportedModelError
from xmodal_interp.evaluation.faithfulness import (
    _values,
    area,
    curve_areas,
    deletion_curve,
    insertion_curve,
)
from xmodal_interp.evaluation.token_boxes import overlap_shares
from xmodal_interp.hooks.embeddings import mean_embeddings
from xmodal_interp.models import load
from xmodal_interp.models.known_answers import batches_of
from xmodal_interp.shapes import ask, sample_scene

ITEMS = [
    {"image": picture(seed=0), "prompt": "what color is the circle ?", "answer": "red"},
    {"image": picture(seed=1), "prompt": "how many shapes ?", "answer": "two", "kind": "count"},
]
QUIET = {"progress": False}


def maps(family: str) -> list[np.ndarray]:
    n = (
        144
        if family == "llava"
        else len(tiny_vlm(family).prepare([[picture()]], ["what ?"])[1][0].grids[0].places)
    )
    return [np.random.default_rng(i).permutation(n).astype(float) for i in range(2)]


def test_areas_of_the_paper() -> None:
    assert area(np.ones(7)) == 1
    assert area(np.linspace(1, 0, 5)) == pytest.approx(0.5)
    assert area(np.array([1.0, 0, 0, 0, 0])) == pytest.approx(0.125)


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_deletion_is_insertion_in_the_reverse_order(family: str) -> None:
    vlm, salience = tiny_vlm(family), maps(family)
    deletion = deletion_curve(vlm, ITEMS, salience, steps=4, **QUIET)
    insertion = insertion_curve(vlm, ITEMS, [-m for m in salience], steps=4, **QUIET)
    assert deletion.columns.tolist() == [
        *("item", "question_kind", "step", "share_changed", "probability", "accuracy")
    ]
    forth = deletion["probability"].to_numpy().reshape(2, 4)
    back = insertion["probability"].to_numpy().reshape(2, 4)
    np.testing.assert_allclose(forth, back[:, ::-1], rtol=1e-5)
    for batch in batches_of(vlm, ITEMS, batch_size=1):
        (item,) = batch.index
        expected = np.exp(answer_scores(vlm, batch)[1, 0])
        assert forth[item, 0] == pytest.approx(expected, rel=1e-5)
    areas = curve_areas(deletion)
    assert areas["area"].tolist() == pytest.approx([area(row) for row in forth])
    assert areas["question_kind"].isna().tolist() == [True, False]


def test_a_step_is_a_forward_with_mean_tokens() -> None:
    """One item, a third of the tokens: compare with an explicit edit of the embeddings."""
    vlm, salience = tiny_vlm("llava"), maps("llava")
    curve = deletion_curve(vlm, ITEMS[:1], [salience[0].reshape(12, 12)], steps=4, **QUIET)
    (batch,) = batches_of(vlm, ITEMS[:1], batch_size=1)
    model, inputs = vlm.model, batch.inputs
    with torch.no_grad():
        tokens = model.get_image_features(pixel_values=inputs["pixel_values"]).pooler_output[0]
        tokens = tokens.clone()
        tokens[salience[0] >= 144 - 48] = tokens.mean(0)
        embedded = model.get_input_embeddings()(inputs["input_ids"])
        embedded[inputs["input_ids"] == model.config.image_token_id] = tokens
        logits = model(inputs_embeds=embedded, use_cache=False).logits
    (gold,) = batch.answers[0]
    expected = logits[0, -2].softmax(-1)[gold]
    assert curve["probability"][1] == pytest.approx(float(expected), rel=1e-4)


def test_deleting_the_asked_object_lowers_the_score_most() -> None:
    vlm, rng = load(), np.random.default_rng(11)
    items, inside = [], []
    while len(items) < 6:
        scene = sample_scene(rng)
        question = ask(scene, "color", rng)
        if question is not None and question.thing is not None:
            items.append(
                {"image": scene.image(), "prompt": question.text, "answer": question.answer}
            )
            grid = vlm.prepare([[scene.image()]], ["what ?"])[1][0].grids[0]
            box = scene.things[question.thing].box
            inside.append(
                overlap_shares(torch.from_numpy(grid.boxes).double(), np.array([box])).numpy()
            )
    of_thing = curve_areas(deletion_curve(vlm, items, inside, steps=6, **QUIET))["area"].mean()
    for null in ("random", "centre"):
        of_null = curve_areas(deletion_curve(vlm, items, null, steps=6, **QUIET))["area"].mean()
        assert of_thing < of_null - 0.1


REFUSALS = {
    "shape": (
        lambda vlm: deletion_curve(vlm, ITEMS[:1], [np.ones(9)], **QUIET),
        InputError,
        "The map of item 0 has shape (9,) with 0 NaN, but the image has 144 tokens (12 x 12). Pass "
        "one number per image token, as a sequence or as a grid.",
    ),
    "number": (
        lambda vlm: deletion_curve(vlm, ITEMS, [np.ones(144)], **QUIET),
        InputError,
        "Pass one map per item; got 1 for 2 items.",
    ),
    "steps": (
        lambda vlm: insertion_curve(vlm, ITEMS, "random", steps=1, **QUIET),
        InputError,
        "steps must be an integer from 2 to 10000000; got 1.",
    ),
    "no curve": (
        lambda vlm: curve_areas(deletion_curve(vlm, ITEMS[:1], "centre", steps=2, **QUIET), "x"),
        InputError,
        "curve lacks the columns x. Pass the result of deletion_curve or insertion_curve.",
    ),
    "cross": (
        lambda _: deletion_curve(tiny_vlm("mllama"), ITEMS[:1], "random", **QUIET),
        UnsupportedModelError,
        "mllama has no image tokens to replace: text attends to the image by cross-attention. Use "
        "knock_out_attention(..., kind='cross') instead.",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name: str) -> None:
    ask_for, error, message = REFUSALS[name]
    with pytest.raises(error) as refusal:
        ask_for(tiny_vlm("llava"))
    assert str(refusal.value) == message


def test_embeddings_are_replaced_in_whole_forwards_only() -> None:
    vlm = tiny_vlm("llava")
    inputs = vlm.prepare([[picture()]], ["what ?"])[0]
    n = inputs["input_ids"].shape[1]
    none = torch.zeros(1, n, dtype=torch.bool)
    with pytest.raises(CaptureError) as refusal, mean_embeddings(vlm, none, ~none):
        pass
    assert str(refusal.value) == (
        "Embeddings were to be replaced, but the language model (LlamaModel) did not run inside "
        "the with block. Run the model there."
    )
    with pytest.raises(CaptureError) as refusal, mean_embeddings(vlm, none[:, 1:], none[:, 1:]):
        vlm.model(**inputs)
    assert str(refusal.value) == (
        f"Embeddings of shape [1, {n - 1}] were to be replaced, but the language model received "
        f"embeddings of shape [1, {n}]. Run one forward over the whole sequence, without a cache."
    )
    assert not vlm.model.get_decoder()._forward_pre_hooks


@pytest.mark.parametrize("maps", ["centre", "rows and columns"])
def test_tokens_without_row_and_column_cannot_be_ranked_by_them(maps: str) -> None:
    """Their row and column are -1, which would index the last one."""
    (grid,) = tiny_vlm("llava").prepare([[picture()]], ["what ?"])[1][0].grids
    headed = np.concatenate([[[-1, -1]], grid.places])
    boxes = np.concatenate([np.full((1, 4), np.nan), grid.boxes])
    stray = dataclasses.replace(grid, places=headed, boxes=boxes)
    given = "centre" if maps == "centre" else [np.ones((grid.rows, grid.cols))]
    message = f"1 of {len(headed)} image tokens of item 0 have no row and column"
    with pytest.raises(InputError, match=message):
        _values(stray, given, 0, seed=0)
