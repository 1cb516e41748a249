"""Entropy and distance of heads, compared with uniform attention."""

import math

import numpy as np
import pytest
import torch

from tests.helpers.real import real
from tests.helpers.replicas import attention_distance as slow_distance
from tests.helpers.replicas import entropy
from tests.helpers.synthetic import captured, dense_call, grid, random_call, sample_of, uniform_call
from tests.helpers.tiny import QUESTION, picture, tiny_vlm
from xmodal_interp.analysis import attention_distance, attention_entropy
from xmodal_interp.capturing.run import capture
from xmodal_interp.errors import GeometryError, InputError
from xmodal_interp.models import VLM
from xmodal_interp.sample import Sample


def eyes(call: object, rows: int, cols: int, cell: float, *, class_token: bool = False) -> Sample:
    """A sample with one call of the vision tower."""
    layout = "v" * (rows * cols) + "t"
    return sample_of(layout, [call], [grid(rows, cols, cell, class_token=class_token)])


def test_worked_example_of_entropy_of_three_positions() -> None:
    matrix = [[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.0, 0.0, 1.0]]
    table = attention_entropy(sample_of("btt", [dense_call(matrix)]))
    assert list(table) == [
        *("sample", "tower", "kind", "layer", "head", "image"),
        *("entropy", "null", "relative_entropy", "n_queries", "sink_mass"),
    ]
    row = table.iloc[0]
    assert row["n_queries"] == 2  # the first query sees one key only
    assert row["entropy"] == pytest.approx(math.log(2) / 2)
    assert row["null"] == pytest.approx((math.log(2) + math.log(3)) / 2)
    assert row["relative_entropy"] == pytest.approx(0.5)


@pytest.mark.parametrize("options", [{}, {"sliding_window": 4}, {"softcap": 3.0}])
def test_entropy_row_by_row(options: dict[str, object]) -> None:
    call = random_call(10, **options)
    table = attention_entropy(sample_of("b" + "t" * 9, [call]), queries=slice(1, None))
    probs, counts = call.probs()[0].numpy(), call.n_visible()[0, 0].numpy()
    for head, row in table.set_index("head").iterrows():
        entropies = [entropy(probs[head, q]) for q in range(1, 10)]
        assert row["entropy"] == pytest.approx(np.mean(entropies), rel=1e-4)
        relative = np.mean([e / math.log(counts[q + 1]) for q, e in enumerate(entropies)])
        assert row["relative_entropy"] == pytest.approx(relative, rel=1e-4)


def test_entropy_of_uniform_attention_is_its_null() -> None:
    """Over 640 causal positions 5.468 nats on average, 6.461 in the last row."""
    sample = sample_of("b" + "t" * 639, [uniform_call(640, n_heads=1)])
    row = attention_entropy(sample).iloc[0]
    assert row["entropy"] * 639 / 640 == pytest.approx(5.468, abs=1e-3)
    assert row["relative_entropy"] == pytest.approx(1.0, abs=1e-5)
    last = attention_entropy(sample, queries="last").iloc[0]
    assert last["entropy"] == pytest.approx(6.461, abs=1e-3)


def test_entropy_leaves_out_padding() -> None:
    mask = torch.ones(1, 1, 6, 6, dtype=torch.bool).tril()
    mask[..., :2] = False
    table = attention_entropy(sample_of("pptttt", [random_call(6, causal=False, mask=mask)]))
    assert table["n_queries"].unique().tolist() == [3]
    assert table["relative_entropy"].between(0, 1).all()


def test_entropy_with_learned_sinks_is_that_of_the_renormalised_row() -> None:
    """Scores of 0 on two keys and a sink of ln 2: half the mass is on the sink."""
    call = uniform_call(2, n_heads=1, sinks=torch.tensor([math.log(2)]))
    (row,) = attention_entropy(sample_of("bt", [call])).to_dict("records")
    assert [row["entropy"], row["null"]] == pytest.approx([math.log(2)] * 2)
    assert row["relative_entropy"] == pytest.approx(1)
    assert row["sink_mass"] == pytest.approx(0.5)
    call = random_call(12, sinks=torch.tensor([0.0, 1.0, 2.0, 5.0]))
    table = attention_entropy(sample_of("b" + "t" * 11, [call])).set_index("head")
    probs, counts = call.probs()[0].double().numpy(), np.arange(1, 13)
    for head in range(4):
        rows = probs[head] / probs[head].sum(1, keepdims=True)
        entropies = np.array([entropy(row) for row in rows])[1:]
        assert table["entropy"][head] == pytest.approx(entropies.mean(), abs=1e-5)
        relative = (entropies / np.log(counts[1:])).mean()
        assert table["relative_entropy"][head] == pytest.approx(relative, abs=1e-5)
        lost = 1 - probs[head].sum(1)[1:]
        assert table["sink_mass"][head] == pytest.approx(lost.mean(), abs=1e-5)
    without = random_call(12)
    assert attention_entropy(sample_of("b" + "t" * 11, [without]))["sink_mass"].eq(0).all()


@pytest.mark.parametrize("queries", [[], slice(4, 4), np.array([], dtype=int)])
def test_no_queries_have_no_entropy(queries: object) -> None:
    """For example the answer tokens of a sample without an answer."""
    table = attention_entropy(sample_of("bvvt", [random_call(4)], [grid(1, 2)]), queries=queries)
    assert table["n_queries"].tolist() == [0] * 4
    assert table[["entropy", "null", "relative_entropy"]].isna().all(axis=None)


def test_worked_example_of_distance_of_three_patches() -> None:
    matrix = [[1.0, 0.0, 0.0], [0.5, 0.0, 0.5], [0.5, 0.5, 0.0]]
    call = dense_call(matrix, tower="vision", causal=False)
    table = attention_distance(eyes(call, 1, 3, 10.0))
    assert list(table) == [
        *("sample", "tower", "kind", "layer", "head", "image"),
        *("distance_px", "distance_grid", "null_px", "null_grid"),
        *("relative_distance", "outside", "n_queries"),
    ]
    row = table.iloc[0]
    assert row["distance_grid"] == pytest.approx((0 + 1 + 1.5) / 3)
    assert row["distance_px"] == pytest.approx(25 / 3)
    assert row["null_grid"] == pytest.approx((1 + 2 / 3 + 1) / 3)
    assert row["outside"] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("tower", ["vision", "language"])
def test_distance_cell_by_cell(tower: str) -> None:
    if tower == "vision":
        call = random_call(7, tower="vision", causal=False)
        sample = sample_of("vvvvvv t", [call], [grid(2, 3, 8.0, class_token=True)])
        places = sample.grids[0].patch_places
    else:
        call = random_call(9)
        sample = sample_of("b vvvvvv tt", [call], [grid(2, 3, 8.0)])
        places = np.full((9, 2), -1)
        places[1:7] = sample.grids[0].places
    table = attention_distance(sample, tower=tower)
    for head, row in table.set_index("head").iterrows():
        slow = slow_distance(call.probs()[0, head].numpy(), places, 8.0, 8.0)
        assert row["distance_px"] == pytest.approx(slow, rel=1e-5)
        assert row["distance_grid"] == pytest.approx(slow / 8, rel=1e-5)


@pytest.mark.parametrize(
    ("side", "patch", "px"), [(14, 16.0, 116.49), (24, 14.0, 175.04), (7, 32.0, 115.50)]
)
def test_distance_of_uniform_attention(side: int, patch: float, px: float) -> None:
    """With a class token: its mass is removed and the rest of each row is rescaled."""
    call = uniform_call(side**2 + 1, n_heads=1, tower="vision", causal=False)
    row = attention_distance(eyes(call, side, side, patch, class_token=True)).iloc[0]
    assert row["distance_px"] == pytest.approx(px, abs=5e-3)
    assert row["null_px"] == pytest.approx(px, abs=5e-3)
    assert row["relative_distance"] == pytest.approx(1.0, abs=1e-5)
    assert row["outside"] == pytest.approx(1 / (side**2 + 1), rel=1e-3)


def test_half_the_mass_on_the_class_token_does_not_halve_the_distance() -> None:
    n = 14 * 14
    probs = torch.full((n + 1, n + 1), 0.5 / n)
    probs[:, 0] = 0.5
    call = dense_call(probs, tower="vision", causal=False)
    row = attention_distance(eyes(call, 14, 14, 16.0, class_token=True)).iloc[0]
    assert row["distance_px"] == pytest.approx(116.49, abs=5e-3)  # 58.25 without rescaling
    assert row["outside"] == pytest.approx(0.5, abs=1e-4)


def test_of_a_model() -> None:
    assert attention_distance(captured("llava"))["relative_distance"].between(0, 2).all()
    images = [picture(), picture(144, 96)]
    sample = capture(tiny_vlm("qwen2_vl"), images, QUESTION)
    table = attention_distance(sample)
    assert table["image"].unique().tolist() == [0, 1]
    assert table["relative_distance"].between(0, 2).all()
    assert attention_distance(sample, tower="language")["distance_px"].gt(0).all()
    described = attention_entropy(sample, tower="vision")
    assert described["image"].unique().tolist() == [0, 1]
    assert described["relative_entropy"].between(0, 1).all()


@pytest.mark.parametrize(
    ("model_type", "tower", "size", "px"),
    [
        ("blip-2", "vision", (128, 128), 128 / 8),  # only its patches have a row and column
        ("molmo2", "vision", (96, 96), 96 / 13),  # odd number of patches, pooled 2 x 2
        ("step3p7", "vision", (80, 40), 40 / 12),  # the thumbnail has more tokens than the tiles
        ("step3p7", "language", (80, 40), 40 / 3),
    ],
)
def test_distance_in_px_is_that_of_the_cells_of_the_image(
    model_type: str, tower: str, size: tuple[int, int], px: float
) -> None:
    vlm = VLM(*real(model_type))
    table = attention_distance(capture(vlm, picture(*size), "where?"), tower=tower)
    assert table["distance_grid"].gt(0).all()
    np.testing.assert_allclose(table["distance_px"], table["distance_grid"] * px)


def test_distance_between_learned_queries_is_refused() -> None:
    sample = capture(VLM(*real("blip-2")), picture(), "where?")
    with pytest.raises(GeometryError) as error:
        attention_distance(sample, tower="language")
    assert str(error.value) == (
        "The positions of image 0 of sample 'sample-0' have no row and column in the language "
        f"tower. {sample.grids[0].reason}"
    )


def test_refusals() -> None:
    sample = eyes(random_call(4, tower="vision", causal=False), 2, 2, 8.0)
    with pytest.raises(InputError) as caught:
        attention_entropy(sample, tower="connector", queries="red")
    assert str(caught.value) == (
        "queries can only be given for the language and the vision tower; got 'red' for the "
        "connector tower. Leave queries out."
    )
    with pytest.raises(InputError) as caught:
        attention_distance(sample, tower="connector")
    assert str(caught.value) == (
        "attention_distance is not defined for tower='connector', whose positions have no place on "
        "the image. Choose tower='vision' or tower='language'."
    )
    with pytest.raises(InputError) as caught:
        attention_distance(sample_of("tt", [random_call(2, tower="vision")]))
    assert str(caught.value) == ("Sample 'fake' has no image. attention_distance requires one.")
    with pytest.raises(GeometryError) as caught:
        attention_distance(eyes(random_call(5, tower="vision", causal=False), 2, 2, 8.0))
    assert str(caught.value) == (
        "The grid of image 0 of sample 'fake' has 4 places, but vision self-attention, layer 0, "
        "call 0 has 5 keys."
    )


def test_language_distance_refuses_cross_attention() -> None:
    with pytest.raises(InputError) as caught:
        attention_distance(captured("mllama"), tower="language")
    assert str(caught.value).startswith(
        "attention_distance with tower='language' requires image and text tokens in one sequence. "
        "In sample 'sample-0' text attends to the image by cross-attention"
    )
