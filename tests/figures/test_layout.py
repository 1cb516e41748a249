"""Nothing is cut off at the edge of a figure, and no two axes overlap, with their labels."""

import itertools
from collections.abc import Callable

import pandas as pd
import pytest
from matplotlib.figure import Figure

from tests.helpers import synthetic
from tests.helpers.figure_samples import fake, sample_of
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
