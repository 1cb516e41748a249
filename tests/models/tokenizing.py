"""A small byte-level tokenizer, trained on the spot: every text has tokens, every token a span."""

from __future__ import annotations

from typing import Any

import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tests.models.records.record import Record

PAD, BEGIN, END, UNKNOWN = "<pad>", "<s>", "</s>", "<unk>"
_CORPUS = (
    "user: what color is the red circle? assistant: red",
    "user: where is the blue square? assistant: top left",
    "user: how many shapes are in the image? assistant: three",
    "describe the image. system: answer in one word",
)
_VOCABULARY = 360  # 256 bytes, the four tokens above, a hundred merges


def tokenizer(record: Record) -> Any:
    """The tokenizer of a record: its special tokens, its named ones, the bytes and some merges."""
    bytelevel = Tokenizer(models.BPE(unk_token=UNKNOWN))
    bytelevel.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytelevel.decoder = decoders.ByteLevel()
    bytelevel.train_from_iterator(
        _CORPUS,
        trainers.BpeTrainer(
            vocab_size=_VOCABULARY,
            special_tokens=[PAD, BEGIN, END, UNKNOWN],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    if record.begins:
        begin = (BEGIN, bytelevel.token_to_id(BEGIN))
        bytelevel.post_processor = processors.TemplateProcessing(
            single=f"{BEGIN} $A", pair=f"{BEGIN} $A $B:1", special_tokens=[begin]
        )
    kind = getattr(transformers, record.tokenizer_class or PreTrainedTokenizerFast.__name__)
    made = kind(
        tokenizer_object=bytelevel,
        pad_token=PAD,
        bos_token=BEGIN,
        eos_token=END,
        unk_token=UNKNOWN,
        extra_special_tokens=dict(record.named),
        padding_side="left",
        model_max_length=4096,
    )
    made.add_tokens(list(record.tokens), special_tokens=True)
    return made
