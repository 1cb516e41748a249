"""Label the positions of a prompt: what each is, where it is on the image, and its characters.

:meth:`VLM.prepare` calls one pipeline, and this file is its last step:

1. ``prompts``: the question is rendered to a prompt with placeholders.
2. ``processor_calls``: the processor turns prompt, images and videos into inputs, and expands each
   placeholder to the tokens of its image or video.
3. ``geometry``: the family's rule gives the grid of each image and video.
4. ``model_inputs``: the ids that the model reads at each position.
5. ``alignment``: each position is matched with its characters in the prompt.
6. ``token_table``: kind, role, image, row, column and box of each position.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

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
from xmodal_interp.models.geometry import ImageGrid, VideoGrid, unplaced
from xmodal_interp.models.media import Video
from xmodal_interp.models.model_inputs import FEATURE_ID, InputRow
from xmodal_interp.models.prompts import RenderedPrompt, spans_in
from xmodal_interp.models.resized import original_size
from xmodal_interp.models.token_table import (
    Columns,
    grid_table,
    token_columns,
    token_table,
    with_places,
)
from xmodal_interp.vocabulary import TURN

if TYPE_CHECKING:
    from xmodal_interp.models.vlm import VLM


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
        n_turns: Number of messages; 0 if the prompt is not a chat.
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
    n_turns: int = 0

    @property
    def n_positions(self) -> int:
        """Number of positions, padding included."""
        return len(self.columns["token"])

    @cached_property
    def tokens(self) -> pd.DataFrame:
        """Table with a row per position; built on first access, because many prompts need none."""
        return token_table(self.columns)


@dataclass(frozen=True, eq=False)
class Unlabelled:
    """One sample before its positions are labelled.

    Attributes:
        question: The question that the user passed.
        images: The images, in order.
        videos: The videos, in order.
        prompt: The prompt that was passed to the processor.
        replacements: The replacements that the processor reports; None if it reports none.
        grids: The grid of each image; None if the family has no rule.
        video_grids: The grid of each video.
        row: The ids that the model reads.
    """

    question: str
    images: tuple[Image.Image, ...]
    videos: tuple[Video, ...]
    prompt: RenderedPrompt
    replacements: Sequence[Mapping[str, Any]] | None
    grids: tuple[ImageGrid, ...] | None
    video_grids: tuple[VideoGrid, ...]
    row: InputRow


def labelled(vlm: VLM, sample: Unlabelled) -> Prompt:
    """Return the labelled positions of a sample.

    If the family has no rule and the ids cannot be matched with the prompt, positions get a kind
    but no characters of the prompt.

    Raises:
        GeometryError: The ids do not match the prompt and the grids.
    """
    family, row = vlm.family, sample.row
    try:
        alignment = _alignment(vlm, sample)
    except GeometryError:
        if sample.grids is not None or len(sample.images) > 1:
            raise
        alignment = unaligned(row.aligned_ids, sample.prompt.text)
    columns = token_columns(
        row,
        alignment,
        spans_in(alignment.text, sample.prompt),
        vlm.tokenizer,
        image_id=_image_id(vlm),
        video_id=family.video_token_id(vlm.model.config),
    )
    if not sample.prompt.n_turns:
        del columns[TURN]
    if family.rewritten:
        columns = _rewritten(vlm, columns)
    grids = sample.grids
    if grids is None:
        if len(sample.images) == 1:
            columns["image"] = [0 if kind == "image" else np.nan for kind in columns["kind"]]
        grids = _unplaced(vlm, columns, sample.images)
    cross_keys = None
    if family.in_sequence:
        columns = with_places(columns, grids, sample.video_grids)
    elif any(grid.n_tokens for grid in grids):
        cross_keys = grid_table(grids)
    return Prompt(
        alignment.text,
        sample.question,
        sample.images,
        grids,
        columns,
        cross_keys,
        sample.video_grids,
        sample.videos,
        row.n_encoder,
        sample.prompt.n_turns,
    )


def _alignment(vlm: VLM, sample: Unlabelled) -> Alignment:
    """Match each position with its characters, by reported replacements or by counting tokens."""
    family, tokenizer, ids = vlm.family, vlm.tokenizer, sample.row.aligned_ids
    texts = _expanded_texts(vlm, sample)
    if sample.replacements is not None:
        return reported_alignment(ids, texts, tokenizer, sample.replacements)
    image_id, markers = _image_id(vlm), None
    if image_id == FEATURE_ID or family.image_mark is not None:
        markers = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    counts: list[int | None] = []
    if family.image_mark is not None:
        image_id = tokenizer.convert_tokens_to_ids(family.image_mark)
        counts = [1] * len(sample.images)
    elif family.in_sequence and sample.grids is not None:
        counts = [grid.n_tokens for grid in sample.grids]
    elif family.in_sequence:
        counts = [None] * len(sample.images)
    return counted_alignment(ids, texts, tokenizer, image_id, counts, markers)


def _image_id(vlm: VLM) -> int | None:
    """Return the id of image tokens; None if images are not among the tokens of the prompt."""
    family = vlm.family
    if family.prepended or family.image_mask is not None:
        return FEATURE_ID
    return family.image_token_id(vlm.model.config) if family.in_sequence else None


def _expanded_texts(vlm: VLM, sample: Unlabelled) -> Iterator[str]:
    """Yield texts that the processor may have expanded: the prompt, and known changes of it."""
    text, tokenizer = sample.prompt.text, vlm.tokenizer
    yield text
    if _image_id(vlm) == FEATURE_ID:
        yield f" {text}"
    for end in ("\n", getattr(tokenizer, "sep_token", None)):
        if end is not None:
            yield text + end
    if vlm.placeholder is not None:
        yield re.sub(rf"({re.escape(vlm.placeholder)})(?=[^\s<])", r"\1 ", text)
    if hasattr(vlm.processor, "prepare_inputs_layout"):
        images = [list(sample.images)] if sample.images else None
        yield vlm.processor.prepare_inputs_layout(images=images, text=[text])[1][0]
    for begin in (tokenizer.bos_token, tokenizer.eos_token):
        if begin is not None and not text.startswith(begin):
            yield begin + text


def _rewritten(vlm: VLM, columns: Columns) -> Columns:
    """Drop the last position and replace the first token, as ``generate`` does."""
    shorter = {name: list(values)[:-1] for name, values in columns.items()}
    if shorter["kind"][0] != "padding":
        begin = vlm.model.config.text_config.bos_token_id
        shorter["token"][0] = vlm.tokenizer.convert_ids_to_tokens(begin)
    return shorter


def _unplaced(vlm: VLM, columns: Columns, images: Sequence[Image.Image]) -> tuple[ImageGrid, ...]:
    """Return grids without rows and columns, and the reason why they have none."""
    family = vlm.family
    reason = family.reason or f"There is no geometry rule for {family.model_type!r}."
    counts = [columns["image"].count(i) for i in range(len(images))]
    return tuple(
        unplaced(original_size(image), n, reason) for image, n in zip(images, counts, strict=True)
    )
