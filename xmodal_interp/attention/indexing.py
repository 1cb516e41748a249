"""Convert positions, heads and layers given as an index, a slice, a list or a mask.

An index is an ``int`` or any object with ``__index__``, such as ``np.int64``. A boolean mask (list,
NumPy, torch or pandas) has an entry for each position, head or layer. Fractions, single booleans
and masks of zeros and ones that are not booleans are refused.
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

_FAR = 2**62  # larger than any length; larger indices are clamped to it to fit into int64


def resolve(positions: Positions, length: int, label: str) -> Int[Tensor, " position"]:
    """Convert positions to an index tensor; negative ones count from the end.

    Args:
        positions: An index, a slice, a list of indices, or a boolean mask with ``length`` entries.
        length: The number of positions.
        label: A noun for messages, such as ``"query"``.

    Raises:
        PositionError: A position is outside ``[-length, length)`` or not a whole number, a mask has
            another length, or the numbers are a mask of zeros and ones that are not booleans.
    """
    if isinstance(positions, Tensor) and positions.dtype == torch.long and positions.ndim == 1:
        held = positions.numpy() if positions.device.type == "cpu" else None
        low = 2 if len(positions) == length else 0  # of the largest: a mask has 0 and 1 only
        inside = held is not None and (
            held.size == 0 or (held.min() >= 0 and low <= held.max() < length)
        )
        if inside:  # most positions; the rest of this function takes longer than a small statistic
            return positions.contiguous()
    if isinstance(positions, slice):
        index = range(length)[whole_slice(positions, label)]
        return torch.tensor(index, dtype=torch.long)
    given = entries_of(positions)
    if given is None:
        raise PositionError(
            f"A {label} must be a number, a list of numbers, a slice, or a boolean mask; got "
            f"{quoted(positions)}."
        )
    if given.dtype == bool:
        if len(given) != length:
            raise PositionError(
                f"A mask must have one entry per {label}, {length} in all; got {len(given)} "
                "entries."
            )
        return torch.from_numpy(np.flatnonzero(given))
    if len(given) == length > 2 and set(given.tolist()) <= {0, 1}:
        raise PositionError(
            f"The {label} numbers are {length} zeros and ones, one per {label}, which look like a "
            "mask. Convert a mask to booleans, such as mask.astype(bool)."
        )
    outside = given[(given < -length) | (given >= length)]
    if len(outside):
        raise PositionError(
            f"A {label} must lie between {-length} and {length - 1}; got {brief(outside.tolist())}."
            if length
            else f"There is no {label}; got {brief(outside.tolist())}."
        )
    return torch.from_numpy(np.where(given < 0, given + length, given))


def entries_of(given: Any) -> np.ndarray | None:
    """Convert whole numbers or booleans to a one-dimensional array, int64 or bool.

    Returns:
        The array; None for anything else, such as fractions, strings, several axes, a single
        boolean, or a list with both numbers and booleans.
    """
    array = _array_of(given)
    if array is None or array.ndim > 1 or (array.ndim == 0 and array.dtype == bool):
        return None
    row = array.reshape(-1)
    if row.size == 0:
        return np.zeros(0, dtype=np.int64)
    if row.dtype == object:
        return _entries_of_objects(row.tolist())
    if row.dtype == bool:
        return row.copy()
    if row.dtype.kind == "u":
        row = np.minimum(row.astype(np.uint64), np.uint64(_FAR))
    return row.astype(np.int64) if row.dtype.kind in "iu" else None


def _array_of(given: Any) -> np.ndarray | None:
    """Convert to a NumPy array; None for strings, mappings, and ragged or mixed lists."""
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
    except (ValueError, TypeError, RuntimeError):  # ragged, or not numbers
        return None


def _entries_of_objects(given: list[Any]) -> np.ndarray | None:
    """Convert Python objects: entries of pandas' nullable columns, or numbers beyond int64."""
    if all(isinstance(one, (bool, np.bool_)) for one in given):
        return np.array(given, dtype=bool)
    if any(isinstance(one, (bool, np.bool_)) or not hasattr(one, "__index__") for one in given):
        return None
    try:
        return np.array([max(min(operator.index(one), _FAR), -_FAR) for one in given])
    except TypeError:
        return None


def whole_slice(given: slice, label: str) -> slice:
    """Return the slice with its parts as ``int``.

    Raises:
        PositionError: A part of the slice is not a whole number, or its step is 0.
    """
    parts = (given.start, given.stop, given.step)
    whole = all(
        part is None or (hasattr(part, "__index__") and not isinstance(part, (bool, np.bool_)))
        for part in parts
    )
    if not whole or (given.step is not None and operator.index(given.step) == 0):
        raise PositionError(
            f"A slice of {label}s must have whole numbers and a step other than 0; got "
            f"{quoted(given)}."
        )
    return slice(*(None if part is None else operator.index(part) for part in parts))


def index_of_kept(
    positions: Positions, rows: Int[Tensor, " row"], n_positions: int, name: str
) -> Int[Tensor, " position"]:
    """Return the indices of positions among the kept rows.

    Args:
        positions: Positions of the sequence.
        rows: The positions that were kept, ascending.
        n_positions: Length of the sequence; if 0 (unknown), the sequence ends at the last kept row.
        name: The name of the call for messages.

    Raises:
        NotRecordedError: A position was not kept.
        PositionError: A position is outside the sequence.
    """
    last = int(rows.max()) + 1 if len(rows) else 0
    wanted = resolve(positions, max(n_positions, last), "query").to(rows.device)
    index = torch.searchsorted(rows, wanted)
    held = index < len(rows)
    held[held.clone()] = rows[index[held]] == wanted[held]
    missing = wanted[~held]
    if len(missing):
        raise NotRecordedError(
            f"{name} does not hold the query rows {brief(missing.tolist())}; it holds "
            f"{brief(rows.tolist())}. Capture again with these queries, or with all."
        )
    return index


def numbers(given: Any, label: str, length: int | None = None) -> list[int]:
    """Convert one or more numbers to a list; negative numbers stay negative.

    Args:
        given: A number; a list, range, array or tensor of numbers; or a boolean mask.
        label: A noun for messages, such as ``"layer"``.
        length: The number of entries that a mask must have; None if unknown.

    Raises:
        LayerError: The argument is a string, a slice or empty, a number is not whole, or a mask has
            another length.
    """
    row = entries_of(given)
    if row is None:
        raise LayerError(
            f"{label}s must be a number or a list of numbers, such as [0, 3] or range(4); got "
            f"{quoted(given)}."
        )
    if row.dtype == bool:
        if len(row) != length:
            needed = f"{length} in all" if length is not None else "whose number is unknown here"
            raise LayerError(
                f"A mask must have one entry per {label}, {needed}; got {len(row)} entries. "
                f"Pass numbers instead, such as numpy.flatnonzero(mask)."
            )
        row = np.flatnonzero(row)
    if not len(row):
        raise LayerError(f"At least one {label} is needed; got none. Leave {label}s out for all.")
    found: list[int] = row.tolist()
    return found


def layer_index(layer: int, known: Sequence[int]) -> int:
    """Return the number of a layer: a negative one counts from the last of the known layers.

    Args:
        layer: The number as given.
        known: The numbers of the layers that exist, ascending. They may have gaps: some models
            have layers without softmax attention.

    Returns:
        The number, which may be that of no layer.
    """
    return known[layer] if -len(known) <= layer < 0 else layer


def number(given: Any, label: str) -> int:
    """Convert an index (``__index__``) to an ``int``.

    Raises:
        LayerError: The argument is not an index, such as a fraction or a boolean.
    """
    boolean = isinstance(given, (bool, np.bool_)) or getattr(given, "dtype", None) == torch.bool
    try:
        if boolean:
            raise TypeError
        return operator.index(given)
    except (TypeError, ValueError):
        raise LayerError(
            f"A {label} must be a whole number; got {quoted(given)}. Negative numbers count from "
            "the last one."
        ) from None


def brief(values: Sequence[int]) -> str:
    """Return numbers as a string for messages; of more than six, the first six and the count."""
    shown = ", ".join(str(v) for v in values[:6])
    return shown if len(values) <= 6 else f"{shown}, ... ({len(values)} in all)"
