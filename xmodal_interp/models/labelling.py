"""From what the processor returned for a sample to its labelled positions."""

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
        text: The rendered prompt, as the processor laid it out, before it expanded its
            placeholders.
        question: What the user asked.
        images: The images, in order.
        grids: The grid of each image.
        columns: What stands at each position, padding included: ``tokens``, before it is a table.
        cross_keys: One row per cross-attention key, for families whose images are not in the
            sequence.
        video_grids: The grid of each video.
        videos: The videos, in order.
        n_encoder: How many of the positions an encoder reads, before those of the decoder.
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
        """One row per position; made when first asked for: many prompts are never looked at."""
        return token_table(self.columns)


@dataclass(frozen=True, eq=False)
class Made:
    """What one sample was made of, before its positions are labelled.

    Attributes:
        question: What the user asked.
        images: The images, in order.
        prompt: The prompt that the processor got.
        replacements: What the processor reports to have replaced; None where it doesn't.
        grids: The grid of each image; None where the family has no rule.
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
    """What labelling needs beside the sample.

    Attributes:
        processor: The processor.
        family: The record of the model's type.
        config: The model's configuration.
        placeholder: What a prompt has where an image goes; None where it has nothing there.
    """

    processor: Any
    family: Family
    config: Any
    placeholder: str | None

    def prompt(self, made: Made, read: Read) -> Prompt:
        """The labelled positions of a sample.

        Where the family has no rule, and the ids cannot be matched with the prompt either, they are
        labelled by kind alone: no position has characters of the prompt.

        Args:
            made: What it was made of.
            read: What the model reads.

        Raises:
            GeometryError: The ids are not what the prompt and the grids lead to.
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
        """The columns without the last position, and with the token that is put first."""
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
        """Whether image tokens are known by where they stand, not by their ids."""
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
        """What the processor may have expanded: the prompt, or what it makes of it before."""
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
        """Grids without places, that say why there are none."""
        reason = self.family.reason or f"There is no rule for {self.family.model_type!r}."
        counts = [columns["image"].count(i) for i in range(len(images))]
        return tuple(
            unplaced(image.size, n, reason) for image, n in zip(images, counts, strict=True)
        )
