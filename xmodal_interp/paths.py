"""Paths as users write them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from xmodal_interp.errors import InputError, quoted


def user_path(given: Any) -> Path:
    """A path with ``~`` replaced by the home folder.

    Raises:
        InputError: Something that is not a path, or that no file can be called.
    """
    if not isinstance(given, (str, os.PathLike)):
        raise InputError(f"A path is a string or a pathlib.Path; got {quoted(given)}.")
    try:
        path = Path(given).expanduser()
        usable = b"\0" not in os.fsencode(path)
    except (
        RuntimeError,
        TypeError,
        UnicodeEncodeError,
    ) as error:  # no such user, bytes
        raise InputError(f"{quoted(given)} cannot be the path of a file: {error}.") from error
    if not usable:
        raise InputError(f"{quoted(given)} cannot be the path of a file: it has a null character.")
    return path
