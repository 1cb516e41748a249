"""All figures at small size and at the size of a real model: readable, bounded, and exact."""

import dataclasses
import functools
import tracemalloc
from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

import xmodal_interp as xi
from tests.helpers import synthetic
from tests.helpers.figure_layout import HIGHEST, WIDEST, problems_of
from tests.helpers.figure_samples import bars, fake, panels, words
from xmodal_interp import figures
from xmodal_interp.attention import AttentionCall
from xmodal_interp.figures.matrix_axes import AxisLabels
from xmodal_interp.figures.matrix_selection import MatrixSelection, matrix_of, pooled_mask
from xmodal_interp.models import VideoGrid
from xmodal_interp.sample import Sample

LAYERS, HEADS = 32, 32
SIDE = 48  # 2,304 image tokens
N_TEXT, N_ANSWER = 500, 200


def photo(width: int, height: int) -> Image.Image:
    """Return a smooth picture of middle brightness."""
    y, x = np.mgrid[0:height, 0:width] / max(width, height)
    pixels = np.stack([0.3 + 0.6 * x, 0.4 + 0.4 * np.sin(6 * y), 0.6 + 0.3 * np.cos(5 * x * y)], -1)
    return Image.fromarray((255 * pixels.clip(0, 1)).astype(np.uint8))


@functools.cache
def large() -> Sample:
    """Return a constructed sample of 3,006 tokens, with two layers of 32 heads."""
    layout = "bs" + "v" * SIDE**2 + "t" * N_TEXT + "o" * N_ANSWER
    torch.manual_seed(0)
    calls = [synthetic.random_call(len(layout), layer=i, n_heads=HEADS) for i in (0, LAYERS - 1)]
    sample = synthetic.sample_of(layout, calls, [synthetic.grid(SIDE, SIDE)])
    question = "Describe what the picture shows, who is in it, where it was taken and why. " * 30
    image = photo(10 * SIDE, 10 * SIDE)
    return dataclasses.replace(sample, images=(image,), question=question, answer="It shows " * 99)


@functools.cache
def small() -> Sample:
    sample = fake()
    return dataclasses.replace(sample, images=(photo(30, 20),))


@functools.cache
def video(n_frames: int) -> Sample:
    """Return a constructed sample of a video of 3 x 4 tokens per frame."""
    n = 12 * n_frames
    layout = "bs" + "v" * n + "tto"
    call = synthetic.random_call(len(layout), n_heads=4)
    sample = synthetic.sample_of(layout, [call], [synthetic.grid(3 * n_frames, 4)])
    frame, cell = np.divmod(np.arange(n), 12)
    row, col = np.divmod(cell, 4)
    places = np.stack([frame, row, col], axis=1)
    corners = np.stack([col, row], axis=1) * 10.0
    grid = VideoGrid(
        *(40, 30, n_frames, 3, 4, places, np.concatenate([corners, corners + 10], axis=1)),
        *(np.arange(n_frames) / 2, n_frames, 3, 4, places),
    )
    tokens = sample.tokens.copy()
    tokens["kind"] = tokens["kind"].replace({"image": "video"})
    tokens.loc[2 : n + 1, "video"] = 0
    tokens.loc[2 : n + 1, "frame"] = frame
    tokens["image"] = pd.array([pd.NA] * len(tokens), dtype="Int64")
    clip = xi.Video([photo(40, 30)] * n_frames, fps=2.0)
    return dataclasses.replace(
        sample,
        tokens=tokens.astype({"video": "Int64", "frame": "Int64"}),
        grids=(),
        video_grids=(grid,),
        videos=(clip,),
    )


def heads(n_layers: int, n_heads: int) -> pd.DataFrame:
    layer, head = np.divmod(np.arange(n_layers * n_heads), n_heads)
    value = np.sin(layer) * np.cos(head)
    return pd.DataFrame({"layer": layer, "head": head, "drop": value, "null": 0.1})


def positions(n_layers: int) -> pd.DataFrame:
    """Return a table like that of positional_bias."""
    rows = [
        (block, axis, layer, start, start + 100, 50, 2 ** np.sin(layer + start / 500), 0.01, 0.02)
        for block in ("text->text", "text->image", "image->image")
        for axis in ("distance", "key")
        for layer in range(n_layers)
        for start in (*range(0, 1000, 100), *range(2000, 3000, 100))
    ]
    names = ["block", "axis", "layer", "start", "stop", "n_cells", "lift", "null", "raw"]
    return pd.DataFrame(rows, columns=names)


def raster(n_layers: int, side: int) -> pd.DataFrame:
    rows = [
        (axis, layer, i, 2 ** np.sin(layer + i / 5) / side, 1 / side, 1.1 / side)
        for axis in ("row", "col")
        for layer in range(n_layers)
        for i in range(side)
    ]
    return pd.DataFrame(rows, columns=["axis", "layer", "index", "share", "null", "share_control"])


def pruning(n_orders: int) -> pd.DataFrame:
    share = np.linspace(0, 1, 20)
    orders = [f"order {i}" for i in range(n_orders)]
    return pd.concat(
        pd.DataFrame({"order": name, "share_removed": share, "accuracy": 1 - share**i})
        for i, name in enumerate(orders, 1)
    )


def rollout(sample: Sample, queries: list[int]) -> pd.DataFrame:
    keys = sample.where("image")
    table = sample.tokens.loc[keys, ["image", "row", "col"]]
    return pd.concat(
        table.assign(
            query=query, query_token=f"token {query}", rollout=np.linspace(0, 1, len(keys))
        )
        for query in queries
    )


TEXT = [SIDE**2 + 2 + i for i in range(N_TEXT)]


def over_time(n_heads: int, n_words: int) -> dict[str, np.ndarray]:
    values = np.random.default_rng(0).dirichlet(np.ones(150), (n_heads, n_words))
    return {f"layer {i // 6}, head {i % 6}": values[i] for i in range(n_heads)}


def words_of(n: int) -> list[str]:
    return [f"word{i}" for i in range(n)]


DRAWN: dict[str, tuple[Callable[..., Figure], Callable[..., Figure]]] = {
    "overlay": (
        lambda **o: figures.overlay(small(), 9, **o),
        lambda **o: figures.overlay(large(), **o),
    ),
    "overlays": (
        lambda **o: figures.overlays(small(), [8, 9, 10], **o),
        lambda **o: figures.overlays(large(), **o),
    ),
    "overlays by panel": (
        lambda **o: figures.overlays(small(), [8, 9, 10], scale="panel", **o),
        lambda **o: figures.overlays(large(), TEXT[:5], scale="panel", show="lift", **o),
    ),
    "head_overlays": (
        lambda **o: figures.head_overlays(small(), 9, **o),
        lambda **o: figures.head_overlays(large(), TEXT, **o),
    ),
    "layer_overlays": (
        lambda **o: figures.layer_overlays(small(), 9, style="light", **o),
        lambda **o: figures.layer_overlays(large(), style="light", **o),
    ),
    "token_head_grid": (
        lambda **o: figures.token_head_grid(small(), [8, 9], **o),
        lambda **o: figures.token_head_grid(large(), **o),
    ),
    "answer_overlays": (
        lambda **o: figures.answer_overlays(small(), **o),
        lambda **o: figures.answer_overlays(large(), **o),
    ),
    "before_after": (
        lambda **o: figures.before_after(small(), small(), 9, **o),
        lambda **o: figures.before_after(large(), large(), TEXT, contours=3, **o),
    ),
    "map_overlays": (
        lambda **o: figures.map_overlays(small(), {"a": np.arange(6.0)}, "value", **o),
        lambda **o: figures.map_overlays(
            large(), {f"map {i}": np.arange(SIDE**2.0) + i for i in range(33)}, "value", **o
        ),
    ),
    "rollout_overlay": (
        lambda **o: figures.rollout_overlay(rollout(small(), [8, 9]), small(), **o),
        lambda **o: figures.rollout_overlay(rollout(large(), TEXT[:70]), large(), **o),
    ),
    "patch_overlays": (
        lambda **o: figures.patch_overlays(with_vision(small(), 2, 3), [(1, 1)], **o),
        lambda **o: figures.patch_overlays(
            with_vision(large(), SIDE, SIDE), [(20 * i + 5, 7) for i in range(20)], **o
        ),
    ),
    "video_overlays": (
        lambda **o: figures.video_overlays(video(2), [26, 27], **o),
        lambda **o: figures.video_overlays(video(16), [194, 195, 196], **o),
    ),
    "attention_matrix": (
        lambda **o: figures.attention_matrix(small(), **o),
        lambda **o: figures.attention_matrix(large(), **o),
    ),
    "attention_matrix zoom": (
        lambda **o: figures.attention_matrix(small(), zoom="text-image", **o),
        lambda **o: figures.attention_matrix(large(), zoom="text-image", show="lift", **o),
    ),
    "token_patch_matrix": (
        lambda **o: figures.token_patch_matrix(small(), **o),
        lambda **o: figures.token_patch_matrix(large(), **o),
    ),
    "side_by_side": (
        lambda **o: figures.side_by_side({"a": small(), "b": synthetic.random_call(5)}, **o),
        lambda **o: figures.side_by_side(
            {"a name that is long enough for two lines": large()}
            | {f"layer {i}": MatrixSelection(large(), i, 3) for i in (0, LAYERS - 1)}
            | {f"call {i}": synthetic.random_call(700) for i in range(3)},
            **o,
        ),
    ),
    "mask_structure": (
        lambda **o: figures.mask_structure(small(), **o),
        lambda **o: figures.mask_structure(large(), **o),
    ),
    "mask_comparison": (
        lambda **o: figures.mask_comparison({"a": small(), "b": synthetic.random_call(5)}, **o),
        lambda **o: figures.mask_comparison(
            {"a": large()} | {f"call {i}": synthetic.random_call(1500) for i in range(5)}, **o
        ),
    ),
    "head_grid": (
        lambda **o: figures.head_grid(heads(2, 4), "drop", **o),
        lambda **o: figures.head_grid(heads(LAYERS, HEADS), "drop", **o),
    ),
    "layer_curves": (
        lambda **o: figures.layer_curves(heads(4, 2), "drop", by="head", null="null", **o),
        lambda **o: figures.layer_curves(heads(LAYERS, HEADS), "drop", by="head", null=0.2, **o),
    ),
    "pruning_curve_plot": (
        lambda **o: figures.pruning_curve_plot(pruning(2), **o),
        lambda **o: figures.pruning_curve_plot(pruning(20), **o),
    ),
    "positional_profiles": (
        lambda **o: figures.positional_profiles(positions(3), **o),
        lambda **o: figures.positional_profiles(positions(LAYERS), **o),
    ),
    "raster_profiles": (
        lambda **o: figures.raster_profiles(raster(4, 12), **o),
        lambda **o: figures.raster_profiles(raster(LAYERS, SIDE), **o),
    ),
    "time_panels": (
        lambda **o: figures.time_panels(over_time(2, 3), words_of(3), duration_s=1.0, **o),
        lambda **o: figures.time_panels(
            over_time(24, 40), words_of(40), duration_s=30.0, columns=6, **o
        ),
    ),
}


def with_vision(sample: Sample, rows: int, cols: int) -> Sample:
    call = synthetic.random_call(rows * cols, tower="vision", causal=False)
    return dataclasses.replace(sample, calls={**sample.calls, ("vision", "self", 0, 0): call})


@pytest.mark.parametrize("name", DRAWN)
@pytest.mark.parametrize(("size", "width"), [("small", None), ("small", "column"), ("large", None)])
def test_a_figure_is_readable(name: str, size: str, width: str | None) -> None:
    draw = DRAWN[name][size == "large"]
    options = {} if width is None else {"width": width}
    figure = draw(**options)
    assert problems_of(figure) == []


def test_all_public_figures_are_drawn() -> None:
    drawn = {name.split()[0] for name in DRAWN}
    functions = {name for name in figures.__all__ if name.islower()}
    assert functions - drawn == {"overlay_grid", "video_animation"}  # those that the others call


def test_the_check_finds_overlaps_cut_off_texts_and_black_figures() -> None:
    page = Figure((3, 3), facecolor="black")
    page.text(0.5, 0.5, "one", color="white")
    page.text(0.51, 0.5, "two", color="white")
    page.text(0.95, 0.1, "three words here")
    found = problems_of(page)
    assert "'one' overlaps 'two'" in found
    assert "'three words here' is cut off" in found
    assert any("is black" in problem for problem in found)
    assert problems_of(Figure((WIDEST + 1, HIGHEST))) == ["16.0 x 20.0 inches is too large"]


@pytest.mark.parametrize("pool", ["mean", "max"])
@pytest.mark.parametrize("show", ["probability", "lift"])
def test_a_pooled_matrix_is_the_exact_mean_or_maximum_of_visible_cells(
    pool: str, show: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = fake("bsvvvvvvvvvttto", 3, 3, call=synthetic.random_call(15))
    monkeypatch.setattr("xmodal_interp.figures.matrix_selection.MOST_BINS", 7)
    monkeypatch.setattr("xmodal_interp.figures.matrix_selection._CHUNK", 4 * 15 * 2)
    found = matrix_of(MatrixSelection(sample, head=[0, 2]), 5.0, show, pool)  # type: ignore[arg-type]
    names = ("b0", "s1", "", "t11", "t12", "t13", "o14")
    assert (found.rows.names, found.rows.sizes) == (names, (1, 1, 9, 1, 1, 1, 1))
    probs = sample.probs(-1, [0, 2]).double().mean(0).numpy()
    seen = np.tri(15, dtype=bool)
    cells = probs * (seen.sum(1)[:, None] if show == "lift" else 1)
    starts = [0, 1, 2, 11, 12, 13, 14, 15]
    for r in range(7):
        for c in range(7):
            block = np.ix_(range(starts[r], starts[r + 1]), range(starts[c], starts[c + 1]))
            visible = cells[block][seen[block]]
            value = found.values[r, c]
            if not len(visible):
                assert np.isnan(value)
            else:
                assert value == pytest.approx(getattr(np, pool)(visible), rel=1e-5)
    # runs: b, s, image, text, generated
    expected = probs[11:14, 2:11].sum(1).mean()
    assert found.mass[3, 2] == pytest.approx(expected, rel=1e-5)
    assert np.isnan(found.mass[2, 3])
    assert not found.all_visible
    note = words(figures.attention_matrix(sample, pool=pool)).replace("\n", " ")  # type: ignore[arg-type]
    of = "mean" if pool == "mean" else "largest value"
    assert f"A cell is the {of} of the visible cells of up to 9 adjacent tokens per side." in note
    shares, rows, columns = pooled_mask(MatrixSelection(sample), 5.0)
    assert rows.names == columns.names == names
    np.testing.assert_allclose(shares[:3, 2], [0, 0, 45 / 81])


def test_positions_are_pooled_within_their_group_and_names_kept() -> None:
    labels = AxisLabels(
        ("a", *[""] * 700, "b", *[""] * 10), ("text", *["image 0"] * 700, "text", *["image 1"] * 10)
    )
    pooled, firsts = labels.pooled(5.0, 100)
    assert pooled.names[0] == "a"
    assert [run.group for run in pooled.runs()] == ["text", "image 0", "text", "image 1"]
    assert sum(pooled.sizes) == len(labels)
    assert len(pooled) <= 104
    assert firsts[-1] + pooled.sizes[-1] == len(labels)
    text = AxisLabels(("word",) * 3000, ("text",) * 3000)
    assert set(text.pooled(5.0, 300)[0].names) == {""}


def test_memory_does_not_grow_with_the_square_of_the_tokens() -> None:
    """A matrix of 3,006 x 3,006 is 72 MB in float64, of 32 heads 1.2 GB in float32."""
    sample = large()
    queries = sample.text_after_image()[:96].tolist()
    figures.overlay(small(), 9)
    for draw, most in (
        (lambda: figures.attention_matrix(sample), 150e6),
        (lambda: figures.layer_overlays(sample, queries), 120e6),
    ):
        tracemalloc.start()
        draw()
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < most


def test_many_lines_have_a_ramp_with_a_bar() -> None:
    figure = figures.layer_curves(heads(4, 20), "drop", by="head", null=0.1)
    axes = figure.axes[0]
    (bar,) = bars(figure)
    assert bar.get_ylabel() == "head"
    colors = [line.get_color() for line in axes.lines[:-1]]
    drawn = bar._colorbar.mappable
    for head in (0, 7, 19):
        np.testing.assert_allclose(colors[head], drawn.to_rgba(head), atol=0.01)
    legend = axes.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["null model"]


def test_profiles_of_many_layers_are_heat_maps_of_the_ratio_to_the_null_model() -> None:
    table = positions(12)
    figure = figures.positional_profiles(table)
    maps = [axes for axes in figure.axes if axes.collections and axes not in bars(figure)]
    assert len(maps) == 6
    assert len(bars(figure)) == 1
    values = np.ma.filled(maps[0].collections[0].get_array(), np.nan)
    assert values.shape == (12, 21)  # 10 bins, a gap, 10 bins
    rows = table[(table.block == "text->text") & (table.axis == "distance")]
    expected = rows[rows.layer == 5].sort_values("start")["lift"].to_numpy()
    np.testing.assert_allclose(2 ** values[5, [*range(10), *range(11, 21)]], expected)
    assert np.isnan(values[:, 10]).all()
    raw = figures.positional_profiles(table, "raw")
    assert "times the null model" in bars(raw)[0].get_ylabel()
    image = figures.raster_profiles(raster(12, 6), scale="panel")
    assert len(bars(image)) == 2
    label = bars(image)[0].get_ylabel().replace("\n", " ")
    assert label == "share: times the control (log scale)"
    drawn = [axes for axes in image.axes if axes.collections and axes not in bars(image)]
    shares = raster(12, 6)
    one = shares[(shares.axis == "row") & (shares.layer == 3)]
    np.testing.assert_allclose(
        2 ** drawn[0].collections[0].get_array()[3], one["share"] / one["share_control"]
    )


def test_other_figures_take_axes_and_colours() -> None:
    page = Figure((12, 6))
    grid = page.subplots(2, 3)
    calls: list[tuple[Callable[..., Figure], AttentionCall | None]] = [
        (lambda **o: figures.head_grid(heads(2, 4), "drop", **o), None),
        (lambda **o: figures.layer_curves(heads(4, 9), "drop", by="head", **o), None),
        (lambda **o: figures.pruning_curve_plot(pruning(2), **o), None),
        (lambda **o: figures.attention_matrix(small(), **o), None),
        (lambda **o: figures.token_patch_matrix(small(), **o), None),
        (lambda **o: figures.overlay(small(), 9, **o), None),
    ]
    for (draw, _), axes in zip(calls, grid.flat, strict=True):
        assert draw(ax=axes, cmap="cividis") is page
        assert axes.has_data()
    page.draw_without_rendering()
    assert len(panels(page)) == 1
