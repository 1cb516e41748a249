"""Attention from words to time: one panel per head, words from top to bottom, seconds across."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np

from xmodal_interp.arguments import checked, real_number, strings, whole_number
from xmodal_interp.errors import InputError
from xmodal_interp.figures.scales import color_scale
from xmodal_interp.figures.style import (
    BAR,
    NORMAL,
    SMALL,
    FigurePath,
    Picture,
    escaped,
    new_picture,
    readable,
    saved,
    styled,
)

_WIDTH, _LEAST, _ROW = 1.75, 1.25, 0.085  # of a panel; its height: a minimum, and per word; inches
_WIDE_ROW, _WIDE = 0.17, 3.2  # the same if every word has a label
_NAMES = 0.85  # width of the words, inches
_MARK, _EMPHASIS = "#ff5d5d", "#cc3311"


@checked
@styled
def time_panels(  # noqa: PLR0913  every option has a default
    panels: Mapping[str, np.ndarray],
    words: Sequence[str],
    *,
    duration_s: float,
    starts_s: Sequence[float] | None = None,
    columns: int = 3,
    emphasised: Collection[str] = (),
    title: str = "attention from words to time",
    note: str = "",
    path: FigurePath = None,
) -> Picture:
    """Draw attention of words over time, such as the cross-attention of a speech model.

    All panels have one colour scale, a square-root scale that is clipped at a high percentile if
    the largest value is far above it.

    Args:
        panels: By title, ``[word, frame]`` of attention; frames of equal duration.
        words: Text of each row.
        duration_s: Duration of all frames, in seconds.
        starts_s: Known start of each word in seconds, drawn as a red line; NaN draws none.
        columns: Number of panels side by side.
        emphasised: Titles of panels that get a red bold title.
        title: Title of the figure.
        note: Small text below the figure, such as what the emphasised panels are.
        path: Where to save the figure.

    Raises:
        InputError: There is no panel, a panel does not have one row per word, or ``starts_s`` does
            not have one number per word.
    """
    arrays = _arrays(panels, words, starts_s)
    length = real_number(duration_s, "duration_s", 1e-9)
    wide = min(whole_number(columns, "columns", 1), len(arrays))
    large = wide <= 3
    tall = -(-len(arrays) // wide)
    across, least, per_row = (_WIDE, _LEAST, _WIDE_ROW) if large else (_WIDTH, _LEAST, _ROW)
    height = max(least, per_row * len(words))
    scale = color_scale("amount", arrays.values(), "attention probability", power=0.5, clip=True)
    known = "" if starts_s is None else "Red line: known start of the word."
    picture = new_picture(
        (wide * across + _NAMES + BAR, tall * (height + 0.3) + 0.3),
        title,
        f"{note} {known}".strip(),
        compress=False,
    )
    drawn = picture.subplots(tall, wide, squeeze=False, sharex=True, sharey=True)
    for axes, (name, array) in zip(drawn.flat, arrays.items(), strict=False):
        axes.imshow(
            scale.drawn(array),
            norm=scale.norm,
            cmap=scale.cmap,
            aspect="auto",
            interpolation="nearest",
            extent=(0, length, len(words) - 0.5, -0.5),
        )
        if starts_s is not None:
            rows = np.arange(len(words))
            axes.vlines(starts_s, rows - 0.5, rows + 0.5, color=_MARK, linewidth=1.0)
        marked = name in emphasised
        axes.set_title(
            escaped(name),
            size=NORMAL,
            color=_EMPHASIS if marked else "black",
            weight="bold" if marked else "normal",
        )
    for axes in drawn.flat[len(arrays) :]:
        axes.set_axis_off()
    shown = range(len(words))
    size = SMALL if large else max(4.5, min(SMALL, 72 * height / len(words) * 0.9))
    drawn[0, 0].set_yticks(shown, labels=[readable(word, 14) for word in words], size=size)
    for axes in drawn.flat:
        axes.tick_params(axis="y", length=0, labelsize=size)
    for axes in drawn[-1]:
        axes.set_xlabel("seconds")
    scale.bar(picture, list(drawn.flat), tall * height)
    return saved(picture, path)


def _arrays(
    panels: Mapping[str, np.ndarray], words: Sequence[str], starts_s: Sequence[float] | None
) -> dict[str, np.ndarray]:
    """Return the panels as arrays with one row per word."""
    strings(list(words), "words")
    arrays = {name: np.asarray(panel, dtype=float) for name, panel in panels.items()}
    if not arrays or not len(words):
        raise InputError("panels and words must not be empty.")
    for name, array in arrays.items():
        if array.ndim != 2 or len(array) != len(words):
            raise InputError(
                f"The panel {name!r} must have one row for each of the {len(words)} words; its "
                f"shape is {array.shape}."
            )
    if starts_s is not None and len(starts_s) != len(words):
        raise InputError(
            f"starts_s must have one number for each of the {len(words)} words; got "
            f"{len(starts_s)}."
        )
    return arrays
