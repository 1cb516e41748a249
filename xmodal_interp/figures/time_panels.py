"""Attention from words to time: one panel per head, words from top to bottom, seconds across."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Unpack

import numpy as np

from xmodal_interp.arguments import checked, real_number, strings, whole_number
from xmodal_interp.errors import InputError
from xmodal_interp.figures.scales import ColorScale, color_scale
from xmodal_interp.figures.style import (
    BAR,
    NORMAL,
    SMALL,
    CmapLike,
    Figure,
    FigureOptions,
    FigurePath,
    Width,
    check_options,
    escaped,
    new_picture,
    readable,
    room,
    saved,
    styled,
)

_WIDTH, _LEAST, _ROW = 1.75, 1.25, 0.085  # of a panel; its height: a minimum, and per word; inches
_WIDE_ROW, _WIDE = 0.17, 3.2  # the same if every word has a label
_NAMES = 0.85  # width of the words, inches
_MARK, _EMPHASIS = "#ff5d5d", "#cc3311"
_IN_A_ROW: Mapping[Width | None, int] = {None: 99, "page": 3, "column": 1}  # panels
_ONE_SCALE = "All panels have one scale."


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
    **options: Unpack[FigureOptions],
) -> Figure:
    """Draw attention of words over time, such as the cross-attention of a speech model.

    The colour scale is a square-root scale that is clipped at a high percentile if the largest
    value is far above it.

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
        **options: ``cmap``, ``width`` and ``scale``; see ``FigureOptions``. All panels have one
            colour scale, unless ``scale="panel"``.

    Raises:
        InputError: There is no panel, a panel does not have one row per word, ``starts_s`` does
            not have one number per word, or an option has a wrong value.
    """
    check_options(**options)
    arrays = _arrays(panels, words, starts_s)
    length = real_number(duration_s, "duration_s", 1e-9)
    size, by_panel = options.get("width"), options.get("scale") == "panel"
    wide = min(whole_number(columns, "columns", 1), len(arrays), _IN_A_ROW[size])
    bars = wide if by_panel else 1
    large = wide <= 3
    tall = -(-len(arrays) // wide)
    across, least, per_row = (_WIDE, _LEAST, _WIDE_ROW) if large else (_WIDTH, _LEAST, _ROW)
    height = max(least, per_row * len(words))
    width = room(size, wide * across, _NAMES + bars * BAR)
    scales = _scales(arrays, options.get("cmap"), by_panel=by_panel)
    known = "" if starts_s is None else "Red line: known start of the word."
    shared = "" if len(arrays) == 1 else "Each panel has its scale." if by_panel else _ONE_SCALE
    picture = new_picture(
        (width + _NAMES + bars * BAR, tall * (height + 0.3) + 0.3),
        title,
        " ".join(part for part in (note, known, shared) if part),
        compress=False,
        width=size,
    )
    drawn = picture.subplots(tall, wide, squeeze=False, sharex=True, sharey=True)
    panels_of = zip(drawn.flat, arrays.items(), scales, strict=False)
    for axes, (name, array), scale in panels_of:
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
        if by_panel:
            scale.bar(picture, [axes], height)
    for axes in drawn.flat[len(arrays) :]:
        axes.set_axis_off()
    shown = range(len(words))
    text = SMALL if large else max(4.5, min(SMALL, 72 * height / len(words) * 0.9))
    drawn[0, 0].set_yticks(shown, labels=[readable(word, 14) for word in words], size=text)
    for axes in drawn.flat:
        axes.tick_params(axis="y", length=0, labelsize=text)
    for axes in drawn[-1]:
        axes.set_xlabel("seconds")
    if not by_panel:
        scales[0].bar(picture, list(drawn.flat), tall * height)
    return saved(picture, path)


def _scales(
    arrays: Mapping[str, np.ndarray], cmap: CmapLike, *, by_panel: bool
) -> list[ColorScale]:
    """Return the colour scale of each panel."""

    def scale_of(shown: Iterable[np.ndarray]) -> ColorScale:
        made = color_scale("amount", shown, "attention probability", power=0.5, clip=True)
        return made.colored(cmap)

    if by_panel:
        return [scale_of([array]) for array in arrays.values()]
    return [scale_of(arrays.values())] * len(arrays)


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
