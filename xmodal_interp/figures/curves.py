"""Line plots of analysis tables, with one line per entry of a column and a dashed null model.

The lines show a value by layer, accuracy as heads are removed, or attention by position: distance
and key position in the sequence, or image row and column.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from xmodal_interp.arguments import checked, string
from xmodal_interp.errors import InputError
from xmodal_interp.figures.style import (
    LINE_COLORS,
    MATRIX_COLORS,
    SMALL,
    FigurePath,
    Picture,
    escaped,
    new_picture,
    saved,
    styled,
)

_WIDTH, _HEIGHT = 4.0, 2.6  # inches of axes
_MARKERS = "osD^vPX"
_NULL: dict[str, Any] = {"color": "black", "linestyle": (0, (4, 3)), "linewidth": 1.0}
_SIDES = {
    "distance": "distance (positions back)",
    "key": "position of the key",
    "rope_distance": "rotary distance",
}
_VALUES = {"raw": "attention probability", "lift": "lift of attention"}
_STEEP = 8.0  # an axis is logarithmic if the ratio of largest to smallest value is above this


@checked
@styled
def layer_curves(
    table: pd.DataFrame,
    value: str,
    *,
    by: str | None = None,
    null: str | float | None = None,
    interval: tuple[str, str] | None = None,
    label: str | None = None,
    title: str | None = None,
    path: FigurePath = None,
) -> Picture:
    """Draw a value by layer, with one line per entry of a column and the null model dashed.

    Args:
        table: A table with ``layer`` and the value, one row per layer (and entry of ``by``).
        value: Column to draw.
        by: Column whose entries are drawn as separate lines (``head``, ``tower``, ...).
        null: Column of the null model, or its value as a number.
        interval: Columns of the lower and the upper end of an interval.
        label: Name of the value on the axis; the column name if not given.
        title: Title of the figure.
        path: Where to save the figure.

    Raises:
        InputError: The table lacks a column, a column is not numeric, or the table has several
            rows for one layer (and entry).
    """
    if by is not None:
        string(by, "by")
    keys = ["layer", *([by] if by else [])]
    drawn = ["layer", value, *([null] if isinstance(null, str) else []), *(interval or ())]
    columns_of(table, [*keys, *drawn[1:]], "A curve by layer", numbers=drawn)
    one_row_each(table, keys, value, "A curve by layer")
    lines = (
        list(table.sort_values("layer").groupby(by))
        if by
        else [(value, table.sort_values("layer"))]
    )
    names = [str(name) for name, _ in lines]
    heading = by if by and not isinstance(lines[0][0], str) else None
    shown = by is not None or null is not None
    entries = [*names, heading or "", "null model"] if shown else []
    picture, axes_grid = _line_page((1, 1), title or f"{value} by layer", entries)
    axes = axes_grid[0, 0]
    styles = _line_styles([name for name, _ in lines])
    for (_, rows), name, style in zip(lines, names, styles, strict=True):
        axes.plot(rows["layer"], rows[value], label=name, **style)
        if interval:
            low, high = (rows[end].to_numpy(dtype=float) for end in interval)
            axes.fill_between(rows["layer"], low, high, color=style["color"], alpha=0.15, lw=0)
    if isinstance(null, str):
        colored = [(rows, style["color"]) for (_, rows), style in zip(lines, styles, strict=True)]
        _draw_null(axes, colored, "layer", null)
    elif null is not None:
        axes.axhline(null, label="null model", **_NULL)
    axes.set(xlabel="layer", ylabel=escaped(label or value.replace("_", " ")))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if shown:
        _legend(axes, heading)
    return saved(picture, path)


@checked
@styled
def pruning_curve_plot(
    table: pd.DataFrame,
    value: str = "accuracy",
    *,
    x: str = "share_removed",
    by: str = "order",
    interval: tuple[str, str] | None = None,
    label: str | None = None,
    title: str | None = None,
    path: FigurePath = None,
) -> Picture:
    """Draw accuracy against the share of heads removed, with one line per order of removal.

    Args:
        table: Table of ``pruning_curve``. Several draws of one order are drawn as their mean, with
            a band for their range.
        value: Column to draw.
        x: Column with the amount removed.
        by: Column whose entries are drawn as separate lines.
        interval: Columns of the lower and the upper end of an interval.
        label: Name of the value on the axis; the column name if not given.
        title: Title of the figure.
        path: Where to save the figure.

    Raises:
        InputError: The table lacks a column, or a column is not numeric.
    """
    drawn = [x, value, *(interval or ())]
    columns_of(table, [by, *drawn], "A pruning curve", numbers=drawn)
    names = list(dict.fromkeys(table[by]))
    draws = {name: int(table[table[by] == name].groupby(x).size().max()) for name in names}
    texts = {n: f"{n}, mean and range of {k}" if k > 1 else str(n) for n, k in draws.items()}
    picture, axes_grid = _line_page(
        (1, 1),
        title or f"{value.replace('_', ' ')} as heads are removed",
        [*texts.values(), "nothing removed"],
    )
    axes = axes_grid[0, 0]
    for name, style in zip(names, _line_styles(names), strict=True):
        steps = table[table[by] == name].groupby(x)
        mean = steps[value].mean()
        axes.plot(mean.index, mean, label=texts[name], **style)
        if interval or draws[name] > 1:
            low = steps[interval[0]].mean() if interval else steps[value].min()
            high = steps[interval[1]].mean() if interval else steps[value].max()
            axes.fill_between(mean.index, low, high, color=style["color"], alpha=0.15, lw=0)
    base = float(table.loc[table[x] == table[x].min(), value].mean())
    axes.axhline(base, label="nothing removed", **_NULL)
    along = "share of heads removed" if x == "share_removed" else escaped(x.replace("_", " "))
    axes.set(xlabel=along, ylabel=escaped(label or value.replace("_", " ")))
    if x.startswith("share"):
        axes.xaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    _legend(axes, by)
    return saved(picture, path)


@checked
@styled
def positional_profiles(
    table: pd.DataFrame,
    value: str = "lift",
    *,
    by: str = "layer",
    title: str | None = None,
    path: FigurePath = None,
) -> Picture:
    """Draw a table of ``positional_bias``: blocks in rows, distance and key position in columns.

    Args:
        table: Table of ``positional_bias``. Rows that differ only in other columns are averaged,
            weighted by ``n_cells``.
        value: ``"lift"``, with uniform attention at 1; or ``"raw"``, with the column ``null`` as
            the null model.
        by: Column whose entries are drawn as separate lines.
        title: Title of the figure.
        path: Where to save the figure.

    Raises:
        InputError: The table lacks a column.
    """
    nulls = ["null"] if value == "raw" else []
    columns_of(
        table,
        ["block", "axis", "start", "stop", "n_cells", value, by, *nulls],
        "A positional profile",
    )
    means = _means(table, ["block", "axis", by, "start", "stop"], [value, *nulls])
    means = _with_gaps(means, ["block", "axis", by])
    means["place"] = (means["start"] + means["stop"] - 1) / 2
    blocks, sides = list(dict.fromkeys(table["block"])), list(dict.fromkeys(table["axis"]))
    names = sorted(table[by].unique())
    shape = (len(blocks), len(sides))
    heading = title or f"{_VALUES.get(value, value)} by position"
    entries = [*map(str, names), by, "null model"]
    picture, grid = _line_page(shape, heading, entries, height=1.9)
    for r, block in enumerate(blocks):
        for c, side in enumerate(sides):
            axes = grid[r, c]
            rows = means[(means["block"] == block) & (means["axis"] == side)]
            _lines(axes, rows, "place", value, by, names)
            if nulls:
                _draw_null(axes, [(rows, "black")], "place", "null")
            else:
                axes.axhline(1.0, label="null model", **_NULL)
            if rows[value].min() > 0 and rows[value].max() > _STEEP * rows[value].min():
                axes.set_yscale("log")
                axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
                axes.yaxis.set_major_formatter("{x:g}")
                axes.yaxis.set_minor_locator(NullLocator())
            axes.set(xlabel=_SIDES.get(side, side), ylabel=escaped(_VALUES.get(value, value)))
            axes.set_title(escaped(str(block).replace("->", " \u2192 ")))
    _legend(grid[0, -1], by)
    return saved(picture, path)


@checked
@styled
def raster_profiles(
    table: pd.DataFrame,
    value: str = "share",
    *,
    by: str = "layer",
    title: str | None = None,
    path: FigurePath = None,
) -> Picture:
    """Draw a table of ``raster_profile``: over the rows of the image (downwards) and its columns.

    Args:
        table: Table of ``raster_profile``. Rows that differ only in other columns, such as heads,
            are averaged. Controls are dotted.
        value: ``"share"``, with the column ``null`` as the null model; or ``"lift"``, with uniform
            attention at 1.
        by: Column whose entries are drawn as separate lines.
        title: Title of the figure.
        path: Where to save the figure.

    Raises:
        InputError: The table lacks a column.
    """
    nulls = ["null"] if value == "share" else []
    columns_of(table, ["axis", "index", value, by, *nulls], "A raster profile")
    control = f"{value}_control" if f"{value}_control" in table else None
    columns = [value, *nulls, *([control] if control else [])]
    means = table.groupby(["axis", by, "index"], as_index=False)[columns].mean()
    means["null"] = means["null"] if nulls else 1.0
    names = sorted(table[by].unique())
    entries = [*map(str, names), by, "null model", *(["control (dotted)"] if control else [])]
    heading = title or f"{value} of image attention by row and column"
    picture, grid = _line_page((1, 2), heading, entries)
    down, across = grid[0]
    for axes, axis in ((down, "row"), (across, "col")):
        upright = axis == "row"
        rows = means[means["axis"] == axis]
        _lines(axes, rows, "index", value, by, names, upright=upright)
        if control:
            _lines(axes, rows, "index", control, by, names, upright=upright, dotted=True)
        null = rows.groupby("index")["null"].mean()
        pair = (null, null.index) if upright else (null.index, null)
        axes.plot(*pair, label="null model", **_NULL)
        (axes.yaxis if upright else axes.xaxis).set_major_locator(MaxNLocator(integer=True))
    down.invert_yaxis()
    down.set(xlabel=escaped(value), ylabel="row of the image, top first", title="rows")
    across.set(xlabel="column of the image", ylabel=escaped(value), title="columns")
    if control:
        across.plot([], [], color="black", linestyle=":", linewidth=1.2, label="control (dotted)")
    _legend(across, by)
    return saved(picture, path)


def columns_of(
    table: pd.DataFrame, columns: Sequence[str], what: str, numbers: Sequence[str] = ()
) -> None:
    """Raise InputError if a table lacks a column, has no rows, or a column is not numeric.

    Args:
        table: The table.
        columns: Required columns.
        what: Name of the figure, for the message.
        numbers: Required columns that must be numeric.
    """
    missing = [name for name in columns if name not in table.columns]
    if missing:
        raise InputError(
            f"{what} requires the columns {', '.join(columns)}; missing: {', '.join(missing)}. "
            f"The table has {', '.join(map(str, table.columns))}."
        )
    if not len(table):
        raise InputError(f"The table is empty. {what} requires at least one row.")
    text = [name for name in numbers if not pd.api.types.is_numeric_dtype(table[name])]
    if text:
        raise InputError(
            f"{what} requires a numeric column {text[0]!r}; got dtype {table[text[0]].dtype}."
        )


def one_row_each(table: pd.DataFrame, keys: Sequence[str], value: str, what: str) -> None:
    """Raise InputError if a table has several rows per entry of ``keys``: only one can be drawn."""
    counts = table.groupby(list(keys), dropna=False).size()
    if counts.max() <= 1:
        return
    crowded = table[table.duplicated(list(keys))]
    place = {key: crowded[key].iloc[0] for key in keys}
    where = ", ".join(f"{key} {entry}" for key, entry in place.items())
    same = table[(table[list(place)] == list(place.values())).all(axis=1)]
    differing = [
        str(name)
        for name in table.columns
        if name not in keys
        and not pd.api.types.is_float_dtype(table[name])
        and len(same[name].unique()) > 1
    ]
    raise InputError(
        f"{what} requires one row per {' and '.join(keys)}; {where} has {len(same)}. Select rows "
        f"by {' or '.join(differing) or 'another column'}, or average them: "
        f"table.groupby({list(keys)!r}, as_index=False)[{value!r}].mean()."
    )


def _line_page(
    shape: tuple[int, int], title: str, entries: Sequence[str], *, height: float = _HEIGHT
) -> tuple[Picture, np.ndarray]:
    """Return a figure with a grid of axes, and the axes as ``[row, column]``.

    Args:
        shape: Number of rows and of columns.
        title: Title of the figure.
        entries: Texts of the legend at the right; they determine its width.
        height: Height of each axes, in inches.
    """
    legend = 0.6 + 0.062 * max(map(len, entries)) if entries else 0.0
    body = ((_WIDTH + 0.75) * shape[1] + legend, (height + 0.55) * shape[0])
    picture = new_picture(body, title)
    return picture, picture.subplots(*shape, squeeze=False)


def _line_styles(names: Sequence[Any]) -> list[dict[str, Any]]:
    """Return a style per line: a sequential colour map for many lines, distinct colours for few."""
    numbers = all(isinstance(name, (int, np.integer)) for name in names)
    if len(names) > len(LINE_COLORS) or (numbers and len(names) > 3):
        colors = mpl.colormaps[MATRIX_COLORS](np.linspace(0, 0.9, len(names)))
        return [{"color": tuple(c), "linewidth": 1.2, "marker": "o", "ms": 2.5} for c in colors]
    return [
        {"color": LINE_COLORS[i], "linewidth": 1.4, "marker": _MARKERS[i], "ms": 3.5}
        for i in range(len(names))
    ]


def _draw_null(axes: Axes, lines: Sequence[tuple[pd.DataFrame, Any]], x: str, null: str) -> None:
    """Draw the null model: once if it is the same for all lines, else in each line's colour.

    Args:
        axes: Axes to draw on.
        lines: Rows and colour of each line.
        x: Column along the horizontal axis.
        null: Column of the null model.
    """
    curves = [rows.groupby(x)[null].mean() for rows, _ in lines]
    together = pd.concat(curves, axis=1)
    if np.allclose(together.max(axis=1), together.min(axis=1), rtol=1e-4, equal_nan=True):
        mean = together.mean(axis=1).sort_index()
        axes.plot(mean.index, mean, label="null model", **_NULL)
        return
    for curve, (_, color) in zip(curves, lines, strict=True):
        axes.plot(curve.index, curve, **{**_NULL, "color": color})
    axes.plot([], [], label="null model", **_NULL)


def _legend(axes: Axes, heading: str | None = None) -> None:
    """Add the legend to the right of the axes."""
    handles, labels = axes.get_legend_handles_labels()
    box = axes.legend(
        handles,
        [escaped(label) for label in labels],
        loc="upper left",
        bbox_to_anchor=(1.02, 1.0),
        borderaxespad=0,
        ncols=1 if len(labels) <= 16 else 2,
        title=heading,
    )
    box.get_title().set_fontsize(SMALL)


def _lines(
    axes: Axes,
    rows: pd.DataFrame,
    x: str,
    value: str,
    by: str,
    names: list[object],
    *,
    upright: bool = False,
    dotted: bool = False,
) -> None:
    """Draw one line per entry; ``upright`` puts the position on the vertical axis."""
    for name, style in zip(names, _line_styles(names), strict=True):
        line = rows[rows[by] == name].sort_values(x)
        look = {**style, "linestyle": ":", "marker": ""} if dotted else style
        pair = (line[value], line[x]) if upright else (line[x], line[value])
        axes.plot(*pair, label=None if dotted else str(name), **look)


def _means(table: pd.DataFrame, keys: list[str], values: list[str]) -> pd.DataFrame:
    """Return means weighted by the number of cells."""
    weighted = table[values].mul(table["n_cells"], axis=0).assign(n_cells=table["n_cells"])
    sums = weighted.groupby([table[key] for key in keys]).sum()
    return sums[values].div(sums["n_cells"], axis=0).reset_index()


def _with_gaps(means: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """Add a row of NaN after each bin whose next bin is missing, so that the line breaks there."""
    ordered = means.sort_values([*keys, "start"])
    following = ordered.groupby(keys)["start"].shift(-1)
    last = ordered[following.notna() & (following != ordered["stop"])]
    gaps = last[keys].assign(start=last["stop"], stop=last["stop"] + 1)
    return pd.concat([ordered, gaps], ignore_index=True)
