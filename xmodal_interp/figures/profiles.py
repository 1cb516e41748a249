"""Attention by position: distance and key position in the sequence, image rows and columns."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from xmodal_interp.arguments import checked
from xmodal_interp.figures.lines import NULL, draw_null, legend, line_page, line_styles
from xmodal_interp.figures.style import FigurePath, Picture, plain, saved, styled
from xmodal_interp.figures.tables import columns_of

_SIDES = {
    "distance": "distance (positions back)",
    "key": "position of the key",
    "rope_distance": "rotary distance",
}
_VALUES = {"raw": "attention probability", "lift": "lift of attention"}
_STEEP = 8.0  # an axis is logarithmic if the ratio of largest to smallest value is above this


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
    page, grid = line_page(shape, heading, entries, height=1.9, titled=True)
    for r, block in enumerate(blocks):
        for c, side in enumerate(sides):
            axes = grid[r, c]
            rows = means[(means["block"] == block) & (means["axis"] == side)]
            _lines(axes, rows, "place", value, by, names)
            if nulls:
                draw_null(axes, [(rows, "black")], "place", "null")
            else:
                axes.axhline(1.0, label="null model", **NULL)
            if _steep(rows[value]):
                axes.set_yscale("log")
                axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
                axes.yaxis.set_major_formatter("{x:g}")
                axes.yaxis.set_minor_locator(NullLocator())
            axes.set(xlabel=_SIDES.get(side, side), ylabel=plain(_VALUES.get(value, value)))
            axes.set_title(plain(str(block).replace("->", " \u2192 ")))
    legend(grid[0, -1], by)
    return saved(page.picture, path)


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
    names = sorted(table[by].unique())
    entries = [*map(str, names), by, "null model", *(["control (dotted)"] if control else [])]
    heading = title or f"{value} of image attention by row and column"
    page, grid = line_page((1, 2), heading, entries, titled=True)
    down, across = grid[0]
    for axes, axis in ((down, "row"), (across, "col")):
        upright = axis == "row"
        rows = means[means["axis"] == axis]
        _lines(axes, rows, "index", value, by, names, upright=upright)
        if control:
            _lines(axes, rows, "index", control, by, names, upright=upright, dotted=True)
        null = rows.groupby("index")["null"].mean() if nulls else None
        places = rows["index"].unique()
        level = [1.0] * len(places) if null is None else null.reindex(places)
        axes.plot(*((level, places) if upright else (places, level)), label="null model", **NULL)
        for side in ("x", "y"):
            if (side == "y") == upright:
                getattr(axes, f"{side}axis").set_major_locator(MaxNLocator(integer=True))
    down.invert_yaxis()
    down.set(xlabel=plain(value), ylabel="row of the image, top first", title="rows")
    across.set(xlabel="column of the image", ylabel=plain(value), title="columns")
    if control:
        across.plot([], [], color="black", linestyle=":", linewidth=1.2, label="control (dotted)")
    legend(across, by)
    return saved(page.picture, path)


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
    for name, style in zip(names, line_styles(names), strict=True):
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


def _steep(values: pd.Series) -> bool:
    return bool(values.min() > 0 and values.max() > _STEEP * values.min())
