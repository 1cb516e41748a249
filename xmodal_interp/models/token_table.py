"""Token tables: string, kind, role, image, grid cell, pixel box and character span per position.

1. Each position is matched with its characters in the prompt, or belongs to the expansion of a
   placeholder (see ``alignment``).
2. The image and video tokens of an expansion get the rows, columns and boxes of its grid, in order.
   The other tokens of an expansion are markers, line breaks and text that the processor inserted.
3. Roles are found from the spans of the messages in the rendered prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from xmodal_interp.errors import GeometryError
from xmodal_interp.models.alignment import (
    IMAGE,
    UNALIGNED,
    VIDEO,
    Alignment,
    TokenSpan,
    special_ids,
)
from xmodal_interp.models.model_inputs import FEATURE_ID, InputRow
from xmodal_interp.models.prompts import RoleSpan
from xmodal_interp.vocabulary import NEXT_COLUMNS, TOKEN_COLUMNS, TURN, VIDEO_COLUMNS

if TYPE_CHECKING:
    from xmodal_interp.models.geometry import ImageGrid, VideoGrid


Columns = dict[str, Any]
"""Columns of a token table, one entry per position, before they get their dtypes."""


def token_columns(
    row: InputRow,
    alignment: Alignment,
    spans: Sequence[RoleSpan],
    tokenizer: Any,
    *,
    image_id: int | None,
    video_id: int | None,
) -> Columns:
    """Return columns of the token table for each position of a prompt, padding included.

    :func:`with_places` adds rows, columns and boxes. A word that is not in the vocabulary has the
    kind ``text``, although the unknown token is a special token; ``token`` is the unknown token,
    and ``start`` and ``end`` are the span of the word.

    Args:
        row: The ids that the model reads.
        alignment: Alignment of the positions that are True in ``row.aligned``.
        spans: The span, role and turn of each message.
        tokenizer: A fast tokenizer.
        image_id: Id of image tokens; None if images are not in the sequence.
        video_id: Id of video tokens; None if the family has none.
    """
    pieces = _pieces(tokenizer, row.ids)
    special = special_ids(tokenizer)
    added = special | set(getattr(tokenizer, "added_tokens_decoder", {}))
    unknown_id, unknown = tokenizer.unk_token_id, tokenizer.unk_token
    aligned_tokens, number = iter(alignment.tokens), _numbers(alignment.expansions)
    rows: list[tuple[Any, ...]] = []
    before: tuple[Any, ...] = ()
    for token, piece, attended, aligned in zip(
        row.ids, pieces, row.attended, row.aligned, strict=True
    ):
        span = next(aligned_tokens) if aligned else UNALIGNED
        if before and before[0] is span and before[1:] == (token, attended):  # one more of an image
            rows.append(rows[-1])
            continue
        before = (span, token, attended)
        modality = None if span.expansion is None else alignment.expansions[span.expansion]
        of_prompt = modality is None and span.end > span.start
        written = span.written or alignment.text[span.start : span.end]
        markers = special if modality is None else added
        is_unknown = token == unknown_id and written.strip() != unknown
        if is_unknown and (of_prompt or span.written is not None):
            markers = markers - {token}
        kind = _kind(token, (image_id, video_id), markers, modality) if attended else "padding"
        has_characters = of_prompt or (kind == "text" and span.written is not None)
        of = np.nan if span.expansion is None else number[span.expansion]
        rows.append(
            (
                written if has_characters and token not in special else piece,
                kind,
                *_role(kind, modality, span, spans),
                of if kind == IMAGE else np.nan,
                of if kind == VIDEO else np.nan,
                span.start,
                span.end,
            )
        )
    names = ("token", "kind", "role", TURN, "image", "video", "start", "end")
    return {name: [each[i] for each in rows] for i, name in enumerate(names)}


def _pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Return the vocabulary entry of each id."""
    unique = list(dict.fromkeys(ids))
    known = tokenizer.convert_ids_to_tokens([max(token, 0) for token in unique])
    piece_of: dict[int, str] = dict(zip(unique, known, strict=True))
    if FEATURE_ID in piece_of:
        piece_of[FEATURE_ID] = "<image>"
    return [piece_of[token] for token in ids]


def _numbers(expansions: Sequence[str]) -> list[int]:
    """Return the number of each expansion among those of its modality."""
    return [list(expansions[:i]).count(modality) for i, modality in enumerate(expansions)]


def _kind(
    token: int, feature_ids: tuple[int | None, int | None], special: set[int], modality: str | None
) -> str:
    """Return the kind of a token that is not padding.

    Args:
        token: Its id.
        feature_ids: The ids of image tokens and of video tokens, which may be equal.
        special: Ids of special tokens.
        modality: The modality of the expansion that it belongs to, if it belongs to one.
    """
    image_id, video_id = feature_ids
    if token in feature_ids:
        in_video = modality == VIDEO or (modality is None and token == video_id)
        return VIDEO if in_video or token != image_id else IMAGE
    return "special" if token in special else "text"


def _role(
    kind: str, modality: str | None, span: TokenSpan, spans: Sequence[RoleSpan]
) -> tuple[str | None, float]:
    """Return the role and the turn of the message that overlaps the token's span.

    Tokens outside all messages have the role ``template`` and no turn (NaN), and so have markers
    and text in an expansion.
    """
    if kind == "padding":
        return None, np.nan
    if span.end <= span.start or (modality is not None and kind not in (IMAGE, VIDEO)):
        return "template", np.nan
    found = (each for each in spans if span.start < each.end and span.end > each.start)
    message = next(found, None)
    if message is None:
        return "template", np.nan
    return message.role, np.nan if message.turn is None else float(message.turn)


_PLACES = ("row", "col", "tile", "frame", "x0", "y0", "x1", "y1")


def with_places(
    columns: Columns, grids: Sequence[ImageGrid], videos: Sequence[VideoGrid] = ()
) -> Columns:
    """Add row, column, box, tile, view and frame of image and video tokens.

    Raises:
        GeometryError: An image or video has another number of tokens than its grid.
    """
    kinds = np.asarray(columns["kind"])
    places: dict[str, np.ndarray] = {name: np.full(len(kinds), np.nan) for name in _PLACES}
    places["view"] = np.full(len(kinds), None, dtype=object)
    if videos:
        places |= {name: np.full(len(kinds), np.nan) for name in VIDEO_COLUMNS}
    by_kind: tuple[tuple[str, Sequence[Any]], ...] = ((IMAGE, grids), (VIDEO, videos))
    for kind, of_kind in by_kind:
        number, is_kind = np.asarray(columns[kind], dtype=float), kinds == kind
        stray = int((is_kind & ~np.isin(number, np.arange(len(of_kind)))).sum())
        if stray:
            raise GeometryError(
                f"{stray} {kind} tokens belong to none of the {len(of_kind)} {kind}s given. "
                f"Write one {kind} placeholder per {kind}, or none."
            )
        for index, grid in enumerate(of_kind):
            positions = np.flatnonzero(is_kind & (number == index))
            if grid.n_tokens != len(positions):
                raise GeometryError(
                    f"By the family's geometry rule, {kind} {index} has {grid.n_tokens} tokens "
                    f"({grid.rows} x {grid.cols}), but the sequence has {len(positions)}. Check "
                    "that processor, family record and model belong together."
                )
            for name, values in _columns_of(grid, kind).items():
                places[name][positions] = values
    return {**columns, **places}


def _columns_of(grid: Any, kind: str) -> dict[str, np.ndarray]:
    """Return columns for a grid's tokens in sequence order; NaN (view: None) outside the grid."""
    boxes = dict(zip(("x0", "y0", "x1", "y1"), grid.boxes.T, strict=True))
    *frames, row, col = _missing(grid.places_by_view).T
    tile = np.full(len(row), np.nan) if grid.tiles is None else _missing(grid.tiles)
    view = np.where(grid.in_thumbnail, "thumbnail", "image").astype(object)
    view[np.isnan(row)] = None
    columns = {"row": row, "col": col, "tile": tile, "view": view, **boxes}
    return columns | {"frame": frames[0], **_in_time(grid, frames[0])} if kind == VIDEO else columns


def _in_time(grid: VideoGrid, frames: np.ndarray) -> dict[str, np.ndarray]:
    """Return ``VIDEO_COLUMNS`` of the tokens of a video; NaN outside the grid."""
    placed = ~np.isnan(frames)
    columns = {name: np.full(len(frames), np.nan) for name in VIDEO_COLUMNS}
    for name, of_frames in zip(VIDEO_COLUMNS, (grid.frame_indices, grid.times), strict=True):
        if of_frames is not None:
            columns[name][placed] = of_frames[frames[placed].astype(int)]
    return columns


def _missing(numbers: np.ndarray) -> np.ndarray:
    """Return the numbers as floats, NaN instead of ``NOWHERE``."""
    return np.where(numbers < 0, np.nan, numbers.astype(float))


def token_table(
    columns: Columns,
    answer: Columns | None = None,
    more: Mapping[str, pd.api.extensions.ExtensionArray] | None = None,
) -> pd.DataFrame:
    """Return a table with one row per position and the columns ``TOKEN_COLUMNS``.

    Args:
        columns: The columns of the prompt.
        answer: The columns of generated tokens, from :func:`generated_columns`.
        more: Further columns, with an entry for each position.
    """
    n_prompt = len(columns["token"])
    n_answer = 0 if answer is None else len(answer["token"])
    if answer is None or not n_answer:
        return _table(columns, n_prompt, more=more)
    nothing = {name: np.nan for name in VIDEO_COLUMNS if name in columns}
    parts = [_table(columns, n_prompt), _table({**nothing, **answer}, n_answer, n_prompt)]
    return pd.concat(parts).assign(**(more or {}))


def grid_table(grids: Sequence[ImageGrid]) -> pd.DataFrame:
    """Return one row per image token of all grids, in order: the keys of a cross-attention."""
    counts = [grid.n_tokens for grid in grids]
    n = sum(counts)
    image, none = np.repeat(np.arange(len(grids)), counts), np.full(n, np.nan)
    bare = {"kind": [IMAGE] * n, "image": image, "video": none, "start": -1, "end": -1}
    return _table(with_places(bare, grids), n)


def answer_separator(text: str) -> str:
    """Return the separator of a prompt and its answer: a space, unless the prompt ends in one."""
    return "" if text.endswith((" ", "\n")) else " "


def generated_columns(
    read: Sequence[int], answer: Sequence[int], tokenizer: Any, text: str
) -> tuple[Columns, str]:
    """Return columns of the token table for generated tokens, and the text of prompt and answer.

    Args:
        read: The generated tokens that the model has read; each is a position.
        answer: All generated tokens.
        tokenizer: The tokenizer.
        text: The text of the prompt.
    """
    ids = list(read)
    if not answer:
        return {name: [] for name in ("token", "kind", "role", "start", "end")}, text
    special = special_ids(tokenizer)
    pieces = tokenizer.convert_ids_to_tokens(list(ids))
    columns: dict[str, list[Any]] = {name: [] for name in ("token", "kind", "start", "end")}
    decoded = tokenizer.decode(answer, skip_special_tokens=True)
    begin = len(text) + len(answer_separator(text))
    spans = _generated_spans(ids, decoded, tokenizer, special)
    for token, piece, (start, end) in zip(ids, pieces, spans, strict=True):
        columns["token"].append(piece if token in special else decoded[start:end].strip() or piece)
        columns["kind"].append("special" if token in special else "text")
        columns["start"].append(begin + start)
        columns["end"].append(begin + end)
    columns["role"] = ["generated"] * len(ids)
    return columns, text + (answer_separator(text) + decoded if decoded else "")


def following_columns(
    ids: Sequence[int],
    probabilities: np.ndarray | None,
    answer: Columns,
    text: str,
    tokenizer: Any,
    n_prompt: int,
) -> dict[str, pd.api.extensions.ExtensionArray]:
    """Return the columns ``NEXT_COLUMNS`` of prompt and answer; none if there is no answer.

    Args:
        ids: All tokens of the answer, with the end-of-sequence token if one was generated.
        probabilities: The probability of each token; None if it is not known.
        answer: The columns of the tokens that were read, from :func:`generated_columns`.
        text: The text of prompt and answer.
        tokenizer: The tokenizer.
        n_prompt: The number of positions of the prompt, whose last one predicts the first token.
    """
    if not len(ids):
        return {}
    read = list(answer["token"])
    tokens = [*read]
    special = special_ids(tokenizer)
    for token, piece in zip(
        ids[len(read) :], tokenizer.convert_ids_to_tokens(list(ids[len(read) :])), strict=True
    ):
        tail = text[answer["end"][-1] :].strip() if read else ""
        tokens.append(piece if token in special else tail or piece)
    first = n_prompt - 1
    n = n_prompt + len(read)
    names: list[str | None] = [None] * n
    values = np.full(n, np.nan)
    names[first : first + len(ids)] = tokens
    if probabilities is not None:
        values[first : first + len(ids)] = probabilities
    return dict(
        zip(
            NEXT_COLUMNS,
            (pd.array(names, dtype="string"), pd.array(values, dtype="float64")),
            strict=True,
        )
    )


def _generated_spans(
    ids: Sequence[int], decoded: str, tokenizer: Any, special: set[int]
) -> list[tuple[int, int]]:
    """Return the span of each token in the decoded answer, without leading white space.

    If the bytes of one character are spread over several tokens, each of them has this character. A
    token may change the characters before it (some tokenizers remove spaces), so a character counts
    as final only when no later token changes it. Tokens whose characters become final together are
    then located one by one.

    Args:
        ids: The tokens; special tokens have no characters.
        decoded: The whole answer, which may continue after these tokens.
        tokenizer: The tokenizer.
        special: Ids of special tokens.
    """
    spans: list[tuple[int, int]] = []
    waiting: list[int] = []  # tokens without a final character yet
    n_final = 0
    for number, token in enumerate(ids):
        if token in special:
            spans.append((n_final, n_final))
            continue
        so_far = tokenizer.decode(ids[: number + 1], skip_special_tokens=True)
        stop = max(_n_in_common(so_far, decoded), n_final)
        unfinished = len(so_far) > stop  # the token ends within a character
        end = min(stop + unfinished, len(decoded))
        spans.append((n_final, end))
        if stop == n_final and unfinished:
            waiting.append(number)
            continue
        if waiting:
            alone = [tokenizer.decode([ids[i]]).strip() for i in (*waiting, number)]
            for i, span in zip(
                (*waiting, number), _one_by_one(alone, decoded, n_final, end), strict=False
            ):
                spans[i] = span
        waiting, n_final = [], stop
    return [(end - len(decoded[start:end].lstrip()), end) for start, end in spans]


def _one_by_one(pieces: Sequence[str], text: str, start: int, end: int) -> list[tuple[int, int]]:
    """Return the spans of consecutive pieces in a text, or [] if one of them is not found."""
    spans = []
    for piece in pieces:
        at = text.find(piece, start, end) if piece else -1
        if at < 0:
            return []
        spans.append((at, at + len(piece)))
        start = at + len(piece)
    return spans


def _n_in_common(one: str, other: str) -> int:
    """Return the length of the common prefix of two strings."""
    if other.startswith(one):
        return len(one)
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


_INTEGERS = (
    *("image", "video", "tile", "frame", "row", "col", "start", "end", "source_frame"),
    TURN,
)
_FLOATS = ("x0", "y0", "x1", "y1", "time_s")


def _table(
    columns: Columns,
    n_rows: int,
    start: int = 0,
    more: Mapping[str, pd.api.extensions.ExtensionArray] | None = None,
) -> pd.DataFrame:
    """Return a table of the columns TOKEN_COLUMNS with their dtypes; missing ones are empty.

    ``turn`` and ``VIDEO_COLUMNS`` follow if they are given.
    """
    typed: dict[str, Any] = {}
    named = [name for name in (TURN, *VIDEO_COLUMNS) if name in columns]
    for name in (*TOKEN_COLUMNS, *named):
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
    typed |= more or {}
    return pd.DataFrame(typed, index=pd.RangeIndex(start, start + n_rows, name="position"))
