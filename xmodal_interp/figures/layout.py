"""A figure laid out in inches: a heading, a body that axes are put into, a note below.

With fixed places nothing moves when a label is long, titles don't collide, and an axes has the size
that was asked for, so that what is legible can be computed.
"""

from __future__ import annotations

from dataclasses import dataclass

from matplotlib.axes import Axes

from xmodal_interp.figures.scales import Scale
from xmodal_interp.figures.style import LARGE, NORMAL, SMALL, Picture, plain, wrapped

MARGIN = 0.15
BAR = 1.1
"""Inches that a colour bar takes, with its label and the gap before it."""

_NARROWEST = 4.8
_LINE = {LARGE: 0.19, SMALL: 0.14}  # inches that a line of text takes


@dataclass(frozen=True, eq=False)
class Sheet:
    """A picture and the inches of its body.

    Attributes:
        picture: The figure.
        top: Inches above the body.
    """

    picture: Picture
    top: float

    def axes(self, left: float, top: float, width: float, height: float) -> Axes:
        """Axes with their upper left corner at this place of the body."""
        wide, tall = self.picture.get_size_inches()
        bottom = tall - self.top - top - height
        return self.picture.add_axes((left / wide, bottom / tall, width / wide, height / tall))

    def bar(self, scale: Scale, left: float, top: float, height: float) -> None:
        """The colour bar of a scale."""
        scale.bar(self.picture, self.axes(left, top, 0.13, height), height)

    def text(
        self, left: float, top: float, text: str, align: str = "right", size: float = NORMAL
    ) -> None:
        """Text beside axes, centred on ``top``."""
        wide, tall = self.picture.get_size_inches()
        place = (left / wide, 1 - (self.top + top) / tall)
        self.picture.text(*place, plain(text), ha=align, va="center", size=size)


def sheet(width: float, height: float, title: str, note: str = "") -> Sheet:
    """An empty sheet with a body of this size, in inches.

    Args:
        width: Of the whole figure; narrow ones are widened so that the title fits.
        height: Of the body.
        title: What the figure shows.
        note: How it is drawn.
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
