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
    """Return the start and the end (exclusive) of a phrase in a text.

    The match ignores case, covers whole words, and allows any white space between words.

    Args:
        phrase: The phrase to find.
        text: The text to search.
        occurrence: Index of the match if there are several; negative ones count from the last.
        hidden: Function of start and end; matches for which it returns True are ignored.

    Raises:
        InputError: ``phrase`` is not a string, or ``occurrence`` is not an integer.
        PhraseError: The phrase does not occur, or occurs several times and ``occurrence`` is None.
    """
    _check_types(phrase, occurrence)
    spans = [span for span in _spans(phrase, text, whole=True) if not hidden(*span)]
    if not spans:
        raise PhraseError(_missing(phrase, text, hidden))
    if occurrence is None and len(spans) > 1:
        raise PhraseError(
            f"{phrase!r} occurs {len(spans)} times in {text!r}; choose one with occurrence=0 to "
            f"{len(spans) - 1}."
        )
    index = 0 if occurrence is None else operator.index(occurrence)
    if not -len(spans) <= index < len(spans):
        raise PhraseError(f"There is no occurrence {index}: {phrase!r} occurs {len(spans)} times.")
    return spans[index]


def has_word(word: str, text: str, hidden: Callable[[int, int], bool]) -> bool:
    """Whether a text contains a word outside hidden characters, ignoring case."""
    return any(not hidden(*span) for span in _spans(word, text, whole=True))


def has_phrase(selector: Any) -> TypeGuard[str | Sequence[str | int]]:
    """Whether a selector is a phrase or a list with at least one phrase."""
    in_list = isinstance(selector, (list, tuple)) and any(isinstance(one, str) for one in selector)
    return isinstance(selector, str) or in_list


def _spans(phrase: str, text: str, *, whole: bool) -> Iterator[tuple[int, int]]:
    """Yield start and end of non-overlapping matches, as whole words only or anywhere."""
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
    """Whether the character at ``at`` continues the word of the character before it.

    Args:
        text: The text.
        at: Index of the character.
        korean: If False, a Korean character never continues a word.
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
    """Whether a character is a letter, digit, underscore, or combining mark of a letter."""
    if character.isalnum() or character == "_":
        return True
    is_mark = unicodedata.category(character) in _MARKS
    return is_mark and not _name(character).startswith("VARIATION SELECTOR")


def _name(character: str) -> str:
    """Return the Unicode name of a character, which starts with its script; empty if unnamed."""
    return unicodedata.name(character, "")


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
    while _goes_on(text, start, korean=True):
        start -= 1
    while _goes_on(text, end, korean=True):
        end += 1
    return text[start:end]


def _check_types(phrase: str, occurrence: int | None) -> None:
    if not isinstance(phrase, str):
        raise InputError(f"A phrase must be a string; got {quoted(phrase)}.")
    if occurrence is None:
        return
    try:
        if isinstance(occurrence, bool):
            raise TypeError
        operator.index(occurrence)
    except (TypeError, ValueError):
        raise InputError(
            f"occurrence must be an integer, 0 for the first; got {quoted(occurrence)}."
        ) from None
