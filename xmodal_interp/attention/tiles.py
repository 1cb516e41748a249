"""Divide the visible cells of a call into rectangles and triangles that need no mask.

A cell is one query and one key. The fused kernel computes all keys of a rectangle, or the keys up
to the query in a square (``causal``), without reading a mask. Most calls consist of few such tiles:

* a bidirectional call is one rectangle;
* consecutive queries ``a`` to ``b`` of a causal call are the rectangle of the keys before ``a``
  and the square of the keys ``a`` to ``b``, for any selection of queries and any number of cached
  keys;
* a packed row of images is one rectangle per image.

Everything else (a mask, a bias, a sliding window, scattered queries of a causal call) is divided
into groups of rows whose part of the mask has at most ``MASK_CELLS`` cells. Memory is therefore
linear in the number of positions.

Counts of visible cells are computed from the same tiles: :func:`row_sums` and :func:`key_sums`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from math import isqrt
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

if TYPE_CHECKING:
    from xmodal_interp.attention.call import AttentionCall

MASK_CELLS = 2**20
"""Largest number of cells of a mask that is built at once; 4 MiB as float32 scores."""

SHORT_RUN = 64
"""Causal queries are divided into runs of consecutive queries that are this long on average."""


@dataclass(frozen=True)
class Tile:
    """Queries and keys whose cells are visible: all, those up to the query, or those of a mask.

    Attributes:
        rows: Indices of queries among those that the call holds.
        keys: Indices of keys.
        causal: Whether row ``i`` of the tile sees its keys up to ``i`` only; the tile is square.
        seen: ``[sample | 1, head | 1, row, key]``, True where visible; None if ``causal`` or if
            all cells are visible.
    """

    rows: slice | Int[Tensor, " row"]
    keys: slice | Int[Tensor, " key"]
    causal: bool = False
    seen: Bool[Tensor, "#sample #head row key"] | None = None


@dataclass(frozen=True)
class Strip:
    """Some rows of the result, with all tiles of these rows.

    Attributes:
        at: Indices of the rows in the result.
        rows: Indices of these queries among those that the call holds.
        tiles: Tiles without a common cell, all with these rows, that contain all visible cells.
    """

    at: slice | Int[Tensor, " row"]
    rows: slice | Int[Tensor, " row"]
    tiles: list[Tile]


def strips(
    call: AttentionCall, row: Int[Tensor, " row"], *, several: bool = True
) -> Iterator[Strip]:
    """Yield strips that contain each of the rows once.

    Args:
        call: The call. A bias and an additive mask are not in the tiles.
        row: Indices of queries among those that the call holds, in any order.
        several: Whether a strip may have several tiles.
    """
    if len(row) == 0:
        return
    n_keys, has_window = call.n_keys, call.sliding_window is not None
    has_mask = call.mask is not None or call.bias is not None
    if has_mask or has_window or (call.causal and call.segments is not None):
        yield from _masked(call, row)
    elif call.segments is not None:
        yield from _segments(call, row)
    elif not call.causal:
        every, rows = slice(0, len(row)), as_slice(row)
        yield Strip(every, rows, [Tile(rows, slice(0, n_keys))])
    else:
        yield from _runs(call, row, several=several)


def as_slice(index: Int[Tensor, " row"]) -> slice | Int[Tensor, " row"]:
    """Return consecutive indices as a slice, which selects a view."""
    numbers = index.cpu().numpy()
    consecutive = bool((np.diff(numbers) == 1).all())
    return slice(int(numbers[0]), int(numbers[-1]) + 1) if consecutive else index


def _runs(call: AttentionCall, row: Int[Tensor, " row"], *, several: bool) -> Iterator[Strip]:
    """Yield a strip of a rectangle and a triangle for each run of consecutive causal queries."""
    index = row.cpu().numpy()  # numpy is faster for few numbers
    position = (index if call.rows is None else call.rows[row].cpu().numpy()) + call.offset
    breaks = np.diff(position) != 1
    if call.rows is not None:
        breaks |= np.diff(index) != 1
    ends = [0, *(np.flatnonzero(breaks) + 1).tolist(), len(row)]
    beyond = position.max() >= call.n_keys
    if beyond or (len(ends) - 1 > 4 and len(row) < SHORT_RUN * (len(ends) - 1)):
        yield from _masked(call, row)
        return
    for start, stop in pairwise(ends):
        first, a = int(index[start]), int(position[start])
        rows = slice(first, first + stop - start)
        tiles = [Tile(rows, slice(0, a))] if a else []
        b = a + stop - start
        if b - a == 1:  # one query, which sees its own key too
            tiles = [Tile(rows, slice(0, b))]
        else:
            tiles.append(Tile(rows, slice(a, b), causal=True))
        if len(tiles) > 1 and not several:
            yield from _masked(call, row[start:stop], at=start)
        else:
            yield Strip(slice(start, stop), rows, tiles)


def _segments(call: AttentionCall, row: Int[Tensor, " row"]) -> Iterator[Strip]:
    """Yield a strip of one rectangle for each segment."""
    assert call.segments is not None
    of_rows = call.segments[call.query_positions[row] + call.offset]
    for segment in of_rows.unique():
        at = (of_rows == segment).nonzero()[:, 0]
        rows, keys = row[at], (call.segments == segment).nonzero()[:, 0]
        rows_, keys_ = as_slice(rows), as_slice(keys)
        yield Strip(as_slice(at), rows_, [Tile(rows_, keys_)])


def _masked(call: AttentionCall, row: Int[Tensor, " row"], at: int = 0) -> Iterator[Strip]:
    """Yield strips of one tile with a mask, over the keys that some of the rows may see."""
    for start, stop in pairwise(_bounds(call, row)):
        part = row[start:stop]
        keys = slice(0, call.n_keys)
        if call.mask is None:
            position = call.query_positions[part] + call.offset
            first, last = 0, call.n_keys
            if call.sliding_window is not None:
                first = min(max(int(position.min()) - call.sliding_window + 1, 0), last)
            if call.causal:
                last = max(min(int(position.max()) + 1, last), first)
            keys = slice(first, last)
        seen = call.visible_rows(part, keys)
        if call.mask is not None and call.mask.dtype == torch.bool:  # leave out a hidden end
            used = seen.flatten(0, 2).any(0).nonzero()[:, 0]
            keys = slice(0, int(used[-1]) + 1 if len(used) else 0)
            seen = seen[..., keys]
        rows = as_slice(part)
        yield Strip(slice(at + start, at + stop), rows, [Tile(rows, keys, seen=seen)])


def _bounds(call: AttentionCall, row: Int[Tensor, " row"]) -> list[int]:
    """Return where groups of rows start and stop whose mask has at most ``MASK_CELLS`` cells."""
    window, per_cell = call.sliding_window, [t for t in (call.mask, call.bias) if t is not None]
    consecutive = bool((call.query_positions[row].diff() == 1).all())
    if not per_cell and window is not None and call.causal and consecutive:
        # c rows see at most window + c keys, and c (window + c) <= MASK_CELLS
        size = min((isqrt(window**2 + 4 * MASK_CELLS) - window) // 2, max(window, SHORT_RUN))
    else:
        n_samples, n_heads = (max([1, *(t.shape[at] for t in per_cell)]) for at in (0, 1))
        size = MASK_CELLS // max(n_samples * n_heads * call.n_keys, 1)
    return [*range(0, len(row), max(size, 1)), len(row)]


def row_sums(
    call: AttentionCall, row: Int[Tensor, " row"], values: Float[Tensor, "key value"]
) -> Float[Tensor, "#sample #head row value"]:
    """Return ``sum_j visible_ij values_jv``, the sum over the keys that each row sees."""
    values = values.double()
    out = values.new_empty(*_mask_shape(call), len(row), values.shape[1])
    for strip in strips(call, row):
        total: Tensor | int = 0
        for tile in strip.tiles:
            here = values[tile.keys]
            if tile.seen is not None:
                total = total + tile.seen.double() @ here
            else:
                total = total + (here.cumsum(0) if tile.causal else here.sum(0)[None])[None, None]
        out[:, :, strip.at] = total
    return out


def key_sums(
    call: AttentionCall,
    row: Int[Tensor, " row"],
    weights: Float[Tensor, "#sample #head row vector"],
) -> Float[Tensor, "#sample #head vector key"]:
    """Return ``sum_i weights_iv visible_ij``, the sum over the rows that see each key."""
    weights = weights.double().transpose(2, 3)
    n_samples, n_heads = (max(a, b) for a, b in zip(_mask_shape(call), weights.shape, strict=False))
    out = weights.new_zeros(n_samples, n_heads, weights.shape[2], call.n_keys)
    for strip in strips(call, row):
        here = weights[..., strip.at]
        for tile in strip.tiles:
            if tile.seen is not None:
                total = here @ tile.seen.double()
            elif tile.causal:
                total = here.flip(-1).cumsum(-1).flip(-1)
            else:
                total = here.sum(-1, keepdim=True)
            out[..., tile.keys] += total
    return out


def _mask_shape(call: AttentionCall) -> tuple[int, int]:
    """Return the length of the sample and head axes of the call's mask, 1 and 1 without a mask."""
    return (1, 1) if call.mask is None else (call.mask.shape[0], call.mask.shape[1])
