"""Head pruning and pruning curves, compared with one forward per question and head."""

import functools
import inspect

import numpy as np
import pandas as pd
import pytest
import torch

from tests.helpers import replicas
from tests.helpers.tiny import picture, tiny_vlm
from xmodal_interp.analysis.answers import _scores, answer_accuracy
from xmodal_interp.analysis.pruning import _summary, head_pruning, pruning_curve
from xmodal_interp.errors import InputError, LayerError
from xmodal_interp.hooks.ablation import ablate_heads
from xmodal_interp.hooks.head_means import HeadMeans, mean_head_outputs
from xmodal_interp.hooks.interventions import intervene
from xmodal_interp.models import VLM, load
from xmodal_interp.models.known_answers import answer_ids

QUESTIONS = [
    ("color", "what color is the circle ?", "red"),
    ("color", "what color is the square ?", "blue"),
    ("place", "where is the red circle ?", "top left"),
    ("place", "where is the blue square ?", "bottom right"),
    ("count", "how many shapes ?", "three"),
]
ITEMS = [
    {"image": picture(seed=i // 2), "prompt": prompt, "answer": answer, "kind": kind}
    for i, (kind, prompt, answer) in enumerate(QUESTIONS)
]
QUIET = {"progress": False, "n_bootstrap": 200}


@functools.cache
def means_of(vlm: VLM, positions: str) -> HeadMeans:
    return mean_head_outputs(vlm, ITEMS, positions=positions)  # type: ignore[arg-type]


def replica_scores(vlm: VLM, item: dict, removal: dict, mode: str) -> tuple[float, ...]:
    """Scores of one question by one forward, without a batch and without replay."""
    inputs, (prompt,) = vlm.prepare([[item["image"]]], [item["prompt"]])
    n_prompt = inputs["input_ids"].shape[1]
    for word in answer_ids(vlm, prompt.text, item["answer"]):
        for name, value in inputs.items():
            if value.shape[:2] == inputs["attention_mask"].shape and name != "attention_mask":
                last = torch.tensor([[word]]) if name == "input_ids" else value[:, -1:]
                inputs[name] = torch.cat([value, last], 1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    edits = []
    if mode == "mean" and removal:
        text = torch.ones(inputs["input_ids"].shape[1], dtype=torch.bool)
        image = torch.zeros_like(text)
        image[:n_prompt] = torch.from_numpy(prompt.tokens["kind"].eq("image").to_numpy(dtype=bool))
        text &= ~image
        for name, chosen in (("text", text), ("image", image)):
            means = means_of(vlm, name)
            edits.append(ablate_heads(removal, "mean", queries=chosen, means=means))
    elif removal:
        edits.append(ablate_heads(removal, mode))  # type: ignore[arg-type]
    with torch.no_grad(), intervene(vlm, *edits):
        logits = vlm.model(**inputs, use_cache=False).logits[0].numpy()
    return replicas.answer_scores(logits, inputs["input_ids"][0].tolist(), n_prompt)


def test_share_at_95_is_nan_for_an_accuracy_of_zero() -> None:
    curve = pd.DataFrame({"order": "increasing", "draw": 0, "share_removed": [0, 0.5, 1]})
    (never,) = _summary(curve.assign(accuracy=[0.0, 0.0, 0.0]))
    assert (never["auc"], np.isnan(never["share_at_95"])) == (0, True)
    (half,) = _summary(curve.assign(accuracy=[0.8, 0.8, 0.1]))
    assert half["share_at_95"] == 0.5


def test_worked_example_of_scores() -> None:
    """A two-word answer whose first word is right with a margin of 2; a wrong one-word answer."""
    logits = torch.tensor([[[2.0, 0, 0], [0, 2, 0]], [[9.0, 9, 9], [0, 0, 2]]])
    gold, lengths = torch.tensor([[0, 2], [1, 0]]), torch.tensor([2, 1])
    accuracy, log_prob, margin = _scores(logits, gold, lengths)
    p = np.log(np.exp([2, 0, 0]) / np.exp([2, 0, 0]).sum())
    assert accuracy.tolist() == [0, 0]
    np.testing.assert_allclose(log_prob, [(p[0] + p[1]) / 2, p[1]], rtol=1e-6)
    assert margin.tolist() == [2, -2]


@pytest.mark.parametrize(
    ("family", "mode"), [("llava", "uniform"), ("llava", "mean"), ("qwen2_vl", "zero")]
)
def test_head_pruning_equals_one_forward_per_question_and_head(family: str, mode: str) -> None:
    vlm = tiny_vlm(family)
    table = head_pruning(vlm, ITEMS, mode=mode, layers=[0, 2], heads=[-1], **QUIET)
    assert table.columns.tolist() == [
        *("tower", "kind", "layer", "head", "question_kind"),
        *("accuracy_drop", "accuracy_drop_low", "accuracy_drop_high"),
        *("log_prob_drop", "log_prob_drop_low", "log_prob_drop_high"),
        *("margin_drop", "margin_drop_low", "margin_drop_high", "n", "n_clusters"),
    ]
    assert table["question_kind"].tolist() == ["all", "color", "place", "count"] * 2
    base = np.array([replica_scores(vlm, item, {}, mode) for item in ITEMS])
    of_kind = {"all": slice(None), "color": [0, 1], "place": [2, 3], "count": [4]}
    for (layer, head), rows in table.groupby(["layer", "head"]):
        removed = np.array([replica_scores(vlm, item, {layer: [head]}, mode) for item in ITEMS])
        for row in rows.itertuples():
            drop = (base - removed)[of_kind[row.question_kind]].mean(0)
            found = [row.accuracy_drop, row.log_prob_drop, row.margin_drop]
            np.testing.assert_allclose(found, drop, atol=2e-5)
    np.testing.assert_allclose(
        list(table.attrs["base"]["place"].values()), base[2:4].mean(0), atol=2e-5
    )
    assert table.attrs["parameters"]["mode"] == mode
    assert table.attrs["provenance"]["model_type"] == family


@pytest.mark.parametrize(("tower", "n"), [("language", 32), ("vision", 12)])
def test_every_head_has_a_row_and_an_interval_around_its_drop(tower: str, n: int) -> None:
    table = head_pruning(tiny_vlm("llava"), ITEMS[1:3], tower=tower, **QUIET)
    table = table[table["question_kind"] == "all"]
    assert len(table) == n
    assert not table.duplicated(["layer", "head"]).any()
    for metric in ("accuracy_drop", "log_prob_drop", "margin_drop"):
        assert (table[f"{metric}_low"] <= table[metric] + 1e-9).all()
        assert (table[metric] <= table[f"{metric}_high"] + 1e-9).all()


def test_batch_size_does_not_matter_in_mllama() -> None:
    vlm = tiny_vlm("mllama")
    tables = [
        head_pruning(vlm, ITEMS, layers=[0], heads=[0, 1], mode="mean", batch_size=size, **QUIET)
        for size in (1, 4)
    ]
    pd.testing.assert_frame_equal(*tables, atol=1e-4)


def test_questions_about_one_image_are_resampled_together() -> None:
    """One image is one cluster and has no interval; two images have one."""
    one = head_pruning(tiny_vlm("llava"), ITEMS[:2], layers=[0], heads=[0], **QUIET)
    two = head_pruning(tiny_vlm("llava"), ITEMS[1:3], layers=[0], heads=[0], **QUIET)
    assert (one["n_clusters"][0], two["n_clusters"][0]) == (1, 2)
    assert np.isnan([one["log_prob_drop_low"][0], one["accuracy_drop_high"][0]]).all()
    assert two["log_prob_drop_low"][0] < two["log_prob_drop"][0]


def test_curve_runs_from_the_intact_model_to_all_ranked_heads_removed() -> None:
    vlm = tiny_vlm("llava")
    ranking = head_pruning(vlm, ITEMS, layers=[1, 3], **QUIET)
    curve = pruning_curve(vlm, ITEMS, ranking, steps=3, n_random=2, progress=False)
    assert curve.columns.tolist() == [
        *("tower", "kind", "order", "draw", "n_removed", "share_removed"),
        *("accuracy", "log_prob", "margin", "n"),
    ]
    assert curve["n_removed"].tolist() == [0, 8, 16] * 4
    first, last = curve[curve["n_removed"] == 0], curve[curve["n_removed"] == 16]
    assert first["log_prob"].nunique() == last["log_prob"].round(6).nunique() == 1
    base = [replica_scores(vlm, item, {}, "zero")[1] for item in ITEMS]
    assert first["log_prob"].iloc[0] == pytest.approx(np.mean(base), abs=2e-5)
    of_all = ranking[ranking["question_kind"] == "all"].sort_values("log_prob_drop")
    removal: dict[int, list[int]] = {}
    for layer, head in of_all[["layer", "head"]].to_numpy()[:8].tolist():
        removal.setdefault(layer, []).append(head)
    removed = [replica_scores(vlm, item, removal, "uniform")[1] for item in ITEMS]
    assert curve["log_prob"][1] == pytest.approx(np.mean(removed), abs=2e-5)
    assert [(s["order"], s["draw"]) for s in curve.attrs["summary"]] == [
        *(("increasing", 0), ("decreasing", 0), ("random", 0), ("random", 1))
    ]


def test_keep_per_layer_keeps_heads_in_every_layer() -> None:
    ranking = pd.DataFrame(
        {"layer": [0, 0, 1, 1], "head": [0, 1, 0, 1], "importance": [1, 2, 3, 4]}
    )
    curve = pruning_curve(
        *(tiny_vlm("llava"), ITEMS[:1], ranking),
        by="importance",
        orders=["increasing"],
        steps=3,
        keep_per_layer=1,
        progress=False,
    )
    assert curve["n_removed"].tolist() == [0, 1, 2]
    assert curve["share_removed"].tolist() == [0, 1 / 32, 2 / 32]  # of all heads of the tower


def test_curve_uses_the_tower_of_its_ranking() -> None:
    vlm, options = tiny_vlm("llava"), {"orders": ["increasing"], "steps": 2, "progress": False}
    ranking = head_pruning(vlm, ITEMS[:1], tower="vision", layers=[1], **QUIET)
    curve = pruning_curve(vlm, ITEMS[:1], ranking, **options)
    assert curve["tower"].unique().tolist() == ["vision"]
    assert curve.attrs["parameters"]["tower"] == "vision"
    assert curve["share_removed"].tolist() == [0, 4 / 12]
    removal = ablate_heads({1: range(4)}, "uniform", tower="vision")
    inputs, (prompt,) = vlm.prepare([[ITEMS[0]["image"]]], [ITEMS[0]["prompt"]])
    with torch.no_grad(), intervene(vlm, removal):
        logits = vlm.model(**inputs).logits[0, -1]
    (first, *rest) = answer_ids(vlm, prompt.text, ITEMS[0]["answer"])
    assert not rest
    assert curve["log_prob"][1] == pytest.approx(float(logits.log_softmax(-1)[first]), abs=2e-5)


def test_generated_answers_are_compared() -> None:
    vlm = load()
    items = [{**ITEMS[i], "answer": "?"} for i in (0, 4)]
    said = answer_accuracy(vlm, items)["predicted"].tolist()
    items = [{**items[0], "answer": said[0].upper()}, items[1], {**items[0], "answer": "no way"}]
    table = answer_accuracy(vlm, items, batch_size=2)
    assert table.columns.tolist() == [
        *("item", "question_kind", "prompt", "answer", "predicted", "correct")
    ]
    assert table["correct"].tolist() == [True, False, False]
    assert table["question_kind"].tolist() == ["color", "count", "color"]
    everything = ablate_heads({layer: range(8) for layer in range(4)})
    with intervene(vlm, everything):
        assert answer_accuracy(vlm, items)["predicted"].tolist() != table["predicted"].tolist()


RANKING = pd.DataFrame(
    {"tower": "vision", "kind": "self", "layer": 0, "head": [0, 1], "log_prob_drop": [1.0, 2.0]}
)
REFUSALS = {
    "tower": (
        lambda vlm: pruning_curve(vlm, ITEMS, RANKING, tower="language"),
        InputError,
        "The ranking's column 'tower' holds 'vision'; it must hold only 'language'. Select rows of "
        "one tower's self-attention, or pass another tower=.",
    ),
    "towers": (
        lambda vlm: pruning_curve(vlm, ITEMS, RANKING.assign(tower=["vision", "language"])),
        InputError,
        "The ranking's column 'tower' holds 'vision' and 'language'; it must hold a single value. "
        "Select rows of one tower's self-attention, or pass another tower=.",
    ),
    "kind": (
        lambda vlm: pruning_curve(vlm, ITEMS, RANKING.assign(kind="cross")),
        InputError,
        "The ranking's column 'kind' holds 'cross'; it must hold only 'self'. Select rows of one "
        "tower's self-attention, or pass another tower=.",
    ),
    "layer": (
        lambda vlm: head_pruning(vlm, ITEMS, layers=[9], **QUIET),
        LayerError,
        "There is no layer 9: language self-attention has layers 0 to 3.",
    ),
    "head": (
        lambda vlm: head_pruning(vlm, ITEMS, layers=[1], heads=[8], **QUIET),
        LayerError,
        "There is no head 8: language self-attention, layer 1, has heads 0 to 7.",
    ),
    "no items": (
        lambda vlm: head_pruning(vlm, [], **QUIET),
        InputError,
        "There are no items. Give at least one.",
    ),
    "order": (
        lambda vlm: inspect.unwrap(pruning_curve)(vlm, ITEMS, pd.DataFrame(), orders=["up"]),
        InputError,
        "orders must be among increasing, decreasing, random; got ['up'].",
    ),
    "steps": (
        lambda vlm: pruning_curve(vlm, ITEMS, "random", steps=1),
        InputError,
        "steps must be at least 2; got 1.",
    ),
    "column": (
        lambda vlm: pruning_curve(vlm, ITEMS, pd.DataFrame({"layer": [0], "head": [0]})),
        InputError,
        "The ranking lacks the columns log_prob_drop; it has layer, head. Name the column with the "
        "importance with by=.",
    ),
    "twice": (
        lambda vlm: pruning_curve(
            vlm, ITEMS, pd.DataFrame({"layer": [0, 0], "head": [1, 1], "x": [1, 2]}), by="x"
        ),
        InputError,
        "The ranking has 2 rows for 1 heads, and 0 NaN in 'x'. Pass one row with a number for each "
        "head.",
    ),
    "no answer": (
        lambda vlm: answer_accuracy(vlm, [{"image": picture(), "prompt": "what ?"}]),
        InputError,
        "Item 0 has no 'answer' (its entries are image, prompt). Give exactly one that is not "
        "None.",
    ),
    "an answer that is None": (
        lambda vlm: answer_accuracy(vlm, [ITEMS[0], {**ITEMS[0], "answer": None}]),
        InputError,
        "Item 1 has no 'answer' (its entries are image, prompt, answer, kind). Give exactly one "
        "that is not None.",
    ),
    "an empty answer": (
        lambda vlm: answer_accuracy(vlm, [{**ITEMS[0], "answer": ""}]),
        InputError,
        "Item 0 has the empty answer ''. Give each item an answer with at least one character.",
    ),
    "an image by two names": (
        lambda vlm: answer_accuracy(
            vlm, [{"image": picture(), "images": [picture()], "prompt": "what ?", "answer": "red"}]
        ),
        InputError,
        "Item 0 has both 'image' and 'images' (its entries are image, images, prompt, answer). "
        "Give exactly one that is not None.",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name: str) -> None:
    ask, error, message = REFUSALS[name]
    with pytest.raises(error) as refusal:
        ask(tiny_vlm("llava"))
    assert str(refusal.value) == message
