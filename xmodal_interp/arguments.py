"""Check and convert the arguments of public functions; each error names the argument.

* ``whole_number``, ``one_of``, ``strings``, ... check one value.
* :func:`as_list` converts a sequence to a list. ``series[0]`` of a pandas Series is the row
  labelled 0: the wrong entry after ``sort_values``, a ``KeyError`` after a filter. Sequences with
  one entry per sample or item are therefore converted before they are indexed.
* :func:`one_or_several` converts a value that may be a list of values to a list.
* :func:`user_path` converts a string to a path.
* :func:`checked` decorates a public function: it checks arguments by name, from the table
  ``CHECKS``.
"""

from __future__ import annotations

import inspect
import math
import operator
import os
from collections.abc import (
    Callable,
    Iterable,
    Iterator,
    KeysView,
    Mapping,
    Sequence,
    Set,
    ValuesView,
)
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeGuard, TypeVar, get_args

import numpy as np
import pandas as pd

from xmodal_interp.errors import InputError, quoted
from xmodal_interp.vocabulary import TOWERS, AttentionKind

MOST = 10_000_000
"""Default upper bound of integer arguments."""


def whole_number(value: Any, name: str, low: int, high: int = MOST) -> int:
    """Return ``value`` as an ``int``.

    Raises:
        InputError: ``value`` is not an integer from ``low`` to ``high``.
    """
    number = None
    if not isinstance(value, (bool, np.bool_)):
        try:
            number = operator.index(value)
        except (TypeError, ValueError):
            number = None
    if number is None or not low <= number <= high:
        raise InputError(f"{name} must be an integer from {low} to {high}; got {quoted(value)}.")
    return number


def real_number(value: Any, name: str, low: float = -math.inf, high: float = math.inf) -> float:
    """Return ``value`` as a ``float``.

    Raises:
        InputError: ``value`` is not a number from ``low`` to ``high`` (both included), or is NaN.
    """
    number = math.nan
    if not isinstance(value, (bool, np.bool_, str, bytes)):
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError, RuntimeError):
            number = math.nan
    if not low <= number <= high:
        bounds = f" from {low:g} to {high:g}" if math.isfinite(low) or math.isfinite(high) else ""
        raise InputError(f"{name} must be a number{bounds}; got {quoted(value)}.")
    return number


def one_of(value: Any, name: str, allowed: Sequence[Any]) -> None:
    """Raise InputError if ``value`` is not in ``allowed``."""
    if not any(value is each or (isinstance(value, str) and value == each) for each in allowed):
        names = ", ".join(str(each) for each in allowed)
        raise InputError(f"{name} must be one of {names}; got {quoted(value)}.")


def string(value: Any, name: str) -> None:
    """Raise InputError if ``value`` is not a string, or contains an unpaired surrogate."""
    if not isinstance(value, str):
        raise InputError(f"{name} must be a string; got {quoted(value)}.")
    if any("\ud800" <= letter <= "\udfff" for letter in value):
        raise InputError(
            f"{name} must be valid Unicode; {quoted(value)} contains an unpaired surrogate."
        )


def strings(value: Any, name: str) -> None:
    """Raise InputError if ``value`` is neither a string nor a list of strings."""
    if isinstance(value, str):
        return
    is_list = isinstance(value, (list, tuple, set, frozenset, np.ndarray))
    if not is_list or not all(isinstance(each, str) for each in value):
        raise InputError(f"{name} must be a string or a list of strings; got {quoted(value)}.")


def function(value: Any, name: str) -> None:
    """Raise InputError if ``value`` is not callable."""
    if not callable(value):
        raise InputError(f"{name} must be a function; got {quoted(value)}.")


def table(value: Any, name: str) -> None:
    """Raise InputError if ``value`` is not a DataFrame."""
    if not isinstance(value, pd.DataFrame):
        raise InputError(f"{name} must be a pandas.DataFrame; got {quoted(value)}.")


def shallow(value: Any, name: str) -> None:
    """Raise InputError if ``value`` is a list nested five or more levels deep."""
    inner = value
    for _ in range(5):
        if not isinstance(inner, (list, tuple)) or not inner:
            return
        inner = inner[0]
    raise InputError(f"{name} is nested too deeply; got {quoted(value)}.")


def as_list(given: Any, name: str) -> list[Any]:
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


def list_if_iterator(given: Any) -> Any:
    """Convert an iterator or a dict view to a list; return any other value unchanged.

    An open file, which iterates over lines, is a single value.
    """
    iterates = isinstance(given, (Iterator, KeysView, ValuesView)) and not hasattr(given, "read")
    return list(given) if iterates else given


def is_several(given: Any) -> TypeGuard[Iterable[Any]]:
    """Return whether an argument is a list of values rather than a single value.

    An array is a single value, because it may be a picture.
    """
    return isinstance(given, (list, tuple, pd.Series, pd.Index))


def one_or_several(given: Any) -> list[Any]:
    """Return the values of a list or an iterator; a single value, such as a picture, is in a list.

    Arrays are single values, unless their entries are objects.
    """
    given = list_if_iterator(given)
    of_objects = isinstance(given, np.ndarray) and given.dtype == object and given.ndim
    return list(given) if of_objects or is_several(given) else [given]


_LONGEST = 255  # limit of one name in bytes on common file systems


def user_path(given: Any) -> Path:
    """Return a path with ``~`` replaced by the home folder.

    Raises:
        InputError: The value is not a path, or cannot be the path of a file.
    """
    if not isinstance(given, (str, os.PathLike)):
        raise InputError(f"A path must be a string or a pathlib.Path; got {quoted(given)}.")
    problem = None
    try:
        path = Path(given).expanduser()
        longest = max((len(os.fsencode(part)) for part in path.parts), default=0)
        if b"\0" in os.fsencode(path):
            problem = "it contains a null character"
        elif longest > _LONGEST:
            problem = f"one of its names has {longest} bytes, and the limit is {_LONGEST}"
    except (RuntimeError, TypeError, UnicodeEncodeError) as error:  # no such user after ~, or bytes
        problem = str(error)
    if problem is not None:
        raise InputError(f"{quoted(given)} cannot be the path of a file: {problem}.")
    return path


def not_recorded_calls(value: Any, name: str) -> None:
    """Raise InputError if ``value`` is a recording or recorded calls instead of samples."""
    listed = isinstance(value, (list, tuple)) and len(value) > 0
    first = value[0] if listed else value
    is_recording = hasattr(first, "calls") and hasattr(first, "without_matrix")
    is_call = hasattr(first, "scaling") and hasattr(first, "query_positions")
    if is_recording or is_call:
        given = f"a {type(value).__name__}"
        given += f" of {type(first).__name__}" if listed else ""
        raise InputError(
            f"{name} must be {'samples' if name == 'samples' else 'a sample'}; got {given}. Make a "
            "sample with xi.capture(vlm, image, prompt), or of a vision model with "
            "recording.sample(image, grid=(rows, columns))."
        )


Check = Callable[[Any, str], Any]
"""Takes a value and the name of its argument; raises InputError if the value is invalid."""

_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")


def count(low: int, high: int = MOST) -> Check:
    """Return a check for integers from ``low`` to ``high``."""
    return lambda value, name: whole_number(value, name, low, high)


def choice(*allowed: Any) -> Check:
    """Return a check for values in ``allowed``."""
    return lambda value, name: one_of(value, name, allowed)


CHECKS: Mapping[str, Check] = {
    **dict.fromkeys(("image", "video", "frame"), count(0)),
    **dict.fromkeys(("n_bootstrap", "workers"), count(1)),
    # the functions check the lower bound themselves
    **dict.fromkeys(("n_bins", "window", "steps", "batch_size", "n_random"), count(-MOST)),
    **dict.fromkeys(("n_positions", "min_queries"), count(0)),
    **dict.fromkeys(("value", "label", "title", "x"), string),
    **dict.fromkeys(("by", "blocks"), strings),
    **dict.fromkeys(("table", "hits", "curve"), table),
    **dict.fromkeys(("queries", "layers", "heads", "head"), shallow),
    **dict.fromkeys(("sample", "samples"), not_recorded_calls),
    "seed": count(0, 2**63 - 1),
    "tower": choice(*TOWERS),
    "kind": choice(*get_args(AttentionKind)),
    "criterion": choice("overlap", "centre"),
    "vmax": lambda value, name: real_number(value, name, 0),
    "interval": strings,
    "meaning": choice("amount", "difference", "ratio"),
    "statistic": function,
    "per_sample": choice(True, False),
}
"""The check of each argument name, applied by ``checked``."""

_READ_AGAIN = ("queries", "layers", "heads", "head", "alpha", "by", "blocks")
"""Arguments that are read once per sample and once for the attributes of the table."""


def checked(function: Callable[_Parameters, _Result]) -> Callable[_Parameters, _Result]:
    """Decorate a public function: check its arguments by name (``CHECKS``) before each call.

    None is accepted where it is the default. Iterators are converted to lists, because some
    arguments are read more than once.
    """
    parameters = inspect.signature(function).parameters
    checks = {name: CHECKS[name] for name in parameters if name in CHECKS}

    @wraps(function)
    def inside(*args: _Parameters.args, **kwargs: _Parameters.kwargs) -> _Result:
        given: dict[str, Any] = dict(zip(parameters, args, strict=False)) | kwargs
        lists = {name: list_if_iterator(given[name]) for name in _READ_AGAIN if name in given}
        given |= lists
        for name, check in checks.items():
            if name in given and not (given[name] is None and parameters[name].default is None):
                check(given[name], name)
        names = [*parameters, *("" for _ in args)]  # padded: Python raises for too many arguments
        positional: Any = [lists.get(name, each) for name, each in zip(names, args, strict=False)]
        named: Any = {name: given[name] for name in kwargs}
        return function(*positional, **named)

    return inside
