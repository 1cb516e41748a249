"""Attention of two models on one image side by side, and the difference."""

from __future__ import annotations

from typing import Unpack

import numpy as np

from xmodal_interp.arguments import checked
from xmodal_interp.attention import Positions
from xmodal_interp.errors import GeometryError
from xmodal_interp.figures.drawing import LIGHT
from xmodal_interp.figures.looks import Look, Options
from xmodal_interp.figures.overlay_values import query_positions, reading
from xmodal_interp.figures.panels import Panel, note_on, panel_figure
from xmodal_interp.figures.placement import place_of
from xmodal_interp.figures.scales import difference_scale, label_of, ratio_scale
from xmodal_interp.figures.style import (
    FigurePath,
    Picture,
    heads_name,
    layer_name,
    named,
    readable,
    saved,
    styled,
)
from xmodal_interp.sample import Sample, Selector


@checked
@styled
def before_after(
    before: Sample,
    after: Sample,
    queries: Selector,
    layer: int = -1,
    head: Positions | None = None,
    *,
    image: int = 0,
    path: FigurePath = None,
    **look: Unpack[Options],
) -> Picture:
    """Draw a phrase's attention in two models, such as before and after training, and the change.

    Args:
        before: The first model's sample.
        after: The second model's sample, of the same image and prompt.
        queries: A phrase or positions; their attention is averaged.
        layer: Layer index; negative ones count from the last.
        head: A head, or several to average; all heads are averaged if not given.
        image: Index of the image.
        path: Where to save the figure.
        **look: Drawing options; see ``Look``. The change of a lift is drawn as a ratio.

    Raises:
        GeometryError: The image tokens of the two samples differ in number or place.
    """
    chosen, place, other = Look(**look), place_of(before, image), place_of(after, image)
    grid, grid_after = place.grid, other.grid
    same = grid.places.shape == grid_after.places.shape and np.allclose(
        grid.boxes, grid_after.boxes, equal_nan=True
    )
    if not same:
        raise GeometryError(
            f"The samples differ in their image tokens: before has {grid.rows} x {grid.cols} "
            f"tokens on {grid.width} x {grid.height} px, after has {grid_after.rows} x "
            f"{grid_after.cols} on {grid_after.width} x {grid_after.height} px. Pass samples of "
            "the same image, made with the same processor settings."
        )
    panels, values = [], []
    for name, sample, where in (("before", before, place), ("after", after, other)):
        positions = query_positions(sample, where, queries)
        read = reading(sample, where, positions, layer, head)
        left_out = chosen.left_out(where, read.call, head)
        values.append(read.values(chosen.show, left_out=left_out))
        text = f'{name}: "{readable(sample.answer)}"' if sample.answer else name
        panels.append(Panel(text, values[-1], left_out=left_out, undrawn=read.undrawn()))
    shared = chosen.scale(values)
    row = [Panel(place.name), *(panel.under(shared) for panel in panels), _change(chosen, *values)]
    where_looked = f"{layer_name(read.call)}, {heads_name(read.call, head)}"
    title = f'"{before.question}"\n{named(before, positions)}: {where_looked}'
    return saved(panel_figure(place, [row], chosen, title, note_on(place, [row], chosen)), path)


def _change(look: Look, before: np.ndarray, after: np.ndarray) -> Panel:
    """Return the panel of the change, with a separate colour scale."""
    if look.show == "lift":
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = after / before
        scale = ratio_scale([ratio], "after / before\n(log scale)")
        return Panel("after / before", ratio, scale.over(LIGHT))
    change = after - before
    scale = difference_scale([change], f"change of\n{label_of(look.show)}")
    return Panel("after - before", change, scale.over(LIGHT))
