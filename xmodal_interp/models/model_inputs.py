"""The inputs of the model, where they differ from the outputs of the processor.

1. The decoder of an encoder-decoder model reads a start token first, followed by its prompt if the
   encoder does not read the prompt (:func:`with_start`).
2. Image features may precede the ids, or replace the ids that a mask marks (:func:`input_row`).
3. When BLIP generates, it drops the last id of a prompt and replaces the first one
   (:func:`as_generated`).
4. A known answer after the prompt (teacher forcing) gets the inputs that ``generate`` gives it
   (:func:`with_answer`).
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from xmodal_interp.errors import InputError
from xmodal_interp.models.geometry import ImageGrid
from xmodal_interp.models.records import Family
from xmodal_interp.upstream import grown_argument

DECODER_IDS, DECODER_MASK = "decoder_input_ids", "decoder_attention_mask"

FEATURE_ID = -1
"""Used instead of a token id at the positions of image features that have no id."""

_OF_PROMPT = ("input_ids", "attention_mask")
_OF_POSITIONS = ("attention_mask", "cross_attention_mask", "image_attention_mask")
_TYPES = ("token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids")
_IMAGE_MARKS = ("image_embeds_position_mask",)
"""Inputs with one entry per position, all ``[sample, position, ...]``. They are listed by name
because shapes are ambiguous: an image may have as many patches as the prompt has positions."""


@dataclass(frozen=True)
class InputRow:
    """The ids of one sample, as the model reads them.

    Attributes:
        ids: The id of each position; ``FEATURE_ID`` for image features without an id.
        attended: False on padding.
        aligned: True for positions of the expanded prompt: neither padding nor the decoder's start
            token.
        n_encoder: Number of positions of the encoder, which precede those of the decoder.
    """

    ids: list[int]
    attended: list[bool]
    aligned: list[bool]
    n_encoder: int

    @property
    def aligned_ids(self) -> list[int]:
        """The ids of the expanded prompt."""
        return [token for token, aligned in zip(self.ids, self.aligned, strict=True) if aligned]


def with_start(model: Any, inputs: Mapping[str, Any], n_samples: int) -> dict[str, Any]:
    """Return the inputs with the first ids of the decoder of an encoder-decoder model.

    As in ``generate``, these are the start token, followed by the prompt of the decoder if there is
    one.
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


def input_row(
    family: Family, inputs: Mapping[str, Any], index: int, grids: Sequence[ImageGrid] | None
) -> InputRow:
    """Return the ids of one sample of a batch, image features without an id included.

    Args:
        family: The record of the model's type.
        inputs: Inputs of the model, with the first ids of its decoder.
        index: The index of the sample.
        grids: The grids of its images, if there are any: some models put the features of images
            before the ids.
    """
    decoded = inputs.get(DECODER_IDS)
    ids = [] if "input_ids" not in inputs else inputs["input_ids"][index].tolist()
    attended = _mask(inputs.get("attention_mask") if ids else None, index, len(ids))
    if family.image_mask is not None and family.image_mask in inputs:
        marked = (inputs[family.image_mask][index] == 1).tolist()
        ids = [FEATURE_ID if mark else token for token, mark in zip(ids, marked, strict=True)]
    if family.prepended:
        n_features = sum(grid.n_tokens for grid in grids or ())
        ids, attended = [FEATURE_ID] * n_features + ids, [True] * n_features + attended
    if decoded is None:
        return InputRow(ids, attended, attended, 0)
    of_decoder: list[int] = decoded[index].tolist()
    seen = _mask(inputs.get(DECODER_MASK), index, len(of_decoder))
    start = seen.index(True)  # padding is on the left
    aligned = [here and at != start for at, here in enumerate(seen)]
    return InputRow(ids + of_decoder, attended + seen, attended + aligned, n_encoder=len(ids))


def as_generated(config: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the inputs as ``generate`` rewrites them: last id dropped, first id replaced."""
    shorter = {name: inputs[name][:, :-1].clone() for name in _OF_PROMPT if name in inputs}
    shorter["input_ids"][:, 0] = config.text_config.bos_token_id
    return {**inputs, **shorter}


def for_generate(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Undo :func:`as_generated` for a call of ``generate``, which drops the last id itself."""
    longer = {
        name: torch.cat([inputs[name], inputs[name][:, -1:]], 1)
        for name in _OF_PROMPT
        if name in inputs
    }
    return {**inputs, **longer}


def with_answer(
    model: Any, inputs: Mapping[str, Any], ids: Sequence[Sequence[int]], last_text: Sequence[int]
) -> dict[str, Any]:
    """Return the inputs with an answer after each prompt of the decoder.

    Positions of the answer are attended and are not image tokens. Their token type is the one that
    ``generate`` gives a new token: PaliGemma's prompt has type 0 and is bidirectional, its answer
    has type 1 and is causal.

    Args:
        model: The model; its ``_update_model_kwargs_for_generation`` gives the token types.
        inputs: Inputs of the prompts, ``[sample, position]``.
        ids: Token ids of the answer of each sample, all of one length.
        last_text: The last text position of each prompt; its token type determines the answer's.
    """
    given = prompt_ids(inputs)
    decoded = DECODER_IDS in inputs
    n = len(ids[0])
    longer = dict(inputs)
    for name in (DECODER_MASK,) if decoded else _OF_POSITIONS:
        value = inputs.get(name)
        if isinstance(value, Tensor):
            longer[name] = torch.cat([value, value[:, -1:].repeat_interleave(n, 1)], 1)
    if not decoded:
        for name in _TYPES:
            if name in inputs:
                value = inputs[name]
                at = torch.tensor(last_text, device=value.device).clamp(max=value.shape[1] - 1)
                of_last = value[torch.arange(len(value), device=value.device), at][:, None]
                grown = grown_argument(model, name, of_last)
                longer[name] = torch.cat([value, grown[:, -1:].repeat_interleave(n, 1)], 1)
        for name in _IMAGE_MARKS:
            if name in inputs:
                value = inputs[name]
                longer[name] = torch.cat([value, value.new_zeros(len(value), n)], 1)
    added = torch.tensor([list(each) for each in ids], dtype=given.dtype, device=given.device)
    longer[DECODER_IDS if decoded else "input_ids"] = torch.cat([given, added], 1)
    return longer


def without_last(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the inputs without the last position of the decoder."""
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
    """Raise InputError if the model requires other inputs than images and a prompt provide.

    An example is the state of a robot.
    """
    forward = model.forward
    method = getattr(forward, "__func__", None)
    required = _required(forward) if method is None else _required_of_method(method)
    missing = [name for name in required if name not in inputs]
    if missing:
        raise InputError(
            f"{type(model).__name__} requires {' and '.join(missing)} besides images and a prompt. "
            "Call it with all inputs inside xi.record(model), or pass them to xi.doctor."
        )


def _required(function: Any) -> list[str]:
    """Return the parameters of a function without a default."""
    wanted = inspect.signature(function).parameters.values()
    named = (each for each in wanted if each.kind is each.POSITIONAL_OR_KEYWORD)
    return [each.name for each in named if each.default is each.empty]


@lru_cache(maxsize=16)  # reading the signature of a model takes 0.1 ms
def _required_of_method(method: Any) -> list[str]:
    return _required(method)[1:]


def prompt_ids(inputs: Mapping[str, Any]) -> Tensor:
    """Return the ids of the prompt, ``[sample, position]``; those of the decoder if it has any."""
    ids: Tensor = inputs.get(DECODER_IDS, inputs.get("input_ids"))
    return ids


def _mask(mask: Tensor | None, index: int, length: int) -> list[bool]:
    return [True] * length if mask is None else mask[index].bool().tolist()


def _start_id(model: Any) -> int:
    settings = model.generation_config
    start = settings.decoder_start_token_id
    start = settings.bos_token_id if start is None else start
    if not isinstance(start, int):
        raise InputError(
            f"The generation config of {type(model).__name__} must have one decoder_start_token_id "
            f"(or bos_token_id); it has {start!r}."
        )
    return start
