"""The positions of a sample that a selector selects.

:mod:`xmodal_interp.at` describes selectors. Each typed selector has a function in this module that
returns its positions in one of three places:

* the sequence of the language tower (``Sample.tokens``);
* the positions of an image in the vision tower;
* the keys of cross-attention to images (``Sample.cross_keys``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor

from xmodal_interp.at import (
    UNION,
    Selector,
    TypedSelector,
    is_function,
    is_union,
    keyword,
    name,
    name_of,
    phrase,
)
from xmodal_interp.attention import entries_of, resolve
from xmodal_interp.errors import InputError, PhraseError, PositionError, quoted

if TYPE_CHECKING:
    from xmodal_interp.sample import Sample


def positions_of(
    sample: Sample,
    selector: Selector,
    *,
    predicts: bool = False,
    tower: str = "language",
    image: int = 0,
) -> Int[Tensor, " position"]:
    """Return the positions that a selector selects, as a tensor; see :meth:`Sample.positions`.

    Args:
        sample: The sample.
        selector: The selector.
        predicts: Return the positions that predict the selected tokens.
        tower: ``"language"``; ``"vision"``; or ``"cross"`` for the keys of ``Sample.cross_keys``.
        image: In the vision tower, index of the image; videos follow the images.
    """
    return _found(_Place(sample, tower, image), selector, predicts=predicts)


def of_function(sample: Sample, selector: Any) -> Any:
    """Return what a function of the sample returns; any other selector unchanged.

    Raises:
        PositionError: The function returns no selector.
    """
    if not is_function(selector):
        return selector
    given = selector(sample)
    known = isinstance(given, (slice, str, TypedSelector)) or is_union(given)
    if not known and entries_of(given) is None:
        raise PositionError(
            f"The {name_of(selector)} returned {quoted(given)} for sample {sample.name!r}. It must "
            "return positions, a slice, a boolean mask, a phrase, a selector of xi.at, or a list "
            "of these."
        )
    return given


@dataclass(frozen=True, eq=False)
class _Place:
    """Where a selector is resolved; see :func:`positions_of` for the attributes."""

    sample: Sample
    tower: str
    image: int

    @property
    def n_positions(self) -> int:
        if self.tower == "vision":
            return len(self.sample.patch_names(self.image))
        return len(self.table)

    @property
    def table(self) -> pd.DataFrame:
        """One row per position, with the columns of a token table that hold its place."""
        if self.tower == "language":
            return self.sample.tokens
        if self.tower == "cross":
            keys = self.sample.cross_keys
            return self.sample.tokens.iloc[:0] if keys is None else keys
        return _patch_table(self.sample, self.image)

    @property
    def title(self) -> str:
        """The place, for messages."""
        sample = f"sample {self.sample.name!r}"
        if self.tower == "vision":
            return f"the vision tower of {sample}"
        return f"the cross-attention keys of {sample}" if self.tower == "cross" else sample

    def typed(self, given: str) -> TypedSelector:
        """Return the typed selector of a string."""
        found = keyword(given)
        if self.tower == "vision":
            return name(given) if found is None or given in self._names else found
        if self.tower == "cross" and found is None:
            raise InputError(
                f"The phrase {given!r} selects text, but keys of cross-attention are image "
                "tokens. Pass at.image, at.patch(row, column), or numbers."
            )
        if found is None:
            return phrase(given)
        if self.tower == "language" and self.sample.has_word(given):
            raise PhraseError(
                f"{given!r} is ambiguous: it is a keyword and a word in the text of sample "
                f"{self.sample.name!r}. Pass xi.{found!r} for the keyword, or "
                f"xi.{phrase(given)!r} for the word."
            )
        return found

    @property
    def _names(self) -> set[str]:
        return set(self.sample.patch_names(self.image).tolist())


def _patch_table(sample: Sample, number: int) -> pd.DataFrame:
    """Return the table of the vision-tower positions of an image; videos follow the images."""
    names, n_images = sample.patch_names(number), len(sample.grids)
    grid: Any = (*sample.grids, *sample.video_grids)[number]
    kind = "image" if number < n_images else "video"
    number -= 0 if number < n_images else n_images
    places = grid.patch_places.astype(float)
    places[places < 0] = np.nan
    columns = dict(zip(("frame", "row", "col")[-places.shape[1] :], places.T, strict=True))
    boxes = getattr(grid, "patch_boxes", None)
    boxes = np.full((len(places), 4), np.nan) if boxes is None else boxes
    is_special = np.isnan(places[:, -1])
    kinds = np.where(names == "padding", "padding", np.where(is_special, "special", kind))
    table = pd.DataFrame({"kind": kinds, "image": np.nan, "video": np.nan, "frame": np.nan})
    table = table.assign(view="image", **columns)
    table[kind] = number
    return table.assign(**dict(zip(("x0", "y0", "x1", "y1"), np.asarray(boxes).T, strict=True)))


def _found(place: _Place, selector: Any, *, predicts: bool) -> Int[Tensor, " position"]:
    sample = place.sample
    if predicts and place.tower != "language":
        raise InputError(
            "predicts=True selects positions of the language tower; positions of the "
            "vision tower predict no token. Leave predicts out."
        )
    if is_function(selector):
        given = of_function(sample, selector)
        try:
            return _found(place, given, predicts=predicts)
        except PositionError as error:
            raise PositionError(
                f"The {name_of(selector)} returned {quoted(given)} for sample {sample.name!r}. "
                f"{error}"
            ) from None
    if isinstance(selector, str):
        selector = place.typed(selector)
    if isinstance(selector, TypedSelector):
        if selector.rule == UNION:
            selector = list(selector.arguments)
        else:
            return torch.from_numpy(_of_typed(place, selector, predicts=predicts))
    if is_union(selector):
        each = (_found(place, one, predicts=predicts) for one in selector)
        return torch.tensor(sorted({int(i) for of_one in each for i in of_one}), dtype=torch.long)
    found = resolve(selector, place.n_positions, "position")
    return torch.from_numpy(sample.before(found.numpy())) if predicts else found


def _of_typed(
    place: _Place, selector: TypedSelector, *, predicts: bool
) -> Int[np.ndarray, " position"]:
    """Return the positions of a typed selector that is not a union."""
    sample, options = place.sample, dict(selector.options)
    if selector.rule in _OF_TEXT and place.tower != "language":
        raise InputError(
            f"{selector!r} selects positions of the language tower; got it for {place.title}. Pass "
            "at.image, at.patch(row, column), a name of the tower, or numbers."
        )
    if selector.rule == "phrase":
        return sample.find(*selector.arguments, **options, predicts=predicts)
    if selector.rule == "answer":
        return _answer(sample, predicts=predicts)
    if selector.rule == "predicts":
        found = _found(place, *selector.arguments, predicts=True).numpy()
    else:
        found = _RULES[selector.rule](place, *selector.arguments, **options)
    return sample.before(found) if predicts else found


def _answer(sample: Sample, *, predicts: bool) -> Int[np.ndarray, " position"]:
    tokens = sample.where(role="generated")
    if predicts and sample.has_unread_token:
        tokens = np.append(tokens, len(sample))
    if len(tokens):
        return sample.before(tokens) if predicts else tokens
    if sample.has_unread_token:
        raise PhraseError(
            f"The answer {sample.answer!r} of sample {sample.name!r} has no attention row: its "
            "only token was generated last and was not fed back to the model. Pass "
            "xi.at.predicts(xi.at.answer), the row that predicts it, or capture more tokens."
        )
    raise InputError(
        f"Sample {sample.name!r} has no answer: no token was generated. Capture it with "
        "max_new_tokens=, or choose other positions."
    )


def _last(place: _Place) -> Int[np.ndarray, " position"]:
    return np.array([place.sample.last])


def _text(place: _Place) -> Int[np.ndarray, " position"]:
    after = place.sample.text_after_image()
    if len(after) == 0:
        raise InputError(
            f"at.text selects text after the last image token; sample {place.sample.name!r} has no "
            "such text. Choose other positions, or put the question after the image."
        )
    return after


def _prompt(place: _Place) -> Int[np.ndarray, " position"]:
    sample = place.sample
    return np.flatnonzero(sample.kinds[: sample.n_prompt] != "padding")


def _role(place: _Place, of: str, turn: int | None = None) -> Int[np.ndarray, " position"]:
    sample = place.sample
    found = sample.where(role=of, turn=turn)
    if not len(found):
        there = ", ".join(sample.tokens["role"].dropna().unique().tolist())
        of_turn = "" if turn is None else f" in turn {turn}"
        raise InputError(
            f"Sample {sample.name!r} has no tokens with the role {of!r}{of_turn}; its roles are "
            f"{there}. Choose one of them."
        )
    return found


def _kind(place: _Place, of: str) -> Int[np.ndarray, " position"]:
    found = np.flatnonzero(place.table["kind"].to_numpy(dtype=object) == of)
    if not len(found):
        raise InputError(f"There are no {of} tokens in {place.title}. Choose other positions.")
    return found


def _special(place: _Place) -> Int[np.ndarray, " position"]:
    return _kind(place, "special")


def _visual(
    place: _Place, of: str, number: int | None, frame: int | None = None
) -> Int[np.ndarray, " position"]:
    """Return the tokens of all images or videos, or of one."""
    if number is None:
        return _kind(place, of)
    sample = place.sample
    grids = sample.grids if of == "image" else sample.video_grids
    if number >= len(grids):
        raise InputError(f"There is no {of} {number}: {_how_many(sample, of, len(grids))}.")
    table = place.table
    mask = (table["kind"].to_numpy(dtype=object) == of) & _equal(table[of], number)
    if not mask.any():
        raise InputError(f"There are no tokens of {of} {number} in {place.title}.")
    if frame is not None:
        frames = table["frame"][mask].dropna()
        mask &= _equal(table["frame"], frame)
        if not mask.any():
            raise InputError(
                f"There is no frame {frame}: {of} {number} of sample {sample.name!r} has "
                f"{frames.nunique()} frames of tokens, numbered from 0."
            )
    return np.flatnonzero(mask)


def _how_many(sample: Sample, of: str, n: int) -> str:
    """Return how many images or videos a sample has."""
    if n < 2:
        return f"sample {sample.name!r} has {f'1 {of}, {of} 0' if n else f'no {of}s'}"
    return f"sample {sample.name!r} has {n} {of}s, {of} 0 to {of} {n - 1}"


def _image(place: _Place, number: int | None = None) -> Int[np.ndarray, " position"]:
    return _visual(place, "image", number)


def _video(
    place: _Place, number: int | None = None, frame: int | None = None
) -> Int[np.ndarray, " position"]:
    return _visual(place, "video", number, frame)


def _patch(
    place: _Place, row: int, column: int, image: int | None = None
) -> Int[np.ndarray, " position"]:
    tokens, number = _of_one_image(place, image)
    table = place.table.iloc[tokens]
    is_placed = _equal(table["view"], "image")
    found: np.ndarray = tokens[is_placed & _equal(table["row"], row) & _equal(table["col"], column)]
    if not len(found):
        rows, columns = (table[each][is_placed].dropna() for each in ("row", "col"))
        size = (
            f"{int(rows.max()) + 1} rows and {int(columns.max()) + 1} columns" if len(rows) else ""
        )
        raise InputError(
            f"There is no token in row {row}, column {column} of image {number} of {place.title}: "
            f"{f'its grid has {size}' if size else 'its tokens have no rows and columns'}."
        )
    return found


def _box(
    place: _Place, corners: tuple[Any, ...], image: int | None = None
) -> Int[np.ndarray, " position"]:
    tokens, number = _of_one_image(place, image)
    boxes = place.table.iloc[tokens][["x0", "y0", "x1", "y1"]].to_numpy(dtype=float)
    known = ~np.isnan(boxes).any(1)
    if not known.any():
        raise InputError(f"The tokens of image {number} of {place.title} have no boxes.")
    wanted = np.array(corners, dtype=float).reshape(-1, 1, 4)
    low = np.maximum(boxes[:, :2], wanted[..., :2])
    high = np.minimum(boxes[:, 2:], wanted[..., 2:])
    found: np.ndarray = tokens[known & (low < high).all(-1).any(0)]
    if not len(found):
        covered = [*boxes[known, :2].min(0).tolist(), *boxes[known, 2:].max(0).tolist()]
        raise InputError(
            f"No token of image {number} of {place.title} overlaps the box {list(corners)}. The "
            f"tokens cover {covered}."
        )
    return found


def _of_one_image(place: _Place, image: int | None) -> tuple[Int[np.ndarray, " position"], int]:
    """Return the tokens of an image and its index."""
    number = (place.image if place.tower == "vision" else 0) if image is None else image
    return _image(place, number), number


def _name(place: _Place, of: str) -> Int[np.ndarray, " position"]:
    sample = place.sample
    if place.tower != "vision":
        raise InputError(
            f"at.name({of!r}) selects positions of the vision tower; got it for {place.title}. "
            f"Pass tower='vision', or at.phrase({of!r}) for the words."
        )
    names = sample.patch_names(place.image)
    groups = np.array([each.rstrip("0123456789 ") for each in names.tolist()], dtype=object)
    rows = np.flatnonzero((names == of) | (groups == of))
    if not len(rows):
        known = ", ".join(dict.fromkeys(groups.tolist()))
        raise PhraseError(
            f"No position of the vision tower of sample {sample.name!r} is named {of!r}; "
            f"the names are {known}. Pass one of them, or positions as numbers."
        )
    return rows


def _positions(
    place: _Place, numbers: tuple[Any, ...] | None = None, **ends: int
) -> Int[np.ndarray, " position"]:
    given = slice(*map(ends.get, ("start", "stop", "step"))) if numbers is None else numbers
    found: np.ndarray = resolve(given, place.n_positions, "position").numpy()
    return found


def _equal(column: pd.Series, value: Any) -> np.ndarray:
    """Return where a column equals a value; False where it is missing."""
    return column.eq(value).fillna(value=False).to_numpy(dtype=bool)


_OF_TEXT = ("last", "text", "prompt", "answer", "phrase", "role", "predicts")
_RULES: Mapping[str, Callable[..., Int[np.ndarray, " position"]]] = {
    "last": _last,
    "text": _text,
    "prompt": _prompt,
    "role": _role,
    "kind": _kind,
    "special": _special,
    "image": _image,
    "video": _video,
    "patch": _patch,
    "box": _box,
    "name": _name,
    "positions": _positions,
}
