"""Positions in any spelling (an index, a slice, a list, a mask) as an index tensor."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from xmodal_interp.errors import PositionError

Positions = int | slice | Sequence[int] | np.ndarray | Tensor


def resolve(positions: Positions, length: int, label: str) -> Int[Tensor, " position"]:
    """Positions of any spelling as an index tensor; negative ones count from the end.

    Raises:
        PositionError: A position outside ``[-length, length)``.
    """
    if isinstance(positions, slice):
        return torch.arange(length)[positions]
    values = [positions] if isinstance(positions, int) else positions
    index = values.cpu() if isinstance(values, Tensor) else torch.as_tensor(np.asarray(values))
    index = index.nonzero()[:, 0] if index.dtype == torch.bool else index.long()
    outside = index[(index < -length) | (index >= length)]
    if len(outside):
        raise PositionError(
            f"A {label} must lie between {-length} and {length - 1}; got {brief(outside.tolist())}."
        )
    return torch.where(index < 0, index + length, index)


def brief(values: Sequence[int]) -> str:
    """The first few of many numbers, for messages."""
    shown = ", ".join(str(v) for v in values[:6])
    return shown if len(values) <= 6 else f"{shown}, ... ({len(values)} in all)"
