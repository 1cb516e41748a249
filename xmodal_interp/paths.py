"""Conversion of user input to paths."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from xmodal_interp.errors import InputError, quoted

_LONGEST = 255  # limit of one name in bytes on common file systems


def user_path(given: Any) -> Path:
    """Return a path with ``~`` replaced by the home folder.

    Raises:
        InputError: The value is not a path, or cannot be the path of a file.
    """
    if not isinstance(given, (str, os.PathLike)):
        raise InputError(f"A path must be a string or a pathlib.Path; got {quoted(given)}.")
    try:
        path = Path(given).expanduser()
        usable = b"\0" not in os.fsencode(path)
    except (
        RuntimeError,
        TypeError,
        UnicodeEncodeError,
    ) as error:  # unknown user after ~, or bytes
        raise InputError(f"{quoted(given)} cannot be the path of a file: {error}.") from error
    if not usable:
        raise InputError(
            f"{quoted(given)} cannot be the path of a file: it contains a null character."
        )
    longest = max((len(os.fsencode(part)) for part in path.parts), default=0)
    if longest > _LONGEST:
        raise InputError(
            f"{quoted(given)} cannot be the path of a file: one of its names has {longest} bytes, "
            f"and the limit is {_LONGEST}."
        )
    return path
