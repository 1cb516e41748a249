"""How overlays are drawn: over the dimmed image, hatched, in what scale, where and how large."""

import dataclasses
import inspect
import io
import itertools
import re
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

import xmodal_interp as xi
from tests.helpers import synthetic
from tests.helpers.figure_samples import bars, fake, panels, titles, words
from tests.helpers.real import real, settled
from tests.helpers.tiny import QUESTION, picture
from xmodal_interp import figures
from xmodal_interp.errors import InputError
from xmodal_interp.figures.overlay_panels import dimmed
from xmodal_interp.figures.scales import DIMMED, color_scale, lightness
from xmodal_interp.figures.style import check_options, panel_name
from xmodal_interp.sample import Sample


def pictured(pixels: np.ndarray, rows: int = 2, cols: int = 3) -> Sample:
    """Return a constructed sample whose image has the given pixels."""
    height, width = pixels.shape[:2]
    made = fake("bs" + "v" * rows * cols + "tto", rows, cols)
    boxes = made.grids[0].boxes * ([width / (10 * cols), height / (10 * rows)] * 2)
    grid = dataclasses.replace(made.grids[0], width=width, height=height, boxes=boxes)
    return dataclasses.replace(made, grids=(grid,), images=(Image.fromarray(pixels),))


def noise(width: int, height: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def rendered(axes: Axes, *, shape: tuple[int, int]) -> np.ndarray:
    """Return the pixels of axes, ``[row, col, 3]``, at one pixel per pixel of the image."""
    page = Figure((shape[1] / 100, shape[0] / 100), dpi=100)
    target = page.add_axes((0, 0, 1, 1))
    for drawn in axes.images:
        target.imshow(
            drawn.get_array(),
            cmap=drawn.cmap,
            norm=drawn.norm,
            extent=drawn.get_extent(),
            interpolation="nearest",
        )
    target.set(xlim=axes.get_xlim(), ylim=axes.get_ylim())
    target.set_axis_off()
    buffer = io.BytesIO()
    page.savefig(buffer, format="png", dpi=100)
    return np.asarray(Image.open(buffer).convert("RGB")).astype(float)


@pytest.mark.parametrize("meaning", ["amount", "ratio", "difference"])
@pytest.mark.parametrize("value", [0.25, 1.0])
def test_a_uniform_map_adds_no_structure_to_the_dimmed_image(meaning: str, value: float) -> None:
    pixels = noise(90, 60)
    sample = pictured(pixels)
    maps = {"uniform": np.full(6, value), "other": np.full(6, 2.0)}
    (axes, _) = panels(figures.map_overlays(sample, maps, "value", meaning=meaning))
    ground, over = axes.images
    np.testing.assert_array_equal(ground.get_array(), dimmed(pixels))
    colors = over.to_rgba(over.get_array(), bytes=True)
    assert len(np.unique(colors.reshape(-1, 4), axis=0)) == 1
    opacity = colors[0, 0, 3] / 255
    drawn = rendered(axes, shape=(60, 90))
    difference = drawn - (1 - opacity) * dimmed(pixels)
    assert np.abs(difference - opacity * colors[0, 0, :3]).max() <= 2  # levels of 255: rounding
    if value == 1.0 and meaning == "ratio":  # the neutral value
        np.testing.assert_allclose(drawn, dimmed(pixels), atol=1)


def test_a_uniform_map_lights_the_image_evenly() -> None:
    pixels = noise(90, 60)
    maps = {"uniform": np.full(6, 0.25), "strongest": np.ones(6), "nothing": np.zeros(6)}
    figure = figures.map_overlays(pictured(pixels), maps, "value", style="light", power=1)
    for axes, level in zip(panels(figure), (0.25, 1.0, 0.0), strict=True):
        lit = DIMMED["light"] + (1 - DIMMED["light"]) * level
        drawn = rendered(axes, shape=(60, 90))
        assert np.abs(drawn - lit * pixels).max() <= 1.5
    assert "the image is lit where the value is high" in words(figure).replace("\n", " ")


def test_all_pixels_are_dimmed_alike_and_keep_their_colours() -> None:
    pixels = np.array([[[200, 0, 0], [0, 200, 0], [120, 120, 120], [240, 240, 240]]], np.uint8)
    red, green, grey, white = dimmed(pixels)[0].astype(float)
    assert red[0] > red[1] + 40
    assert green[1] > green[0] + 40
    np.testing.assert_allclose(2 * grey, white, atol=1)
    np.testing.assert_allclose(white, 240 * DIMMED["colour"], atol=1)
    dark = dimmed(pixels // 2)[0].astype(float)  # to the same brightness
    np.testing.assert_allclose(
        dark[3], 120 * min(0.65, 0.225 * 255 / (pixels // 2).mean()), rtol=0.1
    )
    np.testing.assert_allclose(dimmed(np.full((2, 2, 3), 20, np.uint8)), 13)


@pytest.mark.parametrize("meaning", ["amount", "ratio", "difference"])
def test_overlay_colours_become_lighter_in_equal_steps(meaning: str) -> None:
    scale = color_scale(meaning, [np.linspace(0.1, 4, 50)], "x").over()
    assert scale.bar_cmap is not None
    light = lightness(scale.bar_cmap(np.arange(256))[:, :3])
    rising = light if meaning == "amount" else light[128:]
    falling = [] if meaning == "amount" else light[:128]
    for steps in (np.diff(rising), -np.diff(falling)):
        if len(steps):
            np.testing.assert_allclose(steps, steps.mean(), rtol=0.01)
    assert rising[-1] - rising[0] > 45
    assert not len(falling) or 20 < falling[0] - falling[-1] < rising[-1] - rising[0]
    alpha = scale.cmap(np.arange(256))[:, 3]
    assert alpha[0 if meaning == "amount" else 127] == 0
    assert (np.diff(alpha[128:]) >= 0).all()


def test_weak_attention_is_not_hatched_and_hidden_tokens_are() -> None:
    figure = figures.overlays(fake(), [4, 9])
    some, none = panels(figure)
    (hatched,) = [patch for patch in some.patches if patch.get_hatch() == "xxx"]
    corners = hatched.get_path().vertices
    assert (corners.min(0).tolist(), corners.max(0).tolist()) == ([0, 10], [30, 20])  # second row
    assert not [patch for patch in none.patches if patch.get_hatch()]
    assert "crossed hatching: hidden by the mask" in words(figure)
    assert "hatching" not in words(figures.overlays(fake(), [9]))
    left_out = figures.overlays(fake(), [9], hide=[2])
    assert "hatching" not in words(left_out)


def test_panels_can_have_a_scale_each() -> None:
    sample = fake()
    one = figures.overlays(sample, [8, 9])
    assert "all panels share a scale" in words(one)
    own = figures.overlays(sample, [8, 9], scale="panel")
    assert "each panel has its own scale" in words(own)
    largest = [float(axes.images[1].get_array().max()) for axes in panels(own)]
    assert [axes.images[1].norm.vmax for axes in panels(own)] == pytest.approx(largest)
    named = zip(('"t8"', '"t9"'), largest, strict=True)
    assert titles(own)[1:] == [f"{name}\n0 to {value:.2g}" for name, value in named]
    (bar,) = bars(own)
    assert [label.get_text() for label in bar.get_yticklabels()] == ["low", "high"]
    assert bar.get_ylabel() == "attention probability\nscale of each panel"
    both = figures.before_after(sample, fake(spread=3.0), 9, scale="panel")
    assert len(bars(both)) == 2
    lifts = figures.overlays(sample, [8, 9], scale="panel", show="lift")
    assert all(re.fullmatch('"t[89]"\n1/(\\S+) to \\1', title) for title in titles(lifts)[1:])
    assert [text.get_text() for text in bars(lifts)[0].get_yticklabels()] == ["low", "1", "high"]


def test_contour_lines_are_drawn_at_values_through_the_centres_of_tokens() -> None:
    sample = pictured(noise(80, 40), rows=4, cols=8)
    values = np.tile(np.arange(8.0), (4, 1))
    figure = figures.map_overlays(sample, {"a": values}, "x", contours=[2.5, 6])
    (axes,) = panels(figure)
    lines = [path for drawn in axes.collections for path in drawn.get_paths()]
    places = [np.unique(path.vertices[:, 0].round(6)).tolist() for path in lines]
    assert places == [[30.0], [65.0]]  # the centre of column c is at 10 c + 5
    marks = [line.get_ydata()[0] for line in bars(figure)[0].lines]
    assert marks == [2.5, 6.0]
    three = figures.map_overlays(sample, {"a": values}, "x", contours=3, smooth=True)
    marks = [line.get_ydata()[0] for line in bars(three)[0].lines]
    assert marks == pytest.approx([7 / 4, 7 / 2, 21 / 4])
    ratio = figures.map_overlays(sample, {"a": 2.0**values}, "x", contours=[4], meaning="ratio")
    assert [line.get_ydata()[0] for line in bars(ratio)[0].lines] == [2.0]
    with pytest.raises(InputError) as narrow:
        figures.map_overlays(pictured(noise(30, 10), 1, 3), {"a": np.ones((1, 3))}, "x", contours=2)
    assert str(narrow.value) == (
        "Contour lines require at least 2 x 2 cells; the image has 1 x 3. Leave contours out."
    )


@pytest.mark.parametrize("dpi", [100, 137, 300])
@pytest.mark.parametrize("smooth", [False, True])
def test_cells_and_the_image_are_aligned_to_the_pixel(dpi: int, smooth: bool) -> None:
    """A map that is 1 where the image is white has its edges at the same pixels."""
    rows, cols, cell = 12, 12, 8
    checks = (np.add.outer(np.arange(rows), np.arange(cols)) % 2).astype(float)
    pixels = np.repeat(np.repeat(checks, cell, 0), cell, 1)[..., None] * np.full(3, 255)
    sample = pictured(pixels.astype(np.uint8), rows, cols)
    figure = figures.map_overlays(sample, {"a": checks}, "x", smooth=smooth)
    (axes,) = panels(figure)
    figure.set_dpi(dpi)
    figure.draw_without_rendering()
    box, renderer = axes.get_window_extent(), FigureCanvasAgg(figure).get_renderer()
    edges = []
    for drawn in axes.images:
        image, x, y, _ = drawn.make_image(renderer)
        shown = np.asarray(image)[..., :3].astype(int).sum(-1) * np.asarray(image)[..., 3]
        row = shown[shown.shape[0] // (2 * rows)]
        edges.append(np.flatnonzero(np.diff(row > row.max() / 2)) + x)
        assert (x, y) == (pytest.approx(box.x0, abs=1), pytest.approx(box.y0, abs=1))
    assert len(edges[0]) == len(edges[1]) == cols - 1
    assert np.abs(edges[0] - edges[1]).max() <= (2 if smooth else 0)


def test_one_panel_can_be_drawn_into_axes_of_any_figure() -> None:
    page = Figure((8, 3))
    first, second = page.subplots(1, 2)
    assert figures.overlay(fake(), 9, ax=second, boxes={"a": (0, 0, 10, 10)}) is page
    assert len(second.images) == 2
    assert second.get_title() == '"t9"'
    assert not first.images
    page.draw_without_rendering()
    (bar,) = bars(page)
    panel, beside = second.get_window_extent(), bar.get_window_extent()
    assert beside.y1 == pytest.approx(panel.y1, abs=1)
    assert 5 < beside.x0 - panel.x1 < 20
    with pytest.raises(InputError) as several:
        figures.overlays(fake(), [8, 9], ax=second)
    assert str(several.value) == "ax= requires a figure of one panel; this one has 2."
    with pytest.raises(InputError) as wrong:
        inspect.unwrap(check_options)(ax="here")
    assert str(wrong.value) == "ax must be matplotlib axes; got 'here'."


@pytest.mark.parametrize(("width", "inches"), [("column", 3.4), ("page", 7.0)])
def test_figures_have_the_width_of_a_column_or_a_page(width: str, inches: float) -> None:
    for figure in (
        figures.overlay(fake(), 9, width=width),
        figures.overlays(fake(), [8, 9, 10], width=width),
        figures.token_head_grid(fake(), [8, 9, 10], width=width),
        figures.map_overlays(fake(), {"a": np.arange(6.0)}, "x", width=width),
    ):
        assert figure.get_figwidth() == pytest.approx(inches)
        figure.draw_without_rendering()
        drawn = figure.get_tightbbox()
        assert drawn.x0 >= 0
        assert drawn.x1 <= inches


def test_other_colours_have_an_opacity_that_follows_the_value() -> None:
    over = panels(figures.overlay(fake(), 9, cmap="cividis"))[0].images[1]
    rgba = over.cmap(np.arange(256))
    np.testing.assert_allclose(rgba[:, :3], mpl.colormaps["cividis"](np.arange(256))[:, :3])
    assert np.ptp(np.diff(rgba[:, 3])) < 1e-6
    assert rgba[0, 3] == 0
    for options, message in (
        (
            {"cmap": "rainbows"},
            "cmap must be a matplotlib colour map or its name, such as 'viridis'; got 'rainbows'.",
        ),
        ({"contours": -1}, "contours must be an integer from 0 to 20; got -1."),
        ({"contours": [np.nan]}, "contours must be a number; got nan."),
        ({"page": 2}, "page must be between 0 and 0; got 2."),
        (
            {"view": "thumbnail"},
            "view='thumbnail' requires the language tower and a tiled image with a thumbnail; "
            "image 0 of sample 'fake' is drawn without view.",
        ),
    ):
        with pytest.raises(InputError) as error:
            figures.overlay(fake(), 9, **options)
        assert str(error.value) == message


def test_options_of_a_fixed_set_are_checked() -> None:
    for wrong, message in (
        ({"width": "poster"}, "width must be 'column', 'page' or None; got 'poster'."),
        ({"scale": "row"}, "scale must be 'figure', 'panel' or None; got 'row'."),
    ):
        with pytest.raises(InputError) as error:
            inspect.unwrap(check_options)(**wrong)
        assert str(error.value) == message
    for wrong, message in (
        ({"style": "heat"}, "style must be 'colour' or 'light'; got 'heat'."),
        (
            {"style": "light", "cmap": "viridis"},
            "cmap='viridis' requires style='colour': style='light' has no colours.",
        ),
    ):
        options = figures.OverlayOptions()
        for name, value in wrong.items():
            object.__setattr__(options, name, value)
        with pytest.raises(InputError) as error:
            inspect.unwrap(type(options).__post_init__)(options)
        assert str(error.value) == message


def test_figures_do_not_depend_on_the_style_of_the_user(tmp_path: Path) -> None:
    figures.overlay(fake(), 9, path=tmp_path / "usual.png").savefig(tmp_path / "usual2.png")
    dark = {"text.color": "white", "axes.labelcolor": "white", "figure.facecolor": "black"}
    with mpl.rc_context({**dark, "savefig.transparent": True, "savefig.dpi": 40, "font.size": 20}):
        figure = figures.overlay(fake(), 9, path=tmp_path / "dark.png")
        figure.savefig(tmp_path / "later.png")
    for one, other in (("usual.png", "dark.png"), ("usual2.png", "later.png")):
        with Image.open(tmp_path / one) as image, Image.open(tmp_path / other) as second:
            assert image.info["dpi"] == second.info["dpi"] == pytest.approx((300, 300), abs=0.1)
            expected = np.asarray(image.convert("RGBA"))
            np.testing.assert_array_equal(np.asarray(second.convert("RGBA")), expected)
        assert expected[..., 3].min() == 255  # opaque: readable in dark notebooks


def test_text_stays_text_in_pdf_and_svg(tmp_path: Path) -> None:
    figure = figures.overlay(fake(), 9)
    with mpl.rc_context({"pdf.compression": 0}):
        figure.savefig(tmp_path / "a.pdf")
    pdf = (tmp_path / "a.pdf").read_bytes()
    assert b"/FontFile2" in pdf  # an embedded TrueType font
    assert b"/Subtype /Type3" not in pdf
    figure.savefig(tmp_path / "a.svg")
    svg = (tmp_path / "a.svg").read_text()
    assert re.search(r"<text[^>]*>attention probability</text>", svg)


def test_large_grids_have_pages() -> None:
    layout = "bs" + "v" * 6 + "t" * 70
    call = synthetic.random_call(len(layout), n_heads=20)
    sample = fake(layout, call=call)
    grid = figures.token_head_grid(sample)
    assert titles(grid) == [f"head {i}" for i in range(17)]
    rows = [axes.get_ylabel() for axes in panels(grid)[::17]]
    assert rows == [panel_name(sample, [i]) for i in range(8, 20)]
    said = words(grid).replace("\n", " ")
    assert "Page 0: heads 1 to 17 of 21, queries 1 to 12 of 70; 12 pages, by page=0 to 11." in said
    last = figures.token_head_grid(sample, page=11)
    assert titles(last) == ["head 17", "head 18", "head 19", "mean"]
    assert [axes.get_ylabel() for axes in panels(last)[::4]] == [
        panel_name(sample, [i]) for i in range(68, 78)
    ]
    keys = sample.where("image")
    probs = sample.probs(-1, 18, [70], keys)[0, 0].numpy().reshape(2, 3)
    np.testing.assert_allclose(panels(last)[2 * 4 + 1].images[1].get_array(), probs, rtol=1e-5)
    many = figures.overlays(sample)
    assert len(panels(many)) == 60
    assert "Page 0: queries 1 to 60 of 70; 2 pages, by page=0 to 1." in words(many)
    assert len(panels(figures.overlays(sample, page=1))) == 10
    with pytest.raises(InputError) as after:
        figures.overlays(sample, page=2)
    assert str(after.value) == "page must be between 0 and 1; got 2."


def test_the_thumbnail_is_drawn_on_request_and_the_tiles_on_the_image() -> None:
    vlm = xi.VLM(real("llava_next")[0], settled("llava_next"))
    sample = xi.capture(vlm, picture(96, 96), QUESTION)
    position = int(sample.find("red")[0])
    keys = sample.where("image")
    probs = sample.probs(0, queries=[position], keys=keys)[:, 0].mean(0)
    figure = figures.overlay(sample, "red", 0, view="thumbnail")
    (axes,) = panels(figure)
    expected = sample.grid(probs, view="thumbnail")
    np.testing.assert_allclose(axes.images[1].get_array(), expected, rtol=1e-4)
    said = words(figure).replace("\n", " ")
    assert said.startswith(words(figure).split("\n")[0])
    assert "One cell per thumbnail token" in said
    total, part = float(probs.sum()), float(np.nansum(expected))
    assert (
        f"not drawn: tokens of the tiles, or without a place, which receive {total - part:.3g} of "
        f"the {total:.3g} that the image receives."
    ) in said
    tiled = figures.overlay(sample, "red", 0)
    (image,) = [axes for axes in tiled.axes if axes.get_title() == "image"]
    grid = sample.grids[0]
    tiles = sample.grid(grid.tiles.astype(float))
    lines = [each.tolist() for drawn in image.collections for each in drawn.get_segments()]
    across = np.argwhere(tiles[:, 1:] != tiles[:, :-1])
    down = np.argwhere(tiles[1:] != tiles[:-1])
    assert len(lines) == 2 * (len(across) + len(down)) > 0  # white lines with a black rim
    assert "lines on the image: edges of its tiles" in words(tiled).replace("\n", " ")
    assert all(
        not (first == second).all() for first, second in itertools.pairwise(np.array(lines)[:4])
    )


def test_hidden_is_told_from_zero() -> None:
    """A token without attention is drawn as the dimmed image; a hidden token is hatched too."""
    matrix = torch.tensor([[1.0, 0, 0, 0], [0.5, 0.5, 0, 0], [1, 0, 0, 0], [0.2, 0.8, 0, 0]])
    sample = fake("vvtt", 1, 2, call=synthetic.dense_call(matrix))
    zero, hidden = panels(figures.overlays(sample, [2, 0]))
    assert np.ma.count_masked(zero.images[1].get_array()) == 0
    assert zero.images[1].to_rgba(zero.images[1].get_array())[0, 1, 3] == 0
    assert not [patch for patch in zero.patches if patch.get_hatch()]
    assert np.ma.getmaskarray(hidden.images[1].get_array()).tolist() == [[False, True]]
    assert len([patch for patch in hidden.patches if patch.get_hatch()]) == 1
