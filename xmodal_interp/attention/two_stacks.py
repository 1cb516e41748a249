"""Place encoder and decoder attention on one axis: encoder positions, then decoder positions.

* An encoder layer has rows and keys of the encoder.
* Decoder self-attention has rows and keys of the decoder; cross-attention has rows of the decoder
  and keys of the encoder.
* Merged decoder attention (T5Gemma2) has the decoder's keys first, whose number grows, and the
  encoder's keys after them.

Each becomes a call over all positions. Rows of the other stack see no key.
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
    """Return the calls of an encoder layer as one call over all positions.

    Args:
        calls: A list of one call, because an encoder runs once.
        n_encoder: Number of encoder positions.
        n_positions: Number of encoder and decoder positions.
    """
    own = slice(0, n_encoder)
    return _laid_out(stitch(calls, n_encoder), own, own, n_positions)


def decoder_layer(
    calls: Sequence[AttentionCall], n_encoder: int, n_positions: int, *, merged: bool
) -> AttentionCall:
    """Return the calls of a decoder layer as one call over all positions.

    Args:
        calls: Prefill and decode steps, in order.
        n_encoder: Number of encoder positions.
        n_positions: Number of encoder and decoder positions.
        merged: Whether the keys of a call are the decoder's followed by the encoder's.
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
    """Return a call with only some of its keys, and an explicit mask.

    Probabilities are normalised over these keys, so the other keys must be hidden or added again.
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
    """Join two calls with the same rows into one call with the keys of both."""

    def beside(name: str, axis: int) -> Tensor | None:
        parts = [getattr(one, name), getattr(other, name)]
        return None if parts[0] is None or parts[1] is None else torch.cat(parts, axis)

    axes = {"k": 2, "v": 2, "mask": 3, "bias": 3, "dense": 3}
    both: dict[str, Any] = {name: beside(name, axis) for name, axis in axes.items()}
    return replace(other, **both)


def _laid_out(call: AttentionCall, rows: slice, keys: slice, n: int) -> AttentionCall:
    """Expand a call to ``n`` rows and keys; the added rows and keys are hidden."""

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
