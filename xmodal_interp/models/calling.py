"""How a processor is called: texts and images as its kind takes them, and its options."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import ProcessorMixin

from xmodal_interp.errors import InputError
from xmodal_interp.models.family import Family
from xmodal_interp.models.opening import Composite, Video, flat
from xmodal_interp.models.rendering import interleaved


def texts_and_images(
    family: Family, texts: Sequence[str], opened: Sequence[tuple[Image.Image, ...]]
) -> dict[str, Any]:
    """Texts and images, each in a list, or in one; no texts where there is none.

    Of some samples with images and some without, these have an empty list, unless the processor
    puts the images in front by itself.
    """
    mark = family.image_mark
    if mark is not None:
        pairs = zip(texts, opened, strict=True)
        return {"text": [interleaved(text, mark, of_sample) for text, of_sample in pairs]}
    nested = [list(of_sample) for of_sample in opened if of_sample or not family.in_front]
    images = (flat(nested) if family.flat_images else nested) if any(opened) else None
    return {"images": images, "text": list(texts)} if any(texts) else {"images": images}


def composite_of(processor: Any) -> Composite | None:
    """How a processor puts transparent images on a background; None where that is white."""
    of_images = getattr(processor, "image_processor", None)
    method = getattr(of_images, "convert_to_rgb", None)
    if method is None or not str(method.__module__).startswith("transformers.models."):
        return None

    def composite(image: Image.Image) -> Image.Image:
        """Convert an RGBA image as the processor would."""
        channels_first = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        return Image.fromarray(method(channels_first).permute(1, 2, 0).numpy())

    return composite


def options(
    processor: Any, family: Family, texts: Sequence[str], padding_side: str
) -> dict[str, Any]:
    """The options beside texts and images."""
    chosen: dict[str, Any] = {"return_tensors": "pt"}
    if len(texts) > 1:
        chosen |= {"padding": True, "padding_side": padding_side}
    begin = processor.tokenizer.bos_token
    if begin is not None and texts[0].startswith(begin):  # most chat templates write it themselves
        chosen |= {"add_special_tokens": False}
    if _reports_replacements(processor):
        chosen |= {"return_text_replacement_offsets": True}
    if family.token_types:
        chosen |= {"return_mm_token_type_ids": True}
    return chosen


def videos(shown: Sequence[tuple[Video, ...]]) -> dict[str, Any]:
    """How the processor is given videos: as they are, nothing sampled."""
    every = flat(shown)
    if not every:
        return {}
    return {
        "videos": [video.pixels() for video in every],
        "videos_kwargs": {
            "video_metadata": [video.metadata() for video in every],
            "do_sample_frames": False,
            "return_metadata": True,  # some write the times of frames into the prompt
        },
    }


def policy(questions: Sequence[str]) -> dict[str, Any]:
    """How a processor that writes the prompts itself is told what to write.

    Raises:
        InputError: The questions differ; the processor holds each image against each policy.
    """
    if len(set(questions)) > 1:
        raise InputError(
            "A processor that writes the prompts itself holds all images of a batch against the "
            f"same policy. Got {len(set(questions))} questions; give each a batch of its own."
        )
    return {"policies": ["question"], "custom_policies": {"question": questions[0]}}


def refuse_other_numbers(
    placeholder: str | None,
    texts: Sequence[str],
    opened: Sequence[tuple[Image.Image, ...]],
    cause: Exception,
) -> None:
    """Say so where a processor fails because a prompt has not one placeholder per image.

    It is asked only then: some prompts hold none, or all of an image's tokens.

    Raises:
        InputError: There is such a prompt.
    """
    for text, images in zip(texts, opened, strict=True):
        found = 0 if placeholder is None else text.count(placeholder)
        if placeholder is not None and found != len(images):
            raise InputError(
                f"A prompt must have {placeholder} where each image goes. There are {found} of "
                f"them for {len(images)} images in {text!r}."
            ) from cause


def _reports_replacements(processor: Any) -> bool:
    """Whether a processor expands its placeholders in the way that can be reported."""
    own = getattr(type(processor), "replace_image_token", None)
    return own is not None and own is not ProcessorMixin.replace_image_token
