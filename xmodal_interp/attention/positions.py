"""Positions, heads and layers in any spelling (an index, a slice, a list, a mask), read here only.

An index is whatever Python takes for one: a table's ``np.int64`` as well as an ``int``. A boolean
mask (list, NumPy, torch or pandas) has an entry for each position, head or layer that there is. A
fraction is not an index, nor is a single ``True``.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, SupportsIndex

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from xmodal_interp.errors import LayerError, NotRecordedError, PositionError, quoted

Positions = SupportsIndex | slice | Collection[Any] | np.ndarray | Tensor
"""An index, a slice, indices in any collection, or a boolean mask."""

_FAR = 2**62  # beyond every length; larger numbers do not fit into int64


def resolve(positions: Positions, length: int, label: str) -> Int[Tensor, " position"]:
    """Positions of any spelling as an index tensor; negative ones count from the end.

    Args:
        positions: An index, a slice, a list of indices, or a boolean mask with ``length`` entries.
        length: How many there are.
        label: What they are, for the message: ``"query"``.

    Raises:
        PositionError: A position outside ``[-length, length)``, something that is not a whole
            number, or a mask of another length.
    """
    if isinstance(positions, slice):
        index = range(length)[whole_slice(positions, label)]
        return torch.tensor(index, dtype=torch.long)
    given = entries_of(positions)
    if given is None:
        raise PositionError(
            f"A {label} is a number, a list of them, a slice, or a boolean mask; got "
            f"{quoted(positions)}."
        )
    if given.dtype == bool:
        if len(given) != length:
            raise PositionError(
                f"A mask needs an entry for each {label}, {length} in all; got {len(given)} "
                "entries."
            )
        return torch.from_numpy(np.flatnonzero(given))
    outside = given[(given < -length) | (given >= length)]
    if len(outside):
        raise PositionError(
            f"A {label} must lie between {-length} and {length - 1}; got {brief(outside.tolist())}."
            if length
            else f"There is no {label}; got {brief(outside.tolist())}."
        )
    return torch.from_numpy(np.where(given < 0, given + length, given))


def entries_of(given: Any) -> np.ndarray | None:
    """Whole numbers or booleans in any spelling as one row, int64 or bool.

    Returns:
        None for everything else: fractions, strings, several axes, a single boolean, or whole
        numbers and booleans in one list.
    """
    array = _array_of(given)
    if array is None or array.ndim > 1 or (array.ndim == 0 and array.dtype == bool):
        return None
    row = array.reshape(-1)
    if row.size == 0:
        return np.zeros(0, dtype=np.int64)
    if row.dtype == object:
        return _entries_of_objects(row.tolist())
    if row.dtype.kind == "u":
        row = np.minimum(row.astype(np.uint64), np.uint64(_FAR))
    return (
        row.copy()
        if row.dtype == bool
        else row.astype(np.int64)
        if row.dtype.kind in "iu"
        else None
    )


def _array_of(given: Any) -> np.ndarray | None:
    """What NumPy makes of it; None for strings, mappings, ragged lists and mixed ones."""
    if isinstance(given, (str, bytes, Mapping, slice)) or given is None:
        return None
    if isinstance(given, Tensor):
        bare = given.detach().cpu()
        return (bare.float() if bare.dtype == torch.bfloat16 else bare).numpy()
    if isinstance(given, Iterable) and not hasattr(given, "__array__"):
        given = list(given)
        if len({isinstance(one, (bool, np.bool_)) for one in given}) > 1:
            return None
    try:
        return np.asarray(given)
    except (ValueError, TypeError, RuntimeError):  # ragged, or not numbers at all
        return None


def _entries_of_objects(given: list[Any]) -> np.ndarray | None:
    """The same for Python objects: of pandas' nullable columns, or numbers beyond int64."""
    if all(isinstance(one, (bool, np.bool_)) for one in given):
        return np.array(given, dtype=bool)
    if any(isinstance(one, (bool, np.bool_)) or not hasattr(one, "__index__") for one in given):
        return None
    try:
        return np.array([max(min(operator.index(one), _FAR), -_FAR) for one in given])
    except TypeError:
        return None


def whole_slice(given: slice, label: str) -> slice:
    """A slice of whole numbers.

    Raises:
        PositionError: One of its parts is not a whole number, or its step is 0.
    """
    parts = (given.start, given.stop, given.step)
    whole = all(
        part is None or (hasattr(part, "__index__") and not isinstance(part, (bool, np.bool_)))
        for part in parts
    )
    if not whole or (given.step is not None and operator.index(given.step) == 0):
        raise PositionError(
            f"A slice of {label}s has whole numbers, and a step that is not 0; got {quoted(given)}."
        )
    return slice(*(None if part is None else operator.index(part) for part in parts))


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


def numbers(given: Any, label: str, length: int | None = None) -> list[int]:
    """One number or several, as a list; negative ones stay negative.

    Args:
        given: A number, or a list, range, array or tensor of them, or a boolean mask.
        label: What they number, such as ``"layer"``.
        length: How many entries a mask must have; None where that is not known.

    Raises:
        LayerError: A string or a slice, a number that is not whole, nothing at all, or a mask of
            another length.
    """
    row = entries_of(given)
    if row is None:
        raise LayerError(
            f"{label}s are a number or a list of them, such as [0, 3] or range(4); got "
            f"{quoted(given)}."
        )
    if row.dtype == bool:
        if len(row) != length:
            needed = f"{length} in all" if length is not None else "whose number is not known here"
            raise LayerError(
                f"A mask needs an entry for each {label}, {needed}; got {len(row)} entries. "
                f"Numbers, such as numpy.flatnonzero(mask), are taken too."
            )
        row = np.flatnonzero(row)
    if not len(row):
        raise LayerError(f"At least one {label} is needed; got none. Leave {label}s out for all.")
    found: list[int] = row.tolist()
    return found


def number(given: Any, label: str) -> int:
    """What Python takes for an index, as an ``int``.

    Raises:
        LayerError: Something else, such as a fraction or a boolean.
    """
    boolean = isinstance(given, (bool, np.bool_)) or getattr(given, "dtype", None) == torch.bool
    try:
        if boolean:
            raise TypeError
        return operator.index(given)
    except (TypeError, ValueError):
        raise LayerError(
            f"A {label} is a whole number, negative ones counted from the last; got "
            f"{quoted(given)}."
        ) from None


def brief(values: Sequence[int]) -> str:
    """The first few of many numbers, for messages."""
    shown = ", ".join(str(v) for v in values[:6])
    return shown if len(values) <= 6 else f"{shown}, ... ({len(values)} in all)"
