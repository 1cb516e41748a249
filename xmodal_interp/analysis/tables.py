"""Build tidy tables from arrays with named axes, with key columns first and provenance in attrs.

The ``.attrs`` of every table hold ``analysis`` (the name of the function), ``parameters`` (its
arguments), ``provenance`` (of the sample; for several samples the entries they share, or a list if
they differ in more than date and item) and ``n_samples``. If several samples have the same name,
``numbered`` maps their names in the table to their original name. All attributes can be written as
JSON.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from os import PathLike
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor

from xmodal_interp.arguments import as_list
from xmodal_interp.errors import InputError, quoted
from xmodal_interp.sample import Sample

Cells = np.ndarray | Tensor | float
"""Values with one axis per key, or broadcastable to that shape."""

Columns = dict[str, np.ndarray]
"""Columns of a part of a table. Parts are concatenated before one DataFrame is built, for speed."""

_PLAIN: tuple[Any, ...] = (bytes, range)  # sequences that cannot hold samples

_OF_SAMPLE = ("created", "item", "images", "videos", "batch_size")
"""Provenance entries that may differ between the samples of one run."""


def long_table(axes: Mapping[str, Sequence[Any]], values: Mapping[str, Cells]) -> Columns:
    """Return one row per combination of axis entries, with a column per axis and per value.

    Args:
        axes: Name and entries of each axis.
        values: Name and cells of each column, broadcastable to the shape of the axes.
    """
    shape = tuple(len(entries) for entries in axes.values())
    table: Columns = {}
    for place, (name, entries) in enumerate(axes.items()):
        along = np.asarray(entries).reshape(-1, *(1,) * (len(shape) - place - 1))
        table[name] = np.broadcast_to(along, shape).reshape(-1)
    for name, cells in values.items():
        bare = cells.detach().cpu().numpy() if isinstance(cells, Tensor) else np.asarray(cells)
        table[name] = np.broadcast_to(bare, shape).reshape(-1)
    return table


def keyed(table: Columns, **keys: str | int | np.ndarray) -> Columns:
    """Return the table with key columns inserted in front; scalar keys fill their column."""
    n_rows = len(next(iter(table.values())))
    return {name: np.full(n_rows, value) for name, value in keys.items()} | table


def stacked(tables: Iterable[Columns]) -> pd.DataFrame:
    """Concatenate tables that have the same columns."""
    parts = list(tables)
    return pd.DataFrame({name: np.concatenate([part[name] for part in parts]) for name in parts[0]})


def over_samples(
    samples: Sample | Iterable[Sample],
    table_of: Callable[[Sample], pd.DataFrame],
    *,
    analysis: str,
    parameters: Mapping[str, Any],
) -> pd.DataFrame:
    """Concatenate the tables of all samples, with a ``sample`` column in front.

    Samples with the same name are numbered in the order given (``sample-0``, ``sample-0 (2)``), so
    that each has separate rows. ``.attrs["numbered"]`` maps the numbered names to the original
    name. To choose names, use ``capture(..., name=)`` or ``dataclasses.replace(sample, name=...)``.

    ``.attrs`` also hold the provenance. Samples are read one at a time, so a store may be larger
    than memory.

    Raises:
        InputError: There are no samples.
    """
    tables: list[pd.DataFrame] = []
    provenance: list[Mapping[str, Any]] = []
    names: dict[str, str] = {}
    for sample in samples_of(samples):
        table = table_of(sample)
        table.insert(0, "sample", own_name(sample.name, names))
        tables.append(table)
        note_origin(provenance, sample)
    if not tables:
        raise InputError(f"{analysis} needs at least one sample; got none.")
    table = tables[0] if len(tables) == 1 else pd.concat(tables, ignore_index=True)
    stamped(
        table,
        analysis=analysis,
        parameters=parameters,
        provenance=provenance,
        n_samples=len(tables),
    )
    numbered = {shown: name for shown, name in names.items() if shown != name}
    if numbered:
        table.attrs["numbered"] = numbered
    return table


def own_name(name: str, names: dict[str, str]) -> str:
    """Return the name, numbered if it is among ``names`` already, and add it to ``names``."""
    own, number = name, 1
    while own in names:
        number += 1
        own = f"{name} ({number})"
    names[own] = name
    return own


def samples_of(samples: Sample | Iterable[Sample]) -> Sequence[Sample]:
    """Return one sample or many as a sequence; a store is a sequence already.

    Raises:
        InputError: ``samples`` is a string, such as the path of a store, or not a list of samples.
    """
    if isinstance(samples, (str, PathLike)):
        raise InputError(
            "samples must be a sample, a list of samples or an open store (xi.open_store(path)); "
            f"got {samples!r}."
        )
    if isinstance(samples, Sample):
        return [samples]
    if isinstance(samples, Sequence) and not isinstance(samples, (list, tuple, *_PLAIN)):
        return samples
    several = as_list(samples, "samples")
    if not all(isinstance(each, Sample) for each in several):
        raise InputError(
            "samples must be a sample, a list of samples or an open store "
            f"(xi.open_store(path)); got {quoted(samples)}."
        )
    return several


def note_origin(provenance: list[Mapping[str, Any]], sample: Sample) -> None:
    """Add the sample's provenance, unless the list has one that differs only in date or item."""
    if all(_common(known) != _common(sample.provenance) for known in provenance):
        provenance.append(sample.provenance)


def _common(provenance: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in provenance.items() if name not in _OF_SAMPLE}


def stamped(
    table: pd.DataFrame,
    *,
    analysis: str,
    parameters: Mapping[str, Any],
    provenance: Sequence[Mapping[str, Any]],
    n_samples: int,
) -> pd.DataFrame:
    """Set the table's ``.attrs`` and return the table."""
    origins = [plain(one if n_samples == 1 else _common(one)) for one in provenance]
    table.attrs = {
        "analysis": analysis,
        "parameters": plain(parameters),
        "provenance": origins[0] if len(origins) == 1 else origins,
        "n_samples": n_samples,
    }
    return table


def plain(value: Any) -> Any:
    """Convert a value to JSON types: sequences to lists, a slice to ``"start:stop:step"``."""
    if isinstance(value, Mapping):
        return {str(name): plain(entry) for name, entry in value.items()}
    if isinstance(value, slice):
        parts = (value.start, value.stop, value.step)
        return ":".join("" if part is None else str(part) for part in parts)
    if isinstance(value, (Tensor, np.ndarray, pd.Series, pd.Index)):
        return value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, (set, frozenset)):
        return [plain(entry) for entry in sorted(value)]
    if isinstance(value, (list, tuple, range)):
        return [plain(entry) for entry in value]
    return value
