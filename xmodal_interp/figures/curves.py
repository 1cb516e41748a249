"""Line plots of analysis tables, with one line per entry of a column and a dashed null model.

The lines show a value by layer, accuracy as heads are removed, or attention by position: distance
and key position in the sequence, or image row and column. More than eight lines have the colours of
a ramp with a colour bar. Profiles of more than eight layers are heat maps: the ratio to the null
model, with one row or column per layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Unpack

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import Colormap, ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from xmodal_interp.arguments import checked, string
from xmodal_interp.errors import InputError
from xmodal_interp.figures.scales import ColorScale, color_scale
from xmodal_interp.figures.style import (
    BAR,
    LINE_COLORS,
    MATRIX_COLORS,
    NORMAL,
    SMALL,
    AxesOptions,
    CmapLike,
    FigureOptions,
    FigurePath,
    Picture,
    check_options,
    escaped,
    new_picture,
    placed_on,
    readable,
    room,
    saved,
    styled,
    wrapped,
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
_MOST_NAMED = 8  # lines with an entry in a legend
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
    **options: Unpack[AxesOptions],
) -> Figure:
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
        **options: ``cmap`` (of the lines), ``width``, ``scale`` and ``ax``; see ``AxesOptions``.

    Raises:
        InputError: The table lacks a column, a column is not numeric, or the table has several
            rows for one layer (and entry).
    """
    check_options(**options)
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
    many = len(lines) > _MOST_NAMED
    named = [*([] if many else names), heading or "", "null model"]
    axes, figure = _one_panel(
        title or f"{value} by layer", named if shown else [], options, many=many
    )
    styles = _line_styles([name for name, _ in lines], options.get("cmap"))
    for (_, rows), name, style in zip(lines, names, styles, strict=True):
        axes.plot(rows["layer"], rows[value], label="" if many else name, **style)
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
    if many:
        _ramp(figure, [axes], names, str(by), options.get("cmap"))
        _legend_above(axes)
    elif shown:
        _legend(axes, heading)
    return saved(figure, path) if isinstance(figure, Picture) else figure


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
    **options: Unpack[AxesOptions],
) -> Figure:
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
        **options: ``cmap`` (of the lines), ``width``, ``scale`` and ``ax``; see ``AxesOptions``.

    Raises:
        InputError: The table lacks a column, or a column is not numeric.
    """
    check_options(**options)
    drawn = [x, value, *(interval or ())]
    columns_of(table, [by, *drawn], "A pruning curve", numbers=drawn)
    names = list(dict.fromkeys(table[by]))
    draws = {name: int(table[table[by] == name].groupby(x).size().max()) for name in names}
    texts = {n: f"{n}, mean and range of {k}" if k > 1 else str(n) for n, k in draws.items()}
    many = len(names) > _MOST_NAMED
    entries = [*([] if many else texts.values()), "nothing removed"]
    heading = title or f"{value.replace('_', ' ')} as heads are removed"
    axes, figure = _one_panel(heading, entries, options, many=many)
    for name, style in zip(names, _line_styles(names, options.get("cmap")), strict=True):
        steps = table[table[by] == name].groupby(x)
        mean = steps[value].mean()
        axes.plot(mean.index, mean, label="" if many else texts[name], **style)
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
    if many:
        _ramp(figure, [axes], [texts[name] for name in names], by, options.get("cmap"))
        _legend_above(axes)
    else:
        _legend(axes, by)
    return saved(figure, path) if isinstance(figure, Picture) else figure


@checked
@styled
def positional_profiles(
    table: pd.DataFrame,
    value: str = "lift",
    *,
    by: str = "layer",
    title: str | None = None,
    path: FigurePath = None,
    **options: Unpack[FigureOptions],
) -> Picture:
    """Draw a table of ``positional_bias``: blocks in rows, distance and key position in columns.

    Args:
        table: Table of ``positional_bias``. Rows that differ only in other columns are averaged,
            weighted by ``n_cells``.
        value: ``"lift"``, with uniform attention at 1; or ``"raw"``, with the column ``null`` as
            the null model.
        by: Column whose entries are drawn as separate lines; more than eight as a heat map of the
            ratio to the null model.
        title: Title of the figure.
        path: Where to save the figure.
        **options: ``cmap``, ``width`` and ``scale``; see ``FigureOptions``. Lines have an axis per
            panel unless ``scale="figure"``; heat maps share a scale unless ``scale="panel"``.

    Raises:
        InputError: The table lacks a column.
    """
    check_options(**options)
    nulls = ["null"] if value == "raw" else []
    columns_of(
        table,
        ["block", "axis", "start", "stop", "n_cells", value, by, *nulls],
        "A positional profile",
    )
    means = _means(table, ["block", "axis", by, "start", "stop"], [value, *nulls])
    blocks, sides = list(dict.fromkeys(table["block"])), list(dict.fromkeys(table["axis"]))
    names = sorted(table[by].unique())
    heading = f"{title or f'{_VALUES.get(value, value)} by position'}{_averaged(table, by)}"
    panels = [
        _Profile(
            str(block).replace("->", " \u2192 "),
            _SIDES.get(side, side),
            means[(means["block"] == block) & (means["axis"] == side)],
        )
        for block in blocks
        for side in sides
    ]
    n_cols = 1 if options.get("width") == "column" else len(sides)
    if len(names) > _MOST_NAMED:
        what = f"{_VALUES.get(value, value)}: times the null model\n(log scale)"
        return saved(_heat_maps(panels, value, by, what, heading, n_cols, options), path)
    entries = [*map(str, names), by, "null model"]
    shape = (-(-len(panels) // n_cols), n_cols)
    picture, grid = _line_page(shape, heading, entries, options, height=1.9)
    for axes, panel in zip(grid.flat, panels, strict=False):
        rows = _with_gaps(panel.rows, [by])
        rows["place"] = (rows["start"] + rows["stop"] - 1) / 2
        _lines(axes, rows, "place", value, by, names, cmap=options.get("cmap"))
        if nulls:
            _draw_null(axes, [(rows, "black")], "place", "null")
        else:
            axes.axhline(1.0, label="null model", **_NULL)
        if rows[value].min() > 0 and rows[value].max() > _STEEP * rows[value].min():
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_locator(NullLocator())
        axes.set(xlabel=panel.along, ylabel=escaped(_VALUES.get(value, value)))
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.set_title(escaped(panel.title))
    if options.get("scale") == "figure":
        _same_axis([axes.yaxis for axes in grid.flat])
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
    **options: Unpack[FigureOptions],
) -> Picture:
    """Draw a table of ``raster_profile``: over the rows of the image (downwards) and its columns.

    Args:
        table: Table of ``raster_profile``. Rows that differ only in other columns, such as heads,
            are averaged. Controls are dotted.
        value: ``"share"``, with the column ``null`` as the null model; or ``"lift"``, with uniform
            attention at 1.
        by: Column whose entries are drawn as separate lines; more than eight as a heat map of the
            ratio to the control if there is one, else to the null model.
        title: Title of the figure.
        path: Where to save the figure.
        **options: ``cmap``, ``width`` and ``scale``; see ``FigureOptions``. Lines have an axis per
            panel unless ``scale="figure"``; heat maps share a scale unless ``scale="panel"``.

    Raises:
        InputError: The table lacks a column.
    """
    check_options(**options)
    nulls = ["null"] if value == "share" else []
    columns_of(table, ["axis", "index", value, by, *nulls], "A raster profile")
    control = f"{value}_control" if f"{value}_control" in table else None
    columns = [value, *nulls, *([control] if control else [])]
    means = table.groupby(["axis", by, "index"], as_index=False)[columns].mean()
    means["null"] = means["null"] if nulls else 1.0
    names = sorted(table[by].unique())
    heading = title or f"{value} of image attention by row and column"
    heading += _averaged(table, by)
    n_cols = 1 if options.get("width") == "column" else 2
    if len(names) > _MOST_NAMED:
        of = means.assign(
            **{"null": means[control] if control else means["null"]},
            start=means["index"],
            stop=means["index"] + 1,
        )
        panels = [
            _Profile(f"{kind}s", f"{kind} of the image", of[of["axis"] == axis])
            for axis, kind in (("row", "row"), ("col", "column"))
        ]
        what = f"{value}: times the {'control' if control else 'null model'}\n(log scale)"
        return saved(_heat_maps(panels, value, by, what, heading, n_cols, options), path)
    entries = [*map(str, names), by, "null model", *(["control (dotted)"] if control else [])]
    picture, grid = _line_page((2 // n_cols, n_cols), heading, entries, options)
    down, across = grid.flat
    cmap = options.get("cmap")
    for axes, axis in ((down, "row"), (across, "col")):
        upright = axis == "row"
        rows = means[means["axis"] == axis]
        _lines(axes, rows, "index", value, by, names, upright=upright, cmap=cmap)
        if control:
            dotted = {"upright": upright, "dotted": True}
            _lines(axes, rows, "index", control, by, names, cmap=cmap, **dotted)
        null = rows.groupby("index")["null"].mean()
        pair = (null, null.index) if upright else (null.index, null)
        axes.plot(*pair, label="null model", **_NULL)
        (axes.yaxis if upright else axes.xaxis).set_major_locator(MaxNLocator(6, integer=True))
    down.invert_yaxis()
    down.set(xlabel=escaped(value), ylabel="row of the image, top first", title="rows")
    across.set(xlabel="column of the image", ylabel=escaped(value), title="columns")
    if options.get("scale") == "figure":
        _same_axis([down.xaxis, across.yaxis])
    if control:
        across.plot([], [], color="black", linestyle=":", linewidth=1.2, label="control (dotted)")
    _legend(grid[0, -1], by, across)
    return saved(picture, path)


@dataclass(frozen=True, eq=False)
class _Profile:
    """A panel of values by position.

    Attributes:
        title: Title of the panel.
        along: Name of the position.
        rows: Rows with ``start``, ``stop``, the values and their null model.
    """

    title: str
    along: str
    rows: pd.DataFrame


def _heat_maps(
    panels: Sequence[_Profile],
    value: str,
    by: str,
    label: str,
    title: str,
    n_cols: int,
    options: FigureOptions,
) -> Picture:
    """Draw the ratio of values to their null model: positions from left to right, entries below."""
    ratios = []
    for panel in panels:
        null = panel.rows.get("null", 1.0)
        ratio = (panel.rows[value] / null).replace([np.inf, -np.inf], np.nan)
        ratios.append(panel.rows.assign(ratio=ratio))
    own = options.get("scale") == "panel"
    maps = [each["ratio"].to_numpy(dtype=float) for each in ratios]
    cmap = options.get("cmap")
    one = color_scale("ratio", maps, label).colored(cmap)
    scales = [color_scale("ratio", [each], label).colored(cmap) if own else one for each in maps]
    n_rows = -(-len(panels) // n_cols)
    bars = BAR * (n_cols if own else 1)
    wide = room(options.get("width"), (_WIDTH + 0.6) * n_cols, bars) / n_cols - 0.6
    tall = float(np.clip(0.06 * ratios[0][by].nunique(), 1.3, 3.5))
    note = "Each panel has its own colour scale." if own else "One colour scale for all panels."
    missing = any(np.isnan(each).any() for each in maps)
    body = ((wide + 0.6) * n_cols + bars, (tall + 0.65) * n_rows)
    picture = new_picture(
        body,
        title,
        f"{note}{' Grey: no value.' if missing else ''}",
        width=options.get("width"),
        compress=False,
    )
    grid = picture.subplots(n_rows, n_cols, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.remove()
    drawn = list(grid.flat[: len(panels)])
    for axes, panel, rows, scale in zip(drawn, panels, ratios, scales, strict=True):
        pivot = rows.pivot_table(index=by, columns=["start", "stop"], values="ratio")
        pivot = pivot.sort_index().sort_index(axis=1)
        edges: list[float] = []
        cells: list[np.ndarray] = []
        for i, (start, stop) in enumerate(pivot.columns.to_frame().astype(float).to_numpy()):
            if edges and start > edges[-1]:  # positions without a value
                cells.append(np.full(len(pivot), np.nan))
                edges.append(start)
            edges += [stop] if edges else [start, stop]
            cells.append(pivot.iloc[:, i].to_numpy(dtype=float))
        values = scale.drawn(np.stack(cells, axis=1))
        axes.set_facecolor(scale.cmap.get_bad())
        axes.pcolormesh(
            np.array(edges) - 0.5,
            np.arange(len(pivot) + 1) - 0.5,
            values,
            norm=scale.norm,
            cmap=scale.cmap,
            rasterized=True,
        )
        step = max(1, -(-len(pivot) // max(2, int(tall / 0.2))))
        axes.set_yticks(range(0, len(pivot), step), [str(name) for name in pivot.index[::step]])
        axes.invert_yaxis()
        axes.set(xlabel=panel.along, ylabel=by, title=escaped(panel.title))
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        if own:
            scale.bar(picture, [axes], tall)
    if not own:
        one.bar(picture, drawn, tall * n_rows)
    return picture


def _averaged(table: pd.DataFrame, by: str) -> str:
    """Return a line, for a title, that states over what the drawn values are means."""
    parts = []
    for column in ("sample", "layer", "head"):
        n = table[column].nunique() if column != by and column in table else 1
        if n > 1:
            parts.append(f"{n} {column}s")
    return f"\nmean of {' and '.join(parts)}" if parts else ""


def _same_axis(axes: Sequence[Axis]) -> None:
    """Give axes the same limits."""
    limits = np.array([each.get_view_interval() for each in axes])
    for each in axes:
        each.set_view_interval(limits.min(), limits.max(), ignore=True)


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


def _one_panel(
    title: str, entries: Sequence[str], options: AxesOptions, *, many: bool
) -> tuple[Axes, Figure]:
    """Return axes for lines: those of the options, or those of a new figure; and their figure."""
    given = options.get("ax")
    if given is not None:
        given.set_title(wrapped(title, placed_on(given)[1], NORMAL, 2))
        return given, placed_on(given)[0]
    bar = BAR if many else 0.0
    picture, grid = _line_page((1, 1), title, entries, options, bar=bar)
    return grid[0, 0], picture


def _line_page(
    shape: tuple[int, int],
    title: str,
    entries: Sequence[str],
    options: FigureOptions,
    *,
    height: float = _HEIGHT,
    bar: float = 0.0,
) -> tuple[Picture, np.ndarray]:
    """Return a figure with a grid of axes, and the axes as ``[row, column]``.

    Args:
        shape: Number of rows and of columns.
        title: Title of the figure.
        entries: Texts of the legend at the right; they determine its width.
        options: The width is used.
        height: Height of each axes, in inches.
        bar: Width of a colour bar, in inches.
    """
    legend = 0.6 + 0.062 * max(map(len, entries)) if entries and not bar else bar
    wide = room(options.get("width"), (_WIDTH + 0.75) * shape[1], legend)
    picture = new_picture(
        (wide + legend, (height + 0.55) * shape[0]), title, width=options.get("width")
    )
    return picture, picture.subplots(*shape, squeeze=False)


def _line_styles(names: Sequence[Any], cmap: CmapLike = None) -> list[dict[str, Any]]:
    """Return a style per line: a sequential colour map for many lines, distinct colours for few."""
    numbers = all(isinstance(name, (int, np.integer)) for name in names)
    if cmap is not None or len(names) > len(LINE_COLORS) or (numbers and len(names) > 3):
        many = len(names) > _MOST_NAMED
        look = {"linewidth": 0.8} if many else {"linewidth": 1.2, "marker": "o", "ms": 2.5}
        colors = _ramp_colors(cmap)(np.linspace(0, 1, len(names)))
        return [{"color": tuple(c), **look} for c in colors]
    return [
        {"color": LINE_COLORS[i], "linewidth": 1.4, "marker": _MARKERS[i], "ms": 3.5}
        for i in range(len(names))
    ]


def _ramp_colors(cmap: CmapLike) -> Colormap:
    """Return the colours of many lines, without those that are too light on white."""
    chosen = mpl.colormaps[cmap or MATRIX_COLORS] if cmap is None or isinstance(cmap, str) else cmap
    return ListedColormap(chosen(np.linspace(0, 0.9, 256)))


def _ramp(
    figure: Figure, panels: Sequence[Axes], names: Sequence[str], by: str, cmap: CmapLike
) -> None:
    """Draw a colour bar for the colours of many lines."""
    numbers = all(name.lstrip("-").isdigit() for name in names)
    ends = (float(names[0]), float(names[-1])) if numbers else (0.0, len(names) - 1.0)
    evenly = numbers and ends[1] - ends[0] == len(names) - 1
    norm = Normalize(*ends) if evenly else Normalize(0, len(names) - 1)
    scale = ColorScale(norm, _ramp_colors(cmap), by)
    bar = scale.bar(figure, panels, _HEIGHT)
    if evenly:
        bar.locator = MaxNLocator(8, integer=True)
        bar.update_ticks()
        return
    step = -(-len(names) // 12)
    marks = range(0, len(names), step)
    bar.set_ticks(list(marks), labels=[readable(names[i], 14) for i in marks])


def _legend_above(axes: Axes) -> None:
    """Add the legend of the null model above the axes, next to a colour bar."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        axes.legend(
            handles, labels, loc="lower right", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.2
        )


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


def _legend(axes: Axes, heading: str | None = None, source: Axes | None = None) -> None:
    """Add the legend to the right of the axes; ``source`` are the axes with the lines."""
    handles, labels = (source or axes).get_legend_handles_labels()
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


def _lines(  # noqa: PLR0913  how the lines are drawn
    axes: Axes,
    rows: pd.DataFrame,
    x: str,
    value: str,
    by: str,
    names: list[object],
    *,
    cmap: CmapLike = None,
    upright: bool = False,
    dotted: bool = False,
) -> None:
    """Draw one line per entry; ``upright`` puts the position on the vertical axis."""
    for name, style in zip(names, _line_styles(names, cmap), strict=True):
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
