"""The numbers: rows of probabilities, and sums over them by the fused kernel.

Bare tensors, float32 accumulation.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

CHUNK_BYTES = 32 * 2**20  # of float32 scores at a time


def softmax_rows(
    q: Float[Tensor, "sample head query d_head"],
    k: Float[Tensor, "sample head key d_head"],
    visible: Bool[Tensor, "#sample #head query key"],
    *,
    scaling: float,
    additive: Float[Tensor, "#sample #head query key"] | None = None,
    softcap: float | None = None,
    sinks: Float[Tensor, "#sample head #query"] | None = None,
) -> Float[Tensor, "sample head query key"]:
    """``softmax(scaling q k^T + additive)`` over the visible keys.

    A row that sees nothing is NaN.
    """
    scores = (q.float() @ k.float().transpose(-1, -2)) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if additive is not None:
        scores = scores + additive
    scores = scores.masked_fill_(~visible, -torch.inf)
    if sinks is None:
        return scores.softmax(-1)
    column = sinks.float()[..., None].expand(*scores.shape[:3], 1)
    probs = torch.cat([scores, column], -1).softmax(-1)[..., :-1]
    return probs.masked_fill(~visible.any(-1, keepdim=True), torch.nan)


def fused_average(
    q: Float[Tensor, "sample head query d_head"],
    k: Float[Tensor, "sample kv_head key d_head"],
    values: Float[Tensor, "key value"],
    visible: Bool[Tensor, "#sample #head query key"] | None,
    *,
    causal: bool,
    scaling: float,
) -> Float[Tensor, "sample head query value"]:
    """``softmax(scaling q k^T) @ values`` by the fused kernel.

    The values stand where the model's own stood.

    They are padded to the width of a head, since a narrower V falls off the fused path.
    """
    n_values = values.shape[1]
    padded = functional.pad(values, (0, q.shape[-1] - n_values))
    v = padded.expand(*k.shape[:2], *padded.shape)
    grouped = q.shape[1] != k.shape[1]
    out = functional.scaled_dot_product_attention(
        q.float(), k.float(), v, visible, is_causal=causal, scale=scaling, enable_gqa=grouped
    )[..., :n_values]
    return out if visible is None else out.masked_fill(~visible.any(-1, keepdim=True), torch.nan)


def fused_entropy(
    q: Float[Tensor, "sample head query d_head"],
    k: Float[Tensor, "sample head key d_head"],
    visible: Bool[Tensor, "#sample #head query key"] | None,
    *,
    causal: bool,
    scaling: float,
) -> Float[Tensor, "sample head query"]:
    """Entropy of every row in nats, ``logsumexp - scaling q . (probs k)``, from one fused call."""
    q, k = q.float(), k.float()
    mask = None
    if visible is not None:
        mask = (
            torch.zeros(visible.shape)
            .masked_fill_(~visible, -torch.inf)
            .expand(q.shape[0], -1, -1, -1)
        )
    mean_key, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, k, 0.0, causal, attn_mask=mask, scale=scaling
    )
    entropy: Tensor = logsumexp.reshape(q.shape[:3]) - scaling * (q * mean_key).sum(-1)
    entropy = entropy.clamp_(min=0.0)  # a row with one visible key rounds to just below zero
    return entropy if visible is None else entropy.masked_fill(~visible.any(-1), torch.nan)
