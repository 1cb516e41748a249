"""Two runs of one model, made to be compared: same random numbers, same tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

_Output = TypeVar("_Output")


def seeded(call: Callable[[], _Output]) -> _Output:
    """What a call returns on the same random numbers every time; the caller's own stay."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return call()


def tensors_of(output: Any) -> list[Tensor]:
    """Every floating-point tensor of a model's output in float32, caches left out."""
    if isinstance(output, Tensor):
        return [output.detach().float()] if output.is_floating_point() else []
    if isinstance(output, Mapping):
        return [t for value in output.values() for t in tensors_of(value)]
    if isinstance(output, (list, tuple)):
        return [t for value in output for t in tensors_of(value)]
    return []


def difference(one: list[Tensor], other: list[Tensor]) -> float:
    """The largest absolute difference.

    It is infinite where the shapes differ, or where only one holds NaN.
    """
    if len(one) != len(other):
        return float("inf")
    worst = 0.0
    for a, b in zip(one, other, strict=True):
        if a.shape != b.shape or not torch.equal(a.isnan(), b.isnan()):
            return float("inf")
        gap = torch.where(a == b, 0.0, (a - b).abs()).nan_to_num(0.0, posinf=float("inf"))
        worst = max(worst, float(gap.max()) if gap.numel() else 0.0)
    return worst
