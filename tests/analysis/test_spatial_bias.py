"""Bias over the image grid: profiles, slopes, and the control."""

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
import torch

from tests.helpers.real import real
from tests.helpers.synthetic import dense_call, grid, random_call, sample_of, shipped, uniform_call
from tests.helpers.tiny import QUESTION, picture
from xmodal_interp.analysis import raster_bias, raster_map, raster_profile
from xmodal_interp.capturing.run import capture
from xmodal_interp.errors import GeometryError, InputError
from xmodal_interp.models import VLM
from xmodal_interp.sample import Sample


def looking(at: np.ndarray, name: str = "fake") -> Sample:
    """An image, then two words with half of their attention on BOS and half on the given cells."""
    n = at.size
    probs = torch.eye(n + 3)
    row = torch.tensor(at / at.sum() / 2).flatten()
    for position in (n + 1, n + 2):
        probs[position] = 0.0
        probs[position, 0] = 0.5
        probs[position, 1 : n + 1] = row
    layout = "b" + "v" * n + "tt"
    return sample_of(layout, [dense_call(probs)], [grid(*at.shape)], name=name)


def test_worked_example_of_two_by_two() -> None:
    sample = looking(np.array([[1.0, 2.0], [3.0, 2.0]]))
    cells = raster_map(sample)
    assert list(cells) == ["tower", "kind", "layer", "head", "row", "col", "lift"]
    assert cells["lift"].tolist() == pytest.approx([0.5, 1.0, 1.5, 1.0])
    table = raster_profile(sample)
    assert list(table) == [
        *("tower", "kind", "layer", "head", "axis", "index", "share", "null", "lift"),
    ]
    assert table["axis"].tolist() == ["col", "col", "row", "row"]
    assert table["share"].tolist() == pytest.approx([0.5, 0.5, 3 / 8, 5 / 8])
    assert table["null"].tolist() == pytest.approx([0.5] * 4)
    assert table["lift"].tolist() == pytest.approx([1.0, 1.0, 0.75, 1.25])


@pytest.mark.parametrize("shape", [(5, 5), (4, 7), (3, 8)])
def test_slopes_of_a_known_surface(shape: tuple[int, int]) -> None:
    y, x = (np.linspace(-1, 1, n) for n in shape)
    y, x = np.meshgrid(y, x, indexing="ij")
    surface = np.exp(0.7 * y - 0.3 * x + 0.4 * np.maximum(abs(y), abs(x)))
    row = raster_bias(looking(surface)).iloc[0]
    assert row[["row_slope", "col_slope", "edge_slope"]].tolist() == pytest.approx(
        [0.7, -0.3, 0.4], abs=1e-5
    )


def test_map_is_averaged_over_samples_and_uniform_attention_has_no_bias() -> None:
    left, right = np.array([[3.0, 1.0]] * 2), np.array([[1.0, 3.0]] * 2)
    table = raster_map([looking(left, "a"), looking(right, "b")])
    assert table["lift"].tolist() == pytest.approx([1.0] * 4)
    assert table.attrs["n_samples"] == 2
    even = sample_of("b" + "v" * 12 + "ttt", [uniform_call(16)], [grid(3, 4)])
    bias = raster_bias(even)
    assert bias.loc[:, "row_slope":].to_numpy() == pytest.approx(0.0, abs=1e-6)
    assert raster_profile(even)["lift"].to_numpy() == pytest.approx(1.0, abs=1e-6)


def test_per_sample_rows_equal_those_of_each_sample_alone() -> None:
    rng = np.random.default_rng(0)
    samples = [looking(rng.uniform(1, 3, (3, 4)), name=name) for name in ("a", "b", "b")]
    control = [looking(rng.uniform(1, 3, (3, 4))) for _ in range(2)]
    for analysis in (raster_map, raster_profile, raster_bias):
        options = {} if analysis is raster_map else {"control": control}
        table = analysis(samples, per_sample=True, **options)
        alone = [analysis(sample, **options) for sample in samples]
        for name, expected in zip(("a", "b", "b (2)"), alone, strict=True):
            found = table[table["sample"] == name].drop(columns="sample").reset_index(drop=True)
            pd.testing.assert_frame_equal(found.rename_axis(expected.index.name), expected)
        assert table.columns[0] == "sample"
        assert len(table) == 3 * len(alone[0])
    cells = raster_map(samples, per_sample=True).groupby(["row", "col"])["lift"].mean()
    np.testing.assert_allclose(cells, raster_map(samples)["lift"])


def test_control_is_subtracted() -> None:
    y = np.linspace(-1, 1, 4)[:, None] + np.zeros((4, 4))
    sample, control = looking(np.exp(0.9 * y)), looking(np.exp(0.4 * y))
    row = raster_bias(sample, control=[control, control]).iloc[0]
    assert row[["row_slope", "row_slope_control", "row_slope_difference"]].tolist() == (
        pytest.approx([0.9, 0.4, 0.5], abs=1e-5)
    )
    profile = raster_profile(sample, control=control)
    own, other = raster_profile(sample)["share"], raster_profile(control)["share"]
    np.testing.assert_allclose(profile["share_control"], other)
    np.testing.assert_allclose(profile["share_difference"], own - other)
    assert raster_bias(sample, control=[control] * 2).attrs["parameters"]["n_control"] == 2


def test_profile_equals_sums_of_probabilities() -> None:
    calls = [random_call(16, layer=layer) for layer in range(2)]
    sample = sample_of("b" + "v" * 12 + "ttt", calls, [grid(3, 4)])
    table = raster_profile(sample)
    for layer, call in enumerate(calls):
        on_image = call.probs()[0, :, 13:, 1:13].mean(1).reshape(4, 3, 4)
        slow = (on_image.sum(2) / on_image.sum((1, 2))[:, None]).flatten()
        rows = table[(table["layer"] == layer) & (table["axis"] == "row")]
        np.testing.assert_allclose(rows["share"], slow, rtol=1e-5)
    sums = table.groupby(["layer", "head", "axis"])["share"].sum()
    assert sums.to_numpy() == pytest.approx(1.0)


def test_only_queries_that_see_the_whole_image_count() -> None:
    call = random_call(9, sliding_window=6)
    sample = sample_of("b vvvv tttt", [call], [grid(2, 2)])
    expected = call.probs()[0, :, 5:7, 1:5].mean(1)  # the window of position 7 begins at key 2
    expected = expected / expected.mean(1, keepdim=True)
    np.testing.assert_allclose(raster_map(sample)["lift"], expected.flatten(), rtol=1e-5)
    blind = sample_of("b vvvv tttt", [random_call(9, sliding_window=2)], [grid(2, 2)])
    assert raster_map(blind)["lift"].isna().all()
    assert raster_bias(blind).loc[:, "row_slope":].isna().all(axis=None)


def test_slopes_that_the_grid_cannot_separate_are_nan() -> None:
    row = raster_bias(looking(np.array([[1.0, 2.0], [1.0, 2.0]]))).iloc[0]
    assert row["col_slope"] == pytest.approx(np.log(2) / 2, abs=1e-6)
    assert np.isnan(row["edge_slope"])  # all four cells are at the edge
    flat = raster_bias(looking(np.array([[1.0, 2.0, 4.0]]))).iloc[0]
    assert np.isnan(flat["row_slope"])
    assert flat["col_slope"] == pytest.approx(np.log(2), abs=1e-6)


def test_of_the_shipped_model_against_a_blank_image() -> None:
    sample, blank = shipped(), shipped(blank=True)
    table = raster_bias(sample, control=blank)
    assert len(table) == len(sample.layers()) * sample.call(0).n_heads
    difference = table["row_slope"] - table["row_slope_control"]
    pd.testing.assert_series_equal(table["row_slope_difference"], difference, check_names=False)


def test_refusals() -> None:
    square, wide = looking(np.ones((2, 2))), looking(np.ones((2, 3)), "wide")
    with pytest.raises(GeometryError) as caught:
        raster_bias([square, wide])
    assert str(caught.value) == (
        "Sample 'wide' has a grid of 2 x 3, the other samples have 2 x 2. Pass samples whose image "
        "grids have the same shape."
    )
    with pytest.raises(InputError) as caught:
        raster_map([])
    assert str(caught.value) == "raster_map requires at least one sample; got none."
    cross = sample_of("ttt", [random_call(3)], cross_keys=sample_of("t", []).tokens)
    with pytest.raises(InputError) as caught:
        raster_profile(cross)
    assert str(caught.value) == (
        "A raster map requires image and text tokens in one sequence. In sample 'fake' text "
        "attends to the image by cross-attention (layers not kept), where every key is an image "
        "key."
    )


def test_refuses_samples_with_different_kept_layers() -> None:
    calls = [random_call(7, layer=layer) for layer in range(2)]
    both = sample_of("b vvvv tt", calls, [grid(2, 2)])
    one = sample_of("b vvvv tt", calls[1:], [grid(2, 2)], name="one")
    with pytest.raises(GeometryError) as caught:
        raster_map([both, one])
    assert str(caught.value) == (
        "Sample 'one' has the layers [1], the other samples have [0, 1]. Choose layers= that all "
        "samples have."
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("analysis", [raster_bias, raster_map, raster_profile])
def test_learned_queries_are_refused(analysis: Callable[[Sample], pd.DataFrame]) -> None:
    sample = capture(VLM(*real("blip-2")), picture(), QUESTION)
    with pytest.raises(GeometryError) as caught:
        analysis(sample)
    assert str(caught.value) == (
        "The tokens of image 0 of sample 'sample-0' have no row and column. They are learned "
        "queries: use xi.on_patches for attention on the patches."
    )
