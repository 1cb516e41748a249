"""Join pieces of an image that a tower processed separately, or take one image out of a call.

A vision tower processes an image in tiles or in windows, or several images in one packed row.
``joined`` concatenates pieces into one call, in which a query sees only the keys of its own piece.
``part_of`` takes one image out of a packed row. ``reordered`` undoes a permutation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Int
from torch import Tensor

from xmodal_interp.attention.call import AttentionCall
from xmodal_interp.attention.stitching import added_by_each
from xmodal_interp.errors import CaptureError


def pieces_of(call: AttentionCall) -> list[AttentionCall]:
    """Split a call over a batch into one call per sample."""
    return [call.select_sample(i) for i in range(call.n_samples)]


def joined(pieces: Sequence[AttentionCall]) -> AttentionCall:
    """Concatenate pieces of one sample each into one call; positions are numbered through them."""
    first = pieces[0]
    if len(pieces) == 1:
        return first
    sizes = torch.tensor([piece.n_queries for piece in pieces])
    masks = [piece.visible() for piece in pieces]
    square = all(piece.n_queries == piece.n_keys for piece in pieces)
    even = square and all(bool(mask.all()) for mask in masks)
    rows = torch.arange(len(pieces)).repeat_interleave(sizes)
    shares = [piece.update_share for piece in pieces if piece.update_share is not None]
    return replace(
        first,
        q=_side_by_side(pieces, "q"),
        k=_side_by_side(pieces, "k"),
        v=_side_by_side(pieces, "v"),
        mask=None if even else _blocks(masks),
        bias=_blocks(added_by_each(pieces)),
        dense=_blocks([piece.dense for piece in pieces if piece.dense is not None]),
        segments=rows.to(first.device) if even else None,
        update_share=torch.cat(shares, 1) if shares else None,
        causal=False,
        offset=0,
        sliding_window=None,
    )


def part_of(call: AttentionCall, start: int, stop: int) -> AttentionCall:
    """Return the call with positions ``start`` to ``stop`` of a self-attention only.

    Raises:
        CaptureError: One of these queries sees a key outside of these positions.
    """
    rows = torch.arange(start, stop, device=call.device)
    seen = call.visible(rows)
    if bool(seen[..., :start].any() | seen[..., stop:].any()):
        raise CaptureError(
            f"In {call.name}, the image at positions {start} to {stop - 1} of a packed row also "
            "attends to other positions, so the images cannot be separated. Capture the samples "
            "one by one, or leave the tower out."
        )
    return reordered(call, rows)


def reordered(call: AttentionCall, index: Int[Tensor, " position"]) -> AttentionCall:
    """Reorder the positions of a self-attention; position ``i`` becomes the old ``index[i]``."""
    index = index.to(call.device)

    def both(t: Tensor | None) -> Tensor | None:
        return t if t is None else t[..., index, :][..., index]

    def one(t: Tensor | None) -> Tensor | None:
        return t if t is None else t[:, :, index]

    return replace(
        call,
        q=one(call.q),
        k=one(call.k),
        v=one(call.v),
        mask=both(call.mask),
        bias=both(call.bias),
        dense=both(call.dense),
        segments=None if call.segments is None else call.segments[index],
        update_share=None if call.update_share is None else call.update_share[:, index],
    )


def _side_by_side(pieces: Sequence[AttentionCall], name: str) -> Tensor | None:
    parts = [t for piece in pieces if (t := getattr(piece, name)) is not None]
    return torch.cat(parts, 2) if parts else None


def _blocks(parts: Sequence[Tensor]) -> Tensor | None:
    """Return a block-diagonal tensor with zeros (or False) elsewhere."""
    if not parts:
        return None
    n_heads = max(part.shape[1] for part in parts)
    n_rows, n_columns = (sum(part.shape[axis] for part in parts) for axis in (2, 3))
    whole = parts[0].new_zeros(1, n_heads, n_rows, n_columns)
    row = column = 0
    for part in parts:
        next_row, next_column = row + part.shape[2], column + part.shape[3]
        whole[:, :, row:next_row, column:next_column] = part
        row, column = next_row, next_column
    return whole
