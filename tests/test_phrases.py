"""Phrases are whole words, where words are what a script makes of them."""

import pytest

from tests.models.real import real
from tests.tiny import picture
from xmodal_interp.capturing import capture
from xmodal_interp.errors import InputError, PhraseError
from xmodal_interp.models import VLM
from xmodal_interp.phrases import span_of

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
]


@pytest.mark.parametrize(("phrase", "text", "found"), FOUND, ids=[each[1] for each in FOUND])
def test_found_where_the_script_lets_words_begin_and_end(phrase: str, text: str, found: str):
    start, end = span_of(phrase, text, None, hidden=lambda *_: False)
    assert text[start:end] == found
    assert text.rindex(found) == start


LONGER = [
    ("cross", "the crossing", "a longer word: 'crossing'"),
    ("cross", "across, crossing; Across", "longer words: 'across', 'crossing', 'Across'"),
    ("양이", "빨간 고양이가", "a longer word: '고양이가'"),
    ("cafe", f"the {NFD}s", f"a longer word: '{NFD}s'"),
    ("แม", "แม่", "a longer word: 'แม่'"),
    ("e", "ae be ce de", "longer words: 'ae', 'be', 'ce', ..."),
]


@pytest.mark.parametrize(("phrase", "text", "words"), LONGER, ids=[each[1] for each in LONGER])
def test_only_inside_longer_words(phrase: str, text: str, words: str) -> None:
    with pytest.raises(PhraseError) as refusal:
        span_of(phrase, text, None, hidden=lambda *_: False)
    assert str(refusal.value) == (
        f"A phrase must occur in the sample's text as whole words. {phrase!r} occurs only inside "
        f"{words}."
    )


def test_a_word_of_a_marker_is_no_longer_word() -> None:
    with pytest.raises(PhraseError) as refusal:
        span_of("ima", "<image> of a cat", None, hidden=lambda start, _: start < 7)
    assert str(refusal.value) == (
        "A phrase must occur in the sample's text. 'ima' is not in '<image> of a cat'."
    )


def test_occurrences_do_not_overlap() -> None:
    with pytest.raises(PhraseError, match="occurs 2 times"):
        span_of("哈哈", "哈哈哈哈哈", None, hidden=lambda *_: False)


@pytest.mark.usefixtures("any_type")
@pytest.mark.parametrize(
    ("phrase", "occurrence", "message"),
    [
        (None, None, "A phrase is a text; got None."),
        ("cat", 0.5, "An occurrence is a whole number, 0 for the first; got 0.5."),
        ("cat", True, "An occurrence is a whole number, 0 for the first; got True."),
    ],
)
def test_something_else_than_a_phrase(phrase, occurrence, message: str) -> None:
    with pytest.raises(InputError) as refusal:
        span_of(phrase, "a cat", occurrence, hidden=lambda *_: False)
    assert str(refusal.value) == message


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_a_sample_asked_in_chinese() -> None:
    sample = capture(VLM(*real("idefics3")), picture(64, 48), "这只猫在哪里")
    found = sample.find("猫")
    start, end = sample.text.index("猫"), sample.text.index("猫") + 1
    tokens = sample.tokens.iloc[found]
    assert len(found)
    assert ((tokens["start"] < end) & (tokens["end"] > start)).all()
    assert sample.probs(queries="猫").shape[1] == len(found)
