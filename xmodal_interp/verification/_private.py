"""Compare two runs of a model: seed the random numbers, collect tensors, measure differences."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

_Output = TypeVar("_Output")


def seeded(call: Callable[[], _Output]) -> _Output:
    """Return the result of a call with seed 0; the global random state is restored."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return call()


def tensors_of(output: Any) -> list[Tensor]:
    """Return every floating-point tensor of a model's output, in float32; caches are left out."""
    if isinstance(output, Tensor):
        return [output.detach().float()] if output.is_floating_point() else []
    if isinstance(output, Mapping):
        return [t for value in output.values() for t in tensors_of(value)]
    if isinstance(output, (list, tuple)):
        return [t for value in output for t in tensors_of(value)]
    return []


def difference(one: list[Tensor], other: list[Tensor]) -> float:
    """Return the largest absolute difference.

    It is infinite if the shapes differ, or if an element is NaN in only one of the two.
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
