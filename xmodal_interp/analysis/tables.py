"""Build tidy tables from arrays with named axes, with key columns first and provenance in attrs.

The ``.attrs`` of every table hold ``analysis`` (the name of the function), ``parameters`` (its
arguments), ``provenance`` (of the sample; for several samples the entries they share, or a list if
they differ in more than date and item) and ``n_samples``. If several samples have the same name,
``numbered`` maps their names in the table to their original name. All attributes can be written as
JSON.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from os import PathLike
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor

from xmodal_interp.analysis.processes import rows_of_samples
from xmodal_interp.arguments import as_list
from xmodal_interp.at import TypedSelector, name_of
from xmodal_interp.attention import AttentionCall
from xmodal_interp.errors import InputError, quoted
from xmodal_interp.sample import Sample

Values = np.ndarray | Tensor | float
"""Values with one axis per key, or broadcastable to that shape."""

Part = dict[str, Any]
"""Columns of a part of a table: arrays or ``Taken`` of one length, and scalars that are the same in
all rows."""

_NO_SAMPLES: tuple[Any, ...] = (bytes, range)  # sequences that cannot hold samples

_OF_SAMPLE = ("created", "item", "images", "videos", "batch_size")
"""Provenance entries that may differ between the samples of one run."""


@dataclass(frozen=True, eq=False)
class Taken:
    """A column whose rows are entries of a pandas array, such as a column of a token table.

    ``stacked`` takes the entries once for the whole table. Concatenating them part by part would be
    slower, and the text columns of the table would consist of one chunk per part.

    Attributes:
        entries: The array.
        index: The index of the entry of each row.
    """

    entries: Any
    index: np.ndarray


def long_table(axes: Mapping[str, Sequence[Any]], values: Mapping[str, Values]) -> Part:
    """Return one row per combination of axis entries, with a column per axis and per value.

    Args:
        axes: Name and entries of each axis.
        values: Name and values of each column, broadcastable to the shape of the axes.
    """
    shape = tuple(len(entries) for entries in axes.values())
    table: Part = {}
    for place, (name, entries) in enumerate(axes.items()):
        along = np.asarray(entries).reshape(-1, *(1,) * (len(shape) - place - 1))
        table[name] = np.broadcast_to(along, shape).reshape(-1)
    for name, given in values.items():
        array = given.detach().cpu().numpy() if isinstance(given, Tensor) else np.asarray(given)
        table[name] = np.broadcast_to(array, shape).reshape(-1)
    return table


def call_table(
    call: AttentionCall, axes: Mapping[str, Sequence[Any]], values: Mapping[str, Values]
) -> Part:
    """Return ``long_table`` with the tower, the attention kind and the layer of a call in front."""
    return {"tower": call.tower, "kind": call.kind, "layer": call.layer} | long_table(axes, values)


def stacked(parts: Iterable[Part]) -> pd.DataFrame:
    """Return one table of parts that have the same columns; it is built once, for speed."""
    return pd.DataFrame(joined(parts))


def joined(parts: Iterable[Part]) -> Part:
    """Return the columns of ``stacked`` as arrays."""
    parts = list(parts)
    lengths = [next(n for n in map(_n_rows, part.values()) if n is not None) for part in parts]
    return {name: _column([part[name] for part in parts], lengths) for name in parts[0]}


def _n_rows(column: Any) -> int | None:
    """Return the number of rows of a column of a part; None for a scalar."""
    if isinstance(column, Taken):
        return len(column.index)
    return len(column) if np.ndim(column) else None


def _column(parts: Sequence[Any], lengths: Sequence[int]) -> Any:
    """Return one column of all parts, each with the given number of rows."""
    first = parts[0]
    if isinstance(first, np.ndarray):
        return np.concatenate(parts)
    if isinstance(first, str):
        codes, names = pd.factorize(np.array(parts, dtype=object))
        return pd.Series(names).array.take(np.repeat(codes, lengths))
    if _n_rows(first) is None:
        return np.repeat(np.array(parts), lengths)
    return _taken([each if isinstance(each, Taken) else _whole(each) for each in parts])


def _whole(column: Any) -> Taken:
    """Return a Series or an extension array, such as Int64, as a column of its entries."""
    return Taken(pd.Series(column).array, np.arange(len(column)))


def _taken(columns: Sequence[Taken]) -> Any:
    """Return the entries of all columns, in one array of one chunk."""
    sources = {id(column.entries): column.entries for column in columns}
    starts = np.cumsum([0, *(len(entries) for entries in sources.values())])
    start_of = dict(zip(sources, starts.tolist(), strict=False))
    index = np.concatenate([column.index + start_of[id(column.entries)] for column in columns])
    entries = next(iter(sources.values()))
    if len(sources) > 1:
        several = [pd.Series(each) for each in sources.values()]
        entries = pd.concat(several, ignore_index=True).array
    return entries.take(index)


def over_samples(
    samples: Sample | Iterable[Sample],
    table_rows: Callable[[Sample], Iterable[Part]],
    analysis: str,
    parameters: Mapping[str, Any],
    workers: int = 1,
) -> pd.DataFrame:
    """Return the rows of all samples as one table, with a ``sample`` column in front.

    Samples with the same name are numbered in the order given (``sample-0``, ``sample-0 (2)``), so
    that each has separate rows. ``.attrs["numbered"]`` maps the numbered names to the original
    name. To choose names, use ``capture(..., name=)`` or ``dataclasses.replace(sample, name=...)``.

    ``.attrs`` also hold the provenance. Samples are read one at a time, so a store may be larger
    than memory.

    Args:
        samples: One sample or many.
        table_rows: Function that returns or yields the rows of one sample.
        analysis: Name of the analysis, for ``.attrs``.
        parameters: Arguments of the analysis, for ``.attrs``.
        workers: Number of processes that compute the rows; the table does not depend on it.

    Raises:
        InputError: There are no samples.
    """
    parts: list[Part] = []
    provenance: list[Mapping[str, Any]] = []
    names: dict[str, str] = {}
    with closing(rows_of_samples(samples_of(samples), table_rows, workers)) as of_samples:
        for of_sample in of_samples:
            name = unique_name(of_sample.name, names)
            parts += [{"sample": name, **part} for part in of_sample.parts]
            add_provenance(provenance, of_sample.provenance)
    if not names:
        raise InputError(f"{analysis} requires at least one sample; got none.")
    table = stamped(
        stacked(parts),
        analysis=analysis,
        parameters=parameters,
        provenance=provenance,
        n_samples=len(names),
    )
    numbered = {shown: name for shown, name in names.items() if shown != name}
    if numbered:
        table.attrs["numbered"] = numbered
    return table


def unique_name(name: str, names: dict[str, str]) -> str:
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
    if isinstance(samples, Sequence) and not isinstance(samples, (list, tuple, *_NO_SAMPLES)):
        return samples
    several = as_list(samples, "samples")
    if not all(isinstance(each, Sample) for each in several):
        raise InputError(
            "samples must be a sample, a list of samples or an open store "
            f"(xi.open_store(path)); got {quoted(samples)}."
        )
    return several


def add_provenance(provenance: list[Mapping[str, Any]], of_sample: Mapping[str, Any]) -> None:
    """Add a sample's provenance, unless the list has one that differs only in date or item."""
    if all(_common(known) != _common(of_sample) for known in provenance):
        provenance.append(of_sample)


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
    origins = [as_json(one if n_samples == 1 else _common(one)) for one in provenance]
    table.attrs = {
        "analysis": analysis,
        "parameters": as_json(parameters),
        "provenance": origins[0] if len(origins) == 1 else origins,
        "n_samples": n_samples,
    }
    return table


def as_json(value: Any) -> Any:
    """Convert a value to JSON types.

    Sequences become lists, a slice ``"start:stop:step"``, a typed selector the expression that
    makes it, and a function ``"function NAME"``.
    """
    if isinstance(value, TypedSelector):
        return repr(value)
    if callable(value) and not isinstance(value, Tensor):
        return name_of(value)
    if isinstance(value, Mapping):
        return {str(name): as_json(entry) for name, entry in value.items()}
    if isinstance(value, slice):
        parts = (value.start, value.stop, value.step)
        return ":".join("" if part is None else str(part) for part in parts)
    if isinstance(value, (Tensor, np.ndarray, pd.Series, pd.Index)):
        return value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, (set, frozenset)):
        return [as_json(entry) for entry in sorted(value)]
    if isinstance(value, (list, tuple, range)):
        return [as_json(entry) for entry in value]
    return value
