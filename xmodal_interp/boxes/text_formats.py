r"""Read and write the answers in which models print phrases with their boxes.

| format | form | numbers |
|---|---|---|
| ``paligemma`` | ``<loc0256><loc0256><loc0768><loc0768> cat ; ...`` | ``paligemma`` |
| ``florence2`` | ``cat<loc_10><loc_20><loc_30><loc_40>...`` | ``florence2`` |
| ``kosmos2`` | ``<phrase>cat</phrase><object><patch_index_0044>...</object>`` | ``kosmos2`` |
| ``qwen2_vl`` | ``...<\|box_start\|>(10,20),(30,40)<\|box_end\|>`` | ``xyxy 0..1000`` |
| ``internvl`` | ``<ref>cat</ref><box>[[10, 20, 30, 40]]</box>`` | ``xyxy 0..1000`` |
| ``deepseek_vl2`` | ``<\|ref\|>cat<\|/ref\|><\|det\|>[[10...]]...`` | ``xyxy 0..999`` |
| ``molmo`` | ``<point x="10.5" y="20.0" alt="cat">...`` | ``xy 0..100`` |
| ``json ORDER UNIT`` | ``[{"bbox_2d": [10, 20, 30, 40], "label": "cat"}]`` | ``ORDER UNIT`` |

``qwen2_5_vl`` is ``json xyxy resized px``, and ``qwen3_vl`` is ``json xyxy 0..1000``. The JSON may
be in a code block or within a sentence, and may be one object; an object may hold several boxes, or
a point.

Text between the boxes is ignored, and so are the ``<seg>`` tokens of PaliGemma. If the answer has
other location tokens than whole boxes, for example because it was cut, an error names them.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import pandas as pd

from xmodal_interp.arguments import string, table
from xmodal_interp.boxes.number_formats import CORNERS, FORMATS, Size, read, write
from xmodal_interp.errors import InputError, quoted

Phrase = str | None
Found = tuple[Phrase, list[list[float]]]
"""A phrase with the numbers of its boxes or points."""

POINT = ("x", "y")
_BOX_KEYS, _POINT_KEYS = ("bbox_2d", "bbox", "box_2d"), ("point_2d", "point")
_LABEL_KEYS = ("label", "name", "text_content")


_MARKS = (
    r"<loc_?\d*>|<patch_index_\d*>|<\|(?:box_start|det)\|>|<box>|<points?\b[^>]*>?"
    r"|\"(?:bbox|box|point)_2d\""
)
"""What marks a box or a point in any of the formats."""


def _refuse_other_marks(rest: str) -> None:
    """Raise InputError if a text has the marks of boxes after all boxes have been taken out."""
    marks = re.findall(_MARKS, rest)
    if marks:
        raise InputError(
            f"The text has {quoted(' '.join(marks))} outside whole boxes of this format. Check the "
            "name of the format and that the answer was not cut."
        )


@dataclass(frozen=True)
class _Tags:
    """A format that marks phrases and boxes with tags.

    Attributes:
        numbers: The format of the numbers.
        pattern: A regular expression with the groups ``phrase`` (may be missing) and ``boxes``.
        box: How to write the numbers of a box.
        between: What separates the boxes of one phrase; None if each box repeats the phrase.
        around: How to write a phrase with its boxes.
        end: What separates the phrases.
    """

    numbers: str
    pattern: str
    box: str
    between: str | None
    around: str
    end: str = ""

    def found(self, text: str) -> Iterator[Found]:
        """Yield each phrase with its numbers."""
        n = 2 if self.numbers in ("kosmos2", "xy 0..100") else 4
        for match in re.finditer(self.pattern, text, re.DOTALL):
            numbers = [float(each) for each in re.findall(r"-?\d+(?:\.\d+)?", match["boxes"])]
            if len(numbers) % n:
                raise InputError(
                    f"A box has {n} numbers, but {match['boxes']!r} has {len(numbers)}."
                )
            yield match["phrase"], np.reshape(numbers, (-1, n)).tolist()
        _refuse_other_marks(re.sub(self.pattern, "", text, flags=re.DOTALL))

    def written(self, found: Sequence[Found]) -> str:
        """Return the text of phrases with their numbers."""
        parts = []
        for phrase, rows in found:
            boxes = [self.box.format(*row) for row in rows]
            groups = boxes if self.between is None else [self.between.join(boxes)]
            parts += [self.around.format(phrase=phrase or "", boxes=group) for group in groups]
        return self.end.join(parts)


_QWEN2_REF = r"(?:<\|object_ref_start\|>(?P<phrase>.*?)<\|object_ref_end\|>\s*)?"
_QWEN2_BOX = r"<\|box_start\|>\(\d+,\s*\d+\),\s*\(\d+,\s*\d+\)<\|box_end\|>"
_LISTS = r"\[\s*\[[\d\s,.\[\]]*\]\s*\]"
_TAGS = {
    "paligemma": _Tags(
        "paligemma",
        r"(?P<boxes>(?:<loc\d{4}>){4})(?:<seg\d{3}>)*[ \t]*(?P<phrase>[^;<\n]*)",
        "<loc{:04d}><loc{:04d}><loc{:04d}><loc{:04d}>",
        None,
        "{boxes} {phrase}",
        " ; ",
    ),
    "florence2": _Tags(
        "florence2",
        r"(?P<phrase>[^<>]*)(?P<boxes>(?:(?:<loc_\d+>){4})+)",
        "<loc_{}><loc_{}><loc_{}><loc_{}>",
        "",
        "{phrase}{boxes}",
    ),
    "kosmos2": _Tags(
        "kosmos2",
        r"(?:<phrase>(?P<phrase>[^<]+)</phrase>)?<object>(?P<boxes>(?:<patch_index_\d+>"
        r"<patch_index_\d+>(?:</delimiter_of_multi_objects/>)?)+)</object>",
        "<patch_index_{:04d}><patch_index_{:04d}>",
        "</delimiter_of_multi_objects/>",
        "<phrase>{phrase}</phrase><object>{boxes}</object>",
    ),
    "qwen2_vl": _Tags(
        "xyxy 0..1000",
        rf"{_QWEN2_REF}(?P<boxes>(?:{_QWEN2_BOX})+)",
        "<|box_start|>({},{}),({},{})<|box_end|>",
        "",
        "<|object_ref_start|>{phrase}<|object_ref_end|>{boxes}",
    ),
    "internvl": _Tags(
        "xyxy 0..1000",
        rf"(?:<ref>(?P<phrase>.*?)</ref>\s*)?<box>\s*(?P<boxes>{_LISTS})\s*</box>",
        "[{}, {}, {}, {}]",
        ", ",
        "<ref>{phrase}</ref><box>[{boxes}]</box>",
    ),
    "deepseek_vl2": _Tags(
        "xyxy 0..999",
        r"(?:<\|ref\|>(?P<phrase>.*?)<\|/ref\|>\s*)?"
        rf"<\|det\|>\s*(?P<boxes>{_LISTS})\s*<\|/det\|>",
        "[{}, {}, {}, {}]",
        ", ",
        "<|ref|>{phrase}<|/ref|><|det|>[{boxes}]<|/det|>",
    ),
}
_JSON = {"qwen2_5_vl": "xyxy resized px", "qwen3_vl": "xyxy 0..1000"}
_MOLMO = "molmo"

TEXT_FORMATS: tuple[str, ...] = (
    *(*_TAGS, _MOLMO, *_JSON),
    *(f"json {name}" for name in FORMATS if " " in name and not name.startswith("kosmos2")),
)
"""The names of all formats of text."""


def read_text(
    text: str,
    format: str,
    *,
    size: Size,
    resized: Size | None = None,
    region: Sequence[float] | None = None,
    clip: bool = False,
) -> pd.DataFrame:
    """Return the phrases and boxes of a model's answer.

    Args:
        text: The answer, decoded with its special tokens.
        format: A name of ``TEXT_FORMATS``.
        size: Width and height of the original image, px.
        resized: As for :func:`~xmodal_interp.boxes.read`.
        region: As for :func:`~xmodal_interp.boxes.read`.
        clip: As for :func:`~xmodal_interp.boxes.read`.

    Returns:
        One row per box or point, in the order of the text: ``phrase`` (missing if there is none),
        ``x0, y0, x1, y1`` (NaN for a point) and ``x, y`` (NaN for a box), in pixels of the original
        image. No row if the answer has no box.

    Raises:
        InputError: The text is not of this format, a box is cut, or its numbers do not fit.
    """
    string(text, "text")
    rows: list[dict[str, Any]] = []
    for phrase, numbers, name in _found(text, _known(format)):
        of = read(numbers, name, size=size, resized=resized, region=region, clip=clip)
        name_of = (phrase or "").strip() or None
        columns = CORNERS if of.shape[1] == 4 else POINT
        rows += [{"phrase": name_of, **dict(zip(columns, box, strict=True))} for box in of.tolist()]
    made = pd.DataFrame(rows, columns=["phrase", *CORNERS, *POINT])
    return made.astype({"phrase": "string", **dict.fromkeys((*CORNERS, *POINT), float)})


def write_text(
    boxes: pd.DataFrame,
    format: str,
    *,
    size: Size,
    resized: Size | None = None,
    region: Sequence[float] | None = None,
) -> str:
    """Return the text in which a model prints boxes: the inverse of :func:`read_text`.

    Consecutive rows of the same phrase are boxes of one phrase. Numbers are rounded as models print
    them: to whole numbers, and for fractions and for ``molmo`` to three decimals and to one.

    Args:
        boxes: A table with the columns of :func:`read_text`; ``x`` and ``y`` may be missing.
        format: A name of ``TEXT_FORMATS``.
        size: Width and height of the original image, px.
        resized: As for :func:`~xmodal_interp.boxes.read`.
        region: As for :func:`~xmodal_interp.boxes.read`.

    Raises:
        InputError: A column is missing, or a box is invalid.
    """
    kind = _known(format)
    table(boxes, "boxes")
    missing = [name for name in ("phrase", *CORNERS) if name not in boxes]
    if missing:
        raise InputError(f"boxes lacks the columns {', '.join(missing)}.")
    frame = boxes.reindex(columns=["phrase", *CORNERS, *POINT])
    phrases = [None if pd.isna(phrase) else str(phrase) for phrase in frame["phrase"]]
    points = frame["x0"].isna().to_numpy(dtype=bool)
    found: list[tuple[Phrase, list[list[float]], bool]] = []
    at = 0
    for (phrase, is_point), group in groupby(zip(phrases, points, strict=True)):
        n = len(list(group))
        part = frame.iloc[at : at + n][list(POINT if is_point else CORNERS)].to_numpy(dtype=float)
        at += n
        name = _number_format(kind, is_point=bool(is_point))
        numbers = write(part, name, size=size, resized=resized, region=region)
        digits = 1 if kind == _MOLMO else 3 if name.endswith("0..1") else 0
        found.append((phrase, numbers.round(digits).tolist(), bool(is_point)))
    if kind == _MOLMO:
        return "".join(_molmo_written(phrase, rows) for phrase, rows, _ in found)
    whole = [
        (phrase, [[_plain(number) for number in row] for row in rows], is_point)
        for phrase, rows, is_point in found
    ]
    if kind in _TAGS:
        return _TAGS[kind].written([(phrase, rows) for phrase, rows, _ in whole])
    return json.dumps(
        [
            {_POINT_KEYS[0] if is_point else _BOX_KEYS[0]: row}
            | ({} if phrase is None else {"label": phrase})
            for phrase, rows, is_point in whole
            for row in rows
        ],
        ensure_ascii=False,
    )


def _known(format: Any) -> str:
    """Return the name of a text format; a JSON format as that of its numbers."""
    if not isinstance(format, str) or format not in TEXT_FORMATS:
        raise InputError(
            f"There is no text format {quoted(format)}. The formats are "
            f"{', '.join((*_TAGS, _MOLMO, *_JSON))}, and 'json ORDER UNIT' such as "
            "'json xyxy 0..1000'."
        )
    return _JSON.get(format, format.removeprefix("json "))


def _number_format(kind: str, *, is_point: bool) -> str:
    """Return the format of the numbers of boxes, or of points."""
    if kind in _TAGS and is_point:
        raise InputError("This format has no points; drop the rows without a box.")
    if kind in _TAGS:
        return _TAGS[kind].numbers
    if kind == _MOLMO:
        if not is_point:
            raise InputError("The format 'molmo' has points only; got a box.")
        return "xy 0..100"
    order, unit = kind.split(" ", 1)
    if is_point:
        return f"{'yx' if order in ('yxyx', 'yx') else 'xy'} {unit}"
    return kind


def _found(text: str, kind: str) -> Iterator[tuple[Phrase, list[list[float]], str]]:
    """Yield each phrase of a text with its numbers and their format."""
    if kind in _TAGS:
        for phrase, rows in _TAGS[kind].found(text):
            yield phrase, rows, _TAGS[kind].numbers
    elif kind == _MOLMO:
        for phrase, rows in _molmo(text):
            yield phrase, rows, "xy 0..100"
    else:
        for entry in _objects(text):
            key = next((name for name in (*_BOX_KEYS, *_POINT_KEYS) if name in entry), None)
            if key is None:
                raise InputError(
                    f"An object must have one of {', '.join((*_BOX_KEYS, *_POINT_KEYS))}; got "
                    f"{', '.join(entry)}."
                )
            numbers = entry[key]
            several = isinstance(numbers, list) and numbers and isinstance(numbers[0], list)
            labels = (entry.get(name) for name in _LABEL_KEYS)
            label = next((str(each) for each in labels if each is not None), None)
            name = _number_format(kind, is_point=key in _POINT_KEYS)
            yield label, numbers if several else [numbers], name


def _objects(text: str) -> list[Mapping[str, Any]]:
    """Return the objects of an answer that has JSON between other text, or has none."""
    objects: list[Mapping[str, Any]] = []
    rest, at = "", 0
    while opening := re.compile(r"[\[{]").search(text, at):
        try:
            decoder = json.JSONDecoder(object_pairs_hook=_without_repeats)
            found, end = decoder.raw_decode(text, opening.start())
        except json.JSONDecodeError as error:
            raise InputError(
                f"The text has a bracket that is not JSON ({error}): {quoted(text)}. Check the "
                "name of the format and that the answer was not cut."
            ) from None
        entries = found if isinstance(found, list) else [found]
        if not all(isinstance(entry, dict) for entry in entries):
            raise InputError(f"The JSON must be a list of objects; got {quoted(found)}.")
        objects += entries
        rest, at = rest + text[at : opening.start()], end
    _refuse_other_marks(rest + text[at:])
    return objects


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of JSON, of which ``json`` keeps the last of several values of a key."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise InputError(
            f"An object must have one value for each name; got {quoted(pairs)}. Choose one."
        )
    return found


_POINT_TAG = re.compile(r"<points?\s([^>]*?)/?>(?:([^<]*)</points?>)?")


def _molmo(text: str) -> Iterator[Found]:
    """Yield the phrase and points of each ``<point x= y=>`` and ``<points x1= y1= x2= ...>``."""
    for match in _POINT_TAG.finditer(text):
        given = dict(re.findall(r'(\w+)="([^"]*)"', match[1]))
        numbers = [name[1:] for name in given if re.fullmatch(r"x\d*", name)]
        lacking = [f"y{n}" for n in numbers if f"y{n}" not in given]
        if not numbers or lacking:
            raise InputError(f"{match[0]!r} must have x and y of each point.")
        phrase = given.get("alt", match[2])
        yield (
            None if phrase is None else html.unescape(phrase),
            [[float(given[f"x{n}"]), float(given[f"y{n}"])] for n in numbers],
        )
    _refuse_other_marks(_POINT_TAG.sub("", text))


def _molmo_written(phrase: Phrase, rows: Sequence[Sequence[float]]) -> str:
    name = html.escape(phrase or "")
    if len(rows) == 1:
        (x, y), tag = rows[0], "point"
        places = f'x="{x}" y="{y}"'
    else:
        tag = "points"
        places = " ".join(f'x{n}="{x}" y{n}="{y}"' for n, (x, y) in enumerate(rows, 1))
    return f'<{tag} {places} alt="{name}">{name}</{tag}>'


def _plain(number: float) -> float | int:
    """Return a whole number as an ``int``."""
    return int(number) if float(number).is_integer() else number
