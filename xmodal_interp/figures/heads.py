"""One number per layer and head, as a grid."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis

from xmodal_interp.arguments import checked
from xmodal_interp.errors import InputError
from xmodal_interp.figures.layout import BAR, sheet
from xmodal_interp.figures.scales import Meaning, Scale, finite, scale_for, value_scale
from xmodal_interp.figures.style import SMALL, FigurePath, Picture, saved, styled
from xmodal_interp.figures.tables import columns_of, one_row_each

_CELL = (0.5, 0.3)  # inches of a cell with a number in it
_BARE_CELL = (0.25, 0.2)
_MOST_WRITTEN = 600  # cells; a larger grid has no room for numbers


@checked
@styled
def head_grid(
    table: pd.DataFrame,
    value: str,
    *,
    meaning: Meaning | None = None,
    label: str | None = None,
    title: str | None = None,
    vmax: float | None = None,
    path: FigurePath = None,
) -> Picture:
    """A value of every head: layers from top to bottom, heads from left to right.

    Args:
        table: Any analysis with ``layer``, ``head`` and the value, one row for each head.
        value: Which column.
        meaning: ``"amount"``, ``"difference"`` (colours part at 0) or ``"ratio"`` (a lift: colours
            part at 1, on a log scale). If not given, a difference if there are both signs, a ratio
            if the column is a lift (``lift``, ``..._lift``, ``lift_...``), else an amount. Amounts
            are coloured from 0, or from the smallest if that is not far below the largest.
        label: What the value is, for the colour bar; the column's name if not given.
        title: Of the figure.
        vmax: Upper end of the colour scale; that of the values if not given.
        path: Where to save the figure.

    Raises:
        InputError: A column that the table lacks, or several rows for one head.
    """
    columns_of(table, ["layer", "head", value], "A grid of heads")
    one_row_each(table, ["layer", "head"], value, "A grid of heads")
    grid = table.set_index(["layer", "head"])[value].unstack("head")  # noqa: PD010 - one row each
    grid = grid.sort_index().sort_index(axis=1)
    cells = grid.to_numpy(dtype=float)
    numbers = finite([cells])
    if not len(numbers):
        raise InputError(f"A grid of heads needs a number; the column {value!r} has only NaN.")
    both_signs = numbers.min() < 0 < numbers.max() or numbers.max() <= 0 > numbers.min()
    is_lift = "lift" in str(value).split("_")
    usual: Meaning = "difference" if both_signs else "ratio" if is_lift else "amount"
    meaning = meaning or usual
    if label is None and is_lift and meaning == "ratio":
        label = f"{value}: times uniform\n(log scale)"
    scale = scale_for(meaning, [cells], label or value, vmax=vmax)
    if meaning == "amount" and numbers.min() > numbers.max() / 2:
        scale = value_scale([cells], label or value, vmax=vmax, vmin=float(numbers.min()))
    written = cells.size <= _MOST_WRITTEN
    wide, tall = _CELL if written else _BARE_CELL
    width, height = max(wide * cells.shape[1], 1.6), max(tall * cells.shape[0], 1.7)
    missing = " Grey: no value." if np.isnan(cells).any() else ""
    page = sheet(
        0.65 + width + 0.15 + BAR, height + 0.5, title or f"{value} of every head", missing.strip()
    )
    axes = page.axes(0.65, 0.05, width, height)
    axes.imshow(scale.drawn(cells), norm=scale.norm, cmap=scale.cmap, aspect="auto")
    if written:
        _write(axes, cells, scale)
    _number(axes.xaxis, list(grid.columns), wide)
    _number(axes.yaxis, list(grid.index), tall)
    axes.set(xlabel="head", ylabel="layer")
    page.bar(scale, 0.65 + width + 0.15, 0.05, min(height, 2.6))
    return saved(page.picture, path)


def _write(axes: Axes, cells: np.ndarray, scale: Scale) -> None:
    """The numbers, dark on light cells and light on dark ones."""
    colors = scale.cmap(scale.norm(scale.drawn(cells)))
    largest = float(np.nanmax(np.abs(cells)))
    digits = 0 if largest >= 100 else 1 if largest >= 10 else 2 if largest >= 0.1 else 3
    tiny = 0 < largest < 0.001
    for (row, col), number in np.ndenumerate(cells):
        if np.isnan(number):
            continue
        luminance = float(colors[row, col, :3] @ [0.299, 0.587, 0.114])
        shown = round(number, digits) + 0.0  # no negative zero
        text = f"{number:.0e}" if tiny else f"{shown:.{digits}f}"
        axes.text(
            col,
            row,
            text,
            ha="center",
            va="center",
            size=SMALL - 0.5,
            color="black" if luminance > 0.5 else "white",
        )


def _number(axis: Axis, numbers: list[Any], inches: float) -> None:
    """As many of the layers' or heads' numbers as can be read."""
    step = max(1, int(np.ceil(0.18 / inches)))
    axis.set_ticks(range(0, len(numbers), step), labels=[str(n) for n in numbers[::step]])
    axis.set_tick_params(length=0)
