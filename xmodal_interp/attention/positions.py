"""Positions in any spelling (an index, a slice, a list, a mask) as an index tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from xmodal_interp.errors import NotRecordedError, PositionError

Positions = int | slice | Sequence[int] | np.ndarray | Tensor


def resolve(positions: Positions, length: int, label: str) -> Int[Tensor, " position"]:
    """Positions of any spelling as an index tensor; negative ones count from the end.

    Raises:
        PositionError: A position outside ``[-length, length)``, or a text.
    """
    if isinstance(positions, slice):
        return torch.arange(length)[positions]
    values: Any = [positions] if isinstance(positions, int) else positions
    if isinstance(values, str):
        raise PositionError(f"A {label} is a number, a list of them, or a slice; got {values!r}.")
    index = values.cpu() if isinstance(values, Tensor) else torch.as_tensor(np.asarray(values))
    index = index.nonzero()[:, 0] if index.dtype == torch.bool else index.long()
    outside = index[(index < -length) | (index >= length)]
    if len(outside):
        raise PositionError(
            f"A {label} must lie between {-length} and {length - 1}; got {brief(outside.tolist())}."
        )
    return torch.where(index < 0, index + length, index)


def index_of_kept(
    positions: Positions, rows: Int[Tensor, " row"], n_positions: int, name: str
) -> Int[Tensor, " position"]:
    """Which of the kept rows (ascending positions) stand for positions of a sequence.

    Args:
        positions: Positions of the sequence.
        rows: The positions that were kept.
        n_positions: Length of the sequence, if it reaches beyond the last kept row.
        name: What the rows are of, for the message.

    Raises:
        NotRecordedError: A position that was not kept.
        PositionError: A position outside the sequence.
    """
    last = int(rows.max()) + 1 if len(rows) else 0
    wanted = resolve(positions, max(n_positions, last), "query").to(rows.device)
    index = torch.searchsorted(rows, wanted)
    held = index < len(rows)
    held[held.clone()] = rows[index[held]] == wanted[held]
    missing = wanted[~held]
    if len(missing):
        raise NotRecordedError(
            f"Only rows that were kept can be asked for. {name} kept {brief(rows.tolist())}; "
            f"asked for were also {brief(missing.tolist())}. Capture again with these queries, or "
            "with all."
        )
    return index


def brief(values: Sequence[int]) -> str:
    """The first few of many numbers, for messages."""
    shown = ", ".join(str(v) for v in values[:6])
    return shown if len(values) <= 6 else f"{shown}, ... ({len(values)} in all)"
