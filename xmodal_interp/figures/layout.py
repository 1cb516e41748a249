"""Figure layout in inches: a heading, a body for the axes, a note below.

Every axes has a fixed position and size. Long labels move nothing, titles do not overlap, and the
size of legible text can be computed in advance.
"""

from __future__ import annotations

from dataclasses import dataclass

from matplotlib.axes import Axes

from xmodal_interp.figures.scales import Scale
from xmodal_interp.figures.style import LARGE, NORMAL, SMALL, Picture, plain, wrapped

MARGIN = 0.15
BAR = 1.1
"""Width of a colour bar with its label and the gap before it, inches."""

_NARROWEST = 4.8
_LINE = {LARGE: 0.19, SMALL: 0.14}  # height of a line of text, inches


@dataclass(frozen=True, eq=False)
class Sheet:
    """A picture with a body that is addressed in inches.

    Attributes:
        picture: The figure.
        top: Inches above the body.
    """

    picture: Picture
    top: float

    def axes(self, left: float, top: float, width: float, height: float) -> Axes:
        """Add axes with the upper left corner at (``left``, ``top``) of the body."""
        wide, tall = self.picture.get_size_inches()
        bottom = tall - self.top - top - height
        return self.picture.add_axes((left / wide, bottom / tall, width / wide, height / tall))

    def bar(self, scale: Scale, left: float, top: float, height: float) -> None:
        """Add the colour bar of a scale."""
        scale.bar(self.picture, self.axes(left, top, 0.13, height), height)

    def text(
        self, left: float, top: float, text: str, align: str = "right", size: float = NORMAL
    ) -> None:
        """Add text next to axes, vertically centred on ``top``."""
        wide, tall = self.picture.get_size_inches()
        place = (left / wide, 1 - (self.top + top) / tall)
        self.picture.text(*place, plain(text), ha=align, va="center", size=size)


def sheet(width: float, height: float, title: str, note: str = "") -> Sheet:
    """Return an empty sheet with a body of this size, in inches.

    Args:
        width: Width of the whole figure; narrow figures are widened so that the title fits.
        height: Height of the body.
        title: Heading of the figure.
        note: Small text below the body, on how the figure is drawn.
    """
    width = max(width, _NARROWEST)
    heading = wrapped(title, width - 2 * MARGIN)
    below = wrapped(note, width - 2 * MARGIN, SMALL) if note else ""
    top = 0.1 + _LINE[LARGE] * (heading.count("\n") + 1)
    bottom = 0.12 + (0.08 + _LINE[SMALL] * (below.count("\n") + 1) if note else 0.0)
    tall = top + height + bottom
    picture = Picture(figsize=(width, tall))
    picture.text(MARGIN / width, 1 - 0.08 / tall, heading, va="top", size=LARGE)
    picture.text(MARGIN / width, 0.08 / tall, below, va="bottom", size=SMALL, color="#555555")
    return Sheet(picture, top)
