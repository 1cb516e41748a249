"""The ids that a model reads at each position, if they differ from the ids of the prompt.

1. The decoder of an encoder-decoder model reads a start token first, followed by its prompt if the
   encoder does not read the prompt.
2. Image features may precede the ids, or replace the ids that a mask marks.
3. When BLIP generates, it drops the last id of a prompt and replaces the first one.
4. A known answer after the prompt (teacher forcing) gets the inputs that ``generate`` gives it.

Label the positions of a sample from the outputs of the processor.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor

from xmodal_interp.errors import GeometryError, InputError
from xmodal_interp.models.alignment import (
    Alignment,
    counted_alignment,
    reported_alignment,
    unaligned,
)
from xmodal_interp.models.geometry import ImageGrid, VideoGrid, unplaced
from xmodal_interp.models.media import Video
from xmodal_interp.models.prompts import Rendered, spans_in
from xmodal_interp.models.records import Family
from xmodal_interp.models.token_table import (
    FEATURE,
    Columns,
    Placeholders,
    grid_table,
    token_columns,
    token_table,
    with_places,
)

DECODER_IDS, DECODER_MASK = "decoder_input_ids", "decoder_attention_mask"


@dataclass(frozen=True)
class Read:
    """The positions of one sample.

    Attributes:
        ids: The id of each position; ``FEATURE`` for image features without an id.
        attended: False on padding.
        aligned: True for positions of the expanded prompt: neither padding nor the decoder's start
            token.
        n_encoder: Number of positions of the encoder, which precede those of the decoder.
    """

    ids: list[int]
    attended: list[bool]
    aligned: list[bool]
    n_encoder: int


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


def read_at(family: Family, inputs: Mapping[str, Any], index: int, n_features: int) -> Read:
    """Return the positions of one sample of a batch.

    Args:
        family: The record of the model's type.
        inputs: Inputs of the model, with the first ids of its decoder.
        index: The index of the sample.
        n_features: Number of features of its images, for models that put them before the ids.
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
    """Return the inputs as ``generate`` rewrites them: last id dropped, first id replaced."""
    shorter = {name: inputs[name][:, :-1].clone() for name in _OF_PROMPT if name in inputs}
    shorter["input_ids"][:, 0] = config.text_config.bos_token_id
    return {**inputs, **shorter}


def as_given(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Reverse :func:`as_generated`: repeat the last id, which ``generate`` will drop."""
    longer = {
        name: torch.cat([inputs[name], inputs[name][:, -1:]], 1)
        for name in _OF_PROMPT
        if name in inputs
    }
    return {**inputs, **longer}


def with_answer(
    model: Any, inputs: Mapping[str, Any], ids: Sequence[int], last_text: int
) -> dict[str, Any]:
    """Return the inputs with an answer after the prompt of the decoder.

    Positions of the answer are attended and are not image tokens. Their token type is the one that
    ``generate`` gives a new token: PaliGemma's prompt has type 0 and is bidirectional, its answer
    has type 1 and is causal.

    Args:
        model: The model; its ``_update_model_kwargs_for_generation`` gives the token types.
        inputs: Inputs of the prompts, ``[sample, position]``.
        ids: Token ids of the answer.
        last_text: The last text position of the prompt, from whose token type the answer's follows.
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
    wanted = inspect.signature(model.forward).parameters.values()
    named = (each for each in wanted if each.kind is each.POSITIONAL_OR_KEYWORD)
    missing = [
        each.name for each in named if each.default is each.empty and each.name not in inputs
    ]
    if missing:
        raise InputError(
            f"{type(model).__name__} requires {' and '.join(missing)} besides images and a prompt. "
            "Call it with all inputs inside xi.record(model), or pass them to xi.doctor."
        )


def prompt_ids(inputs: Mapping[str, Any]) -> Tensor:
    """Return the ids before the answer, ``[sample, position]``: of the decoder, if it has ids."""
    ids: Tensor = inputs.get(DECODER_IDS, inputs.get("input_ids"))
    return ids


_OF_PROMPT = ("input_ids", "attention_mask")
_OF_POSITIONS = ("attention_mask", "cross_attention_mask", "image_attention_mask")
_TYPES = ("token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids")
_IMAGE_MARKS = ("image_embeds_position_mask",)
"""Inputs with one entry per position, all ``[sample, position, ...]``. They are listed by name
because shapes are ambiguous: an image may have as many patches as the prompt has positions."""


def _type_of_new(model: Any, name: str, before: Tensor) -> Tensor:
    """Return the token type of a generated position after type ``before``, ``[sample, 1]``."""
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
            "The generation config must have one decoder_start_token_id (or bos_token_id); that of "
            f"{type(model).__name__} has {start!r}."
        )
    return start


@dataclass(frozen=True, eq=False)
class Prompt:
    """One sample, ready for the model.

    Attributes:
        text: The rendered prompt as the processor laid it out, with placeholders not yet expanded.
        question: The question that the user passed.
        images: The images, in order.
        grids: The grid of each image.
        columns: The columns of ``tokens``, padding included.
        cross_keys: One row per cross-attention key, for families whose images are not in the
            sequence.
        video_grids: The grid of each video.
        videos: The videos, in order.
        n_encoder: Number of positions of the encoder, which precede those of the decoder.
    """

    text: str
    question: str
    images: tuple[Image.Image, ...]
    grids: tuple[ImageGrid, ...]
    columns: Columns
    cross_keys: pd.DataFrame | None
    video_grids: tuple[VideoGrid, ...] = ()
    videos: tuple[Video, ...] = ()
    n_encoder: int = 0

    @cached_property
    def tokens(self) -> pd.DataFrame:
        """One row per position. Built on first access, because many prompts need no table."""
        return token_table(self.columns)


@dataclass(frozen=True, eq=False)
class Made:
    """The parts of a sample before its positions are labelled.

    Attributes:
        question: The question that the user passed.
        images: The images, in order.
        prompt: The prompt that was passed to the processor.
        replacements: The replacements that the processor reports; None if it reports none.
        grids: The grid of each image; None if the family has no rule.
        video_grids: The grid of each video.
        videos: The videos, in order.
    """

    question: str
    images: tuple[Image.Image, ...]
    prompt: Rendered
    replacements: Sequence[Mapping[str, Any]] | None
    grids: tuple[ImageGrid, ...] | None
    video_grids: tuple[VideoGrid, ...]
    videos: tuple[Video, ...]


@dataclass(frozen=True, eq=False)
class Labeller:
    """Labels the positions of samples of one model.

    Attributes:
        processor: The processor.
        family: The record of the model's type.
        config: The model's configuration.
        placeholder: The placeholder of an image in a prompt; None if images have no placeholder.
    """

    processor: Any
    family: Family
    config: Any
    placeholder: str | None

    def prompt(self, made: Made, read: Read) -> Prompt:
        """Return the labelled positions of a sample.

        If the family has no rule and the ids cannot be matched with the prompt, positions get a
        kind but no characters of the prompt.

        Args:
            made: The parts of the sample.
            read: The ids that the model reads.

        Raises:
            GeometryError: The ids do not match the prompt and the grids.
        """
        tokens = [token for token, ours in zip(read.ids, read.aligned, strict=True) if ours]
        try:
            alignment = self._aligned(made, tokens)
        except GeometryError:
            if made.grids is not None or len(made.images) > 1:
                raise
            alignment = unaligned(tokens, made.prompt.text)
        spans = spans_in(alignment.text, made.prompt)
        columns = token_columns(
            read.ids,
            read.attended,
            alignment,
            self.processor.tokenizer,
            self._placeholders(),
            spans,
            read.aligned,
        )
        if self.family.rewritten:
            columns = self._rewritten(columns)
        if made.grids is None and len(made.images) == 1:
            columns["image"] = [0 if kind == "image" else np.nan for kind in columns["kind"]]
        grids = self._unplaced(columns, made.images) if made.grids is None else made.grids
        crossed = None
        if self.family.in_sequence:
            columns = with_places(columns, grids, made.video_grids)
        elif any(grid.n_tokens for grid in grids):
            crossed = grid_table(grids)
        return Prompt(
            alignment.text,
            made.question,
            made.images,
            grids,
            columns,
            crossed,
            made.video_grids,
            made.videos,
            read.n_encoder,
        )

    def _rewritten(self, columns: Columns) -> Columns:
        """Drop the last position and replace the first token, as ``generate`` does."""
        shorter = {name: list(values)[:-1] for name, values in columns.items()}
        if shorter["kind"][0] != "padding":
            begin = self.config.text_config.bos_token_id
            shorter["token"][0] = self.processor.tokenizer.convert_ids_to_tokens(begin)
        return shorter

    def _placeholders(self) -> Placeholders:
        family = self.family
        by_id = family.image_token_id(self.config) if family.in_sequence else None
        return Placeholders(
            FEATURE if self._by_place else by_id,
            family.video_token_id(self.config),
        )

    @property
    def _by_place(self) -> bool:
        """Whether image tokens are identified by their positions, not by their ids."""
        return self.family.prepended or self.family.image_mask is not None

    def _aligned(self, made: Made, ids: Sequence[int]) -> Alignment:
        texts, tokenizer = self._laid_out(made), self.processor.tokenizer
        if made.replacements is not None:
            return reported_alignment(ids, texts, tokenizer, made.replacements)
        mark = self.family.image_mark
        markers = None
        if self._by_place or mark is not None:
            markers = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
        image_id = self._placeholders().image
        counts: list[int | None] = []
        if mark is not None:
            image_id, counts = tokenizer.convert_tokens_to_ids(mark), [1] * len(made.images)
        elif self.family.in_sequence and made.grids is not None:
            counts = [grid.n_tokens for grid in made.grids]
        elif self.family.in_sequence:
            counts = [None] * len(made.images)
        return counted_alignment(ids, texts, tokenizer, image_id, counts, markers)

    def _laid_out(self, made: Made) -> Iterator[str]:
        """Yield texts that the processor may have expanded: the prompt, and known changes of it."""
        text, tokenizer = made.prompt.text, self.processor.tokenizer
        yield text
        if self._by_place:
            yield f" {text}"
        for end in ("\n", getattr(tokenizer, "sep_token", None)):
            if end is not None:
                yield text + end
        if self.placeholder is not None:
            yield re.sub(rf"({re.escape(self.placeholder)})(?=[^\s<])", r"\1 ", text)
        if hasattr(self.processor, "prepare_inputs_layout"):
            images = [list(made.images)] if made.images else None
            yield self.processor.prepare_inputs_layout(images=images, text=[text])[1][0]
        for begin in (tokenizer.bos_token, tokenizer.eos_token):
            if begin is not None and not text.startswith(begin):
                yield begin + text

    def _unplaced(self, columns: Columns, images: Sequence[Image.Image]) -> tuple[ImageGrid, ...]:
        """Return grids without rows and columns, with the reason."""
        reason = self.family.reason or f"There is no geometry rule for {self.family.model_type!r}."
        counts = [columns["image"].count(i) for i in range(len(images))]
        return tuple(
            unplaced(image.size, n, reason) for image, n in zip(images, counts, strict=True)
        )
