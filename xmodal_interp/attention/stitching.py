"""Prefill and decode steps of one layer, put together to one call with a row per token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import torch

from xmodal_interp.attention.call import AttentionCall
from xmodal_interp.attention.masks import visible_rows
from xmodal_interp.errors import CaptureError


def stitch(calls: Sequence[AttentionCall], n_positions: int) -> AttentionCall:
    """Prefill and decode steps of one layer as one call with a row per token.

    Args:
        calls: The calls in order.
        n_positions: How many positions the sample has; steps behind them (of a batch that went on)
            are left out.

    Raises:
        CaptureError: Keys that don't grow step by step, or that changed when they were read again.
    """
    first, last = calls[0], calls[-1]
    if len(calls) == 1:
        return first
    if first.q is None or last.k is None or first.k is None:
        raise CaptureError("Only calls that hold queries and keys can be stitched.")
    if reread(calls):
        return _last_reading(calls, n_positions)
    if any(call.kind == "cross" for call in calls):
        return _stitch_cross(calls)
    growing = all(a.n_keys + b.n_queries == b.n_keys for a, b in pairwise(calls))
    if not growing:
        raise CaptureError(
            "Decode steps are stitched where each step's keys are those before plus its own. "
            f"{first.name} had "
            f"{', '.join(str(c.n_keys) for c in calls[:5])}, ... keys (a static or sliding cache). "
            "Generate with the default cache."
        )
    q = torch.cat([call.q for call in calls if call.q is not None], 2)[:, :, :n_positions]
    n_queries = q.shape[2]
    k = last.k[:, :, :n_queries]
    v = None if last.v is None else last.v[:, :, :n_queries]
    shares = [call.update_share for call in calls if call.update_share is not None]
    share = torch.cat(shares, 1)[:, :n_queries] if shares else None
    simple = (
        first.mask is None
        and first.causal
        and first.offset == 0
        and first.n_queries == first.n_keys
    )
    if (
        simple
        and first.sliding_window is None
        and all(c.mask is None and c.bias is None for c in calls)
    ):
        return replace(first, q=q, k=k, v=v, update_share=share)
    mask = torch.zeros(
        1,
        first.mask.shape[1] if first.mask is not None else 1,
        n_queries,
        n_queries,
        dtype=torch.bool,
        device=q.device,
    )
    start = 0
    for call in calls:
        rows = torch.arange(call.n_queries, device=q.device)
        seen = visible_rows(
            call.mask,
            rows,
            rows + call.offset,
            call.n_keys,
            causal=call.causal,
            sliding_window=call.sliding_window,
        )
        stop = min(start + call.n_queries, n_queries)
        mask[:, :, start:stop, : min(call.n_keys, n_queries)] = seen[
            :, :, : stop - start, :n_queries
        ]
        start = stop
    whole = replace(first, q=q, k=k, v=v, mask=mask, update_share=share)
    return replace(whole, causal=False, offset=0, sliding_window=None)


def reread(calls: Sequence[AttentionCall]) -> bool:
    """Whether the whole sequence was read again at every step: generation without a cache."""
    return len(calls) > 1 and all(a.n_queries + 1 == b.n_queries for a, b in pairwise(calls))


def _last_reading(calls: Sequence[AttentionCall], n_positions: int) -> AttentionCall:
    """The call that reads all positions; what is behind them belongs to other samples' answers."""
    first, last = calls[0], calls[min(n_positions - calls[0].n_queries, len(calls) - 1)]
    held = [call.k for call in (first, last) if call.k is not None]
    before, after = (keys[:, :, : first.n_keys].float() for keys in held)
    if not torch.allclose(after, before, rtol=1e-2, atol=1e-3):
        raise CaptureError(
            "Without a cache the prompt is read again for every token, and must be read alike. The "
            f"keys of {first.name} changed: some models are given their image in the first step "
            "only. Generate with the cache."
        )
    return replace(last, call=first.call)


def _stitch_cross(calls: Sequence[AttentionCall]) -> AttentionCall:
    """Cross-attention keys don't grow: the rows follow one another."""
    first = calls[0]
    q = torch.cat([call.q for call in calls if call.q is not None], 2)
    masks = [call.visible().expand(-1, -1, call.n_queries, -1) for call in calls]
    shares = [call.update_share for call in calls if call.update_share is not None]
    share = torch.cat(shares, 1) if shares else None
    whole = replace(first, q=q, mask=torch.cat(masks, 2), update_share=share)
    return replace(whole, causal=False, offset=0)
