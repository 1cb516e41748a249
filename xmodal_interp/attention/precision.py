"""Compute this package's numbers in full float32 precision, with any settings of the process.

Two settings of torch lower the precision of float32 matrix products: autocast, and
``torch.set_float32_matmul_precision`` (``"medium"`` multiplies in bfloat16 on the CPU, ``"high"``
and ``"medium"`` in TensorFloat-32 on CUDA). :func:`full_precision` disables both, and restores them
afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

_BACKENDS: tuple[Any, ...] = (
    torch.backends.mkldnn.matmul,  # type: ignore[attr-defined]
    torch.backends.cuda.matmul,
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
