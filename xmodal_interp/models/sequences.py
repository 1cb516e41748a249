"""What a model reads at each position, where that is not simply the ids of the prompt.

1. The decoder of an encoder-decoder reads a start token first: behind the prompt that the encoder
   reads, or in front of the one that the decoder reads.
2. Features of an image may stand in front of the ids, or where a mask says so, whatever the ids.
3. BLIP leaves out the last id of a prompt when it generates, and writes the first one anew.
4. A known answer after the prompt (teacher forcing) is read as ``generate`` would read it.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from xmodal_interp.errors import InputError
from xmodal_interp.models.family import Family
from xmodal_interp.models.tokens import FEATURE

DECODER_IDS, DECODER_MASK = "decoder_input_ids", "decoder_attention_mask"


@dataclass(frozen=True)
class Read:
    """The positions of one sample.

    Attributes:
        ids: The id at each; ``FEATURE`` where an image's feature stands that has none of its own.
        attended: False on padding.
        aligned: Which ones the prompt was expanded to: neither padding nor a decoder's start token.
        n_encoder: How many of them an encoder reads, before those of the decoder.
    """

    ids: list[int]
    attended: list[bool]
    aligned: list[bool]
    n_encoder: int


def with_start(model: Any, inputs: Mapping[str, Any], n_samples: int) -> dict[str, Any]:
    """The inputs with the ids that the decoder of an encoder-decoder begins with.

    They are those that ``generate`` would begin with: the prompt of the decoder, if there is one,
    behind its start token.
    """
    if not model.config.is_encoder_decoder:
        return dict(inputs)
    start = torch.full((n_samples, 1), _start_id(model))
    given, mask = inputs.get(DECODER_IDS), inputs.get(DECODER_MASK)
    if given is None:
        return {**inputs, DECODER_IDS: start}
    if (given[:, :1] == start).any():
        return dict(inputs)
    begun = {DECODER_IDS: torch.cat([start, given], 1)}
    if mask is not None:
        begun[DECODER_MASK] = torch.cat([torch.ones_like(mask[:, :1]), mask], 1)
    return {**inputs, **begun}


def read_at(family: Family, inputs: Mapping[str, Any], index: int, n_features: int) -> Read:
    """The positions of one sample of a batch.

    Args:
        family: The record of the model's type.
        inputs: Those of the model, with what its decoder begins with.
        index: Which sample.
        n_features: How many features its images have, for models that put them in front.
    """
    decoded = inputs.get(DECODER_IDS)
    ids = [] if "input_ids" not in inputs else inputs["input_ids"][index].tolist()
    attended = _mask(inputs.get("attention_mask") if ids else None, index, len(ids))
    if family.image_mask is not None and family.image_mask in inputs:
        marked = (inputs[family.image_mask][index] == 1).tolist()
        ids = [FEATURE if mark else token for token, mark in zip(ids, marked, strict=True)]
    if family.prepended:
        ids, attended = [FEATURE] * n_features + ids, [True] * n_features + attended
    if decoded is None:
        return Read(ids, attended, attended, 0)
    of_decoder: list[int] = decoded[index].tolist()
    seen = _mask(inputs.get(DECODER_MASK), index, len(of_decoder))
    start = seen.index(True)  # padding is on the left
    aligned = [here and at != start for at, here in enumerate(seen)]
    return Read(ids + of_decoder, attended + seen, attended + aligned, n_encoder=len(ids))


def as_generated(config: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs of a rewritten prompt as ``generate`` reads them, whose answer follows."""
    shorter = {name: inputs[name][:, :-1].clone() for name in _OF_PROMPT if name in inputs}
    shorter["input_ids"][:, 0] = config.text_config.bos_token_id
    return {**inputs, **shorter}


def as_given(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The reverse of :func:`as_generated`: with a last id, which ``generate`` leaves out."""
    longer = {
        name: torch.cat([inputs[name], inputs[name][:, -1:]], 1)
        for name in _OF_PROMPT
        if name in inputs
    }
    return {**inputs, **longer}


def with_answer(
    model: Any, inputs: Mapping[str, Any], ids: Sequence[int], last_text: int
) -> dict[str, Any]:
    """The inputs with an answer after the prompt; after that of the decoder, if there is one.

    Positions of the answer are attended, are not of an image, and get the token type that
    ``generate`` gives a new token: PaliGemma's prompt has type 0 and is bidirectional, its answer
    has type 1 and is causal.

    Args:
        model: The model; its ``_update_model_kwargs_for_generation`` gives the token types.
        inputs: Those of the prompts, ``[sample, position]``.
        ids: The answer's token ids.
        last_text: The last text position of the prompt, whose token type the answer continues.
    """
    given = prompt_ids(inputs)
    decoded = DECODER_IDS in inputs
    n = len(ids)
    longer = dict(inputs)
    for name in (DECODER_MASK,) if decoded else _OF_POSITIONS:
        value = inputs.get(name)
        if isinstance(value, Tensor):
            longer[name] = torch.cat([value, value[:, -1:].repeat_interleave(n, 1)], 1)
    if not decoded:
        for name in _TYPES:
            if name in inputs:
                value = inputs[name]
                at = min(last_text, value.shape[1] - 1)
                new = _type_of_new(model, name, value[:, at : at + 1])
                longer[name] = torch.cat([value, new.repeat_interleave(n, 1)], 1)
        for name in _IMAGE_MARKS:
            if name in inputs:
                value = inputs[name]
                longer[name] = torch.cat([value, value.new_zeros(len(value), n)], 1)
    added = torch.tensor([list(ids)], dtype=given.dtype, device=given.device)
    longer[DECODER_IDS if decoded else "input_ids"] = torch.cat([given, added], 1)
    return longer


def without_last(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs without their last position; without the decoder's, if there is one."""
    decoded = DECODER_IDS in inputs
    names = (
        (DECODER_IDS, DECODER_MASK)
        if decoded
        else ("input_ids", *_OF_POSITIONS, *_TYPES, *_IMAGE_MARKS)
    )
    return {
        name: value[:, :-1] if name in names and isinstance(value, Tensor) else value
        for name, value in inputs.items()
    }


def check_whole(model: Any, inputs: Mapping[str, Any]) -> None:
    """Raise InputError if the model needs more than images and a prompt give (a robot's state)."""
    wanted = inspect.signature(model.forward).parameters.values()
    named = (each for each in wanted if each.kind is each.POSITIONAL_OR_KEYWORD)
    missing = [
        each.name for each in named if each.default is each.empty and each.name not in inputs
    ]
    if missing:
        raise InputError(
            "A sample is what a model makes of images and a prompt. "
            f"{type(model).__name__} also needs {' and '.join(missing)}. Call it with everything "
            "it needs inside of xi.record(model), or give xi.doctor these inputs."
        )


def prompt_ids(inputs: Mapping[str, Any]) -> Tensor:
    """The ids that the answer follows, ``[sample, position]``: the decoder's, if there is one."""
    ids: Tensor = inputs.get(DECODER_IDS, inputs.get("input_ids"))
    return ids


_OF_PROMPT = ("input_ids", "attention_mask")
_OF_POSITIONS = ("attention_mask", "cross_attention_mask", "image_attention_mask")
_TYPES = ("token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids")
_IMAGE_MARKS = ("image_embeds_position_mask",)
"""Inputs with one entry per position, all ``[sample, position, ...]``. They are named because
shapes are ambiguous: an image may have as many patches as the prompt has positions."""


def _type_of_new(model: Any, name: str, before: Tensor) -> Tensor:
    """The token type of a generated position after one of the type ``before``, ``[sample, 1]``."""
    update = getattr(model, "_update_model_kwargs_for_generation", None)
    grown = before if update is None else update({}, {name: before})[name]
    return grown[:, -1:]


def _mask(mask: Tensor | None, index: int, length: int) -> list[bool]:
    return [True] * length if mask is None else mask[index].bool().tolist()


def _start_id(model: Any) -> int:
    settings = model.generation_config
    start = settings.decoder_start_token_id
    start = settings.bos_token_id if start is None else start
    if not isinstance(start, int):
        raise InputError(
            "A decoder begins with the decoder_start_token_id (or the bos_token_id) of the "
            f"generation config, which must be one id; {type(model).__name__} has {start!r}."
        )
    return start
