"""Compute rows of probabilities, and sums over rows with the fused kernel, in full precision.

The functions take tensors and accumulate in float32, or in float64 if float32 is not precise
enough. Every function accepts zero rows, heads and keys.

Two settings of torch lower the precision of float32 matrix products: autocast, and
``torch.set_float32_matmul_precision`` (``"medium"`` multiplies in bfloat16 on the CPU, ``"high"``
and ``"medium"`` in TensorFloat-32 on CUDA). :func:`full_precision` disables both for a block of
code. Callers of the kernels use it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

CHUNK_BYTES = 32 * 2**20  # size of a chunk of float32 scores

EXACT_TO = 16.0
"""Up to logits of this size, the error of an entropy in float32 is at most 1e-5.

The entropy is ``logsumexp`` minus the mean score. Both are as large as the logits, and their
difference is a few nats. Its measured error is at most 8 roundings of the larger one.
"""

LOWEST = -87.0
"""Lower differences of scores are set to this; ``exp`` of lower ones is slow (subnormal)."""


def softmax_rows(
    scores: Float[Tensor, "sample head query key"],
    sinks: Float[Tensor, "#sample head #query"] | None = None,
) -> Float[Tensor, "sample head query key"]:
    """Return the softmax of scores over the keys, in the dtype of the scores.

    Sinks take part in the softmax and are then dropped. A row without a visible key is NaN.
    """
    if sinks is None:
        return scores.softmax(-1)
    column = sinks.to(scores.dtype)[..., None].expand(*scores.shape[:3], 1)
    probs = torch.cat([scores, column], -1).softmax(-1)[..., :-1]
    return probs.masked_fill(scores.isneginf().all(-1, keepdim=True), torch.nan)


def entropy_rows(
    scores: Float[Tensor, "sample head query key"],
    sinks: Float[Tensor, "#sample head #query"] | None = None,
) -> Float[Tensor, "sample head query"]:
    """Return ``-sum p ln p`` of the softmax of every row, in nats, float32; overwrites ``scores``.

    With the largest score ``m`` of a row, ``t = s - m``, and ``Z = sum e^t`` with the sink,

        H = (ln Z sum e^t - sum t e^t) / Z

    The large numbers ``s`` and ``m`` are subtracted in the dtype of the scores. For float64 scores
    all the other steps are exact enough in float32: terms are at most 1, and those below
    ``LOWEST`` are negligible. A row without a visible key is NaN.
    """
    if scores.shape[-1] == 0:
        return scores.new_full(scores.shape[:3], torch.nan, dtype=torch.float32)
    top = scores.amax(-1, keepdim=True)
    if sinks is not None:
        column = sinks.to(scores.dtype)[..., None].expand_as(top)
        top = torch.where(top.isneginf(), top, top.maximum(column))
    t = scores.sub_(top).float().clamp_(min=LOWEST)
    share = t.exp()
    total = kept = share.sum(-1)
    if sinks is not None:
        total = total + (column - top).float().exp()[..., 0]
    products = t.mul_(share).sum(-1)
    # rounding can give a negative entropy for one key
    entropy: Tensor = ((total.log() * kept - products) / total).clamp_(min=0.0)
    return entropy


def score_rows(
    q: Float[Tensor, "sample head query d_head"],
    k: Float[Tensor, "sample kv_head key d_head"],
    visible: Bool[Tensor, "#sample #head query key"],
    *,
    scaling: float,
    additive: Float[Tensor, "#sample #head query key"] | None = None,
    softcap: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "sample head query key"]:
    """Return ``scaling q k^T + additive``, minus infinity where hidden, computed in ``dtype``.

    The soft-cap is applied before ``additive``.
    """
    scores = products(q, k, dtype) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if additive is not None:
        scores = scores + additive
    return scores.masked_fill_(~visible, -torch.inf)


def products(
    q: Float[Tensor, "sample head query d_head"],
    k: Float[Tensor, "sample kv_head key d_head"],
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "sample head query key"]:
    """Return ``q k^T`` without copying keys for the query heads that share them."""
    n_groups, n_queries = q.shape[1] // max(k.shape[1], 1), q.shape[2]
    grouped = q.to(dtype).unflatten(1, (k.shape[1], n_groups)).flatten(2, 3)
    scores = grouped @ k.to(dtype).transpose(-1, -2)
    by_head: Tensor = scores.unflatten(2, (n_groups, n_queries)).flatten(1, 2)
    return by_head


def fused_average(
    q: Float[Tensor, "sample head query d_head"],
    k: Float[Tensor, "sample kv_head key d_head"],
    values: Float[Tensor, "key value"],
    visible: Bool[Tensor, "#sample #head query key"] | None,
    *,
    causal: bool,
    scaling: float,
) -> Float[Tensor, "sample head query value"]:
    """Return ``softmax(scaling q k^T) @ values``, computed by the fused kernel.

    The values are padded to the width of a head, because torch does not use the fused kernel for a
    narrower V.
    """
    n_values = values.shape[1]
    padded = functional.pad(values, (0, q.shape[-1] - n_values))
    v = padded.expand(*k.shape[:2], *padded.shape)
    grouped = q.shape[1] != k.shape[1]
    out = functional.scaled_dot_product_attention(
        q.float(), k.float(), v, visible, is_causal=causal, scale=scaling, enable_gqa=grouped
    )[..., :n_values]
    if k.shape[2] == 0:
        return out.fill_(torch.nan)
    return out if visible is None else out.masked_fill(~visible.any(-1, keepdim=True), torch.nan)


class _SharedSetting:
    """Adapter for torch before 2.9, where one setting holds for all backends."""

    _NAMES: ClassVar[dict[str, str]] = {"highest": "ieee", "high": "tf32", "medium": "bf16"}

    @property
    def fp32_precision(self) -> str:
        return self._NAMES[torch.get_float32_matmul_precision()]

    @fp32_precision.setter
    def fp32_precision(self, name: str) -> None:
        setting = {ours: theirs for theirs, ours in self._NAMES.items()}[name]
        torch.set_float32_matmul_precision(setting)


_MKLDNN: Any = torch.backends.mkldnn
_BACKENDS: tuple[Any, ...] = (
    (_MKLDNN.matmul, torch.backends.cuda.matmul)
    if hasattr(_MKLDNN, "matmul")
    else (_SharedSetting(),) * 2
)
_DEVICES = ("cpu", "cuda", "xpu", "mps")
_FULL = ("none", "ieee")
_EPS = {"tf32": 2.0**-10, "bf16": 2.0**-7}  # the spacing of numbers just above 1


@contextmanager
def full_precision() -> Iterator[None]:
    """Compute float32 products in float32 inside a ``with`` block, or in a decorated function."""
    lowered = [(each, each.fp32_precision) for each in _BACKENDS]
    lowered = [(each, setting) for each, setting in lowered if setting not in _FULL]
    for each, _ in lowered:
        each.fp32_precision = "ieee"
    kinds = [kind for kind in _DEVICES if torch.is_autocast_enabled(kind)]
    try:
        with ExitStack() as stack:
            for kind in kinds:
                stack.enter_context(torch.autocast(kind, enabled=False))
            yield
    finally:
        for each, setting in lowered:
            each.fp32_precision = setting


def product_eps(dtype: torch.dtype) -> float:
    """Return the relative spacing of numbers in matrix products of this dtype."""
    eps = torch.finfo(dtype).eps
    if dtype != torch.float32:
        return eps
    return max([eps, *(_EPS.get(each.fp32_precision, 0.0) for each in _BACKENDS)])


def lowered_precision(device: torch.device | str) -> dict[str, str]:
    """Return the settings that lower the precision of a model on this device; empty if none do.

    ``autocast`` is the dtype of matrix products, ``matmul_precision`` the precision of float32
    products.
    """
    kind = torch.device(device).type
    found = {}
    if torch.is_autocast_enabled(kind):
        found["autocast"] = str(torch.get_autocast_dtype(kind)).removeprefix("torch.")
    backend = _BACKENDS[1 if kind == "cuda" else 0]
    if backend.fp32_precision not in _FULL:
        found["matmul_precision"] = str(backend.fp32_precision)
    return found
