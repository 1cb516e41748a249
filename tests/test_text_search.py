"""Phrases match whole words, with the word boundaries of their script."""

import pytest

from tests.helpers.real import real
from tests.helpers.tiny import picture
from xmodal_interp.capturing.run import capture
from xmodal_interp.errors import InputError, PhraseError
from xmodal_interp.models import VLM
from xmodal_interp.text_search import span_of

NFD = "cafe\u0301"

FOUND = [
    ("猫", "这只猫在哪里", "猫"),
    ("赤い丸", "赤い丸はどこ", "赤い丸"),
    ("カメラ", "新しいカメラで", "カメラ"),
    ("แมว", "แมวอยู่ที่ไหน", "แมว"),
    ("circle", "红色circle在哪里", "circle"),
    ("猫", "a猫b", "猫"),
    ("고양이", "빨간 고양이가 어디에", "고양이"),
    ("circle", "빨간 circle은", "circle"),
    ("❤", "a ❤\ufe0f b", "❤"),
    ("red circle", "the Red \n circle?", "Red \n circle"),
    (NFD, f"the {NFD}s and a {NFD}", NFD),
    ("a a", "ba a a", "a a"),
    ("snow", "a snow_man in snow", "snow"),
    ("STRASSE", "die Straße", "Straße"),
]


@pytest.mark.parametrize(("phrase", "text", "found"), FOUND, ids=[each[1] for each in FOUND])
def test_phrases_start_and_end_at_word_boundaries(phrase: str, text: str, found: str):
    start, end = span_of(phrase, text, None, hidden=lambda *_: False)
    assert text[start:end] == found
    assert text.rindex(found) == start


LONGER = [
    ("cross", "the crossing", ("a longer word", "'crossing'")),
    ("cross", "across, crossing; Across", ("longer words", "'across', 'crossing', 'Across'")),
    ("양이", "빨간 고양이가", ("a longer word", "'고양이가'")),
    ("cafe", f"the {NFD}s", ("a longer word", f"'{NFD}s'")),
    ("แม", "แม่", ("a longer word", "'แม่'")),
    ("e", "ae be ce de", ("longer words", "'ae', 'be', 'ce', ...")),
]


@pytest.mark.parametrize(("phrase", "text", "words"), LONGER, ids=[each[1] for each in LONGER])
def test_a_phrase_inside_longer_words_is_an_error(phrase: str, text: str, words) -> None:
    with pytest.raises(PhraseError) as refusal:
        span_of(phrase, text, None, hidden=lambda *_: False)
    assert str(refusal.value) == (
        f"{phrase!r} occurs only inside {words[0]} of the sample's text: {words[1]}. Pass a phrase "
        "of whole words."
    )


def test_words_in_placeholders_are_not_suggested() -> None:
    with pytest.raises(PhraseError) as refusal:
        span_of("ima", "<image> of a cat", None, hidden=lambda start, _: start < 7)
    assert str(refusal.value) == ("'ima' is not in the sample's text '<image> of a cat'.")


def test_occurrences_do_not_overlap() -> None:
    with pytest.raises(PhraseError, match="occurs 2 times"):
        span_of("哈哈", "哈哈哈哈哈", None, hidden=lambda *_: False)


@pytest.mark.usefixtures("any_type")
@pytest.mark.parametrize(
    ("phrase", "occurrence", "message"),
    [
        (None, None, "A phrase must be a string; got None."),
        ("cat", 0.5, "occurrence must be an integer, 0 for the first; got 0.5."),
        ("cat", True, "occurrence must be an integer, 0 for the first; got True."),
    ],
)
def test_wrong_types_are_errors(phrase, occurrence, message: str) -> None:
    with pytest.raises(InputError) as refusal:
        span_of(phrase, "a cat", occurrence, hidden=lambda *_: False)
    assert str(refusal.value) == message


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_a_sample_with_a_chinese_question() -> None:
    sample = capture(VLM(*real("idefics3")), picture(64, 48), "这只猫在哪里")
    found = sample.find("猫")
    start, end = sample.text.index("猫"), sample.text.index("猫") + 1
    tokens = sample.tokens.iloc[found]
    assert len(found)
    assert ((tokens["start"] < end) & (tokens["end"] > start)).all()
    assert sample.probs(queries="猫").shape[1] == len(found)


@pytest.mark.parametrize(
    ("phrase", "text", "span"),
    [
        ("caf\u00e9", "a cafe\u0301 b", (2, 7)),
        ("cafe\u0301", "a caf\u00e9 b", (2, 6)),
        ("CAF\u00c9 b", "a cafe\u0301 b", (2, 9)),
        ("\ud55c\uad6d", "\u1112\u1161\u11ab\u1100\u116e\u11a8", (0, 6)),
    ],
)
def test_composed_and_decomposed_characters_match(phrase, text, span):
    assert span_of(phrase, text, None, hidden=lambda *_: False) == span


def test_a_letter_without_its_accent_is_another_word():
    with pytest.raises(PhraseError) as refusal:
        span_of("cafe", "a cafe\u0301 b", None, hidden=lambda *_: False)
    assert str(refusal.value) == (
        "'cafe' occurs only inside a longer word of the sample's text: 'cafe\u0301'. Pass a phrase "
        "of whole words."
    )
