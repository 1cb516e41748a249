"""A vision-language model with its processor.

The pair that turns an image and a question into labelled positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, cast

import pandas as pd
import torch
from PIL import Image, UnidentifiedImageError
from transformers import PreTrainedModel

from xmodal_interp.errors import InputError
from xmodal_interp.models.family import Family, family_of
from xmodal_interp.models.geometry import ImageGrid
from xmodal_interp.models.tokens import Placeholders, Span, grid_table, message_spans, token_table

ImageLike = Image.Image | str | PathLike[str]


@dataclass(frozen=True, eq=False)
class Prompt:
    """One sample, ready for the model.

    Attributes:
        text: The rendered prompt, before the processor expanded its image placeholders.
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
        rendered = [
            self._render(question, len(of), system)
            for question, of in zip(questions, opened, strict=True)
        ]
        texts = [text for text, _ in rendered]
        nested = [list(of) for of in opened if of]
        inputs = self.processor(
            images=nested or None,
            text=texts,
            return_tensors="pt",
            **({"padding": True, "padding_side": "left"} if len(texts) > 1 else {}),
            **({"add_special_tokens": False} if self._begins_itself(texts[0]) else {}),
        )
        grids = self._grids(inputs, opened)
        prompts = [
            self._prompt(i, inputs, questions[i], opened[i], grids[i], *rendered[i])
            for i in range(len(questions))
        ]
        device = self.model.device
        moved = {
            name: value.to(device) if isinstance(value, torch.Tensor) else value
            for name, value in inputs.items()
        }
        return self._cast(moved), prompts

    def generate(self, inputs: dict[str, Any], **options: Any) -> torch.Tensor:
        """Token ids of prompt and answer, ``[sample, position]``, greedy unless told otherwise."""
        output = self.model.generate(**inputs, **{"do_sample": False, **options})  # type: ignore[operator]
        return cast("torch.Tensor", output)

    def _render(self, question: str, n_images: int, system: str | None) -> tuple[str, list[Span]]:
        if not question.strip():
            raise InputError("A prompt must not be empty; got only white space.")
        placeholder = self.tokenizer.convert_ids_to_tokens(
            self.family.image_token_id(self.model.config)
        )
        if placeholder in question:
            return question, [Span("user", 0, len(question))]
        if getattr(self.processor, "chat_template", None) is None:
            raise InputError(
                f"{type(self.processor).__name__} has no chat template, so a bare question cannot "
                "be rendered. Write the "
                f"whole prompt, with {placeholder} where each image goes; got {question!r}."
            )
        content = [
            *({"type": "image"} for _ in range(n_images)),
            {"type": "text", "text": question},
        ]
        messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
        if system is not None:
            messages.insert(0, {"role": "system", "content": [{"type": "text", "text": system}]})
        text = self.processor.apply_chat_template(messages, add_generation_prompt=True)
        return text, [*message_spans(text, messages), *_placeholder_spans(text, placeholder)]

    def _begins_itself(self, text: str) -> bool:
        """Chat templates usually write the beginning-of-sequence token themselves."""
        begin = self.tokenizer.bos_token
        return begin is not None and text.startswith(begin)

    def _grids(
        self, inputs: Any, opened: Sequence[tuple[Image.Image, ...]]
    ) -> list[tuple[ImageGrid, ...]]:
        flat = [image for of_sample in opened for image in of_sample]
        grids = iter(
            self.family.geometry(self.processor, self.model.config, inputs, flat) if flat else []
        )
        return [tuple(next(grids) for _ in of_sample) for of_sample in opened]

    def _prompt(
        self,
        index: int,
        inputs: Any,
        question: str,
        images: tuple[Image.Image, ...],
        grids: tuple[ImageGrid, ...],
        text: str,
        spans: list[Span],
    ) -> Prompt:
        config, family = self.model.config, self.family
        table = token_table(
            inputs["input_ids"][index].tolist(),
            inputs["attention_mask"][index].bool().tolist(),
            text,
            self.tokenizer,
            Placeholders(
                family.image_token_id(config) if family.in_sequence else None,
                family.video_token_id(config),
            ),
            grids,
            spans,
        )
        return Prompt(
            text, question, images, grids, table, None if family.in_sequence else grid_table(grids)
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


def _placeholder_spans(text: str, placeholder: str) -> list[Span]:
    spans, start = [], text.find(placeholder)
    while start >= 0:
        spans.append(Span("user", start, start + len(placeholder)))
        start = text.find(placeholder, start + len(placeholder))
    return spans
