"""A vision-language model with its processor.

The pair that turns an image and a question into labelled positions.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any, cast

import pandas as pd
import torch
from PIL import Image, UnidentifiedImageError
from transformers import PreTrainedModel, ProcessorMixin

from xmodal_interp.errors import InputError
from xmodal_interp.models.alignment import Alignment, counted_alignment, reported_alignment
from xmodal_interp.models.family import Family
from xmodal_interp.models.geometry import ImageGrid, unplaced
from xmodal_interp.models.records import family_of
from xmodal_interp.models.rendering import Rendered, rendered, spans_in
from xmodal_interp.models.tokens import Placeholders, grid_table, token_table, with_places

ImageLike = Image.Image | str | PathLike[str]


@dataclass(frozen=True, eq=False)
class Prompt:
    """One sample, ready for the model.

    Attributes:
        text: The rendered prompt, as the processor laid it out, before it expanded its image
            placeholders.
        question: What the user asked.
        images: The images, in order.
        grids: The grid of each image.
        tokens: One row per position, padding included.
        cross_keys: One row per cross-attention key, for families whose images are not in the
            sequence.
    """

    text: str
    question: str
    images: tuple[Image.Image, ...]
    grids: tuple[ImageGrid, ...]
    tokens: pd.DataFrame
    cross_keys: pd.DataFrame | None


@dataclass(frozen=True, eq=False)
class _Made:
    """What one sample was made of, before its positions are labelled."""

    question: str
    images: tuple[Image.Image, ...]
    prompt: Rendered
    replacements: Sequence[Mapping[str, Any]] | None
    grids: tuple[ImageGrid, ...] | None


@dataclass(frozen=True, eq=False)
class VLM:
    """A model, its processor and its family record.

    Raises:
        UnsupportedModelError: The model type has no family record, or reads text only.
    """

    model: PreTrainedModel
    processor: Any
    family: Family = None  # type: ignore[assignment]  # filled from the model type

    def __post_init__(self) -> None:
        object.__setattr__(self, "family", self.family or family_of(self.model.config))

    @property
    def name(self) -> str:
        """Where the model came from, or its class."""
        return str(getattr(self.model, "name_or_path", "") or type(self.model).__name__)

    @property
    def tokenizer(self) -> Any:
        """The processor's tokenizer."""
        return self.processor.tokenizer

    def prepare(
        self,
        images: Sequence[Sequence[ImageLike]],
        questions: Sequence[str],
        *,
        system: str | None = None,
    ) -> tuple[dict[str, Any], list[Prompt]]:
        """Model inputs for a batch, and the labelled positions of each sample.

        Args:
            images: For each sample, its images in order.
            questions: For each sample, its question. One that already holds the image placeholder
                is taken as the whole prompt; any other is put into the chat template behind its
                images.
            system: A system message, for the chat template.

        Raises:
            InputError: An empty question, an image that cannot be read, or a processor without a
                chat template.
        """
        opened = [tuple(open_image(image) for image in of_sample) for of_sample in images]
        prompts = [
            rendered(
                self.processor,
                question,
                self.placeholder,
                len(of),
                system=system,
                in_front=self.family.in_front,
            )
            for question, of in zip(questions, opened, strict=True)
        ]
        texts = [prompt.text for prompt in prompts]
        nested: list[Any] = [list(of) for of in opened if of]
        given = [image for of in nested for image in of] if self.family.flat_images else nested
        inputs = self.processor(images=given or None, text=texts, **self._options(texts))
        replacements = inputs.pop("text_replacement_offsets", None) or [None] * len(texts)
        grids = self._grids(inputs, opened)
        ids = inputs["input_ids"]
        attended = inputs.get("attention_mask", torch.ones_like(ids))
        labelled = [
            self._prompt(_Made(*made), ids[i], attended[i])
            for i, made in enumerate(
                zip(questions, opened, prompts, replacements, grids, strict=True)
            )
        ]
        device = self.model.device
        moved = {
            name: value.to(device) if isinstance(value, torch.Tensor) else value
            for name, value in inputs.items()
        }
        return self._cast(moved), labelled

    def generate(self, inputs: dict[str, Any], **options: Any) -> torch.Tensor:
        """Token ids of prompt and answer, ``[sample, position]``, greedy unless told otherwise."""
        output = self.model.generate(**inputs, **{"do_sample": False, **options})  # type: ignore[operator]
        return cast("torch.Tensor", output)

    @property
    def placeholder(self) -> str | None:
        """What a prompt has where an image goes; None where prompts have nothing there."""
        token = getattr(self.processor, self.family.placeholder, None)
        token_id = self.family.image_token_id(self.model.config)
        if token is None and token_id is not None:
            token = self.tokenizer.convert_ids_to_tokens(token_id)
        return None if token is None else str(getattr(token, "content", token))

    def _begins_itself(self, text: str) -> bool:
        """Chat templates usually write the beginning-of-sequence token themselves."""
        begin = self.tokenizer.bos_token
        return begin is not None and text.startswith(begin)

    def _options(self, texts: Sequence[str]) -> dict[str, Any]:
        """How the processor is called, beside texts and images."""
        options: dict[str, Any] = {"return_tensors": "pt"}
        if len(texts) > 1:
            options |= {"padding": True, "padding_side": "left"}
        if self._begins_itself(texts[0]):
            options |= {"add_special_tokens": False}
        if _reports_replacements(self.processor):
            options |= {"return_text_replacement_offsets": True}
        return options

    def _grids(
        self, inputs: Any, opened: Sequence[tuple[Image.Image, ...]]
    ) -> list[tuple[ImageGrid, ...] | None]:
        """The grids of each sample; None where the family has no rule."""
        rule = self.family.geometry
        flat = [image for of_sample in opened for image in of_sample]
        if rule is None and flat:
            return [None] * len(opened)
        made = [] if rule is None else rule(self.processor, self.model.config, inputs, flat)
        grids = (replace(grid, reason=self.family.reason) for grid in made)
        return [tuple(next(grids) for _ in of_sample) for of_sample in opened]

    def _prompt(self, made: _Made, ids: torch.Tensor, attended: torch.Tensor) -> Prompt:
        """The labelled positions of one sample."""
        family, seen = self.family, attended.bool().tolist()
        alignment = self._aligned(made, [t for t, s in zip(ids.tolist(), seen, strict=True) if s])
        spans = spans_in(alignment.text, made.prompt)
        table = token_table(
            ids.tolist(), seen, alignment, self.tokenizer, self._placeholders(), spans
        )
        grids = made.grids
        if grids is None:
            grids = self._unplaced(table, made.images)
        if family.in_sequence:
            table = with_places(table, grids)
        return Prompt(
            alignment.text,
            made.question,
            made.images,
            grids,
            table,
            None if family.in_sequence else grid_table(grids),
        )

    def _placeholders(self) -> Placeholders:
        family, config = self.family, self.model.config
        return Placeholders(
            family.image_token_id(config) if family.in_sequence else None,
            family.video_token_id(config),
        )

    def _aligned(self, made: _Made, ids: Sequence[int]) -> Alignment:
        texts = self._laid_out(made)
        if made.replacements is not None:
            return reported_alignment(ids, texts, self.tokenizer, made.replacements)
        in_sequence = self.family.in_sequence
        counts: list[int | None] = [None] * len(made.images)
        if made.grids is not None:
            counts = [grid.n_tokens for grid in made.grids]
        return counted_alignment(
            ids,
            texts,
            self.tokenizer,
            self._placeholders().image,
            counts if in_sequence else [],
        )

    def _laid_out(self, made: _Made) -> Iterator[str]:
        """What the processor may have expanded: the prompt, or what it makes of it before."""
        text = made.prompt.text
        yield text
        if self.placeholder is not None:
            yield re.sub(rf"({re.escape(self.placeholder)})(?=[^\s<])", r"\1 ", text)
        if hasattr(self.processor, "prepare_inputs_layout"):
            images = [list(made.images)] if made.images else None
            yield self.processor.prepare_inputs_layout(images=images, text=[text])[1][0]

    def _unplaced(
        self, table: pd.DataFrame, images: Sequence[Image.Image]
    ) -> tuple[ImageGrid, ...]:
        """Grids without places, that say why there are none."""
        reason = self.family.reason or f"There is no rule for {self.family.model_type!r}."
        counts = [int(table["image"].eq(i).sum()) for i in range(len(images))]
        return tuple(
            unplaced(image.size, n, reason) for image, n in zip(images, counts, strict=True)
        )

    def _cast(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Pixels in the model's precision; ids and masks as they are."""
        return {
            name: value.to(self.model.dtype)
            if name.startswith("pixel_values") and value.is_floating_point()
            else value
            for name, value in inputs.items()
        }


def open_image(image: ImageLike) -> Image.Image:
    """An RGB image from a path or a PIL image.

    Raises:
        InputError: There is no such file, or it is no image.
    """
    if isinstance(image, Image.Image):
        return image if image.mode == "RGB" else image.convert("RGB")
    path = Path(image)
    try:
        with Image.open(path) as opened:
            return opened.convert("RGB")
    except FileNotFoundError:
        raise InputError(
            f"An image must be a file that exists, or a PIL image; there is no {str(path)!r}."
        ) from None
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise InputError(
            f"An image file must be readable by Pillow; {str(path)!r} is not: {error}."
        ) from error


def _reports_replacements(processor: Any) -> bool:
    """Whether a processor expands its placeholders in the way that can be reported."""
    own = getattr(type(processor), "replace_image_token", None)
    return own is not None and own is not ProcessorMixin.replace_image_token
