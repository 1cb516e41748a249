"""Sequences that users pass, read by position, once.

``series[0]`` of pandas is the row labelled 0. After ``sort_values`` that is another sample's entry,
and after a filter it raises ``KeyError``. Sequences that run beside samples or items are therefore
read here, and nowhere by ``[i]``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, KeysView, Mapping, Set, ValuesView
from typing import Any, TypeGuard

import pandas as pd

from xmodal_interp.errors import InputError


def in_order(given: Any, name: str) -> list[Any]:
    """The entries of a list, array, tensor, Series or iterator, by position.

    Args:
        given: The sequence; of a DataFrame, its rows as tuples.
        name: Name of the argument, for the message.

    Raises:
        InputError: A string, or something without an order: a dict, a set, a single number.
    """
    if isinstance(given, pd.DataFrame):
        return list(given.itertuples(index=False, name=None))
    unordered = isinstance(given, (str, bytes, Mapping, Set)) or not isinstance(given, Iterable)
    if unordered or getattr(given, "ndim", 1) == 0:
        raise InputError(
            f"{name} must be a list with an order; got {type(given).__name__} {given!r:.80}."
        )
    return list(given)


def held(given: Any) -> Any:
    """An iterator, which can be read once only, or a dict's view as a list; else as it is."""
    return list(given) if isinstance(given, (Iterator, KeysView, ValuesView)) else given


def is_several(given: Any) -> TypeGuard[Iterable[Any]]:
    """Whether an argument that may be one thing or a list of them is a list.

    An array is one thing: it may be a picture.
    """
    return isinstance(given, (list, tuple, pd.Series, pd.Index))
