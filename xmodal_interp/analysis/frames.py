"""Tidy tables: numbers with axes become rows, keys first, and the table says where it came from.

Every table's ``.attrs`` hold ``analysis`` (the name of the function), ``parameters`` (what it was
asked), ``provenance`` (of the sample, or what several samples have in common; a list where they
differ in more than their date and item) and ``n_samples``; where samples of one name were numbered
also ``numbered`` (what they are called in the table, and their own name). All of it can be written
as JSON.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from os import PathLike
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor

from xmodal_interp.errors import InputError, quoted
from xmodal_interp.ordered import in_order
from xmodal_interp.sample import Sample

Cells = np.ndarray | Tensor | float
"""Values with one axis per key, or what broadcasts to that."""

Columns = dict[str, np.ndarray]
"""A part of a table, before many parts become one frame: a frame for each would take the time."""

_PLAIN: tuple[Any, ...] = (bytes, range)  # sequences that hold no samples

_OF_SAMPLE = ("created", "item", "images", "videos", "batch_size")
"""Provenance that may be another one for every sample of a run."""


def long_table(axes: Mapping[str, Sequence[Any]], values: Mapping[str, Cells]) -> Columns:
    """One row per combination of the axes' entries; one column per axis, then one per value.

    Args:
        axes: Name and entries of each axis.
        values: Name and cells of each column, of the shape of the axes or broadcast to it.
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
    """The table with key columns in front, in the order given; most are the same in all rows."""
    n_rows = len(next(iter(table.values())))
    return {name: np.full(n_rows, value) for name, value in keys.items()} | table


def stacked(tables: Iterable[Columns]) -> pd.DataFrame:
    """The tables, all of the same columns, one below the other."""
    parts = list(tables)
    return pd.DataFrame({name: np.concatenate([part[name] for part in parts]) for name in parts[0]})


def over_samples(
    samples: Sample | Iterable[Sample],
    table_of: Callable[[Sample], pd.DataFrame],
    *,
    analysis: str,
    parameters: Mapping[str, Any],
) -> pd.DataFrame:
    """The tables of all samples, one below the other, with a ``sample`` column in front.

    Samples of one name are numbered in the order given (``sample-0``, ``sample-0 (2)``), so that
    each has rows of its own; ``.attrs["numbered"]`` has the names that were given so, and what the
    samples are called. To choose names: ``capture(..., name=)``, or
    ``dataclasses.replace(sample, name=...)``.

    ``.attrs`` also say where the tables come from. Samples are read one at a time, so a store may
    be larger than memory.

    Raises:
        InputError: No sample came.
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
    """A name that no sample before has in the table; ``names``, which it is added to, has these."""
    own, number = name, 1
    while own in names:
        number += 1
        own = f"{name} ({number})"
    names[own] = name
    return own


def samples_of(samples: Sample | Iterable[Sample]) -> Sequence[Sample]:
    """One sample or many, always as a sequence; a store is one.

    Raises:
        InputError: A string, such as the path of a store that was not opened, or no list.
    """
    if isinstance(samples, (str, PathLike)):
        raise InputError(
            "An analysis takes a sample, a list of samples or an open store (xi.open_store(path)); "
            f"got {samples!r}."
        )
    if isinstance(samples, Sample):
        return [samples]
    if isinstance(samples, Sequence) and not isinstance(samples, (list, tuple, *_PLAIN)):
        return samples
    several = in_order(samples, "samples")
    if not all(isinstance(each, Sample) for each in several):
        raise InputError(
            "An analysis takes a sample, a list of samples or an open store "
            f"(xi.open_store(path)); got {quoted(samples)}."
        )
    return several


def note_origin(provenance: list[Mapping[str, Any]], sample: Sample) -> None:
    """Add the sample's provenance, unless there is one that differs in its date or item only."""
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
    """The table with ``.attrs`` that say what it is and where it came from."""
    origins = [plain(one if n_samples == 1 else _common(one)) for one in provenance]
    table.attrs = {
        "analysis": analysis,
        "parameters": plain(parameters),
        "provenance": origins[0] if len(origins) == 1 else origins,
        "n_samples": n_samples,
    }
    return table


def plain(value: Any) -> Any:
    """The value in JSON's own types: sequences as lists, a slice as ``"start:stop:step"``."""
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
