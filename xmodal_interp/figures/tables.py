"""Checks of the tables given to figures: columns, and one row per plotted point."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from xmodal_interp.errors import InputError


def columns_of(
    table: pd.DataFrame, columns: Sequence[str], what: str, numbers: Sequence[str] = ()
) -> None:
    """Raise InputError if a table lacks a column, has no rows, or a column is not numeric.

    Args:
        table: The table.
        columns: Required columns.
        what: Name of the figure, for the message.
        numbers: Required columns that must be numeric.
    """
    missing = [name for name in columns if name not in table.columns]
    if missing:
        raise InputError(
            f"{what} requires the columns {', '.join(columns)}; missing: {', '.join(missing)}. "
            f"The table has {', '.join(map(str, table.columns))}."
        )
    if not len(table):
        raise InputError(f"The table is empty. {what} requires at least one row.")
    text = [name for name in numbers if not pd.api.types.is_numeric_dtype(table[name])]
    if text:
        raise InputError(
            f"{what} requires a numeric column {text[0]!r}; got dtype {table[text[0]].dtype}."
        )


def one_row_each(table: pd.DataFrame, keys: Sequence[str], value: str, what: str) -> None:
    """Raise InputError if a table has several rows per entry of ``keys``: only one can be drawn."""
    counts = table.groupby(list(keys), dropna=False).size()
    if counts.max() <= 1:
        return
    crowded = table[table.duplicated(list(keys))]
    place = {key: crowded[key].iloc[0] for key in keys}
    where = ", ".join(f"{key} {entry}" for key, entry in place.items())
    same = table[(table[list(place)] == list(place.values())).all(axis=1)]
    differing = [
        str(name)
        for name in table.columns
        if name not in keys
        and not pd.api.types.is_float_dtype(table[name])
        and len(same[name].unique()) > 1
    ]
    raise InputError(
        f"{what} requires one row per {' and '.join(keys)}; {where} has {len(same)}. Select rows "
        f"by {' or '.join(differing) or 'another column'}, or average them: "
        f"table.groupby({list(keys)!r}, as_index=False)[{value!r}].mean()."
    )
