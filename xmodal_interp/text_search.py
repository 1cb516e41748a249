"""Find a phrase in a text.

A phrase matches whole words only. Word boundaries depend on the script:

* Scripts with spaces between words: a match starts and ends at a word boundary.
* Scripts without spaces (Chinese, Japanese, Thai, ...): a match may start and end between any two
  characters, but not between a character and its combining marks.
* Korean, which attaches particles to words: a match starts at a word boundary and may end inside a
  word.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import SupportsIndex
from unicodedata import normalize

import regex

from xmodal_interp.errors import InputError, PhraseError, quoted

_MARK = r"[[\p{Mn}\p{Mc}]--\p{Variation_Selector}]"
_IN_WORD = rf"[\p{{L}}\p{{N}}_{_MARK}]"
_SCRIPTS = ("Han", "Hiragana", "Katakana", "Bopomofo", "Yi", "Thai", "Lao", "Khmer", "Myanmar")
_UNSPACED = "".join(rf"\p{{Script={name}}}" for name in (*_SCRIPTS, "Tibetan"))
_UNSPACED += "\u3006\u30fc\uff70\uff9e\uff9f"  # Japanese signs that belong to several scripts


def _within_word(unspaced: str) -> str:
    """Return a pattern that matches between two characters of a word."""
    spaced = f"[{_IN_WORD}--[{unspaced}]]"
    return f"(?:(?<={_IN_WORD})(?={_MARK})|(?<={spaced})(?={spaced}))"


_WITHIN = _within_word(_UNSPACED)
_WITHIN_UNLESS_KOREAN = _within_word(rf"{_UNSPACED}\p{{Script=Hangul}}")
_FLAGS = regex.VERSION1 | regex.IGNORECASE  # version 1 has differences of sets, [A--B]
_N_SHOWN = 3


def span_of(
    phrase: str, text: str, occurrence: int | None, *, hidden: Callable[[int, int], bool]
) -> tuple[int, int]:
    """Return the start and the end (exclusive) of a phrase in a text.

    The match ignores case, covers whole words, and allows any white space between words. Composed
    and decomposed characters (NFC and NFD), which look the same, match each other.

    Args:
        phrase: The phrase to find.
        text: The text to search.
        occurrence: Index of the match if there are several; negative ones count from the last.
        hidden: Function of start and end; matches for which it returns True are ignored.

    Raises:
        InputError: ``phrase`` is not a string, or ``occurrence`` is not an integer.
        PhraseError: The phrase does not occur, or occurs several times and ``occurrence`` is None.
    """
    if not isinstance(phrase, str):
        raise InputError(f"A phrase must be a string; got {quoted(phrase)}.")
    number = check_occurrence(occurrence)
    spans = [span for span in _spans(phrase, text, whole=True) if not hidden(*span)]
    if not spans:
        raise PhraseError(_missing(phrase, text, hidden))
    if number is None and len(spans) > 1:
        raise PhraseError(
            f"{phrase!r} occurs {len(spans)} times in {text!r}; choose one with occurrence=0 to "
            f"{len(spans) - 1}."
        )
    index = number or 0
    if not -len(spans) <= index < len(spans):
        raise PhraseError(f"There is no occurrence {index}: {phrase!r} occurs {len(spans)} times.")
    return spans[index]


def has_word(word: str, text: str, hidden: Callable[[int, int], bool]) -> bool:
    """Return whether a text contains a word outside hidden characters, ignoring case."""
    return any(not hidden(*span) for span in _spans(word, text, whole=True))


def _spans(phrase: str, text: str, *, whole: bool) -> list[tuple[int, int]]:
    """Return start and end of non-overlapping matches, as whole words only or anywhere."""
    pattern = r"\s+".join(map(_any_form, phrase.split()))
    if not pattern:
        return []
    if whole:
        pattern = f"(?!{_WITHIN}){pattern}(?!{_WITHIN_UNLESS_KOREAN})"
    return [match.span() for match in regex.finditer(pattern, text, _FLAGS)]


def _any_form(word: str) -> str:
    """Return a pattern of a word with composed or decomposed characters, which look the same."""
    forms = dict.fromkeys((word, normalize("NFC", word), normalize("NFD", word)))
    return f"(?:{'|'.join(map(regex.escape, forms))})"


def _missing(phrase: str, text: str, hidden: Callable[[int, int], bool]) -> str:
    """Return the message for a phrase that does not occur, or occurs only inside longer words."""
    within = [span for span in _spans(phrase, text, whole=False) if not hidden(*span)]
    if not within:
        return f"{phrase!r} is not in the sample's text {text!r}."
    words = list(dict.fromkeys(repr(_word_around(text, *span)) for span in within))
    shown = ", ".join(words[:_N_SHOWN]) + (", ..." if len(words) > _N_SHOWN else "")
    return (
        f"{phrase!r} occurs only inside {'a longer word' if len(words) == 1 else 'longer words'} "
        f"of the sample's text: {shown}. Pass a phrase of whole words."
    )


def _word_around(text: str, start: int, end: int) -> str:
    """Return the characters from ``start`` to ``end`` and the rest of the words they are in."""
    boundaries = [match.start() for match in regex.finditer(f"(?!{_WITHIN})", text, _FLAGS)]
    first = max(each for each in boundaries if each <= start)
    last = min(each for each in boundaries if each >= end)
    return text[first:last]


def check_occurrence(occurrence: SupportsIndex | None) -> int | None:
    """Return the index of an occurrence as an ``int``; None if it is not given.

    Raises:
        InputError: It is not an integer.
    """
    if occurrence is None:
        return None
    try:
        if isinstance(occurrence, bool):
            raise TypeError
        return operator.index(occurrence)
    except (TypeError, ValueError):
        raise InputError(
            f"occurrence must be an integer, 0 for the first; got {quoted(occurrence)}."
        ) from None


def same_answer(known: str, given: str) -> bool:
    """Return whether two answers are equal, except for case and white space."""
    return known.casefold().split() == given.casefold().split()
