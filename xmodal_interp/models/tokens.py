"""What stands at each position: text, kind, role, image, grid cell, pixel box, character span.

1. Every position has its characters in the prompt, or is of an expansion (``alignment``).
2. Image and video tokens of an expansion get the rows, columns and boxes of its grid, one for one;
   its other tokens are markers, breaks and text of the processor's own.
3. Roles come from where the messages' texts stand in the rendered prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from xmodal_interp.errors import GeometryError
from xmodal_interp.models.alignment import IMAGE, VIDEO, Alignment, Position, special_ids
from xmodal_interp.models.rendering import Span
from xmodal_interp.vocabulary import TOKEN_COLUMNS

if TYPE_CHECKING:
    from xmodal_interp.models.geometry import ImageGrid, VideoGrid


@dataclass(frozen=True)
class Placeholders:
    """Ids of the tokens whose embeddings are features of images or videos.

    None where a family has no such token, or where images are not in the sequence.
    """

    image: int | None
    video: int | None = None


FEATURE = -1
"""In place of an id, where an image's feature stands that has no id of its own."""


Columns = dict[str, Any]
"""Columns of a token table, one entry per position, before they are typed."""


def token_columns(
    ids: Sequence[int],
    attended: Sequence[bool],
    alignment: Alignment,
    tokenizer: Any,
    placeholders: Placeholders,
    spans: Sequence[Span],
    aligned: Sequence[bool],
) -> Columns:
    """What stands at each position of a prompt, padding included: columns of the token table.

    Places are still missing; :func:`with_places` adds them. A word that the vocabulary lacks is
    text, though its token, the unknown one, is among the special tokens; ``token`` says what is
    read in its place, ``start`` and ``end`` where it stands.

    Args:
        ids: Token ids as the model gets them.
        attended: False on padding.
        alignment: The positions in ``aligned``.
        tokenizer: A fast tokenizer.
        placeholders: Ids of image and video tokens.
        spans: Whose text is where.
        aligned: Which positions the alignment is of.
    """
    pieces = _pieces(tokenizer, ids)
    special = special_ids(tokenizer)
    added = special | set(getattr(tokenizer, "added_tokens_decoder", {}))
    placed = iter(alignment.positions)
    nothing = Position(-1, -1, None, None)
    positions = [next(placed) if written else nothing for written in aligned]
    columns: dict[str, list[Any]] = {
        name: [] for name in ("token", "kind", "role", "image", "video", "start", "end")
    }
    number = _numbers(alignment.expansions)
    for token, piece, seen, at in zip(ids, pieces, attended, positions, strict=True):
        modality = None if at.expansion is None else alignment.expansions[at.expansion]
        markers = special if modality is None else added
        written = at.written or alignment.text[at.start : at.end]
        outside = modality is None and at.end > at.start
        lacking = token == tokenizer.unk_token_id and written.strip() != tokenizer.unk_token
        if lacking and (outside or at.written is not None):
            markers = markers - {token}
        kind = _kind(token, placeholders, markers, modality) if seen else "padding"
        written_here = outside or (kind == "text" and at.written is not None)
        columns["token"].append(written if written_here and token not in special else piece)
        columns["kind"].append(kind)
        columns["role"].append(_role(kind, modality, at, spans))
        of = np.nan if at.expansion is None else number[at.expansion]
        columns["image"].append(of if kind == IMAGE else np.nan)
        columns["video"].append(of if kind == VIDEO else np.nan)
        columns["start"].append(at.start)
        columns["end"].append(at.end)
    return columns


def _pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The vocabulary's entry for each id."""
    known: list[str] = tokenizer.convert_ids_to_tokens([max(token, 0) for token in ids])
    return [
        "<image>" if token == FEATURE else piece for token, piece in zip(ids, known, strict=True)
    ]


def _numbers(expansions: Sequence[str]) -> list[int]:
    """Which image, or which video, each expansion is."""
    return [list(expansions[:i]).count(modality) for i, modality in enumerate(expansions)]


def _kind(token: int, placeholders: Placeholders, special: set[int], modality: str | None) -> str:
    if token in (placeholders.image, placeholders.video):
        in_video = modality == VIDEO or (modality is None and token == placeholders.video)
        return VIDEO if in_video or token != placeholders.image else IMAGE
    return "special" if token in special else "text"


def _role(kind: str, modality: str | None, at: Position, spans: Sequence[Span]) -> str | None:
    """A token belongs to the message that its span touches.

    What no message wrote is the template's, markers and text in an expansion too.
    """
    if kind == "padding":
        return None
    if at.end <= at.start or (modality is not None and kind not in (IMAGE, VIDEO)):
        return "template"
    touched = (span.role for span in spans if at.start < span.end and at.end > span.start)
    return next(touched, "template")


def with_places(
    columns: Columns, grids: Sequence[ImageGrid], videos: Sequence[VideoGrid] = ()
) -> Columns:
    """The columns, with row, column, box, tile, view and frame of image and video tokens.

    Raises:
        GeometryError: An image or video does not have as many tokens as its grid.
    """
    kinds = np.asarray(columns["kind"])
    places = {name: np.full(len(kinds), np.nan) for name in _PLACES}
    view = np.full(len(kinds), None, dtype=object)
    for kind, all_of in ((IMAGE, grids), (VIDEO, videos)):
        number, is_kind = np.asarray(columns[kind], dtype=float), kinds == kind
        stray = int((is_kind & ~np.isin(number, np.arange(len(all_of)))).sum())
        if stray:
            raise GeometryError(
                f"Each {kind} token must be of one of the {kind}s given. There are {len(all_of)}, "
                f"and {stray} {kind} tokens beside theirs."
            )
        for index, grid in enumerate(all_of):
            _fill(places, view, np.flatnonzero(is_kind & (number == index)), grid, kind, index)
    return {**columns, **places, "view": view}


def token_table(columns: Columns) -> pd.DataFrame:
    """One row per position; the columns are ``TOKEN_COLUMNS``."""
    return _table(columns, len(columns["token"]))


_PLACES = ("row", "col", "tile", "frame", "x0", "y0", "x1", "y1")


def _fill(
    columns: dict[str, np.ndarray],
    view: np.ndarray,
    positions: np.ndarray,
    grid: Any,
    kind: str,
    index: int,
) -> None:
    """Put a grid's places on the positions of its tokens."""
    if grid.n_tokens != len(positions):
        raise GeometryError(
            f"A rule must give each {kind} as many tokens as it has in the sequence. For {kind} "
            f"{index} it gives {grid.n_tokens} ({grid.rows} x {grid.cols}); the sequence has "
            f"{len(positions)}."
        )
    for name, values in _columns_of(grid, kind).items():
        if name == "view":
            view[positions] = values
        else:
            columns[name][positions] = values


def _columns_of(grid: Any, kind: str) -> dict[str, np.ndarray]:
    """Columns of a grid's tokens in sequence order; NaN (None for the view) without a place."""
    boxes = dict(zip(("x0", "y0", "x1", "y1"), grid.boxes.T, strict=True))
    *frames, row, col = _missing(grid.places_by_view).T
    tile = np.full(len(row), np.nan) if grid.tiles is None else _missing(grid.tiles)
    view = np.where(grid.in_thumbnail, "thumbnail", "image").astype(object)
    view[np.isnan(row)] = None
    columns = {"row": row, "col": col, "tile": tile, "view": view, **boxes}
    return columns | {"frame": frames[0]} if kind == VIDEO else columns


def _missing(numbers: np.ndarray) -> np.ndarray:
    """Numbers with NaN for ``NOWHERE``."""
    return np.where(numbers < 0, np.nan, numbers.astype(float))


def grid_table(grids: Sequence[ImageGrid]) -> pd.DataFrame:
    """One row per image token of all grids in order: the keys of a cross-attention."""
    counts = [grid.n_tokens for grid in grids]
    n = sum(counts)
    image, none = np.repeat(np.arange(len(grids)), counts), np.full(n, np.nan)
    bare = {"kind": [IMAGE] * n, "image": image, "video": none, "start": -1, "end": -1}
    return _table(with_places(bare, grids), n)


def separator_behind(text: str) -> str:
    """What stands between a prompt and its answer: a space, if the prompt does not end in one."""
    return "" if text.endswith((" ", "\n")) else " "


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
    special = special_ids(tokenizer)
    pieces = tokenizer.convert_ids_to_tokens(list(ids))
    columns: dict[str, list[Any]] = {name: [] for name in ("token", "kind", "start", "end")}
    decoded = tokenizer.decode(answer, skip_special_tokens=True)
    begin = len(text) + len(separator_behind(text))
    spans = _generated_spans(ids, decoded, tokenizer, special)
    for token, piece, (start, end) in zip(ids, pieces, spans, strict=True):
        columns["token"].append(piece if token in special else decoded[start:end].strip() or piece)
        columns["kind"].append("special" if token in special else "text")
        columns["start"].append(begin + start)
        columns["end"].append(begin + end)
    table = _table({**columns, "role": ["generated"] * len(ids)}, len(ids), n_before)
    return table, text + (separator_behind(text) + decoded if decoded else "")


def _generated_spans(
    ids: Sequence[int], decoded: str, tokenizer: Any, special: set[int]
) -> list[tuple[int, int]]:
    """The characters of a decoded answer that each token has a part in, white space left out.

    A character of several tokens, each with some of its bytes, is that of all of them. A token may
    change the characters before it (some tokenizers take spaces away), so a character is settled
    when no later token changes it; tokens that are settled together are found one by one.

    Args:
        ids: The tokens; special ones have no character.
        decoded: The whole answer, which may go on.
        tokenizer: The tokenizer.
        special: Ids of special tokens.
    """
    spans: list[tuple[int, int]] = []
    waiting: list[int] = []  # tokens that have settled no character yet
    settled = 0
    for number, token in enumerate(ids):
        if token in special:
            spans.append((settled, settled))
            continue
        so_far = tokenizer.decode(ids[: number + 1], skip_special_tokens=True)
        stop = max(_n_in_common(so_far, decoded), settled)
        unfinished = len(so_far) > stop  # has bytes of the next character
        end = min(stop + unfinished, len(decoded))
        spans.append((settled, end))
        if stop == settled and unfinished:
            waiting.append(number)
            continue
        if waiting:
            alone = [tokenizer.decode([ids[i]]).strip() for i in (*waiting, number)]
            for i, span in zip(
                (*waiting, number), _one_by_one(alone, decoded, settled, end), strict=False
            ):
                spans[i] = span
        waiting, settled = [], stop
    return [_without_space(decoded, start, end) for start, end in spans]


def _one_by_one(pieces: Sequence[str], text: str, start: int, end: int) -> list[tuple[int, int]]:
    """Where pieces stand in order within a text; empty if some do not, as parts of a character."""
    spans = []
    for piece in pieces:
        at = text.find(piece, start, end) if piece else -1
        if at < 0:
            return []
        spans.append((at, at + len(piece)))
        start = at + len(piece)
    return spans


def _n_in_common(one: str, other: str) -> int:
    """How many characters two strings begin with alike."""
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _without_space(text: str, start: int, end: int) -> tuple[int, int]:
    """A span without the white space that it begins with."""
    return end - len(text[start:end].lstrip()), end


_INTEGERS = ("image", "video", "tile", "frame", "row", "col", "start", "end")
_FLOATS = ("x0", "y0", "x1", "y1")


def _table(columns: Columns, n_rows: int, start: int = 0) -> pd.DataFrame:
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
