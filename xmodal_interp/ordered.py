"""Convert sequences that users pass to lists, by position.

``series[0]`` of a pandas Series is the row labelled 0: the wrong entry after ``sort_values``, a
``KeyError`` after a filter. Therefore sequences with one entry per sample or item are converted
here before they are indexed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, KeysView, Mapping, Set, ValuesView
from typing import Any, TypeGuard

import pandas as pd

from xmodal_interp.errors import InputError


def in_order(given: Any, name: str) -> list[Any]:
    """Return the entries of a list, array, tensor, Series, DataFrame or iterator, by position.

    Args:
        given: The sequence. The entries of a DataFrame are its rows, as tuples.
        name: Name of the argument, for the message.

    Raises:
        InputError: A string, a dict, a set or a single number.
    """
    if isinstance(given, pd.DataFrame):
        return list(given.itertuples(index=False, name=None))
    unordered = isinstance(given, (str, bytes, Mapping, Set)) or not isinstance(given, Iterable)
    if unordered or getattr(given, "ndim", 1) == 0:
        raise InputError(
            f"{name} must be an ordered sequence, such as a list; got {type(given).__name__} "
            f"{given!r:.80}."
        )
    return list(given)


def held(given: Any) -> Any:
    """Convert an iterator or a dict view to a list; return any other value unchanged."""
    return list(given) if isinstance(given, (Iterator, KeysView, ValuesView)) else given


def is_several(given: Any) -> TypeGuard[Iterable[Any]]:
    """Whether an argument is a list of values rather than a single value.

    An array is a single value, because it may be a picture.
    """
    return isinstance(given, (list, tuple, pd.Series, pd.Index))
