"""Label the positions of a sample from the outputs of the processor."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from xmodal_interp.errors import GeometryError
from xmodal_interp.models.alignment import (
    Alignment,
    counted_alignment,
    reported_alignment,
    unaligned,
)
from xmodal_interp.models.family import Family
from xmodal_interp.models.geometry import ImageGrid, VideoGrid, unplaced
from xmodal_interp.models.opening import Video
from xmodal_interp.models.rendering import Rendered, spans_in
from xmodal_interp.models.sequences import Read
from xmodal_interp.models.tokens import (
    FEATURE,
    Columns,
    Placeholders,
    grid_table,
    token_columns,
    token_table,
    with_places,
)


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
