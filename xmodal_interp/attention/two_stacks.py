"""Encoder and decoder of one model on one axis: positions of the encoder, then of the decoder.

* A layer of the encoder has rows and keys of the encoder.
* Self-attention of the decoder has rows and keys of the decoder; cross-attention has rows of the
  decoder and keys of the encoder.
* Attention of the decoder that does both at once (T5Gemma2) has its own keys first, which grow, and
  behind them those of the encoder.

Each becomes a call over all positions. A row of the other stack sees nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from xmodal_interp.attention.call import AttentionCall
from xmodal_interp.attention.stitching import added, stitch


def encoder_layer(
    calls: Sequence[AttentionCall], n_encoder: int, n_positions: int
) -> AttentionCall:
    """The calls of a layer of the encoder, over all positions.

    Args:
        calls: They are one call: an encoder reads once.
        n_encoder: Positions that the encoder reads.
        n_positions: Those and the decoder's.
    """
    own = slice(0, n_encoder)
    return _laid_out(stitch(calls, n_encoder), own, own, n_positions)


def decoder_layer(
    calls: Sequence[AttentionCall], n_encoder: int, n_positions: int, *, merged: bool
) -> AttentionCall:
    """The calls of a layer of the decoder, over all positions.

    Args:
        calls: Prefill and decode steps, in order.
        n_encoder: Positions that the encoder reads.
        n_positions: Those and the decoder's.
        merged: Whether the keys of the encoder stand behind the decoder's own.
    """
    encoder, own = slice(0, n_encoder), slice(n_encoder, n_positions)
    n_own = n_positions - n_encoder
    if calls[0].kind == "cross":
        return _laid_out(stitch(calls, n_own), own, encoder, n_positions)
    if not merged:
        return _laid_out(stitch(calls, n_own), own, own, n_positions)
    alone = [with_keys(call, 0, call.n_keys - n_encoder) for call in calls]
    across = [with_keys(call, call.n_keys - n_encoder, call.n_keys) for call in calls]
    of_itself = stitch(alone, n_own)
    of_encoder = stitch([replace(call, kind="cross") for call in across], n_own)
    return _laid_out(_side_by_side(of_encoder, of_itself), own, slice(0, n_positions), n_positions)


def with_keys(call: AttentionCall, start: int, stop: int) -> AttentionCall:
    """A call with some of its keys only, the mask written out.

    Probabilities that are recomputed are those among these keys: the others must be hidden, or
    come back beside them.
    """
    bias = added(call)
    return replace(
        call,
        k=None if call.k is None else call.k[:, :, start:stop],
        v=None if call.v is None else call.v[:, :, start:stop],
        dense=None if call.dense is None else call.dense[..., start:stop],
        bias=None if bias is None else bias[..., start:stop],
        mask=call.visible()[..., start:stop],
        **_NO_FLAGS,
    )


def _side_by_side(one: AttentionCall, other: AttentionCall) -> AttentionCall:
    """Two calls of the same rows as one, with the keys of both."""

    def beside(name: str, axis: int) -> Tensor | None:
        parts = [getattr(one, name), getattr(other, name)]
        return None if parts[0] is None or parts[1] is None else torch.cat(parts, axis)

    axes = {"k": 2, "v": 2, "mask": 3, "bias": 3, "dense": 3}
    both: dict[str, Any] = {name: beside(name, axis) for name, axis in axes.items()}
    return replace(other, **both)


def _laid_out(call: AttentionCall, rows: slice, keys: slice, n: int) -> AttentionCall:
    """A call with room for ``n`` rows and keys; what it did not have is hidden."""

    def matrix(part: Tensor | None, of_other_rows: float = 0.0) -> Tensor | None:
        if part is None:
            return None
        whole = part.new_full((*part.shape[:2], n, n), of_other_rows)
        whole[:, :, rows] = 0
        whole[:, :, rows, keys] = part
        return whole

    def along(part: Tensor | None, places: slice, axis: int = 2) -> Tensor | None:
        if part is None:
            return None
        whole = part.new_zeros((*part.shape[:axis], n, *part.shape[axis + 1 :]))
        whole.narrow(axis, places.start, places.stop - places.start).copy_(part)
        return whole

    per_query = call.sinks is not None and call.sinks.ndim == 3
    return replace(
        call,
        q=along(call.q, rows),
        k=along(call.k, keys),
        v=along(call.v, keys),
        mask=matrix(call.visible()),
        bias=matrix(added(call)),
        dense=matrix(call.dense, torch.nan),
        sinks=along(call.sinks, rows) if per_query else call.sinks,
        update_share=along(call.update_share, rows, 1),
        **_NO_FLAGS,
    )


_NO_FLAGS: dict[str, Any] = {
    "causal": False,
    "offset": 0,
    "sliding_window": None,
    "segments": None,
}
