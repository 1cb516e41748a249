"""What stands at each position: text, kind, role, image, grid cell, pixel box, character span.

1. Tokenise the prompt as written, with character offsets.
2. Expand each image placeholder to the tokens of its grid: the ids that the processor returned must
   be just these.
3. Put each image's rows, columns and boxes on its run.
4. Roles come from where the messages' texts stand in the rendered prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from xmodal_interp.errors import GeometryError, InputError
from xmodal_interp.vocabulary import TOKEN_COLUMNS

if TYPE_CHECKING:
    from xmodal_interp.models.geometry import ImageGrid


@dataclass(frozen=True)
class Span:
    """A stretch of the rendered prompt, in characters, and whose it is."""

    role: str
    start: int
    end: int


@dataclass(frozen=True)
class Placeholders:
    """Ids that the processor expands.

    None where a family has no such token, or where images are not in the sequence.
    """

    image: int | None
    video: int | None = None


def token_table(
    ids: Sequence[int],
    attended: Sequence[bool],
    text: str,
    tokenizer: Any,
    placeholders: Placeholders,
    grids: Sequence[ImageGrid],
    spans: Sequence[Span],
) -> pd.DataFrame:
    """One row per position of a prompt, padding included; columns are ``TOKEN_COLUMNS``.

    Args:
        ids: Token ids as the model gets them.
        attended: False on padding.
        text: The rendered prompt before the processor expanded its placeholders.
        tokenizer: A fast tokenizer.
        placeholders: Ids of image and video placeholders.
        grids: One per image, in order; empty if images are not in the sequence.
        spans: Whose text is where.

    Raises:
        GeometryError: The ids are not the prompt's own tokens with each image placeholder expanded
            to its grid.
    """
    pieces = tokenizer.convert_ids_to_tokens(list(ids))
    special = set(tokenizer.all_special_ids)
    offsets = _offsets(ids, attended, text, tokenizer, placeholders, grids)
    kinds = [
        _kind(token, placeholders, special) if seen else "padding"
        for token, seen in zip(ids, attended, strict=True)
    ]
    roles = {span: _role(*span, spans) for span in set(offsets)}
    columns: dict[str, Any] = {
        "token": [
            text[start:end] if end > start and token not in special else piece
            for piece, token, (start, end) in zip(pieces, ids, offsets, strict=True)
        ],
        "kind": kinds,
        "role": [None if k == "padding" else roles[o] for k, o in zip(kinds, offsets, strict=True)],
        "start": [start for start, _ in offsets],
        "end": [end for _, end in offsets],
    }
    if placeholders.image is not None:
        columns |= _places(np.array(kinds) == "image", grids)
    return _table(columns, len(ids))


def _kind(token: int, placeholders: Placeholders, special: set[int]) -> str:
    if token == placeholders.image:
        return "image"
    if token == placeholders.video:
        return "video"
    return "special" if token in special else "text"


def grid_table(grids: Sequence[ImageGrid]) -> pd.DataFrame:
    """One row per image token of all grids in order: the keys of a cross-attention."""
    n_tokens = sum(grid.n_tokens for grid in grids)
    places = _places(np.ones(n_tokens, dtype=bool), grids)
    return _table({"kind": ["image"] * n_tokens, "start": -1, "end": -1, **places}, n_tokens)


def generated_table(
    read: Sequence[int], answer: Sequence[int], tokenizer: Any, n_before: int, text: str
) -> tuple[pd.DataFrame, str]:
    """Rows for the generated tokens, and the text with the answer.

    Args:
        read: The generated tokens that the model has read, so that they are positions.
        answer: All generated tokens.
        tokenizer: The tokenizer.
        n_before: Positions of the prompt.
        text: The prompt's text.
    """
    ids = list(read)
    special = set(tokenizer.all_special_ids)
    pieces = tokenizer.convert_ids_to_tokens(list(ids))
    columns: dict[str, list[Any]] = {name: [] for name in ("token", "kind", "start", "end")}
    separator = "" if text.endswith((" ", "\n")) else " "
    before = ""
    for i, token in enumerate(ids):
        after = tokenizer.decode(ids[: i + 1], skip_special_tokens=True)
        piece, end = after[len(before) :], len(text) + len(separator) + len(after)
        columns["token"].append(pieces[i] if token in special else piece.strip() or pieces[i])
        columns["kind"].append("special" if token in special else "text")
        columns["start"].append(end - len(piece.lstrip()))
        columns["end"].append(end)
        before = after
    table = _table({**columns, "role": ["generated"] * len(ids)}, len(ids), n_before)
    decoded = tokenizer.decode(answer, skip_special_tokens=True)
    return table, text + (separator + decoded if decoded else "")


def message_spans(text: str, messages: Sequence[dict[str, Any]]) -> list[Span]:
    """Where the texts of the messages stand in the rendered prompt.

    A message reaches from its first part to its last.
    """
    spans, cursor = [], 0
    for message in messages:
        content = message["content"]
        parts = (
            [content]
            if isinstance(content, str)
            else [p["text"] for p in content if p["type"] == "text"]
        )
        for part in parts:
            start = text.find(part.strip(), cursor)
            if start < 0:
                raise InputError(
                    f"A chat template must render every message text as it is. The text {part!r} "
                    "is not in the rendered "
                    f"prompt {text!r}."
                )
            cursor = start + len(part.strip())
            spans.append(Span(message["role"], start, cursor))
    return spans


def _offsets(
    ids: Sequence[int],
    attended: Sequence[bool],
    text: str,
    tokenizer: Any,
    placeholders: Placeholders,
    grids: Sequence[ImageGrid],
) -> list[tuple[int, int]]:
    """Character span of each position in the unexpanded text.

    An expanded run has the span of its placeholder.
    """
    real = [token for token, seen in zip(ids, attended, strict=True) if seen]
    own = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
    if own["input_ids"][:1] != real[:1]:
        own = tokenizer(text, return_offsets_mapping=True)
    counts = iter([grid.n_tokens for grid in grids])
    expected: list[int] = []
    spans: list[tuple[int, int]] = []
    for token, span in zip(own["input_ids"], own["offset_mapping"], strict=True):
        repeats = next(counts, 1) if token == placeholders.image else 1
        expected += [token] * repeats
        spans += [tuple(span)] * repeats
    if expected != real:
        raise GeometryError(
            "The processor must expand each image placeholder to the tokens of its grid, and "
            "nothing else. Expected were "
            f"{len(expected)} positions, {sum(token == placeholders.image for token in expected)} "
            "of them image tokens "
            f"({', '.join(f'{g.rows} x {g.cols}' for g in grids) or 'no grid'}); the processor "
            f"returned {len(real)} and "
            f"{sum(token == placeholders.image for token in real)}."
        )
    placed = iter(spans)
    return [next(placed) if seen else (-1, -1) for seen in attended]


def _role(start: int, end: int, spans: Sequence[Span]) -> str:
    """A token belongs to the message that its span touches.

    What no message wrote is the template's.
    """
    if end <= start:
        return "template"
    return next((span.role for span in spans if start < span.end and end > span.start), "template")


def _places(is_image: np.ndarray, grids: Sequence[ImageGrid]) -> dict[str, np.ndarray]:
    """Image, row, column and box of image tokens, in order; NaN everywhere else."""
    expected = sum(grid.n_tokens for grid in grids)
    if expected != is_image.sum():
        raise GeometryError(
            f"Image tokens and grids must agree. The sequence has {is_image.sum()} image tokens; "
            f"the grids ({', '.join(f'{g.rows} x {g.cols}' for g in grids) or 'none'}) have "
            f"{expected}."
        )
    names = ("image", "row", "col", "x0", "y0", "x1", "y1")
    cells = np.full((len(is_image), len(names)), np.nan)
    if grids:
        image = np.repeat(np.arange(len(grids)), [grid.n_tokens for grid in grids])
        places = np.concatenate([grid.places for grid in grids]).astype(float)
        places[places[:, 0] < 0] = np.nan
        boxes = np.concatenate([grid.boxes for grid in grids])
        cells[is_image] = np.column_stack([image, places, boxes])
    return dict(zip(names, cells.T, strict=True))


_INTEGERS = ("image", "row", "col", "start", "end")
_FLOATS = ("x0", "y0", "x1", "y1")


def _table(columns: dict[str, Any], n_rows: int, start: int = 0) -> pd.DataFrame:
    """Columns in the order of the vocabulary, each with its type; the missing ones are empty."""
    typed: dict[str, Any] = {}
    for name in TOKEN_COLUMNS:
        if name in _FLOATS:
            typed[name] = np.broadcast_to(columns.get(name, np.nan), n_rows).astype(float)
        elif name in _INTEGERS:
            values = np.broadcast_to(np.asarray(columns.get(name, np.nan), dtype=float), n_rows)
            missing = np.isnan(values)
            typed[name] = pd.arrays.IntegerArray(
                np.where(missing, 0, values).astype(np.int64), missing
            )
        else:
            typed[name] = pd.array(columns.get(name, [None] * n_rows), dtype="string")
    return pd.DataFrame(typed, index=pd.RangeIndex(start, start + n_rows, name="position"))
