"""Escape user text for output: control characters, Markdown markup, spreadsheet formulas.

Terminals, spreadsheets, SVG files and Markdown pages each interpret some characters of prompts,
answers, tokens, paths and names as commands.
"""

from __future__ import annotations

import re
import unicodedata
from pathlib import PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

_BIDI = re.compile("[\u202a-\u202e\u2066-\u2069]")  # change the direction of the following text
_MARKDOWN = re.compile(r"([\\`*_{}\[\]<>|#~$])")
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def printable(text: str, *, lines: bool = True) -> str:
    r"""Replace control characters by escapes such as ``\x1b``.

    Unpaired surrogates and characters that change the text direction are replaced too.

    Args:
        text: Any string.
        lines: If True, line breaks and tabs are kept.
    """
    return "".join(
        letter if _is_shown(letter, lines=lines) else letter.encode("unicode_escape").decode()
        for letter in text
    )


def _is_shown(letter: str, *, lines: bool) -> bool:
    if letter in "\n\t":
        return lines
    hidden = unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp")
    return not hidden and _BIDI.match(letter) is None


def markdown_escaped(text: str) -> str:
    """Return one line of Markdown that renders as the given text."""
    return _MARKDOWN.sub(r"\\\1", printable(text, lines=False))


def for_spreadsheets(table: pd.DataFrame) -> pd.DataFrame:
    """Put an apostrophe before strings that a spreadsheet would run as a formula.

    These are strings of two or more characters that start with ``=``, ``+``, ``-``, ``@``, a tab or
    a carriage return. Numbers are not changed.
    """
    from pandas.api.types import is_object_dtype, is_string_dtype

    texts = [
        name
        for name, dtype in table.dtypes.items()
        if is_string_dtype(dtype) or is_object_dtype(dtype)
    ]
    if not texts:
        return table
    return table.assign(**{str(name): table[name].map(_no_formula) for name in texts})


def _no_formula(cell: object) -> object:
    is_formula = isinstance(cell, str) and len(cell) > 1 and cell.startswith(_FORMULA)
    return f"'{cell}" if is_formula else cell


def portable(value: Any) -> Any:
    """Return absolute paths without their folders: a page may be mailed.

    Args:
        value: A value of a manifest or a provenance; lists are searched for paths.
    """
    if isinstance(value, (list, tuple)):
        return [portable(each) for each in value]
    if not isinstance(value, str):
        return value
    for path in (PurePosixPath(value), PureWindowsPath(value)):
        if path.is_absolute():
            return path.name or "/"
    return value
