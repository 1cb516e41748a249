"""Shared parts of line plots: panels with one legend, line styles, the dashed null model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from xmodal_interp.figures.layout import Sheet, sheet
from xmodal_interp.figures.style import LINE_COLORS, SEQUENTIAL, SMALL, plain

NULL: dict[str, Any] = {"color": "black", "linestyle": (0, (4, 3)), "linewidth": 1.0}
"""Line style of a null model."""

_WIDTH, _LEFT, _BELOW = 4.0, 0.85, 0.5  # inches
_MARKERS = "osD^vPX"


def line_page(
    shape: tuple[int, int],
    title: str,
    entries: Sequence[str],
    *,
    height: float = 2.6,
    titled: bool = False,
) -> tuple[Sheet, np.ndarray]:
    """Return a sheet with a grid of axes, and the axes as ``[row, column]``.

    Args:
        shape: Number of rows and of columns.
        title: Title of the figure.
        entries: Texts of the legend at the right; they determine its width.
        height: Height of each axes, in inches.
        titled: Whether to leave room for a title above each axes.
    """
    n_rows, n_cols = shape
    legend = 0.6 + 0.062 * max((len(entry) for entry in entries), default=0) if entries else 0.15
    above = 0.28 if titled else 0.1
    across, down = _LEFT + _WIDTH, above + height + _BELOW
    page = sheet(across * n_cols + 0.1 + legend, down * n_rows, title)
    every = [
        [page.axes(across * c + _LEFT, down * r + above, _WIDTH, height) for c in range(n_cols)]
        for r in range(n_rows)
    ]
    return page, np.array(every, dtype=object)


def line_styles(names: Sequence[Any]) -> list[dict[str, Any]]:
    """Return a style per line: a sequential colour map for many lines, distinct colours for few."""
    numbers = all(isinstance(name, (int, np.integer)) for name in names)
    if len(names) > len(LINE_COLORS) or (numbers and len(names) > 3):
        colors = mpl.colormaps[SEQUENTIAL](np.linspace(0, 0.9, len(names)))
        return [{"color": tuple(c), "linewidth": 1.2, "marker": "o", "ms": 2.5} for c in colors]
    return [
        {"color": LINE_COLORS[i], "linewidth": 1.4, "marker": _MARKERS[i], "ms": 3.5}
        for i in range(len(names))
    ]


def draw_null(axes: Axes, lines: Sequence[tuple[pd.DataFrame, Any]], x: str, null: str) -> None:
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
        axes.plot(mean.index, mean, label="null model", **NULL)
        return
    for curve, (_, color) in zip(curves, lines, strict=True):
        axes.plot(curve.index, curve, **{**NULL, "color": color})
    axes.plot([], [], label="null model", **NULL)


def legend(axes: Axes, heading: str | None = None) -> None:
    """Add the legend to the right of the axes."""
    handles, labels = axes.get_legend_handles_labels()
    box = axes.legend(
        handles,
        [plain(label) for label in labels],
        loc="upper left",
        bbox_to_anchor=(1.02, 1.0),
        borderaxespad=0,
        ncols=1 if len(labels) <= 16 else 2,
        title=heading,
    )
    box.get_title().set_fontsize(SMALL)
