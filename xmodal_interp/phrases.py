"""Where a phrase stands in a text.

A phrase is made of whole words: it does not begin or end within one. What a word is depends on
the script. Most put spaces between words. Some do not (Chinese, Japanese, Thai, ...): there a
phrase may begin and end anywhere but within a character. Korean puts spaces between words, and
particles behind them without one: there a phrase begins where a word does, and the word may go on.
"""

from __future__ import annotations

import operator
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeGuard

from xmodal_interp.errors import InputError, PhraseError, quoted

_WITHOUT_SPACES = (
    *("CJK", "IDEOGRAPHIC", "HIRAGANA", "KATAKANA", "HALFWIDTH KATAKANA", "BOPOMOFO", "YI"),
    *("THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN"),
)
_MARKS = ("Mn", "Mc")
_N_SHOWN = 3


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
        InputError: The phrase is no text, or the occurrence no whole number.
        PhraseError: The phrase does not occur, or occurs several times and ``occurrence`` was not
            given.
    """
    _check_types(phrase, occurrence)
    spans = [span for span in _spans(phrase, text, whole=True) if not hidden(*span)]
    if not spans:
        raise PhraseError(_missing(phrase, text, hidden))
    if occurrence is None and len(spans) > 1:
        raise PhraseError(
            f"A phrase must be unique, or one occurrence chosen. {phrase!r} occurs "
            f"{len(spans)} times in {text!r}; pass occurrence=0 to {len(spans) - 1}."
        )
    index = 0 if occurrence is None else operator.index(occurrence)
    if not -len(spans) <= index < len(spans):
        raise PhraseError(f"{phrase!r} occurs {len(spans)} times; there is no occurrence {index}.")
    return spans[index]


def has_word(word: str, text: str, hidden: Callable[[int, int], bool]) -> bool:
    """Whether a text has a word, upper and lower case alike, where it is not hidden."""
    return any(not hidden(*span) for span in _spans(word, text, whole=True))


def has_phrase(selector: Any) -> TypeGuard[str | Sequence[str | int]]:
    """Whether positions are named by a phrase, or in a list by one at least."""
    in_list = isinstance(selector, (list, tuple)) and any(isinstance(one, str) for one in selector)
    return isinstance(selector, str) or in_list


def _spans(phrase: str, text: str, *, whole: bool) -> Iterator[tuple[int, int]]:
    """Where a phrase occurs, as whole words or anywhere; no two overlap."""
    words = r"\s+".join(re.escape(word) for word in phrase.split())
    pattern, at = re.compile(words, re.IGNORECASE), 0
    while words and (match := pattern.search(text, at)) is not None:
        start, end = match.span()
        if whole and (_goes_on(text, start, korean=True) or _goes_on(text, end)):
            at = start + 1
            continue
        yield start, end
        at = end


def _goes_on(text: str, at: int, *, korean: bool = False) -> bool:
    """Whether the character at ``at`` continues the word of the one before it.

    Args:
        text: The text.
        at: Which character.
        korean: Whether Korean continues a word.
    """
    if not 0 < at < len(text):
        return False
    before, after = text[at - 1], text[at]
    if not (_in_word(before) and _in_word(after)):
        return False
    if unicodedata.category(after) in _MARKS:  # part of the character before
        return True
    unspaced = _WITHOUT_SPACES if korean else (*_WITHOUT_SPACES, "HANGUL")
    return not (_name(before).startswith(unspaced) or _name(after).startswith(unspaced))


def _in_word(character: str) -> bool:
    """Letters, digits, the underscore, and the accents and vowel signs put on letters."""
    if character.isalnum() or character == "_":
        return True
    is_mark = unicodedata.category(character) in _MARKS
    return is_mark and not _name(character).startswith("VARIATION SELECTOR")


def _name(character: str) -> str:
    """A character's name in Unicode, which begins with its script; empty for those without one."""
    return unicodedata.name(character, "")


def _missing(phrase: str, text: str, hidden: Callable[[int, int], bool]) -> str:
    """The refusal of a phrase that does not occur, or within words only."""
    within = [span for span in _spans(phrase, text, whole=False) if not hidden(*span)]
    if not within:
        return f"A phrase must occur in the sample's text. {phrase!r} is not in {text!r}."
    words = list(dict.fromkeys(repr(_word_around(text, *span)) for span in within))
    shown = ", ".join(words[:_N_SHOWN]) + (", ..." if len(words) > _N_SHOWN else "")
    return (
        f"A phrase must occur in the sample's text as whole words. {phrase!r} occurs only inside "
        f"{'a longer word' if len(words) == 1 else 'longer words'}: {shown}."
    )


def _word_around(text: str, start: int, end: int) -> str:
    while _goes_on(text, start, korean=True):
        start -= 1
    while _goes_on(text, end, korean=True):
        end += 1
    return text[start:end]


def _check_types(phrase: str, occurrence: int | None) -> None:
    if not isinstance(phrase, str):
        raise InputError(f"A phrase is a text; got {quoted(phrase)}.")
    if occurrence is None:
        return
    try:
        if isinstance(occurrence, bool):
            raise TypeError
        operator.index(occurrence)
    except (TypeError, ValueError):
        raise InputError(
            f"An occurrence is a whole number, 0 for the first; got {quoted(occurrence)}."
        ) from None
