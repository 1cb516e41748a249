"""Full float32 precision for this package's numbers, whatever the process is set to.

Two settings of torch lower the precision of float32 matrix products: autocast, and
``torch.set_float32_matmul_precision`` (``"medium"`` multiplies in bfloat16 on the CPU, ``"high"``
and ``"medium"`` in TensorFloat-32 on CUDA). Inside :func:`full_precision` neither applies; both are
restored afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_BACKENDS: tuple[Any, ...] = (
    torch.backends.mkldnn.matmul,  # type: ignore[attr-defined]
    torch.backends.cuda.matmul,
)
_FULL = ("none", "ieee")
_EPS = {"tf32": 2.0**-10, "bf16": 2.0**-7}  # the spacing of numbers just above 1


@contextmanager
def full_precision(device: torch.device | str = "cpu") -> Iterator[None]:
    """Compute float32 products in float32 inside a ``with`` block.

    Args:
        device: Where the tensors are: autocast is set per kind of device.
    """
    lowered = [(each, each.fp32_precision) for each in _BACKENDS]
    lowered = [(each, setting) for each, setting in lowered if setting not in _FULL]
    for each, _ in lowered:
        each.fp32_precision = "ieee"
    kind = torch.device(device).type
    try:
        if torch.is_autocast_enabled(kind):
            with torch.autocast(kind, enabled=False):
                yield
        else:
            yield
    finally:
        for each, setting in lowered:
            each.fp32_precision = setting


def product_eps(dtype: torch.dtype) -> float:
    """The relative spacing of numbers that products of this dtype are computed with."""
    eps = torch.finfo(dtype).eps
    if dtype != torch.float32:
        return eps
    return max([eps, *(_EPS.get(each.fp32_precision, 0.0) for each in _BACKENDS)])
