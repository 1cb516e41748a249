"""Selectors: how positions are named, everywhere.

Every argument that names positions (``queries``, ``keys``, ``positions``) accepts:

* positions: an index, indices, a slice or a boolean mask; negative indices count from the end;
* a string: a keyword, or else a phrase of the prompt or the answer. The keywords are ``"last"``,
  ``"text"``, ``"image"``, ``"image 1"``, ``"video"``, ``"video 0"``, ``"special"``, ``"answer"``
  and ``"prompt"``. In the vision tower, a string is the name of a position, such as ``"class"`` or
  ``"register 0"``;
* a typed selector of this module, such as ``at.last`` or ``at.phrase("last")``. It means the same
  in every sample, although a prompt may contain the word "last";
* a list of these: all their positions, sorted and unique. ``at.last | at.image(1)`` is the same for
  typed selectors. A list of numbers alone keeps its order;
* a function that takes the sample and returns any of these, such as ``lambda sample: sample.last``.

::

    at.last                                 the last position of the prompt
    at.text                                 text of prompt and answer after the last image or video
    at.prompt, at.answer                    all positions of the prompt; the generated tokens
    at.phrase("circle", occurrence=1)       the second "circle"
    at.image, at.image(1)                   the tokens of all images; of image 1
    at.video, at.video(0, frame=2)          the tokens of all videos; of frame 2 of video 0
    at.kind("special"), at.special          the tokens of a kind; at.kind("text") is all text
    at.role("user"), at.role("user", turn=1)  the tokens of a role, of one message
    at.patch(3, 4), at.patch(3, 4, image=1)   the token in row 3 and column 4 of an image
    at.box((8, 8, 40, 24))                  the tokens whose box overlaps a box, px of the image
    at.name("register 0")                   positions of the vision tower by name
    at.positions([3, 5])                    positions by number, for unions
    at.predicts(at.answer)                  the positions whose output predicts the selected tokens

``repr(selector)`` is the expression that makes the selector, and :func:`parse` reads it. Typed
selectors are immutable and hashable, and can be pickled.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, SupportsIndex

from torch import Tensor

from xmodal_interp.arguments import one_of, string, whole_number
from xmodal_interp.attention import Positions, entries_of
from xmodal_interp.attention.indexing import whole_slice
from xmodal_interp.boxes.number_formats import Boxes, pixel_boxes
from xmodal_interp.errors import InputError, PositionError, quoted
from xmodal_interp.text_search import check_occurrence
from xmodal_interp.vocabulary import ROLES, TOKEN_KINDS

__all__ = [
    "Selector",
    "TypedSelector",
    "answer",
    "box",
    "image",
    "kind",
    "last",
    "name",
    "parse",
    "patch",
    "phrase",
    "positions",
    "predicts",
    "prompt",
    "role",
    "special",
    "text",
    "video",
]


@dataclass(frozen=True, repr=False)
class TypedSelector:
    """A selector made by a name of this module.

    Attributes:
        rule: The name, such as ``"phrase"``; ``"|"`` for a union.
        arguments: Positional arguments.
        options: Names and values of the other arguments that are not the default.
    """

    rule: str
    arguments: tuple[Any, ...] = ()
    options: tuple[tuple[str, Any], ...] = ()

    __array_ufunc__ = None  # an array on the left of | leaves the union to __ror__

    def __or__(self, other: Any) -> TypedSelector:
        """Return the union with another selector."""
        found: TypedSelector = _union(self, other)
        return found

    def __ror__(self, other: Any) -> TypedSelector:
        """Return the union with another selector."""
        found: TypedSelector = _union(other, self)
        return found

    def __repr__(self) -> str:
        """Return the expression that makes the selector."""
        if self.rule == UNION:
            return " | ".join(map(_shown, self.arguments))
        given = [*map(_shown, self.arguments), *(f"{k}={_shown(v)}" for k, v in self.options)]
        return f"at.{self.rule}" + (f"({', '.join(given)})" if given else "")


class _Numbered(TypedSelector):
    """``at.image`` or ``at.video``: all of them, or one if called with its index."""

    def __call__(self, index: SupportsIndex, *, frame: SupportsIndex | None = None) -> _Numbered:
        """Return the selector of the image or video with this index.

        Args:
            index: Index of the image or video.
            frame: For a video: index of a frame.

        Raises:
            InputError: An index is not an integer from 0, or an image is given a frame.
        """
        if self.arguments:
            raise InputError(f"{self!r} is one {self.rule} already; it takes no index.")
        number = whole_number(index, self.rule, 0)
        if frame is None:
            return _Numbered(self.rule, (number,))
        if self.rule == "image":
            raise InputError(f"Images have no frames; got frame={quoted(frame)}. Leave frame out.")
        return _Numbered(self.rule, (number,), (("frame", whole_number(frame, "frame", 0)),))


Selector = str | TypedSelector | Positions | Sequence[Any] | Callable[[Any], Any]
"""What selects positions; see the module docstring."""

UNION = "|"

last = TypedSelector("last")
"""The last position of the prompt, which predicts the first token of the answer."""
text = TypedSelector("text")
"""Text tokens of prompt and answer after the last image or video."""
prompt = TypedSelector("prompt")
"""All positions of the prompt, without padding."""
answer = TypedSelector("answer")
"""The generated tokens, or those of a given answer, that have a position."""
image = _Numbered("image")
"""The tokens of all images; ``at.image(1)``: those of image 1."""
video = _Numbered("video")
"""The tokens of all videos; ``at.video(0)``: those of video 0; ``at.video(0, frame=2)``."""
special = TypedSelector("special")
"""Special tokens, such as the beginning of the sequence."""


def phrase(words: str, occurrence: SupportsIndex | None = None) -> TypedSelector:
    """Return the selector of the tokens of a phrase; see :meth:`Sample.find`.

    Args:
        words: A phrase of the prompt or the answer, even if it is a keyword.
        occurrence: Index of the match if there are several; negative ones count from the last.
    """
    string(words, "words")
    number = check_occurrence(occurrence)
    return TypedSelector("phrase", (words,), () if number is None else (("occurrence", number),))


def kind(kind: str) -> TypedSelector:
    """Return the selector of the tokens of a kind.

    Args:
        kind: ``"image"``, ``"video"``, ``"text"``, ``"special"`` or ``"padding"``.
    """
    one_of(kind, "kind", TOKEN_KINDS)
    return TypedSelector("kind", (kind,))


def role(role: str, turn: SupportsIndex | None = None) -> TypedSelector:
    """Return the selector of the tokens with a role.

    Args:
        role: A role of ``vocabulary.ROLES``, such as ``"user"``.
        turn: Number of the message; all messages if not given.
    """
    one_of(role, "role", ROLES)
    options = () if turn is None else (("turn", whole_number(turn, "turn", 0)),)
    return TypedSelector("role", (role,), options)


def patch(
    row: SupportsIndex, column: SupportsIndex, image: SupportsIndex | None = None
) -> TypedSelector:
    """Return the selector of the token at a place of an image, or of the patch in a vision tower.

    Args:
        row: Row on the grid of the image.
        column: Column on the grid of the image.
        image: Index of the image. If not given, image 0; in the vision tower, the image whose
            positions are selected.
    """
    place = (whole_number(row, "row", 0), whole_number(column, "column", 0))
    return TypedSelector("patch", place, _of_image(image))


def box(corners: Boxes, image: SupportsIndex | None = None) -> TypedSelector:
    """Return the selector of the tokens whose box overlaps a box; the thumbnail's tokens too.

    Args:
        corners: ``x0, y0, x1, y1`` in pixels of the original image, or several such boxes, in any
            form of :func:`xmodal_interp.boxes.pixel_boxes`.
        image: As for :func:`patch`.

    Raises:
        InputError: The corners are not those of a box.
    """
    boxes = [
        tuple(int(edge) if edge.is_integer() else edge for edge in each)
        for each in pixel_boxes(corners).tolist()
    ]
    return TypedSelector("box", (boxes[0] if len(boxes) == 1 else tuple(boxes),), _of_image(image))


def _of_image(index: SupportsIndex | None) -> tuple[tuple[str, int], ...]:
    return () if index is None else (("image", whole_number(index, "image", 0)),)


def name(name: str) -> TypedSelector:
    """Return the selector of positions of the vision tower by name; see ``Sample.patch_names``.

    Args:
        name: A name, such as ``"class"`` or ``"register 0"``; ``"register"`` for all registers.
    """
    string(name, "name")
    return TypedSelector("name", (name,))


def positions(
    numbers: Positions | None = None,
    *,
    start: SupportsIndex | None = None,
    stop: SupportsIndex | None = None,
    step: SupportsIndex | None = None,
) -> TypedSelector:
    """Return the selector of positions given by number, as in a list.

    Args:
        numbers: An index, indices, a slice or a boolean mask.
        start: The first position of a slice.
        stop: The position after the last one of a slice.
        step: The step of a slice.

    Raises:
        PositionError: The positions are not whole numbers.
    """
    given = slice(start, stop, step) if numbers is None else numbers
    if isinstance(given, slice):
        parts = whole_slice(given, "position")
        ends = (("start", parts.start), ("stop", parts.stop), ("step", parts.step))
        return TypedSelector("positions", (), tuple(end for end in ends if end[1] is not None))
    row = entries_of(given)
    if row is None:
        raise _no_positions(given)
    return TypedSelector("positions", (tuple(row.tolist()),))


def _no_positions(given: Any) -> PositionError:
    return PositionError(
        "A position must be a number, a list of numbers, a slice, or a boolean mask; got "
        f"{quoted(given)}."
    )


def predicts(selector: Selector) -> TypedSelector:
    """Return the selector of the positions whose output predicts the selected tokens.

    These are the positions before each token. The last generated token is predicted too, although
    it has no position unless it was fed back to the model.

    Args:
        selector: Any selector of tokens.
    """
    return TypedSelector("predicts", (_hashable(selector),))


def _union(*selectors: Any) -> Any:
    """Return one selector of all positions; the selector itself if there is only one."""
    entries: list[Any] = []
    for each in selectors:
        hashable = _hashable(each)
        is_union = isinstance(hashable, TypedSelector) and hashable.rule == UNION
        entries += hashable.arguments if is_union else [hashable]
    different = tuple(dict.fromkeys(entries))
    return different[0] if len(different) == 1 else TypedSelector(UNION, different)


def _hashable(selector: Any) -> Any:
    """Return a selector as a typed selector, a string or a function.

    Raises:
        PositionError: The value is not a selector.
    """
    if isinstance(selector, (str, TypedSelector)) or is_function(selector):
        return selector
    if is_union(selector):
        return _union(*selector)
    if selector is None:
        raise _no_positions(selector)
    return positions(selector)


def _shown(argument: Any) -> str:
    """Return an argument as an expression."""
    return name_of(argument) if is_function(argument) else repr(argument)


def is_function(selector: Any) -> bool:
    """Return whether a selector is a function of the sample."""
    return callable(selector) and not isinstance(selector, (TypedSelector, Tensor))


def is_union(selector: Any) -> bool:
    """Return whether a selector is a list with another entry than numbers."""
    return isinstance(selector, (list, tuple)) and any(
        isinstance(each, (str, TypedSelector, slice)) or is_function(each) for each in selector
    )


def by_name(selector: Any) -> bool:
    """Return whether a selector is resolved in a sample: anything except numbers and masks."""
    return isinstance(selector, (str, TypedSelector)) or is_function(selector) or is_union(selector)


def has_function(selector: Any) -> bool:
    """Return whether a selector is a function, or a typed selector made of one."""
    if isinstance(selector, TypedSelector):
        return any(has_function(each) for each in selector.arguments)
    return is_function(selector)


def name_of(function: Any) -> str:
    """Return a function for a message or a setting: ``function NAME``."""
    return f"function {getattr(function, '__name__', type(function).__name__)}"


KEYWORDS = {str(each)[3:]: each for each in (last, text, image, video, special, answer, prompt)}
_NUMBERED = re.compile(r"(image|video) (\d{1,7})")


def keyword(given: str) -> TypedSelector | None:
    """Return the typed selector of a keyword, such as ``"image 1"``; None for another string."""
    numbered = _NUMBERED.fullmatch(given)
    if numbered:
        of = image if numbered[1] == "image" else video
        return of(int(numbered[2]))
    return KEYWORDS.get(given)


def parse(given: str) -> Selector:
    """Return the selector that a string of the command line means.

    Args:
        given: ``repr`` of a typed selector, such as ``"at.phrase('circle', occurrence=1)"``; or a
            string with a prefix: ``"at:last"`` (a keyword), ``"phrase:last"``, ``"kind:text"``,
            ``"role:user"``, ``"name:class"``, ``"positions:3,5"``, ``"positions:3:9"`` (a slice)
            or ``"predicts:yes"``, whose rest may have a prefix too. Any other string is returned
            unchanged: a keyword or a phrase.

    Raises:
        InputError: The string has one of these forms, but is not a selector.
    """
    string(given, "A selector")
    expression = given.removeprefix("xi.")
    if expression.startswith("at."):
        return _evaluated(expression)
    prefix, _, rest = given.partition(":")
    if prefix in _PREFIXES and rest:
        return _PREFIXES[prefix](rest)
    return given


def _of_keyword(given: str) -> TypedSelector:
    found = keyword(given)
    if found is None:
        raise InputError(
            f"{given!r} is not a keyword; the keywords are {', '.join(KEYWORDS)}, 'image 1' and "
            f"'video 0'. Pass phrase:{given} for the words."
        )
    return found


def _of_numbers(given: str) -> TypedSelector:
    try:
        if ":" in given:
            return positions(slice(*(int(part) if part else None for part in given.split(":"))))
        return positions([int(part) for part in given.split(",")])
    except (TypeError, ValueError):
        raise InputError(
            f"Positions must be numbers with commas, such as 3,5, or a slice, such as 3:9; got "
            f"{given!r}."
        ) from None


_PREFIXES: Mapping[str, Callable[[str], TypedSelector]] = {
    "at": _of_keyword,
    "phrase": phrase,
    "kind": kind,
    "role": role,
    "name": name,
    "positions": _of_numbers,
    "predicts": lambda rest: predicts(parse(rest)),
}
_MADE_BY = (phrase, kind, role, patch, box, name, positions, predicts)
_NAMES = KEYWORDS | {each.__name__: each for each in _MADE_BY}


def _evaluated(expression: str) -> TypedSelector:
    """Return the selector of an expression such as ``at.last | at.image(1)``."""
    try:
        found = _value(ast.parse(expression, mode="eval").body)
        if isinstance(found, TypedSelector):
            return found
    except (
        *(SyntaxError, TypeError, ValueError, PositionError),
        *(RecursionError, MemoryError),
    ) as error:
        if isinstance(error, InputError):
            raise
    raise InputError(
        f"{expression!r} is not a selector. Write it as in Python, such as "
        "at.phrase('circle', occurrence=1); the names are "
        f"{', '.join(f'at.{each}' for each in _NAMES)}."
    )


def _value(node: ast.expr) -> Any:
    """Return the value of a part of an expression, which may name selectors only."""
    match node:
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return _union(_value(left), _value(right))
        case ast.Attribute(value=ast.Name(id="at"), attr=attribute) if attribute in _NAMES:
            return _NAMES[attribute]
        case ast.Call(func=ast.Attribute() as function, args=args, keywords=options):
            called = _value(function)
            given = {str(each.arg): _value(each.value) for each in options}
            return called(*(_value(each) for each in args), **given)
        case _:
            return ast.literal_eval(node)
