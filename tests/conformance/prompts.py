"""Token ids for the images: one function per way to join both, named in the records."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from tests.conformance.overrides import Record
from tests.conformance.pictures import Pixels
from tests.helpers.tiny_configs import FIRST_WORD, VOCABULARY

Inputs = dict[str, Any]
IMAGE_TOKEN = ("image_token_id", "image_token_index", "image_patch_id")
BEFORE_IMAGE = ("vision_start_token_id", "image_start_token_id", "boi_token_id", "boi_token_index")
AFTER_IMAGE = ("vision_end_token_id", "image_end_token_id", "eoi_token_id", "eoi_token_index")
TYPES = ("token_type_ids", "mm_token_type_ids")


def placeholders(model: PreTrainedModel, record: Record, images: Pixels) -> Inputs:
    """Return prompts with one token per image feature, and token types if the model takes them."""
    counts = _image_tokens(model, record, images)
    before, after = first_of(model.config, BEFORE_IMAGE), first_of(model.config, AFTER_IMAGE)
    token = record.image_token or first_of(model.config, IMAGE_TOKEN)[0]
    runs = iter([before + [token] * count + after for count in counts])
    rows = []
    for row, n in enumerate(record.images_per_row):
        images_of_row = [i for _ in range(n) for i in next(runs)]
        rows.append(words(2) + images_of_row + words(1 + 4 * row))
    inputs = padded(rows) | images
    takes = inspect.signature(model.forward).parameters
    types = (inputs["input_ids"] == token).long()
    return inputs | {name: types for name in TYPES if name in takes}


def beside(_model: PreTrainedModel, record: Record, images: Pixels) -> Inputs:
    """Return prompts of words, without image tokens."""
    return padded([words(5 + 3 * row) for row in range(len(record.images_per_row))]) | images


def caption(model: PreTrainedModel, record: Record, images: Pixels) -> Inputs:
    """Return prompts of words, padded on the right as for text encoders."""
    inputs = beside(model, record, images)
    return inputs | {name: inputs[name].flip(1) for name in ("input_ids", "attention_mask")}


def words_only(_model: PreTrainedModel, record: Record, _images: Pixels) -> Inputs:
    """Return prompts of words, without images."""
    return padded([words(5 + 3 * row) for row in range(len(record.images_per_row))])


def none(_model: PreTrainedModel, _record: Record, images: Pixels) -> Inputs:
    """Return images without a prompt, for an image encoder with a text decoder."""
    return dict(images)


def words(n: int) -> list[int]:
    """Return random word ids."""
    return torch.randint(FIRST_WORD, VOCABULARY, (n,)).tolist()


def padded(rows: Sequence[list[int]]) -> Inputs:
    """Return rows padded on the left, ``[row, position]``, with their attention mask."""
    length = max(map(len, rows))
    gaps = [[0] * (length - len(row)) for row in rows]
    return {
        "input_ids": torch.tensor([gap + row for gap, row in zip(gaps, rows, strict=True)]),
        "attention_mask": torch.tensor(
            [gap + [1] * len(row) for gap, row in zip(gaps, rows, strict=True)]
        ),
    }


def _image_tokens(model: PreTrainedModel, record: Record, images: Pixels) -> list[int]:
    """Return the number of tokens of each image, from the record or from the model."""
    n_images = sum(record.images_per_row)
    told = record.tokens_per_image
    if told is not None:
        return [told] * n_images if isinstance(told, int) else list(told)
    return n_tokens_of(model, "image", images, n_images)


@torch.no_grad()
def n_tokens_of(model: PreTrainedModel, kind: str, given: Pixels, n: int) -> list[int]:
    """Return the number of tokens of each of ``n`` images or videos, from the model's features."""
    name = f"get_{kind}_features"
    ask = getattr(model, name, None) or getattr(model.base_model, name)
    features = ask(**given)
    features = getattr(features, "pooler_output", features)
    if isinstance(features, Tensor):
        return [features.numel() // features.shape[-1] // n] * n
    return [part.numel() // part.shape[-1] for part in features]


def first_of(config: PreTrainedConfig, names: Sequence[str]) -> list[int]:
    """Return a list with the first of these tokens that the configuration has, or []."""
    found = [getattr(config, name, None) for name in names]
    return [token for token in found if token is not None][:1]
