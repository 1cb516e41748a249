"""Paths as users write them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from xmodal_interp.errors import InputError, quoted

_LONGEST = 255  # bytes of one name, on usual file systems


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
    longest = max((len(os.fsencode(part)) for part in path.parts), default=0)
    if longest > _LONGEST:
        raise InputError(
            f"{quoted(given)} cannot be the path of a file: a name of {longest} bytes, where at "
            f"most {_LONGEST} are possible."
        )
    return path
