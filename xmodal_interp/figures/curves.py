"""Lines from tidy tables: a value layer by layer, and what is left when heads are removed."""

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
    """A value layer by layer, a line for each entry of a column, the null model dashed.

    Args:
        table: Any analysis with ``layer`` and the value, one row per layer (and entry of ``by``).
        value: Which column.
        by: A line for each entry of this column (``head``, ``tower``, ...).
        null: The column of the null model, or a number.
        interval: The columns of the lower and of the upper end of an interval.
        label: What the value is; the column's name if not given.
        title: Of the figure.
        path: Where to save the figure.

    Raises:
        InputError: A column that the table lacks or that holds no numbers, or several rows for one
            layer (and entry).
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
    """How answers get worse as heads are removed: a line per order, repeated draws as a band.

    Args:
        table: Of ``pruning_curve``. Several draws of one order become their mean and, as a band,
            their range.
        value: Which column.
        x: How much was removed.
        by: A line for each entry of this column.
        interval: The columns of the lower and of the upper end of an interval, if there are any.
        label: What the value is; the column's name if not given.
        title: Of the figure.
        path: Where to save the figure.

    Raises:
        InputError: A column that the table lacks or that holds no numbers.
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
