"""Statistics of attention computed by the fused attention kernel, in memory linear in the length.

Let ``P = exp(s_ij - L_i)`` be the probabilities of one head, with the scores ``s = scaling q k^T``
(plus a bias) and the log-sum-exp ``L_i`` of each row.

**Sums over keys** (:func:`row_pass`). ``P V`` is attention with other values: the kernel computes
it for up to ``d_head`` columns at once, for example the mass on groups of keys. It also returns
``L``. For ``V = K`` the result gives the entropy:

    H_i = -sum_j P_ij (s_ij - L_i) = L_i sum_j P_ij - scaling q_i . (P K)_i

**Sums over queries** (:func:`column_pass`). ``P^T R`` is attention of the transposed call. The
keys take the place of the queries, and the queries that of the keys, with one more dimension that
adds ``-L_i`` to the scores:

    [k_j, 1] . [scaling q_i, -L_i] = s_ij - L_i = ln P_ij

The kernel normalises over ``i``. Multiplied by the exponential of its log-sum-exp, which is the
attention that key ``j`` receives, its output is ``P^T R``, for up to ``d_head`` columns ``R``. In a
causal square, both sequences are reversed, so that the transposed mask is causal again.

Three points keep the results exact:

* Results over several tiles of a row are combined by their log-sum-exp.
* A learned sink takes part in ``L`` only: it multiplies the probabilities by
  ``exp(L - L_with_sink)``.
* The mean key is subtracted from the keys. This adds the same number to all scores of a row, so
  probabilities are unchanged, but scores and ``L`` are smaller and their rounding is too.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from xmodal_interp.attention import masks
from xmodal_interp.attention.tiles import Tile, as_slice, strips
from xmodal_interp.upstream import attention_with_logsumexp

if TYPE_CHECKING:
    from xmodal_interp.attention.call import AttentionCall

GROUP_BYTES = 8 * 2**20
"""Heads are computed in groups whose queries have at most this size."""

BUCKET = 60
"""Row vectors are divided into parts whose entries differ by at most a factor of ``2**60``."""


def supports(call: AttentionCall) -> bool:
    """Return whether the kernel computes this call: on the CPU, from q and k, without soft-cap."""
    on_cpu = call.q is not None and call.device.type == "cpu"
    return on_cpu and call.softcap is None and is_finite(call)


def is_finite(call: AttentionCall) -> bool:
    """Return whether q and k are finite.

    The mask is added to the scores in the kernel, so NaN or infinity in a hidden query or key makes
    other results NaN.
    """
    held = [t.detach() for t in (call.q, call.k) if t is not None and t.numel()]
    return all(bool(torch.isfinite(end)) for t in held for end in t.aminmax())


@torch.no_grad()
def row_pass(
    call: AttentionCall,
    head: Int[Tensor, " head"],
    row: Int[Tensor, " row"],
    values: Float[Tensor, "key value"] | None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Float[Tensor, "sample head row"], float]:
    """Return ``P V`` and the log-sum-exp of each row; for ``values=None`` the entropy instead.

    Args:
        call: A call that the kernel supports; for the entropy, one without a bias.
        head: Indices of query heads.
        row: Indices of queries among those that the call holds.
        values: Values with at most ``d_head`` columns, or None.
        dtype: float32 or float64.

    Returns:
        Three results. First ``P V``, ``[sample, head, row, value]``, or the entropy in nats,
        ``[sample, head, row]``; NaN in a row without a visible key. Second the log-sum-exp of the
        scores, with the centred keys and the sinks; minus infinity in such a row. Third the size
        of the largest term of these sums; the error is a few roundings of it.
    """
    assert call.q is not None
    shape, d_head = (call.n_samples, len(head), len(row)), call.q.shape[-1]
    n_values = d_head if values is None else values.shape[1]
    out = call.q.new_empty(*shape, *(() if values is None else (n_values,)), dtype=dtype)
    logsumexp, size = call.q.new_empty(shape, dtype=dtype), call.q.new_zeros((), dtype=dtype)
    for at, heads, q, k, centre in _head_groups(call, head, dtype):
        for strip in strips(call, row):
            parts = []
            for tile in strip.tiles:
                v = k[:, :, tile.keys]
                if values is not None:
                    of_tile = values[tile.keys].to(dtype)
                    of_tile = functional.pad(of_tile, (0, d_head - n_values)).contiguous()
                    v = of_tile.expand(*k.shape[:2], *of_tile.shape)
                added = _added(call, heads, tile, dtype)
                operands = q[:, :, tile.rows], k[:, :, tile.keys], v
                parts.append(_attention(*operands, added, causal=tile.causal))
            mean, total = _joined(parts)
            empty = total.isneginf()
            kept = torch.ones_like(total)
            if call.sinks is not None:
                shift = (q[:, :, strip.rows] @ centre.transpose(2, 3))[..., 0]
                sinks = call.sinks_of(heads, row[strip.at])
                assert sinks is not None
                with_sinks = torch.logaddexp(total, sinks.to(dtype) - shift)
                kept, total = (total - with_sinks).exp(), with_sinks
            term = total.masked_fill(empty, 0.0).abs()
            if values is None:
                products = q[:, :, strip.rows] * mean
                term = term.maximum(products.abs().sum(-1))
                found = ((total - products.sum(-1)) * kept).masked_fill(empty, torch.nan)
            else:
                found = mean[..., :n_values] * kept[..., None]
                found = found.masked_fill(empty[..., None], torch.nan)
            out[:, at, strip.at] = found
            logsumexp[:, at, strip.at] = total.masked_fill(empty, -torch.inf)
            if term.numel():
                size = size.maximum(term.amax())  # NaN if a term is
    return out, logsumexp, float(size)


@torch.no_grad()
def column_pass(
    call: AttentionCall,
    head: Int[Tensor, " head"],
    row: Int[Tensor, " row"],
    weights: Float[Tensor, "#sample row vector"],
    logsumexp: Float[Tensor, "sample head row"],
    *,
    over_heads: bool,
) -> Tensor:
    """Return ``P^T R`` of each head, or its sum over the heads.

    Args:
        call: A call that the kernel supports.
        head: Indices of query heads.
        row: Indices of queries among those that the call holds.
        weights: ``R``, float32 or float64. float64 vectors are divided into parts by the size of
            their entries, so that shares below the range of float32 are kept.
        logsumexp: The second result of :func:`row_pass`, in the precision of the computation.
        over_heads: Whether to sum over the heads.

    Returns:
        ``[sample, head, vector, key]`` or ``[sample, vector, key]``, in the dtype of ``weights``.
    """
    dtype, n_keys = logsumexp.dtype, call.n_keys
    parts, scale, vector = _by_size(weights)
    heads_axis = () if over_heads else (len(head),)
    out = weights.new_zeros(call.n_samples, *heads_axis, weights.shape[2], n_keys)
    usable = logsumexp.masked_fill(logsumexp.isneginf(), 0.0)
    for at, heads, q, k, _ in _head_groups(call, head, dtype):
        width = (q.shape[-1] // 8 + 1) * 8  # the kernel is faster for multiples of 8
        q, k = (functional.pad(t, (0, width - t.shape[-1])) for t in (q, k))
        q[:, :, as_slice(row), -1] = -usable[:, at]
        k[..., -1] = 1.0
        for first in range(0, parts.shape[2], width):
            columns = slice(first, first + width)
            r = parts[..., columns].to(dtype)
            n_columns = r.shape[2]
            r = functional.pad(r, (0, width - n_columns))[:, None].expand(*q.shape[:2], -1, -1)
            group_axis = () if over_heads else (len(heads),)
            total = weights.new_zeros(call.n_samples, *group_axis, n_keys, n_columns)
            for strip in strips(call, row):
                for tile in strip.tiles:
                    found = _transposed(call, heads, q, k, r[:, :, strip.at], tile)
                    found = found[..., :n_columns].to(weights.dtype)
                    total[..., tile.keys, :] += found.sum(1) if over_heads else found
            target = out if over_heads else out[:, at]
            target.index_add_(target.ndim - 2, vector[columns], (total * scale[columns]).mT)
    return out


def _head_groups(
    call: AttentionCall, head: Int[Tensor, " head"], dtype: torch.dtype
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor, Tensor]]:
    """Yield groups of heads: places in ``head``, heads, scaled q, centred k, and the mean key."""
    assert call.q is not None
    assert call.k is not None
    longest = max(call.n_queries, call.n_keys)
    per_head = dtype.itemsize * call.n_samples * longest * call.q.shape[-1]
    size = max(1, GROUP_BYTES // max(per_head, 1))
    for start in range(0, len(head), size):
        heads = head[start : start + size]
        kv_heads, shared = call.kv_head_of(heads).unique(return_inverse=True)
        q = call.q[:, as_slice(heads)].to(dtype) * call.scaling
        k = call.k[:, as_slice(kv_heads)].to(dtype)
        centre = k.mean(2, keepdim=True)
        k = k - centre
        if not torch.equal(shared, torch.arange(len(kv_heads), device=shared.device)):
            k, centre = k[:, shared], centre[:, shared]
        yield slice(start, start + len(heads)), heads, q, k, centre


def _added(
    call: AttentionCall, heads: Int[Tensor, " head"], tile: Tile, dtype: torch.dtype
) -> Float[Tensor, "#sample #head row key"] | None:
    """Return what is added to the scores of a tile: the bias, and minus infinity where hidden."""
    if tile.seen is None:
        return None
    row = torch.arange(call.n_queries, device=call.device)[tile.rows]
    additive = masks.additive_rows(call.mask, row)
    scored = masks.scored_rows(tile.seen, additive)
    if call.bias is not None:
        bias = call.bias[..., row, :][..., tile.keys].float()
        additive = bias if additive is None else additive + bias
    zeros = tile.seen.new_zeros((), dtype=dtype) if additive is None else additive.to(dtype)
    added = zeros.masked_fill(~scored, -torch.inf)
    return added if added.shape[1] == 1 else added[:, heads]


def _attention(
    q: Float[Tensor, "sample head row d_head"],
    k: Float[Tensor, "sample head key d_head"],
    v: Float[Tensor, "sample head key d_head"],
    added: Float[Tensor, "#sample #head row key"] | None,
    *,
    causal: bool,
) -> tuple[Float[Tensor, "sample head row d_head"], Float[Tensor, "sample head row"]]:
    """Return the kernel's output and the log-sum-exp; 0 and minus infinity if all is hidden."""
    if 0 in (*q.shape, k.shape[2]):
        # here torch 2.14.1 divides by zero, which ends the process (SIGFPE)
        return torch.zeros_like(q), torch.full_like(q[..., 0], -torch.inf)
    if added is not None:
        hidden = added.isneginf().all(-1)
    out, total = attention_with_logsumexp(q, k, v, mask=added, causal=causal, scaling=1.0)
    total = total.reshape(q.shape[:3])
    if added is None:
        return out, total
    return out.masked_fill(hidden[..., None], 0.0), total.masked_fill(hidden, -torch.inf)


def _joined(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return the average and the log-sum-exp over several tiles of the same rows."""
    if len(parts) == 1:
        return parts[0]
    total = torch.stack([part for _, part in parts]).logsumexp(0)
    mean = torch.zeros_like(parts[0][0])
    for of_tile, part in parts:
        mean += of_tile * (part - total).exp().nan_to_num(0.0)[..., None]
    return mean, total


def _transposed(
    call: AttentionCall,
    heads: Int[Tensor, " head"],
    q: Float[Tensor, "sample head query width"],
    k: Float[Tensor, "sample head key width"],
    r: Float[Tensor, "sample head row width"],
    tile: Tile,
) -> Float[Tensor, "sample head tile_key width"]:
    """Return ``P^T R`` over the cells of a tile."""
    q, k = q[:, :, tile.rows], k[:, :, tile.keys]
    added = _added(call, heads, tile, q.dtype)
    if tile.causal:
        q, k, r = (t.flip(2) for t in (q, k, r))
    mean, total = _attention(k, q, r, None if added is None else added.mT, causal=tile.causal)
    out = mean * total.exp()[..., None]
    return out.flip(2) if tile.causal else out


def _by_size(
    weights: Float[Tensor, "sample row vector"],
) -> tuple[Float[Tensor, "sample row part"], Float[Tensor, " part"], Int[Tensor, " part"]]:
    """Divide float64 vectors into parts whose entries differ by at most ``2**BUCKET``.

    Returns:
        The parts, scaled to a largest entry of 1 to 2; the scale of each part; and the index of
        the vector that it belongs to.
    """
    every = torch.arange(weights.shape[2], device=weights.device)
    if weights.dtype != torch.float64:
        return weights, weights.new_ones(len(every)), every
    mantissa, exponent = torch.frexp(weights)  # ldexp overflows in torch 2.6
    used = weights != 0
    highest = exponent.masked_fill(~used, -2000).amax((0, 1))
    bucket = ((highest - exponent) // BUCKET).masked_fill(~used, 0)
    parts, scales, vectors = [], [], []
    for number in range(int(bucket.max()) + 1 if bucket.numel() else 0):
        inside = used & (bucket == number)
        held = inside.any(0).any(0).nonzero()[:, 0]
        top = highest[held] - number * BUCKET - 1
        part = mantissa[..., held] * torch.exp2((exponent[..., held] - top).double())
        parts.append(part.where(inside[..., held], 0.0))
        scales.append(torch.exp2(top.double()))
        vectors.append(held)
    if not parts:
        return weights[..., :0], weights.new_zeros(0), every[:0]
    return torch.cat(parts, 2), torch.cat(scales), torch.cat(vectors)
