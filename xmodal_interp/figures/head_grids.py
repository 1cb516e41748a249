"""Grid of one number per layer and head."""

from __future__ import annotations

from typing import Any, Unpack

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure

from xmodal_interp.arguments import checked
from xmodal_interp.errors import InputError
from xmodal_interp.figures.curves import columns_of, one_row_each
from xmodal_interp.figures.scales import ColorScale, Meaning, color_scale, finite
from xmodal_interp.figures.style import (
    BAR,
    HIGHEST_PAGE,
    NORMAL,
    SMALL,
    AxesOptions,
    FigurePath,
    Picture,
    check_options,
    new_picture,
    placed_on,
    room,
    saved,
    styled,
    wrapped,
)

_CELL = (0.5, 0.3)  # width and height of a cell with a number, inches
_BARE_CELL = (0.25, 0.2)
_LEGIBLE = (0.36, 0.15)  # smallest width and height of a cell with a number, inches
_MOST_WRITTEN = 600  # largest number of cells for which numbers are written


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
    **options: Unpack[AxesOptions],
) -> Figure:
    """Draw a value of every head: layers from top to bottom, heads from left to right.

    Args:
        table: A table with ``layer``, ``head`` and the value, one row per head.
        value: Column to draw.
        meaning: ``"amount"`` (colours from 0, or from the smallest value if it is above half of the
            largest), ``"difference"`` (diverging colours around 0) or ``"ratio"`` (diverging
            colours around 1, on a log scale). If not given: a difference if there are negative
            values, a ratio if the column is a lift (``lift``, ``..._lift``, ``lift_...``), else an
            amount.
        label: Label of the colour bar; the column name if not given.
        title: Title of the figure.
        vmax: Upper end of the colour scale; the largest value if not given.
        path: Where to save the figure.
        **options: ``cmap``, ``width``, ``scale`` and ``ax``; see ``AxesOptions``.

    Raises:
        InputError: The table lacks a column, has several rows for one head, or only NaN.
    """
    check_options(**options)
    columns_of(table, ["layer", "head", value], "A grid of heads")
    one_row_each(table, ["layer", "head"], value, "A grid of heads")
    grid = table.set_index(["layer", "head"])[value].unstack("head")  # noqa: PD010 - one row each
    grid = grid.sort_index().sort_index(axis=1)
    cells = grid.to_numpy(dtype=float)
    numbers = finite([cells])
    if not len(numbers):
        raise InputError(f"The column {value!r} has only NaN. Choose a column with numbers.")
    both_signs = numbers.min() < 0 < numbers.max() or numbers.max() <= 0 > numbers.min()
    is_lift = "lift" in str(value).split("_")
    usual: Meaning = "difference" if both_signs else "ratio" if is_lift else "amount"
    meaning = meaning or usual
    if label is None and is_lift and meaning == "ratio":
        label = f"{value}: times uniform\n(log scale)"
    low = float(numbers.min())
    vmin = low if meaning == "amount" and low > numbers.max() / 2 else 0.0
    scale = color_scale(meaning, [cells], label or value, vmax=vmax, vmin=vmin)
    scale = scale.colored(options.get("cmap"))
    wide, tall = _CELL if cells.size <= _MOST_WRITTEN else _BARE_CELL
    width, height = max(wide * cells.shape[1], 1.6), max(tall * cells.shape[0], 1.7)
    heading = title or f"{value} of every head"
    missing = "Grey: no value." if np.isnan(cells).any() else ""
    given, size = options.get("ax"), options.get("width")
    if given is not None:
        axes, (figure, width, height) = given, placed_on(given)
        axes.set_title(wrapped(heading, width, NORMAL, 2))
    else:
        natural, width = width, room(size, width, 0.65 + BAR)
        height = min(height * min(width / natural, 1.0), HIGHEST_PAGE) if size else height
        height = min(height, HIGHEST_PAGE)
        figure = new_picture((0.65 + width + BAR, height + 0.45), heading, missing, width=size)
        axes = figure.subplots()
    axes.imshow(scale.drawn(cells), norm=scale.norm, cmap=scale.cmap, aspect="auto")
    wide, tall = width / cells.shape[1], height / cells.shape[0]
    if cells.size <= _MOST_WRITTEN and wide >= _LEGIBLE[0] and tall >= _LEGIBLE[1]:
        _write(axes, cells, scale)
    _number(axes.xaxis, list(grid.columns), wide)
    _number(axes.yaxis, list(grid.index), tall)
    axes.set(xlabel="head", ylabel="layer")
    scale.bar(figure, [axes], height)
    return saved(figure, path) if isinstance(figure, Picture) else figure


def _write(axes: Axes, cells: np.ndarray, scale: ColorScale) -> None:
    """Write the numbers: black on light cells, white on dark cells."""
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
    """Label every layer or head, or every n-th one where labels would overlap."""
    step = max(1, int(np.ceil(0.18 / inches)))
    axis.set_ticks(range(0, len(numbers), step), labels=[str(n) for n in numbers[::step]])
    axis.set_tick_params(length=0)
