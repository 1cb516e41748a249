"""Select the rows, heads and mask of a call, and call the fused kernel or compute exact rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from xmodal_interp.attention import kernels, masks
from xmodal_interp.attention.kernels import full_precision
from xmodal_interp.errors import NotRecordedError

if TYPE_CHECKING:
    from xmodal_interp.attention.call import AttentionCall


def visible(
    call: AttentionCall, row: Int[Tensor, " query"]
) -> Bool[Tensor, "sample head query key"]:
    """Return which keys the queries of these rows can attend to."""
    positions = call.query_positions[row] + call.offset
    return masks.visible_rows(
        call.mask,
        row,
        positions,
        call.n_keys,
        causal=call.causal,
        sliding_window=call.sliding_window,
        segments=call.segments,
    )


def exact_rows(
    call: AttentionCall,
    head: Int[Tensor, " head"],
    row: Int[Tensor, " query"],
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "sample head query key"]:
    """Return the probabilities of some heads and rows, computed in ``dtype``."""
    if call.dense is not None:
        return call.dense[:, head][:, :, row].to(dtype)
    q, k = _queries_and_keys(call)
    additive = masks.additive_rows(call.mask, row)
    if additive is not None:
        additive = _of_heads(additive, head)
    seen = masks.scored_rows(_of_heads(visible(call, row), head), additive)
    if call.bias is not None:
        bias = _of_heads(call.bias[..., row, :], head).float()
        additive = bias if additive is None else additive + bias
    if _is_all(head, call.n_heads):
        q = q[:, :, row]
    else:
        q, k = q[:, head][:, :, row], k[:, _kv_head(call, head)]
    with full_precision():
        return kernels.softmax_rows(
            q,
            k,
            seen,
            scaling=call.scaling,
            additive=additive,
            softcap=call.softcap,
            sinks=_sinks(call, head, row),
            dtype=dtype,
        )


def weighted_rows(
    call: AttentionCall,
    head: Int[Tensor, " head"],
    vector: Float[Tensor, "sample query"],
    contraction: str,
) -> Float[Tensor, "sample *head key"]:
    """Return rows of probabilities, weighted and summed by an einsum.

    Rows are computed in the dtype of the weights; rows with weight 0 are not computed.
    """
    needed = vector.ne(0).any(0).nonzero()[:, 0]
    n_samples = max(vector.shape[0], call.n_samples)
    heads = [len(head)] if "h" in contraction.partition("->")[2] else []
    out = vector.new_zeros(n_samples, *heads, call.n_keys)
    with full_precision():
        for part in needed.split(chunk(call, len(head))):
            probs = exact_rows(call, head, part, vector.dtype)
            out += torch.einsum(contraction, vector[:, part], probs)
    return out


def fusible(call: AttentionCall) -> bool:
    """Whether the fused kernel supports the call: boolean masks, but no soft-cap, sinks or bias."""
    plain = call.q is not None and call.softcap is None and call.sinks is None and call.bias is None
    return plain and (call.mask is None or call.mask.dtype == torch.bool)


def average(
    call: AttentionCall,
    head: Int[Tensor, " head"],
    row: Int[Tensor, " query"],
    values: Float[Tensor, "key value"],
) -> Float[Tensor, "sample head query value"]:
    """Return ``probs @ values``, by the fused kernel (``d_head`` values at a time) if possible."""
    with full_precision():
        if fusible(call):
            q, k, seen, causal = _fused(call, head, row)
            return torch.cat(
                [
                    kernels.fused_average(q, k, part, seen, causal=causal, scaling=call.scaling)
                    for part in values.split(q.shape[-1], 1)
                ],
                -1,
            )
        if call.n_keys == 0:
            shape = (call.n_samples, len(head), len(row), values.shape[1])
            return torch.full(shape, torch.nan, dtype=torch.float32, device=row.device)
        parts = row.split(chunk(call, len(head)))
        return torch.cat([exact_rows(call, head, part) @ values for part in parts], 2)


def null_average(
    call: AttentionCall, row: Int[Tensor, " query"], values: Float[Tensor, "key value"]
) -> Float[Tensor, "sample head query value"]:
    """Return ``average`` for uniform attention over the visible keys."""
    parts = []
    with full_precision():
        for part in row.split(chunk(call, 1)):
            seen = visible(call, part).float()
            parts.append((seen @ values) / seen.sum(-1, keepdim=True))
    return torch.cat(parts, 2)


def entropy(
    call: AttentionCall, head: Int[Tensor, " head"], row: Int[Tensor, " query"]
) -> Float[Tensor, "sample head query"]:
    """Return the entropy of the rows in nats, with an error of at most 1e-5.

    On the CPU it is computed by the fused kernel if possible.
    """
    with full_precision():
        if fusible(call) and row.device.type == "cpu":
            q, k, seen, causal = _fused(call, head, row)
            k = k.repeat_interleave(q.shape[1] // max(k.shape[1], 1), 1)
            return kernels.fused_entropy(q, k, seen, causal=causal, scaling=call.scaling)
        call = call.in_float64()
        head, row = head.to(call.device), row.to(call.device)
        parts = row.split(chunk(call, len(head)))
        return torch.cat(
            [kernels.row_entropy(exact_rows(call, head, part, torch.float64)) for part in parts], 2
        )


def chunk(call: AttentionCall, n_heads: int) -> int:
    """Return the number of rows per chunk, for chunks of at most 32 MiB of float32 scores."""
    return max(1, kernels.CHUNK_BYTES // max(4 * call.n_keys * n_heads * call.n_samples, 1))


def _fused(
    call: AttentionCall, head: Tensor, row: Tensor
) -> tuple[Tensor, Tensor, Tensor | None, bool]:
    """Return the operands of the fused kernel, with a causal flag for the whole square or a mask.

    Keys are repeated for their group of heads only if some heads are selected.
    """
    q, k = _queries_and_keys(call)
    if not _is_all(head, call.n_heads):
        q, k = q[:, head], k[:, _kv_head(call, head)]
    whole = call.rows is None and _is_all(row, call.n_queries)
    if call.mask is None and call.sliding_window is None and call.segments is None:
        if not call.causal:
            return q if whole else q[:, :, row], k, None, False
        if whole and call.n_queries == call.n_keys and call.offset == 0:
            return q, k, None, True
    return q if whole else q[:, :, row], k, _of_heads(visible(call, row), head), False


def _kv_head(call: AttentionCall, head: Int[Tensor, " head"]) -> Int[Tensor, " head"]:
    """Return the key head of each query head."""
    return head // max(call.n_heads // max(call.n_kv_heads, 1), 1)


def _queries_and_keys(call: AttentionCall) -> tuple[Tensor, Tensor]:
    if call.q is None or call.k is None:
        raise holds_neither(call)
    return call.q, call.k


def holds_neither(call: AttentionCall) -> NotRecordedError:
    """Return the error for a call without queries and keys and without probabilities."""
    return NotRecordedError(
        f"{call.name} holds neither q and k nor dense probabilities. Record the call again."
    )


def _sinks(
    call: AttentionCall, head: Int[Tensor, " head"], row: Int[Tensor, " query"]
) -> Float[Tensor, "sample head #query"] | None:
    """Return the sinks of some heads and rows; an axis has length 1 if all its entries agree."""
    if call.sinks is None:
        return None
    if call.sinks.ndim == 1:
        return call.sinks[head][None, :, None]
    return call.sinks[:, head][:, :, row]


def _of_heads(t: Tensor, head: Int[Tensor, " head"]) -> Tensor:
    return t if t.shape[1] == 1 or _is_all(head, t.shape[1]) else t[:, head]


def _is_all(index: Tensor, length: int) -> bool:
    return len(index) == length and bool((index == torch.arange(length, device=index.device)).all())
