"""What every figure of a table asks of it: its columns, and one row per place in the figure."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from xmodal_interp.errors import InputError


def columns_of(
    table: pd.DataFrame, columns: Sequence[str], what: str, numbers: Sequence[str] = ()
) -> None:
    """Refuse a table that lacks a column, has no rows, or text where numbers are drawn.

    Args:
        table: The table.
        columns: What it must have.
        what: The figure, for the message.
        numbers: Which of the columns must hold numbers.
    """
    missing = [name for name in columns if name not in table.columns]
    if missing:
        raise InputError(
            f"{what} needs the columns {', '.join(columns)}. The table has "
            f"{', '.join(map(str, table.columns))}; missing: {', '.join(missing)}."
        )
    if not len(table):
        raise InputError(f"{what} needs at least one row; the table has none.")
    text = [name for name in numbers if not pd.api.types.is_numeric_dtype(table[name])]
    if text:
        raise InputError(
            f"{what} draws numbers. The column {text[0]} holds {table[text[0]].dtype}."
        )


def one_row_each(table: pd.DataFrame, keys: Sequence[str], value: str, what: str) -> None:
    """Refuse a table with several rows for one place in the figure: it would hide all but one."""
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
        f"{what} shows one row per {' and '.join(keys)}; {where} has {len(same)}. Choose rows by "
        f"{' or '.join(differing) or 'another column'}, or average them first: "
        f"table.groupby({list(keys)!r}, as_index=False)[{value!r}].mean()."
    )
