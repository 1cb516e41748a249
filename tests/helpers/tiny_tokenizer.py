"""A small byte-level tokenizer, trained when needed, that can tokenize every text."""

from __future__ import annotations

import json
import re
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from tests.helpers.families.family_record import Record

PAD, BEGIN, END, UNKNOWN = "<pad>", "<s>", "</s>", "<unk>"
_CORPUS = (
    "user: what color is the red circle? assistant: red",
    "user: where is the blue square? assistant: top left",
    "user: how many shapes are in the image? assistant: three",
    "describe the image. system: answer in one word",
)
_VOCABULARY = 360  # 256 bytes, the four tokens above, a hundred merges


def tokenizer(record: Record) -> Any:
    """Return the tokenizer of a record, with its special tokens, bytes and some merges."""
    trained = _with_words(record.words) if record.words else _trained(())
    if record.begins:
        trained.post_processor = processors.TemplateProcessing(
            single=f"{BEGIN} $A",
            pair=f"{BEGIN} $A $B:1",
            special_tokens=[(BEGIN, trained.token_to_id(BEGIN))],
        )
    made = PreTrainedTokenizerFast(
        tokenizer_object=trained,
        pad_token=PAD,
        bos_token=BEGIN,
        eos_token=END,
        unk_token=UNKNOWN,
        extra_special_tokens=dict(record.named),
        padding_side="left",
        model_max_length=4096,
    )
    made.add_tokens([AddedToken(token, special=True, normalized=False) for token in record.tokens])
    return made


def _trained(words: tuple[str, ...]) -> Tokenizer:
    bytelevel = Tokenizer(models.BPE(unk_token=UNKNOWN, ignore_merges=bool(words)))
    bytelevel.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytelevel.decoder = decoders.ByteLevel()
    bytelevel.train_from_iterator(
        _CORPUS,
        trainers.BpeTrainer(
            vocab_size=_VOCABULARY,
            special_tokens=[PAD, BEGIN, END, UNKNOWN, *words],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return bytelevel


def _with_words(words: tuple[str, ...]) -> Tokenizer:
    """Return a tokenizer with words that are not split and not special.

    Training makes the words special, so they are removed from the list of special tokens and split
    off before the bytes. Every text starts with a space.
    """
    state = json.loads(_trained(words).to_str())
    state["added_tokens"] = [t for t in state["added_tokens"] if t["content"] not in words]
    bytelevel = Tokenizer.from_str(json.dumps(state))
    bytelevel.normalizer = normalizers.Prepend(" ")
    bytelevel.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("|".join(map(re.escape, words))), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return bytelevel
