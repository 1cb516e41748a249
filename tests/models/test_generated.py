"""Characters of generated tokens: a token has each character that contains one of its bytes."""

import pytest
from transformers import BertTokenizer

from tests.helpers.real import real
from xmodal_interp.models.token_table import generated_columns, token_table

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
WORDS = (
    *("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "it", "'", "s", "do", "don", "n", "t"),
    *("red", "##dish", ",", "."),
)


def found(text: str, phrase: str, table) -> list[int]:
    start = text.index(phrase)
    touched = (table["start"] < start + len(phrase)) & (table["end"] > start)
    return [int(i) for i in table.index[touched]]


@pytest.mark.parametrize("answer", ["a 红 circle", "x红色 is 🙂 é!", "naïve 中文", "two\n lines "])
def test_spans_equal_those_of_the_same_text_in_a_prompt(answer: str) -> None:
    """The vocabularies of Qwen and Llama 3 split rare characters into bytes.

    A prefix of such tokens is decoded to U+FFFD (tokenizers 0.23, ``decoders.ByteLevel``).
    """
    tokenizer = real("qwen2_vl")[1].tokenizer
    encoded = tokenizer(answer, add_special_tokens=False, return_offsets_mapping=True)
    ids = encoded["input_ids"]
    for read in (ids, ids[:-1], ids[:-2]):  # the last tokens of an answer may not be read
        columns, text = generated_columns(read, ids, tokenizer, "user:")
        table = token_table(columns)
        assert text == f"user: {answer}"
        for row, (start, end) in zip(table.itertuples(), encoded["offset_mapping"], strict=False):
            expected = answer[start:end].lstrip()
            assert text[row.start : row.end] == expected
            assert row.start == row.end or row.end == len("user: ") + end


def test_all_tokens_of_a_character_are_found() -> None:
    tokenizer = real("qwen2_vl")[1].tokenizer
    ids = tokenizer("a 红 circle", add_special_tokens=False)["input_ids"]
    columns, text = generated_columns(ids, ids, tokenizer, "user:")
    table = token_table(columns)
    assert found(text, "红", table) == [2, 3, 4]
    assert table["token"][2:5].tolist() == ["红"] * 3


@pytest.mark.parametrize(
    ("answer", "phrase", "positions"),
    [
        ("it's reddish", "it's", [0, 1, 2]),
        ("it's reddish", "reddish", [3, 4]),
        ("red, don't.", "don't", [2, 3, 4]),
        ("red, don't.", "red", [0]),
        ("do n't.", "don't", [0, 1, 2, 3]),
    ],
)
def test_spaces_that_a_tokenizer_removes(answer, phrase, positions) -> None:
    """The tokenizers of BLIP and GIT clean up "it ' s", so later tokens change earlier characters
    (transformers 5.23, ``clean_up_tokenization``)."""
    vocabulary = {word: number for number, word in enumerate(WORDS)}
    tokenizer = BertTokenizer(vocab=vocabulary, clean_up_tokenization_spaces=True)
    ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
    columns, text = generated_columns(ids, ids, tokenizer, "user:")
    table = token_table(columns)
    assert found(text, phrase, table) == positions
    assert "".join(table["token"]) == text.removeprefix("user: ").replace(" ", "")
