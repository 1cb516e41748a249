"""Where a phrase stands in a text."""

from __future__ import annotations

import re
from collections.abc import Callable

from xmodal_interp.errors import PhraseError


def span_of(
    phrase: str, text: str, occurrence: int | None, *, hidden: Callable[[int, int], bool]
) -> tuple[int, int]:
    """First character of a phrase in a text, and one past the last.

    Upper and lower case are alike, whole words only, and any white space between them.

    Args:
        phrase: What to find.
        text: Where.
        occurrence: Which one, 0-based, if there are several; negative counts from the last.
        hidden: Whether the characters from start to end are no text.

    Raises:
        PhraseError: The phrase does not occur, or occurs several times and ``occurrence`` was not
            given.
    """
    found = re.finditer(_as_pattern(phrase), text, re.IGNORECASE) if phrase.strip() else ()
    spans = [match.span() for match in found if not hidden(*match.span())]
    if not spans:
        raise PhraseError(
            f"A phrase must occur in the sample's text. {phrase!r} is not in {text!r}."
        )
    if occurrence is None and len(spans) > 1:
        raise PhraseError(
            f"A phrase must be unique, or one occurrence chosen. {phrase!r} occurs "
            f"{len(spans)} times in {text!r}; pass occurrence=0 to {len(spans) - 1}."
        )
    index = occurrence or 0
    if not -len(spans) <= index < len(spans):
        raise PhraseError(f"{phrase!r} occurs {len(spans)} times; there is no occurrence {index}.")
    return spans[index]


def _as_pattern(phrase: str) -> str:
    """The phrase with any white space between its words, and no word continued at either end."""
    words = r"\s+".join(re.escape(word) for word in phrase.split())
    return rf"(?<!\w){words}(?!\w)"
