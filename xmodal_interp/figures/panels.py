"""Rows of panels of one image, laid out in inches, with the image's aspect ratio.

The figure's title is above the panels, the colour bars are at the right, and a note on how the
figure is drawn is below.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from matplotlib.axes import Axes

from xmodal_interp.figures import drawing
from xmodal_interp.figures.drawing import DARK, LIGHT
from xmodal_interp.figures.layout import BAR, MARGIN, sheet
from xmodal_interp.figures.looks import Look
from xmodal_interp.figures.placement import Box, Boxes, Place, uncovered
from xmodal_interp.figures.scales import Scale
from xmodal_interp.figures.style import HIDDEN, SMALL, Picture, plain

_MOST_IN_A_ROW = 6
_BAR_HEIGHTS = (1.5, 2.6)  # smallest (room for the label) and largest height, inches


@dataclass(frozen=True, eq=False)
class Panel:
    """Values on one image.

    Attributes:
        title: Text above the panel.
        values: One per token of the image, NaN where hidden; None draws the image alone.
        scale: Colour scale; panels with the same scale share one colour bar.
        left_out: Tokens to mark as left out.
        outlined: Boxes to outline on this panel only.
        undrawn: Attention to tokens without a cell, and to all tokens of the image.
    """

    title: str
    values: np.ndarray | None = None
    scale: Scale | None = None
    left_out: np.ndarray | None = None
    outlined: Sequence[Box] = ()
    undrawn: tuple[float, float] | None = None

    def under(self, scale: Scale) -> Panel:
        """Return the panel with a colour scale."""
        return self if self.values is None else replace(self, scale=scale)


def panel_figure(
    place: Place,
    rows: Sequence[Sequence[Panel]],
    look: Look,
    title: str,
    note: str = "",
    row_titles: Sequence[str] = (),
) -> Picture:
    """Draw panels in rows.

    Args:
        place: The image.
        rows: Panels of each row; rows may differ in length.
        look: Drawing options.
        title: Title of the figure.
        note: Text below the panels, on how they are drawn.
        row_titles: Text at the left of each row.
    """
    n_cols = max(len(row) for row in rows)
    width, height = _panel_size(place, n_cols)
    scales = list({id(p.scale): p.scale for row in rows for p in row if p.scale}.values())
    left = MARGIN + (max(map(len, row_titles)) * 0.075 + 0.1 if row_titles else 0.0)
    right = left + n_cols * (width + 0.1)
    heads = [0.25 if any(panel.title for panel in row) else 0.08 for row in rows]
    below = sum(heads[1:]) + len(rows) * height
    bar_height = float(np.clip(below, *_BAR_HEIGHTS))
    body = heads[0] + max(below, bar_height if scales else 0.0)
    page = sheet(right + BAR * len(scales), body, title, note)
    for r, row in enumerate(rows):
        top = sum(heads[: r + 1]) + r * height
        for c, panel in enumerate(row):
            _draw(page.axes(left + c * (width + 0.1), top, width, height), place, panel, look)
        if row_titles:
            page.text(left - 0.1, top + height / 2, row_titles[r])
    for i, scale in enumerate(scales):
        page.bar(scale, right + 0.02 + BAR * i, heads[0], bar_height)
    return page.picture


def note_on(place: Place, rows: Sequence[Sequence[Panel]], look: Look) -> str:
    """Return the note on how a figure is drawn."""
    panels = [panel for row in rows for panel in row]
    parts = [
        f"interpolated between {place.unit}s (bilinear)"
        if look.smooth
        else f"one cell per {place.unit} (nearest)"
    ]
    if uncovered(place):
        parts.append(f"hatched: no {place.unit} there")
    undrawn = [panel.undrawn for panel in panels if panel.undrawn is not None]
    if undrawn:
        of_thumbnail = " of the thumbnail, or" if place.grid.thumbnail is not None else ""
        without, whole = (_span(amounts) for amounts in zip(*undrawn, strict=True))
        parts.append(
            f"not drawn: tokens{of_thumbnail} without a place, which receive {without} of the "
            f"{whole} that the image receives"
        )
    marked = [int(panel.left_out.sum()) for panel in panels if panel.left_out is not None]
    if any(marked):
        number = (
            f"{min(marked)}" if min(marked) == max(marked) else f"{min(marked)} to {max(marked)}"
        )
        parts.append(f"\u00d7: {number} left out")
    elif marked:
        parts.append("nothing to leave out")
    return "; ".join(parts).capitalize() + "."


def _span(amounts: Sequence[float]) -> str:
    """Return the range of numbers as text, such as ``"0.24"`` or ``"0.10 to 0.24"``."""
    ends = [f"{end:.3g}" for end in (min(amounts), max(amounts))]
    return ends[0] if ends[0] == ends[1] else " to ".join(ends)


def in_rows(panels: Sequence[Panel]) -> list[Sequence[Panel]]:
    """Split panels into the fewest rows, of about equal length."""
    n_rows = -(-len(panels) // _MOST_IN_A_ROW)
    length = -(-len(panels) // n_rows)
    return [panels[i : i + length] for i in range(0, len(panels), length)]


def _panel_size(place: Place, n_cols: int) -> tuple[float, float]:
    """Return width and height in inches, with the image's aspect; smaller for many columns."""
    side = 2.0 if n_cols <= 4 else 1.75 if n_cols <= 6 else 1.3
    aspect = float(np.clip(place.grid.width / place.grid.height, 1 / 6, 6.0))
    return side * aspect**0.5, side / aspect**0.5


def _draw(axes: Axes, place: Place, panel: Panel, look: Look) -> None:
    ground = None if panel.scale is None else LIGHT if panel.scale.diverging else DARK
    drawing.draw_image(axes, place, ground)
    if panel.values is not None and panel.scale is not None:
        grid = place.on_grid(panel.values)
        drawing.draw_map(axes, place, grid, panel.scale, smooth=look.smooth)
        if np.isnan(panel.values).all():
            axes.text(
                *(0.5, 0.5, "hidden by the mask"),
                transform=axes.transAxes,
                ha="center",
                va="center",
                size=SMALL,
                color=HIDDEN,
            )
        drawing.draw_uncovered(axes, place)
    if panel.left_out is not None and place.shares is None:
        drawing.draw_marks(axes, place, np.flatnonzero(panel.left_out))
    drawing.draw_boxes(axes, place, panel.outlined)
    if look.boxes is not None:
        names = look.boxes if panel.values is None else _without_names(look.boxes)
        drawing.draw_boxes(axes, place, names)
    axes.set_title(plain(panel.title))


def _without_names(boxes: Boxes) -> Boxes:
    """Drop the names of boxes: they are written once, on the image itself."""
    return list(boxes.values()) if isinstance(boxes, Mapping) else boxes
