"""Line plots of analysis tables: a value by layer, and accuracy as heads are removed."""

from __future__ import annotations

import pandas as pd
from matplotlib.ticker import MaxNLocator

from xmodal_interp.arguments import checked, string
from xmodal_interp.figures.lines import NULL, draw_null, legend, line_page, line_styles
from xmodal_interp.figures.style import FigurePath, Picture, plain, saved, styled
from xmodal_interp.figures.tables import columns_of, one_row_each


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
    page, axes_grid = line_page((1, 1), title or f"{value} by layer", entries)
    axes = axes_grid[0, 0]
    styles = line_styles([name for name, _ in lines])
    for (_, rows), name, style in zip(lines, names, styles, strict=True):
        axes.plot(rows["layer"], rows[value], label=name, **style)
        if interval:
            low, high = (rows[end].to_numpy(dtype=float) for end in interval)
            axes.fill_between(rows["layer"], low, high, color=style["color"], alpha=0.15, lw=0)
    if isinstance(null, str):
        colored = [(rows, style["color"]) for (_, rows), style in zip(lines, styles, strict=True)]
        draw_null(axes, colored, "layer", null)
    elif null is not None:
        axes.axhline(null, label="null model", **NULL)
    axes.set(xlabel="layer", ylabel=plain(label or value.replace("_", " ")))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if shown:
        legend(axes, heading)
    return saved(page.picture, path)


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
    page, axes_grid = line_page(
        (1, 1),
        title or f"{value.replace('_', ' ')} as heads are removed",
        [*texts.values(), "nothing removed"],
    )
    axes = axes_grid[0, 0]
    for name, style in zip(names, line_styles(names), strict=True):
        steps = table[table[by] == name].groupby(x)
        mean = steps[value].mean()
        axes.plot(mean.index, mean, label=texts[name], **style)
        if interval or draws[name] > 1:
            low = steps[interval[0]].mean() if interval else steps[value].min()
            high = steps[interval[1]].mean() if interval else steps[value].max()
            axes.fill_between(mean.index, low, high, color=style["color"], alpha=0.15, lw=0)
    base = float(table.loc[table[x] == table[x].min(), value].mean())
    axes.axhline(base, label="nothing removed", **NULL)
    along = "share of heads removed" if x == "share_removed" else plain(x.replace("_", " "))
    axes.set(xlabel=along, ylabel=plain(label or value.replace("_", " ")))
    if x.startswith("share"):
        axes.xaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    legend(axes, by)
    return saved(page.picture, path)
