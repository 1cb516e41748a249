"""The pointing game, and the selection of the best head."""

import inspect
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from tests.helpers import replicas
from tests.helpers.synthetic import dense_call, grid, random_call, sample_of
from tests.helpers.tiny import QUESTION, tiny_vlm
from xmodal_interp.capturing.run import capture
from xmodal_interp.errors import InputError
from xmodal_interp.evaluation import best_head, pointing_game, pointing_hits
from xmodal_interp.evaluation.token_boxes import overlap_shares
from xmodal_interp.sample import Sample
from xmodal_interp.shapes import sample_scene


def placed(sample: Sample, **labels: object) -> Sample:
    """The sample with the pixel boxes of its grid's tokens."""
    tokens = sample.tokens.copy()
    runs = np.flatnonzero(tokens["kind"] == "image")
    tokens.loc[runs, ["x0", "y0", "x1", "y1"]] = np.concatenate([g.boxes for g in sample.grids])
    return replace(sample, tokens=tokens, labels=labels)


def worked_example(row: list[float]) -> Sample:
    """Nine image tokens of 10 x 10 px, then one word that attends to them with the given row."""
    probs = torch.zeros(10, 10)
    probs[-1, :9] = torch.tensor(row)
    probs[-1, 9] = 1 - sum(row)
    return placed(
        sample_of("vvvvvvvvvt", [dense_call(probs)], [grid(3, 3)]),
        box=[10, 0, 25, 10],  # token 1, and half of token 2
        other_boxes=[[0, 20, 10, 30], [20, 20, 30, 30]],
    )


def test_worked_example_of_three_by_three() -> None:
    sample = worked_example([0, 0.3, 0.4, 0, 0.1, 0, 0, 0, 0])
    (row,) = pointing_hits(sample).to_dict("records")
    assert (row["hit"], row["any_object"], row["other_object"]) == (1, 1, 0)
    assert row["energy"] == pytest.approx((0.3 + 0.4 / 2) / 0.8)
    assert row["image_mass"] == pytest.approx(0.8)
    assert row["hit_chance"] == pytest.approx(2 / 9)
    assert row["energy_chance"] == pytest.approx(1.5 / 9)  # 150 of 900 px
    # The centre of the peak, x = 25, is on the edge of the box, which counts as inside.
    assert pointing_hits(sample, criterion="centre")["hit"][0] == 1
    assert pointing_hits(sample, [[10, 0, 24, 10]], criterion="centre")["hit"][0] == 0
    assert pointing_hits(sample, [[10, 0, 24, 10]])["hit"][0] == 1
    elsewhere = worked_example([0, 0, 0, 0, 0, 0, 0.6, 0, 0.2])
    (row,) = pointing_hits(elsewhere).to_dict("records")
    assert (row["hit"], row["any_object"], row["other_object"]) == (0, 1, 0.5)
    assert row["energy"] == 0


@pytest.mark.parametrize("criterion", ["overlap", "centre"])
def test_equals_the_replica(criterion: str) -> None:
    rng = np.random.default_rng(0)
    samples, boxes = [], []
    for number in range(4):
        calls = [random_call(24, layer=layer) for layer in range(2)]
        samples.append(placed(sample_of("b" + "v" * 20 + "ttt", calls, [grid(4, 5)])))
        x, y = rng.uniform(0, 30, 2)
        boxes.append([x, y, x + 12 + number, y + 9])
    table = pointing_hits(samples, boxes, queries=[22, 23], criterion=criterion)
    assert len(table) == 4 * 2 * 4
    assert table["any_object"].isna().all()
    for number, sample in enumerate(samples):
        of_sample = table.iloc[number * 8 : number * 8 + 8]
        for row in of_sample.itertuples():
            probs = sample.probs(row.layer, [row.head])[0, [22, 23], 1:21].mean(0).numpy()
            hit, energy = replicas.pointed_at(
                probs, sample.grids[0].boxes, boxes[number], criterion=criterion
            )
            assert row.hit == hit
            assert row.energy == pytest.approx(energy, rel=1e-5)
    rates = pointing_game(samples, boxes, queries=[22, 23], criterion=criterion, n_bootstrap=100)
    expected = table.groupby(["layer", "head"])["hit"].mean().to_numpy()
    np.testing.assert_allclose(rates["hit"], expected)
    assert (rates["hit_low"] <= rates["hit"]).all()
    assert (rates["hit"] <= rates["hit_high"]).all()
    assert (rates["n"] == 4).all()
    assert rates.columns.tolist() == [
        *("tower", "kind", "layer", "head", "hit", "energy", "any_object", "other_object"),
        *("image_mass", "padding_mass", "hit_chance", "energy_chance"),
        *("hit_low", "hit_high", "energy_low", "energy_high", "n", "n_clusters"),
    ]


def test_uniform_attention_has_the_energy_of_the_area() -> None:
    probs = torch.full((1, 10, 10), 0.1)
    sample = placed(sample_of("vvvvvvvvvt", [dense_call(probs)], [grid(3, 3)]))
    for box in ([0, 0, 30, 30], [3, 4, 17, 29], [12, 12, 13, 13]):
        table = pointing_hits(sample, [box])
        area = (box[2] - box[0]) * (box[3] - box[1]) / 900
        assert table["energy"][0] == pytest.approx(area)
        assert table["energy_chance"][0] == pytest.approx(area)


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "mllama"])
def test_real_models_against_the_boxes_of_the_scene(family: str) -> None:
    scene = sample_scene(np.random.default_rng(7), width=128, height=72)
    sample = capture(tiny_vlm(family), scene.image(), QUESTION)
    sample.labels["box"] = list(scene.things[0].box)
    sample.labels["other_boxes"] = [list(thing.box) for thing in scene.things[1:]]
    kind = "cross" if family == "mllama" else "self"
    table = pointing_game(
        [sample], kind=kind, queries=lambda s: s.find("red circle"), n_bootstrap=10
    )
    positions = sample.tokens if kind == "self" else sample.cross_keys
    keys = np.flatnonzero(positions["kind"].eq("image") & positions["x0"].notna())
    boxes = positions.iloc[keys][["x0", "y0", "x1", "y1"]].to_numpy()
    for row in table.itertuples():
        probs = sample.probs(row.layer, [row.head], sample.find("red circle"), keys, kind=kind)
        seen = probs[0].mean(0).numpy()
        hits, energies = zip(
            *(replicas.pointed_at(seen, boxes, t.box, criterion="overlap") for t in scene.things),
            strict=True,
        )
        assert (row.hit, row.any_object) == (hits[0], any(hits))
        assert row.other_object == pytest.approx(np.mean(hits[1:]))
        assert row.energy == pytest.approx(energies[0], rel=1e-5)
    assert table["energy_chance"].between(0.001, 0.5).all()
    assert table.attrs["parameters"]["queries"] == "function <lambda>"


def hits_of(values: list[list[float]]) -> pd.DataFrame:
    """``[sample][head]``, all heads in layer 0."""
    rows = [(0, head, v) for of_sample in values for head, v in enumerate(of_sample)]
    return pd.DataFrame(rows, columns=["layer", "head", "hit"])


def test_the_best_head_is_scored_on_samples_it_was_not_chosen_on() -> None:
    (row,) = best_head(hits_of([[1, 0], [1, 0], [0, 1], [0, 1]])).to_dict("records")
    assert (row["head"], row["chosen_with"], row["hit"]) == (0, 1, 0)
    assert (row["n_chosen"], row["n"]) == (2, 2)


def test_the_best_of_many_random_heads_is_no_better_than_chance() -> None:
    rng = np.random.default_rng(0)
    scored = [
        best_head(hits_of((rng.uniform(size=(60, 32)) < 0.3).astype(float).tolist())).iloc[0]
        for _ in range(30)
    ]
    assert np.mean([row["chosen_with"] for row in scored]) > 0.45
    assert np.mean([row["hit"] for row in scored]) == pytest.approx(0.3, abs=0.05)


def test_a_flat_map_has_the_hit_rate_of_a_random_token() -> None:
    """The first token, which argmax returns, is in the box; the hit is 2 / 9 all the same."""
    probs = torch.full((10, 10), 0.1)
    labels = {"box": [0, 0, 15, 9], "other_boxes": [[12, 0, 15, 9], [0, 25, 30, 30]]}
    sample = placed(sample_of("vvvvvvvvvt", [dense_call(probs)], [grid(3, 3)]), **labels)
    (row,) = pointing_hits(sample).to_dict("records")
    assert [row["hit"], row["hit_chance"]] == pytest.approx([2 / 9] * 2)
    assert row["any_object"] == pytest.approx(5 / 9)  # a token in two boxes counts once
    assert row["other_object"] == pytest.approx((1 / 9 + 3 / 9) / 2)
    two = placed(
        worked_example([0, 0.3, 0, 0, 0, 0, 0, 0, 0.3]), **worked_example([0.1] * 9).labels
    )
    assert pointing_hits(two)["hit"].tolist() == [0.5]
    assert best_head(pointing_hits([two] * 3).assign(picture=[0, 1, 2]))["hit"].tolist() == [0.5]


def test_boxes_are_matched_by_position_not_by_index() -> None:
    """``series[i]`` is by label: after ``sort_values`` it is the entry of another sample."""
    samples = [worked_example([0] * at + [0.5] + [0] * (8 - at)) for at in (0, 4, 8)]
    boxes = [[0, 0, 9, 9], [11, 11, 19, 19], [21, 21, 29, 29]]
    others = [[[21, 0, 29, 9]], [], np.array([[0, 0, 9, 9], [0, 0, 5, 5]])]
    expected = pointing_hits(samples, boxes, other_boxes=others)
    assert expected["hit"].tolist() == [1, 1, 1]
    table = pd.DataFrame({"box": boxes, "others": others}, index=[2, 0, 1])
    edges = pd.DataFrame(boxes, columns=["x0", "y0", "x1", "y1"], index=[7, 8, 9])
    of_table = {
        "series": table["box"],
        "filtered": pd.concat([table.iloc[:1], table])["box"].iloc[1:],
        "rows": edges,
        "row by row": [row for _, row in edges.iterrows()],
        "array": np.array(boxes),
        "tensor": torch.tensor(boxes),
        "iterator": iter(boxes),
    }
    for name, given in of_table.items():
        found = pointing_hits(
            pd.Series(samples, index=[5, 3, 4]), given, other_boxes=table["others"]
        )
        pd.testing.assert_frame_equal(found, expected, obj=name)


def test_several_boxes_of_one_phrase_are_one_region() -> None:
    """Hit in any box, energy of the union: what two boxes share counts once."""
    sample = worked_example([0, 0.3, 0.1, 0, 0.2, 0, 0, 0, 0.1])
    boxes = [[10, 0, 20, 5], [15, 0, 25, 10], [0, 20, 10, 30]]
    union = 0.3 * (10 * 5 + 5 * 5) / 100 + 0.1 / 2
    forms = {
        "list": boxes,
        "array": np.array(boxes),
        "dicts": [dict(zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)) for box in boxes],
        "table": pd.DataFrame(boxes, columns=["x0", "y0", "x1", "y1"]).assign(phrase="cats"),
    }
    for name, form in forms.items():
        (row,) = pointing_hits(sample, [form]).to_dict("records")
        assert row["hit"] == 1, name
        assert row["energy"] == pytest.approx(union / 0.7), name
        assert row["energy_chance"] == pytest.approx((75 + 50 + 100) / 900), name
        assert row["hit_chance"] == pytest.approx(3 / 9), name
        labelled = replace(sample, labels={**sample.labels, "box": form})
        assert pointing_hits(labelled).to_dict("records") == [row], name
    elsewhere = worked_example([0, 0, 0, 0, 0.2, 0, 0.1, 0, 0])
    assert pointing_hits(elsewhere, [boxes])["hit"].tolist() == [0]
    (row,) = pointing_hits(sample, [boxes[2]], other_boxes=[[boxes[:2]]]).to_dict("records")
    assert (row["hit"], row["any_object"], row["other_object"]) == (0, 1, 1)
    centres = pointing_hits(sample, [[[0, 0, 8, 8], [12, 2, 18, 8]]], criterion="centre")
    assert centres[["hit", "hit_chance"]].to_numpy().tolist() == [[1, pytest.approx(2 / 9)]]


def test_the_area_of_a_union_is_that_of_its_pixels() -> None:
    rng = np.random.default_rng(3)
    low = rng.integers(0, 40, (12, 2))
    boxes = np.concatenate([low, low + rng.integers(1, 25, (12, 2))], 1).astype(float)
    pixels = np.zeros((70, 70))
    for x0, y0, x1, y1 in boxes.astype(int):
        pixels[y0:y1, x0:x1] = 1
    x, y = np.meshgrid(np.arange(0, 70, 7), np.arange(0, 70, 5))
    tokens = np.stack([x.ravel(), y.ravel(), x.ravel() + 7, y.ravel() + 5], 1).astype(float)
    expected = [pixels[y0:y1, x0:x1].mean() for x0, y0, x1, y1 in tokens.astype(int)]
    shares = overlap_shares(torch.from_numpy(tokens), boxes)
    np.testing.assert_allclose(shares, expected, atol=1e-12)
    assert 0 < np.mean(expected) < 1


def padded(attention: list[float], **labels: object) -> Sample:
    """An image of 25 x 20 px padded to 30 x 30: tokens extend over its right edge and below it."""
    sample = worked_example(attention)
    return replace(sample, grids=(replace(sample.grids[0], width=25, height=20),), labels=labels)


def test_tokens_over_the_edge_count_by_their_part_on_the_image() -> None:
    sample = padded([0.1, 0, 0.3, 0, 0, 0, 0.2, 0, 0], box=[0, 0, 25, 20])
    (row,) = pointing_hits(sample).to_dict("records")
    assert (row["hit"], row["energy"], row["energy_chance"]) == (1, 1, 1)
    assert row["image_mass"] == pytest.approx(0.6)
    assert row["padding_mass"] == pytest.approx(0.2)
    assert row["hit_chance"] == pytest.approx(6 / 9)
    right = [20, 0, 25, 10]  # the visible part of the third token, whose full centre is x = 25
    (row,) = pointing_hits(sample, [right]).to_dict("records")
    assert (row["hit"], row["energy"]) == (1, pytest.approx(0.3 / 0.4))
    assert row["energy_chance"] == pytest.approx(1 / 6)
    assert pointing_hits(sample, [[20, 0, 24, 10]], criterion="centre")["hit"].tolist() == [1]
    on_padding = padded([0.1, 0, 0, 0, 0, 0, 0, 0.2, 0], box=[0, 0, 25, 30])
    (row,) = pointing_hits(on_padding).to_dict("records")
    assert (row["hit"], row["energy"]) == (0, 1)


@pytest.mark.parametrize("family", ["llava", "mllama", "qwen2_vl"])
def test_the_box_of_the_whole_picture_has_all_energy(family: str) -> None:
    scene = sample_scene(np.random.default_rng(7), width=128, height=72)
    sample = capture(tiny_vlm(family), scene.image(), QUESTION)
    kind = "cross" if family == "mllama" else "self"
    table = pointing_hits(sample, [[0, 0, 128, 72]], kind=kind)
    assert table["energy"].to_numpy() == pytest.approx(1.0)
    assert table["energy_chance"].to_numpy() == pytest.approx(1.0)


def test_a_head_without_attention_on_the_image_has_hit_and_energy_zero() -> None:
    probs = torch.zeros(2, 10, 10)
    probs[0, -1, 9] = 1.0
    probs[1, -1, 0] = 1.0
    labels = {"box": [0, 0, 10, 10], "other_boxes": [[0, 0, 10, 10]]}
    sample = placed(sample_of("vvvvvvvvvt", [dense_call(probs)], [grid(3, 3)]), **labels)
    table = pointing_hits(sample)
    for value in ("hit", "energy", "any_object", "other_object", "image_mass"):
        assert table[value].tolist() == [0, 1]


def layered(*layers: int, **more: object) -> Sample:
    calls = [random_call(10, layer=layer, **more) for layer in layers]
    return placed(sample_of("vvvvvvvvvt", calls, [grid(3, 3)]), box=[0, 0, 15, 15])


def test_a_layer_that_does_not_see_the_image_is_nan() -> None:
    near = random_call(14, layer=1, sliding_window=3)
    sample = sample_of("b vvvvvvvvv tttt", [random_call(14), near], [grid(3, 3)])
    samples = [placed(sample, box=[0, 0, 15, 15])] * 3
    table = pointing_game(samples, n_bootstrap=10)
    values = ["hit", "energy", "image_mass", "hit_low", "energy_high"]
    assert table.loc[table["layer"] == 0, values].notna().all(axis=None)
    assert table.loc[table["layer"] == 1, values].isna().all(axis=None)
    assert table["n"].tolist() == [3] * 4 + [0] * 4
    chosen = best_head(pointing_hits(samples).drop(columns="picture"), "image_mass")
    assert chosen["layer"].tolist() == [0]


def test_questions_about_one_picture_are_resampled_together() -> None:
    """One picture, in memory or in a file, is one cluster and has no interval."""
    rng = np.random.default_rng(0)
    pictures = [
        Image.fromarray(rng.integers(0, 255, (30, 30, 3), dtype=np.uint8)) for _ in range(2)
    ]

    def asked(which: list[int], **more: object) -> pd.DataFrame:
        samples = [replace(layered(0), images=(pictures[i].copy(),), **more) for i in which]
        return pointing_game(samples, n_bootstrap=200)

    same, several = asked([0] * 8), asked([0, 1] * 4)
    ends = ["hit_low", "hit_high", "energy_low", "energy_high"]
    assert same[ends].isna().all(axis=None)
    assert several[ends].notna().all(axis=None)
    assert [table["n_clusters"].tolist() for table in (same, several)] == [[1] * 4, [2] * 4]
    assert (several["energy_low"] < several["energy"]).all()
    assert [table.attrs["n_pictures"] for table in (same, several)] == [1, 2]
    of_file = asked([0, 1] * 4, provenance={"images": ["scene.png"]})
    assert of_file.attrs["n_pictures"] == 1
    unknown = pointing_game([layered(0) for _ in range(8)], n_bootstrap=10)
    assert unknown.attrs["n_pictures"] == 8


def test_no_picture_is_in_both_halves() -> None:
    hits = hits_of([[1, 0], [1, 0], [0, 1], [0, 1]])
    hits["picture"] = np.repeat([4, 4, 4, 7], 2)
    (row,) = best_head(hits, n_bootstrap=10).to_dict("records")
    assert (row["head"], row["n_chosen"], row["n"]) == (0, 3, 1)
    assert row["chosen_with"] == pytest.approx(2 / 3)


def test_nan_is_left_out_of_the_selection() -> None:
    hits = hits_of([[np.nan, np.nan, 0], [np.nan, 1, 0], [1, np.nan, 1], [1, 1, 1]])
    (row,) = best_head(hits, n_bootstrap=10).to_dict("records")
    assert (row["head"], row["chosen_with"], row["hit"]) == (1, 1, 1)
    assert (row["n_chosen"], row["n"], row["n_clusters"]) == (1, 1, 1)
    assert np.isnan([row["hit_low"], row["hit_high"]]).all()  # one sample has no interval


SAMPLE = worked_example([0, 0.3, 0.4, 0, 0.1, 0, 0, 0, 0])
BEFORE = placed(sample_of("t vvvvvvvvv t", [random_call(11)], [grid(3, 3)]), box=[0, 0, 15, 15])
REFUSALS = {
    "no box": (
        lambda: pointing_hits(replace(SAMPLE, labels={"kind": "count"})),
        "Sample 'fake' has no label 'box'; its labels are kind. Pass boxes=, or leave the sample "
        "out.",
    ),
    "outside": (
        lambda: pointing_hits(SAMPLE, [[40, 40, 50, 50]]),
        "The box [40, 40, 50, 50] of sample 'fake' contains no image token by the criterion "
        "'overlap'. The image tokens cover [0.0, 0.0, 30.0, 30.0].",
    ),
    "no box at all": (
        lambda: pointing_hits(SAMPLE, [[10, 0, 5, 10]]),
        "A box must be x0, y0, x1, y1 with x0 < x1 and y0 < y1; got [10, 0, 5, 10].",
    ),
    "thousandths": (
        lambda: pointing_hits(SAMPLE, [[0, 10, 500, 1000]]),
        "The box [0, 10, 500, 1000] of sample 'fake' exceeds its image of 30 x 30 px by more than "
        "half a side. Read numbers of other units with xi.boxes.read(numbers, format, size=(width, "
        "height)).",
    ),
    "another object": (
        lambda: pointing_hits(SAMPLE, [[0, 0, 10, 10]], other_boxes=[[[20, 20, 45.5, 30]]]),
        "The box [20, 20, 45.5, 30] of sample 'fake' exceeds its image of 30 x 30 px by more than "
        "half a side. Read numbers of other units with xi.boxes.read(numbers, format, size=(width, "
        "height)).",
    ),
    "outside all": (
        lambda: pointing_hits(SAMPLE, [[[40, 40, 50, 50], [31, 0, 50, 9]]]),
        "The union of 2 boxes of sample 'fake' contains no image token by the criterion 'overlap'. "
        "The image tokens cover [0.0, 0.0, 30.0, 30.0].",
    ),
    "fractions": (
        lambda: pointing_hits(SAMPLE, [[0.25, 0.25, 0.5, 0.5]]),
        "The box [0.25, 0.25, 0.5, 0.5] lies within 1.5 units of 'px', as fractions of an image "
        "do. Read fractions with xi.boxes.read(box, 'xyxy 0..1', size=(width, height)).",
    ),
    "boxes": (
        lambda: pointing_hits([SAMPLE, SAMPLE], [[0, 0, 9, 9]]),
        "boxes must have one entry per sample; got 1 for 2 samples.",
    ),
    "criterion": (
        lambda: inspect.unwrap(pointing_hits)(SAMPLE, criterion="near"),
        "criterion must be one of overlap, centre; got 'near'.",
    ),
    "blind": (
        lambda: pointing_hits(BEFORE, queries=[0]),
        "Query positions [0] of sample 'fake' cannot attend to image 0 in any chosen layer. Choose "
        "queries after the image.",
    ),
    "other layers": (
        lambda: pointing_game([layered(0, 1), layered(1)]),
        "Sample 'fake' has the layers [0, 1], but 'fake (2)' has [1]. Choose layers= that all "
        "samples have.",
    ),
    "unknown": (
        lambda: best_head(hits_of([[np.nan, np.nan], [np.nan, np.nan], [1, 0]])),
        "All values of 'hit' in the first half of the samples are NaN, so no head can be chosen.",
    ),
    "one picture": (
        lambda: best_head(hits_of([[1, 0], [1, 0]]).assign(picture=0)),
        "All samples show the same picture. At least two pictures are required: one to choose a "
        "head, another to score it.",
    ),
    "columns": (
        lambda: best_head(hits_of([[1, 0], [1, 0]]), "energy"),
        "hits must have the columns layer, head and energy; got layer, head, hit.",
    ),
    "one sample": (
        lambda: best_head(hits_of([[1, 0]])),
        "hits must have one row per head and sample, with the same two or more samples for each "
        "head; got 1 rows per head.",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name: str) -> None:
    ask, message = REFUSALS[name]
    with pytest.raises(InputError) as refusal:
        ask()
    assert str(refusal.value) == message
