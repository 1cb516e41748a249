"""The null model of every statistic: attention that is uniform over the visible keys.

The null model is an attention call too: if all queries are zero, every visible key of a row has the
same probability. The null of any statistic is therefore that statistic of ``uniform(call)``. For
the mass on groups of keys, ``null_mass`` computes it directly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from xmodal_interp.attention import AttentionCall
from xmodal_interp.attention.masks import hides

D_NULL = 8  # head width of the null's zero q and k; the fused kernel processes 8 values at a time


def uniform(call: AttentionCall) -> AttentionCall:
    """Return the call with uniform attention over the same visible keys.

    The result has one head, unless the mask differs between heads.
    """
    mask = call.mask
    if mask is not None and mask.dtype != torch.bool:
        mask = ~hides(mask)
    n_heads = 1 if mask is None else mask.shape[1]
    device = call.device
    return replace(
        call,
        q=torch.zeros(1, n_heads, call.n_queries, D_NULL, dtype=torch.float32, device=device),
        k=torch.zeros(1, n_heads, call.n_keys, D_NULL, dtype=torch.float32, device=device),
        v=None,
        mask=mask,
        bias=None,
        softcap=None,
        sinks=None,
        dense=None,
    )


def n_visible(
    call: AttentionCall, queries: Int[Tensor, " query"], heads: Sequence[int]
) -> Float[Tensor, "head query"]:
    """Return how many keys each query sees, expanded over heads if the mask has one head."""
    counts = call.n_visible(queries)[0].float()
    return counts.expand(len(heads), -1) if counts.shape[0] == 1 else counts[list(heads)]


def null_mass(
    call: AttentionCall,
    groups: Float[Tensor, "group key"] | Bool[Tensor, "group key"],
    heads: Sequence[int],
    queries: Int[Tensor, " query"],
) -> Float[Tensor, "head query group"]:
    """Return ``AttentionCall.null_mass``, expanded over heads if the mask has one head."""
    even = call.null_mass(groups, queries)[0]
    return even.expand(len(heads), -1, -1) if even.shape[0] == 1 else even[list(heads)]


def received(
    call: AttentionCall, queries: Int[Tensor, " query"], heads: Sequence[int]
) -> Float[Tensor, "head key"]:
    """Return the probability that each key receives, summed over queries that see some key."""
    seeing = queries[call.n_visible(queries)[0].gt(0).all(0).to(queries.device)]
    rows = call if len(seeing) == call.n_queries else call.select_rows(seeing)
    ones = torch.ones(1, len(seeing), dtype=torch.float32, device=call.device)
    return rows.received(ones, list(heads))[0]


def cells_of(
    call: AttentionCall,
    heads: Sequence[int],
    rows: Int[Tensor, " query"],
    keys: Int[Tensor, " key"],
) -> tuple[
    Float[Tensor, "head query key"], Float[Tensor, "#head query key"], Float[Tensor, "head query 1"]
]:
    """Return probabilities, whether each cell is visible, and how many keys each query sees.

    A query that sees no key has probabilities 0 and a count of 1.
    """
    counts = n_visible(call, rows, heads).cpu().double()[..., None]
    seen = call.visible(rows)[0][..., keys].cpu().double()
    seen = seen if seen.shape[0] == 1 else seen[list(heads)]
    probs = call.probs(list(heads), rows, keys)[0].cpu().double()
    return probs.where(counts > 0, 0.0), seen, counts.clamp(min=1)
