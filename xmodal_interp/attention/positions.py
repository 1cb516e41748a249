"""Positions in any spelling (an index, a slice, a list, a mask) as an index tensor.

An index is whatever Python takes for one: a table's ``np.int64`` as well as an ``int``.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any, SupportsIndex

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from xmodal_interp.errors import LayerError, NotRecordedError, PositionError

Positions = SupportsIndex | slice | Sequence[SupportsIndex] | np.ndarray | Tensor


def resolve(positions: Positions, length: int, label: str) -> Int[Tensor, " position"]:
    """Positions of any spelling as an index tensor; negative ones count from the end.

    Raises:
        PositionError: A position outside ``[-length, length)``, or no whole number.
    """
    if isinstance(positions, slice):
        return torch.arange(length)[positions]
    held = positions if isinstance(positions, Tensor) else np.atleast_1d(np.asarray(positions))
    several = held.ndim <= 1
    if isinstance(held, Tensor):
        index = held.cpu().reshape(-1)
        whole = held.numel() == 0 or not held.is_floating_point()
    else:
        whole = held.size == 0 or held.dtype.kind in "biu"
        index = torch.as_tensor(held.reshape(-1) if whole else [])
    if not (whole and several):
        raise PositionError(
            f"A {label} is a number, a list of them, or a slice; got {positions!r}."
        )
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


def numbers(given: Any, label: str) -> list[Any]:
    """One number or several, as a list.

    Args:
        given: A number, or a list, range, array or tensor of them.
        label: What they number, such as ``"layer"``.

    Raises:
        LayerError: A text or a slice, or nothing at all.
    """
    if isinstance(given, (str, slice)):
        raise LayerError(
            f"{label}s are a number or a list of them, such as [0, 3] or range(4); got {given!r}."
        )
    plain = given.tolist() if isinstance(given, (np.ndarray, Tensor)) else given
    listed = list(plain) if isinstance(plain, Iterable) else [plain]
    if not listed:
        raise LayerError(f"At least one {label} is needed; got none. Leave {label}s out for all.")
    return listed


def number(given: Any, label: str) -> int:
    """What Python takes for an index, as an ``int``.

    Raises:
        LayerError: It is none.
    """
    try:
        return operator.index(given)
    except TypeError:
        raise LayerError(
            f"A {label} is a whole number, negative ones counted from the last; got {given!r}."
        ) from None


def brief(values: Sequence[int]) -> str:
    """The first few of many numbers, for messages."""
    shown = ", ".join(str(v) for v in values[:6])
    return shown if len(values) <= 6 else f"{shown}, ... ({len(values)} in all)"
