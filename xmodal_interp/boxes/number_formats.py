r"""Read and write boxes and points as data sets hold them and models print them.

The package itself has one kind of box: ``x0, y0, x1, y1`` in pixels of the original image, measured
from its top left corner, so that a box of the whole image is ``0, 0, width, height``. This module
converts from and to others. A format is always named, never guessed from the numbers:

* ``"ORDER UNIT"`` for numbers. The order is ``xyxy``, ``yxyx``, ``xywh``, ``cxcywh`` (centre and
  size), or ``xy`` or ``yx`` for points. The unit is ``px`` (of the original image), ``resized px``
  (of the picture that the model read), or ``0..1``, ``0..100``, ``0..999``, ``0..1000``: 0 is one
  edge of the image, and the last number is the other edge.
* ``"paligemma"``: four of 1,024 numbers, y first; number n is at n / 1024 of the side.
* ``"florence2"``: four of 1,000 bins; a bin is read as its centre.
* ``"kosmos2"``: the indices of the first and the last of 32 x 32 patches, row by row. The box is
  that of the whole patches. ``"kosmos2 centres"`` ends at the centres of these patches, unless both
  are in one row or column. transformers reads it this way, although the text that it writes for a
  box names the patches that the box covers; the box shrinks by half a patch on each side.

By default numbers refer to the whole image. If a model read another region, pass ``region=``, in
pixels of the original image. OWLv2 pads an image of 640 x 480 px to a square at the bottom: its
region is ``(0, 0, 640, 640)``. LLaVA 1.5 pads on both sides: ``(0, -80, 640, 560)``.

    >>> from xmodal_interp.boxes import read, write
    >>> read([0.25, 0.5, 0.5, 1], "xyxy 0..1", size=(640, 480)).tolist()
    [[160.0, 240.0, 320.0, 480.0]]
    >>> write([[160, 240, 320, 480]], "xywh 0..1000", size=(640, 480)).tolist()
    [[250.0, 500.0, 250.0, 500.0]]
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from xmodal_interp.arguments import as_list, real_number
from xmodal_interp.errors import InputError, quoted

CORNERS = ("x0", "y0", "x1", "y1")
"""Names of the corners of a box in tables and dicts."""

Boxes = Any
"""One box or several, in pixels of the original image: see :func:`pixel_boxes`."""

Size = tuple[float, float]

_NAMES = (
    CORNERS,
    ("x1", "y1", "x2", "y2"),
    ("xmin", "ymin", "xmax", "ymax"),
    ("x_min", "y_min", "x_max", "y_max"),
    ("left", "top", "right", "bottom"),
)
_ORDERS = ("xyxy", "yxyx", "xywh", "cxcywh", "xy", "yx")
_PX, _RESIZED = "px", "resized px"
_SCALES = {"0..1": 1, "0..100": 100, "0..999": 999, "0..1000": 1000}
_KOSMOS, _CENTRES, _SIDE = "kosmos2", "kosmos2 centres", 32
_BINS = {"paligemma": ("yxyx", 1024, 0.0), "florence2": ("xyxy", 1000, 0.5)}
"""Order, number of bins, and the place of a number within its bin."""

FORMATS: tuple[str, ...] = (
    *(f"{order} {unit}" for order in _ORDERS for unit in (_PX, _RESIZED, *_SCALES)),
    *(*_BINS, _KOSMOS, _CENTRES),
)
"""The names of all formats of numbers."""

_NEAR = 1.5
"""Boxes that reach no further, in pixels, are fractions: detectors print fractions up to 1.05."""

_DIGITS = 9
"""Decimals to which written numbers are rounded, so that shorter decimals round-trip exactly."""


def pixel_boxes(given: Boxes) -> Float[np.ndarray, "box 4"]:
    """Return boxes in pixels of the original image as an array. Analyses and figures call this.

    Args:
        given: ``x0, y0, x1, y1`` as a list, array or tensor; several boxes as a list or an array
            ``[box, 4]``; dicts or rows with the keys ``x0, y0, x1, y1`` (or ``x1, y1, x2, y2``,
            ``xmin, ymin, xmax, ymax``, ``left, top, right, bottom``, or a dict of these under
            ``box``); or a table with such columns.

    Raises:
        InputError: A box has other keys, has no area, or lies within 1.5 pixels, as boxes in
            fractions of the image do.
    """
    boxes = _corners(given)
    for box in boxes:
        if not (box[0] < box[2] and box[1] < box[3]):
            raise _not_a_box(given if len(boxes) == 1 else box.tolist())
    _refuse_fractions(boxes, _PX)
    return boxes


def read(
    numbers: Any,
    format: str,
    *,
    size: Size | None = None,
    resized: Size | None = None,
    region: Sequence[float] | None = None,
    clip: bool = False,
) -> Float[np.ndarray, "box corner"]:
    """Return boxes, or points, in pixels of the original image.

    Args:
        numbers: One box or several: a list, array or tensor of numbers in this format.
        format: A name of ``FORMATS``.
        size: Width and height of the original image, px. Required, except for the unit ``px``,
            where it serves to check the boxes.
        resized: Width and height of the picture that the model read, for the unit ``resized px``.
        region: The part of the original image to which the numbers refer, as ``x0, y0, x1, y1`` in
            px; the whole image by default.
        clip: Cut boxes at the edges of the image, if they exceed them by at most half its side.

    Returns:
        ``x0, y0, x1, y1`` of each box, ``[box, 4]``, or ``x, y`` of each point, ``[point, 2]``.

    Raises:
        InputError: The numbers do not fit the format: a box ends before it starts, exceeds the
            image by more than a pixel, or lies within 1.5 pixels, as fractions of the image do.
    """
    made = _Frame.of(format, size, resized, region)
    given = _rows(numbers, made.n_numbers, format)
    units = made.in_units(given)
    if made.unit not in ("0..1", *_BINS, _KOSMOS, _CENTRES):
        _refuse_fractions(units, made.unit)
    pixels = made.to_pixels(units)
    for row, box in zip(given, pixels, strict=True):
        _check_within(box, made, row, clip)
    if clip and made.size is not None:
        edges = np.tile(made.size, pixels.shape[1] // 2)
        pixels = np.clip(pixels, 0, edges)
    return pixels


def write(
    boxes: Boxes,
    format: str,
    *,
    size: Size | None = None,
    resized: Size | None = None,
    region: Sequence[float] | None = None,
) -> Float[np.ndarray, "box number"]:
    """Return boxes in another format: the inverse of :func:`read`.

    Numbers of bins and patches are whole. Others are rounded to nine decimals: numbers that have no
    more are returned exactly as they were read.

    Args:
        boxes: Boxes in pixels of the original image (see :func:`pixel_boxes`), or points
            ``[point, 2]`` if the format is one of points.
        format: A name of ``FORMATS``.
        size: As for :func:`read`.
        resized: As for :func:`read`.
        region: As for :func:`read`.

    Raises:
        InputError: A box is invalid, or exceeds the image or the region by more than a pixel.
    """
    made = _Frame.of(format, size, resized, region)
    pixels = _rows(boxes, 2, format) if made.is_point else _corners(boxes)
    for box in pixels:
        _check_within(box, made, box, clip=False)
    return made.from_units(made.from_pixels(pixels))


def iou(boxes: Boxes, others: Boxes) -> Float[np.ndarray, "box other"]:
    """Return the area common to two boxes divided by the area of their union, for each pair.

    Args:
        boxes: Boxes in px (see :func:`pixel_boxes`), such as those that a model predicted.
        others: Boxes of the same image, such as the true ones.

    Raises:
        InputError: A box is invalid.
    """
    mine, theirs = pixel_boxes(boxes)[:, None], pixel_boxes(others)[None]
    low, high = np.maximum(mine, theirs)[..., :2], np.minimum(mine, theirs)[..., 2:]
    common = (high - low).clip(0).prod(-1)
    areas = [(each[..., 2:] - each[..., :2]).prod(-1) for each in (mine, theirs)]
    shares: np.ndarray = common / (areas[0] + areas[1] - common)
    return shares


@dataclass(frozen=True)
class _Frame:
    """A format, and the part of the image that its numbers describe.

    Numbers are converted in two steps: :meth:`in_units` orders them as ``x0, y0, x1, y1``, and
    :meth:`to_pixels` scales them to the region.
    """

    format: str
    order: str
    unit: str
    size: np.ndarray | None
    resized: np.ndarray | None
    region: np.ndarray | None

    @classmethod
    def of(
        cls, format: str, size: Size | None, resized: Size | None, region: Sequence[float] | None
    ) -> _Frame:
        if not isinstance(format, str) or format not in FORMATS:
            raise InputError(
                f"There is no box format {quoted(format)}. The formats are an order "
                f"({', '.join(_ORDERS)}) with a unit ({', '.join((_PX, _RESIZED, *_SCALES))}), "
                f"such as 'xyxy px', and {', '.join((*_BINS, _KOSMOS, _CENTRES))}."
            )
        order, _, unit = format.partition(" ")
        if format in _BINS:
            order, unit = _BINS[format][0], format
        elif format in (_KOSMOS, _CENTRES):
            order, unit = "xyxy", format
        of = None if size is None else _size(size, "size")
        if of is None and unit != _PX:
            raise InputError(f"The format {format!r} requires size=(width, height) of the image.")
        if resized is None and unit == _RESIZED:
            raise InputError(
                f"The format {format!r} requires resized=(width, height) of the picture that the "
                "model read."
            )
        part = None if of is None else np.array([0, 0, *of])
        if region is not None:
            if unit == _PX:
                raise InputError("Pixels of the original image have no region; omit region=.")
            part = _corners(region)[0]
        return cls(
            format, order, unit, of, None if resized is None else _size(resized, "resized"), part
        )

    @property
    def is_point(self) -> bool:
        return self.order in ("xy", "yx")

    @property
    def n_numbers(self) -> int:
        return 2 if self.is_point or self.unit in (_KOSMOS, _CENTRES) else 4

    def in_units(self, numbers: np.ndarray) -> np.ndarray:
        """Return numbers of this format in the order ``x0, y0, x1, y1``, or ``x, y``."""
        if self.unit in (_KOSMOS, _CENTRES):
            return self._of_patches(numbers)
        if self.unit in _BINS:
            self._check_whole(numbers, _BINS[self.unit][1])
        if self.order in ("yxyx", "yx"):
            return numbers[:, [1, 0, 3, 2] if self.order == "yxyx" else [1, 0]]
        if self.order in ("xywh", "cxcywh"):
            start, extent = numbers[:, :2], numbers[:, 2:]
            start = start - extent / 2 if self.order == "cxcywh" else start
            return np.concatenate([start, start + extent], 1)
        return numbers

    def from_units(self, units: np.ndarray) -> np.ndarray:
        """Return the inverse of :meth:`in_units`, rounded."""
        if self.unit in (_KOSMOS, _CENTRES):
            first = np.floor(units[:, :2].round(_DIGITS)).clip(0, _SIDE - 1)
            last = np.ceil(units[:, 2:].round(_DIGITS) - 1).clip(0, _SIDE - 1)
            return np.stack([each[:, 1] * _SIDE + each[:, 0] for each in (first, last)], 1)
        if self.unit in _BINS:
            _, n, within = _BINS[self.unit]
            exact = units.round(_DIGITS)
            units = (np.floor(exact) if within else np.rint(exact)).clip(0, n - 1)
        if self.order in ("yxyx", "yx"):
            units = units[:, [1, 0, 3, 2] if self.order == "yxyx" else [1, 0]]
        if self.order in ("xywh", "cxcywh"):
            start, extent = units[:, :2], units[:, 2:] - units[:, :2]
            start = start + extent / 2 if self.order == "cxcywh" else start
            units = np.concatenate([start, extent], 1)
        return units.round(_DIGITS)

    def to_pixels(self, units: np.ndarray) -> np.ndarray:
        """Scale ordered numbers to pixels of the original image."""
        if self.region is None or self.unit == _PX:
            return units
        within = _BINS[self.unit][2] if self.unit in _BINS else 0.0
        times = units.shape[1] // 2
        start, end = np.tile(self.region[:2], times), np.tile(self.region[2:], times)
        pixels: np.ndarray = start + (units + within) * (end - start) / self._extent(times)
        return pixels

    def from_pixels(self, pixels: np.ndarray) -> np.ndarray:
        """Return the inverse of :meth:`to_pixels`; a number of a bin is not yet rounded."""
        if self.region is None or self.unit == _PX:
            return pixels
        times = pixels.shape[1] // 2
        start, end = np.tile(self.region[:2], times), np.tile(self.region[2:], times)
        units: np.ndarray = (pixels - start) * self._extent(times) / (end - start)
        return units

    def _extent(self, times: int) -> np.ndarray | int:
        """The numbers at the far edges of the region."""
        if self.unit == _RESIZED and self.resized is not None:
            return np.tile(self.resized, times)
        if self.unit in _BINS:
            return _BINS[self.unit][1]
        return _SCALES.get(self.unit, _SIDE)

    def _of_patches(self, numbers: np.ndarray) -> np.ndarray:
        """Return the box of the patches, in patches."""
        self._check_whole(numbers, _SIDE * _SIDE)
        first, last = ((np.stack([n % _SIDE, n // _SIDE], 1)) for n in numbers.T)
        boxes = np.concatenate([first, last + 1], 1)
        if self.unit == _CENTRES:
            inside = (first < last).all(1, keepdims=True)
            boxes += np.where(inside, [0.5, 0.5, -0.5, -0.5], 0)
        return boxes

    def _check_whole(self, numbers: np.ndarray, n: int) -> None:
        wrong = (numbers != np.rint(numbers)) | (numbers < 0) | (numbers >= n)
        if wrong.any():
            row = numbers[wrong.any(1)][0]
            raise InputError(
                f"The format {self.format!r} has whole numbers from 0 to {n - 1}; got {shown(row)}."
            )


def _corners(given: Boxes) -> Float[np.ndarray, "box 4"]:
    """Return the corners of boxes given in any form; they may be in any order."""
    if isinstance(given, pd.DataFrame):
        if any(isinstance(name, str) for name in given.columns):
            return _finite(given[_named(given.columns)].to_numpy(dtype=float), given)
        given = given.to_numpy()
    if isinstance(given, pd.Series) and any(isinstance(name, str) for name in given.index):
        given = given.to_dict()
    if isinstance(given, Mapping):
        if "box" in given:
            return _corners(given["box"])
        given = [given[name] for name in _named(given)]
    entries = as_list(given, "A box")
    numbers = [_number(entry) for entry in entries]
    if None not in numbers:
        if len(numbers) != 4:
            raise _not_a_box(given)
        return _finite(np.array([numbers], dtype=float), given)
    if not entries or any(number is not None for number in numbers):
        raise _not_a_box(given)
    return np.concatenate([_corners(entry) for entry in entries])


def _named(names: Iterable[Any]) -> list[str]:
    """Return the names of the corners of a box among those of a dict or table."""
    found = list(names)
    for corners in _NAMES:
        if set(corners) <= set(found):
            return list(corners)
    raise InputError(
        f"A box with names must have {', '.join(CORNERS)}; got {', '.join(map(str, found))}. "
        "Read other numbers with xi.boxes.read(numbers, format)."
    )


def _number(value: Any) -> float | None:
    """Return a number as a float; None for anything else."""
    if isinstance(value, (str, bytes, Mapping)) or getattr(value, "ndim", 0) != 0:
        return None
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def _finite(boxes: np.ndarray, given: Any) -> np.ndarray:
    if not len(boxes) or not np.isfinite(boxes).all():
        raise _not_a_box(given)
    return boxes


def _not_a_box(given: Any) -> InputError:
    return InputError(
        f"A box must be x0, y0, x1, y1 with x0 < x1 and y0 < y1; got {quoted(given)}."
    )


def _rows(numbers: Any, n: int, format: str) -> Float[np.ndarray, "box number"]:
    """Return numbers of a format as rows.

    Raises:
        InputError: They are not finite numbers, or not ``n`` per row.
    """
    shaped = None
    if isinstance(numbers, pd.DataFrame):
        numbers = _in_order(numbers, format)
    try:
        entries = as_list(numbers, "numbers")
        entries = [each.detach() if hasattr(each, "detach") else each for each in entries]
        shaped = np.array([np.asarray(entry, dtype=float) for entry in entries])
    except (TypeError, ValueError):  # not numbers, or rows of different lengths
        shaped = None
    if shaped is not None and shaped.ndim == 1 and len(shaped):
        shaped = shaped[None]
    if shaped is None or shaped.ndim != 2 or shaped.shape[1] != n or not np.isfinite(shaped).all():
        raise InputError(
            f"The format {format!r} has {n} numbers for each box or point; got {quoted(numbers)}."
        )
    return shaped


def _in_order(table: pd.DataFrame, format: str) -> pd.DataFrame:
    """Return the corners of a table in the order of the format, if its columns name corners.

    Raises:
        InputError: The format has another order than the names.
    """
    known = next((names for names in _NAMES if {*names} <= {*table.columns}), None)
    if known is None:
        return table
    if not format.startswith("xyxy "):
        raise InputError(
            f"The columns {', '.join(known)} of the table are an xyxy order, and the format is "
            f"{format!r}. Name an xyxy format, or pass the numbers without names: "
            "table.to_numpy()."
        )
    return table[list(known)]


def _size(given: Any, name: str) -> np.ndarray:
    """Return width and height as an array."""
    sides = as_list(given, name)
    if len(sides) != 2:
        raise InputError(f"{name} must be (width, height) in px; got {quoted(given)}.")
    for side in sides:
        if real_number(side, f"A side of {name}", 0) == 0:
            raise InputError(f"{name} must have sides above 0; got {quoted(given)}.")
    return np.array(sides, dtype=float)


def _refuse_fractions(units: np.ndarray, unit: str) -> None:
    """Raise InputError for boxes that lie within 1.5 pixels: they are fractions of the image.

    A point may be at 0 or 1, so only points between them are refused.
    """
    small = (np.abs(units) <= _NEAR).all(1)
    if units.shape[1] == 2:
        small &= (units != np.rint(units)).any(1)
    if small.any():
        what, order = ("box", "xyxy") if units.shape[1] == 4 else ("point", "xy")
        raise InputError(
            f"The {what} {shown(units[small][0])} lies within 1.5 units of {unit!r}, as fractions "
            f"of an image do. Read fractions with xi.boxes.read({what}, '{order} 0..1', "
            "size=(width, height))."
        )


def _check_within(box: np.ndarray, made: _Frame, given: np.ndarray, clip: bool) -> None:  # noqa: FBT001
    """Raise InputError if a box ends before it starts, or is not within region and image."""
    start, end = box[:2], box[-2:]
    if (start > end).any():
        raise InputError(
            f"A box must not end before it starts; {shown(given)} does in the format "
            f"{made.format!r}."
        )
    image = None if made.size is None else np.array([0, 0, *made.size])
    for part in (made.region, image):
        if part is None:
            continue
        beyond = (part[2:] - part[:2]) / 2 if clip else np.ones(2)
        outside = (end < part[:2]) | (start > part[2:])
        if (start < part[:2] - beyond).any() or (end > part[2:] + beyond).any() or outside.any():
            raise InputError(
                f"{shown(given)} in the format {made.format!r} is {shown(box)} px, beyond the "
                f"edges {shown(part)}. Name the format of the numbers, or pass clip=True to cut "
                "boxes that exceed the image."
            )


def shown(numbers: Any) -> str:
    """Return the numbers of a box for a message."""
    return f"[{', '.join(f'{number:.6g}' for number in np.asarray(numbers).tolist())}]"
