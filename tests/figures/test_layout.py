"""Nothing is cut off, no two axes overlap, and colour bars stand beside the panels."""

import itertools
from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from tests.helpers import synthetic
from tests.helpers.figure_samples import bars, fake, sample_of
from xmodal_interp import figures

LONG = "What color is the red circle that is to the left of the yellow square and the cross ?"
HEADS = pd.DataFrame({"layer": [0, 0, 1, 1], "head": [0, 1, 0, 1], "drop": [0.1, -0.2, 0.3, 0.4]})


@pytest.mark.parametrize(
    "draw",
    [
        lambda: figures.overlay(sample_of("llava", LONG), "red circle", hide="sinks"),
        lambda: figures.overlays(sample_of("qwen2_vl")),
        lambda: figures.token_head_grid(sample_of("qwen2_vl"), "red circle"),
        lambda: figures.before_after(sample_of("llava"), sample_of("llava"), "red circle"),
        lambda: figures.before_after(fake(), fake(spread=3.0), 9, show="lift"),
        lambda: figures.attention_matrix(sample_of("llava")),
        lambda: figures.attention_matrix(sample_of("qwen2_vl"), zoom="text-image", show="lift"),
        lambda: figures.token_patch_matrix(sample_of("qwen2_vl")),
        lambda: figures.mask_structure(sample_of("llava")),
        lambda: figures.mask_structure(sample_of("mllama"), 1, kind="cross"),  # one key group
        lambda: figures.mask_comparison({"a": sample_of("llava"), LONG: synthetic.random_call(5)}),
        lambda: figures.side_by_side({"a": sample_of("llava"), "b": synthetic.random_call(5)}),
        lambda: figures.head_grid(
            HEADS, "drop", label="a label that is longer than its colour bar"
        ),
        lambda: figures.layer_curves(HEADS, "drop", by="head", null=0.1, title=LONG),
    ],
)
def test_nothing_is_cut_off_and_no_axes_overlap(draw: Callable[[], Figure]) -> None:
    figure = draw()
    figure.draw_without_rendering()
    drawn = figure.get_tightbbox()
    width, height = figure.get_size_inches()
    assert min(drawn.x0, drawn.y0) >= 0
    assert drawn.x1 <= width
    assert drawn.y1 <= height
    boxes = [axes.get_tightbbox() for axes in figure.axes]
    boxes += [text.get_window_extent() for text in figure.texts]
    for first, second in itertools.combinations(boxes, 2):
        across = min(first.x1, second.x1) - max(first.x0, second.x0)
        down = min(first.y1, second.y1) - max(first.y0, second.y0)
        assert min(across, down) < 2  # pixels


@pytest.mark.parametrize(
    "draw",
    [
        lambda: figures.overlay(sample_of("llava", LONG), "red circle"),
        lambda: figures.overlays(sample_of("qwen2_vl")),  # two rows
        lambda: figures.overlays(
            fake("bsvvvvvvttttto"), [8, 9, 10, 11, 12, 13]
        ),  # the last is shorter
        lambda: figures.layer_overlays(sample_of("llava"), "red circle"),
        lambda: figures.token_head_grid(sample_of("llava"), "red circle", show="lift"),
        lambda: figures.map_overlays(fake(), {"a": np.arange(6.0)}, "a", vmax=3),
        lambda: figures.attention_matrix(sample_of("llava")),
        lambda: figures.attention_matrix(sample_of("qwen2_vl"), zoom="text-image"),
        lambda: figures.token_patch_matrix(sample_of("qwen2_vl")),
        lambda: figures.side_by_side({"a": fake(), "b": synthetic.random_call(5)}, shared=True),
        lambda: figures.head_grid(HEADS, "drop"),
    ],
)
def test_a_shared_colour_bar_is_as_high_as_the_panels_and_close_to_them(
    draw: Callable[[], Figure],
) -> None:
    figure = draw()
    figure.draw_without_rendering()
    (axes,) = bars(figure)
    bar = axes._colorbar.outline.get_window_extent()  # with the triangles at the ends
    panels = Bbox.union([each.get_window_extent() for each in figure.axes if each is not axes])
    assert bar.y0 == pytest.approx(panels.y0, abs=1)  # pixels
    assert bar.y1 == pytest.approx(panels.y1, abs=1)
    assert 8 < bar.x0 - panels.x1 < 14
    assert 10 < bar.width < 20


def test_each_of_two_colour_bars_is_as_high_as_its_panels() -> None:
    figure = figures.before_after(sample_of("llava"), sample_of("llava"), "red circle")
    figure.draw_without_rendering()
    panels = [each.get_window_extent() for each in figure.axes[:4]]
    for axes, panel in zip(bars(figure), panels[2:], strict=True):
        bar = axes.get_window_extent()
        assert (bar.y0, bar.y1) == pytest.approx((panel.y0, panel.y1), abs=1)
        assert 8 < bar.x0 - panel.x1 < 14


def test_the_colour_bar_of_very_high_panels_is_short_and_at_the_top() -> None:
    table = pd.DataFrame({"layer": range(40), "head": 0, "drop": np.linspace(0, 1, 40)})
    figure = figures.head_grid(table, "drop")
    figure.draw_without_rendering()
    bar, panel = bars(figure)[0].get_window_extent(), figure.axes[0].get_window_extent()
    assert bar.y1 == pytest.approx(panel.y1, abs=1)
    assert bar.height == pytest.approx(2.6 * figure.dpi, abs=1)
    assert panel.height > 8 * figure.dpi
