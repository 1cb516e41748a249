"""Text of users as it can be shown anywhere: no control characters, no markup, no formulas.

Prompts, answers, tokens, paths and names come from outside. A terminal, a spreadsheet, an SVG
file and a Markdown page each read some characters as commands.
"""

from __future__ import annotations

import re
import unicodedata

import pandas as pd

_BIDI = re.compile("[\u202a-\u202e\u2066-\u2069]")  # turn the reading order of what follows
_MARKDOWN = re.compile(r"([\\`*_{}\[\]<>|#~$])")
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def printable(text: str, *, lines: bool = True) -> str:
    r"""The text with an escape such as ``\x1b`` for each character that is not for reading.

    These are control characters, halves of surrogate pairs, and marks that turn the reading order.

    Args:
        text: Any text.
        lines: Whether line breaks and tabs stay.
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
    """One line of Markdown that shows the text as it is."""
    return _MARKDOWN.sub(r"\\\1", printable(text, lines=False))


def for_spreadsheets(table: pd.DataFrame) -> pd.DataFrame:
    """The table with an apostrophe before texts that a spreadsheet would take for a formula.

    Such a text begins with ``=``, ``+``, ``-``, ``@`` or white space, and goes on. Numbers stay.
    """
    texts = [
        name
        for name, dtype in table.dtypes.items()
        if pd.api.types.is_string_dtype(dtype) or pd.api.types.is_object_dtype(dtype)
    ]
    if not texts:
        return table
    return table.assign(**{str(name): table[name].map(_no_formula) for name in texts})


def _no_formula(cell: object) -> object:
    is_formula = isinstance(cell, str) and len(cell) > 1 and cell.startswith(_FORMULA)
    return f"'{cell}" if is_formula else cell
