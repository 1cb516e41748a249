"""The call of a processor: its arguments from prompts, images and videos, and its outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from transformers import ProcessorMixin

from xmodal_interp.errors import InputError
from xmodal_interp.models.media import Composite, Video, flat
from xmodal_interp.models.processor_settings import unset
from xmodal_interp.models.prompts import RenderedPrompt
from xmodal_interp.models.records import Family

if TYPE_CHECKING:
    from xmodal_interp.models.vlm import VLM

FAILURES = (
    *(ValueError, TypeError, RuntimeError, StopIteration),
    *(ArithmeticError, LookupError, AttributeError),
)
"""Errors that a processor may raise for unusable inputs; processors rarely check them."""

_UNREAD = (
    "video_metadata",
    "labels",
)  # outputs that the model does not read; labels are for training


def processed(
    vlm: VLM,
    questions: Sequence[str],
    prompts: Sequence[RenderedPrompt],
    images: Sequence[tuple[Image.Image, ...]],
    videos: Sequence[tuple[Video, ...]],
) -> tuple[Any, Sequence[Sequence[Mapping[str, Any]] | None]]:
    """Return the outputs of the processor, and the replacements that it reports for each prompt.

    Args:
        vlm: Model, processor and family record.
        questions: The question of each sample.
        prompts: The rendered prompt of each sample.
        images: The images of each sample.
        videos: The videos of each sample.

    Raises:
        InputError: The processor fails on these inputs.
    """
    texts, processor = [prompt.text for prompt in prompts], vlm.processor
    arguments = {
        **_texts_and_images(vlm.family, texts, images),
        **_options(vlm, texts),
        **(_policy(questions) if vlm.family.writes_prompt else {}),
        **_videos(videos),
    }
    try:
        outputs = processor(**arguments)
    except FAILURES as error:
        _refuse_other_numbers(vlm.placeholder, texts, images, error)
        missing = unset(processor)
        if missing:
            raise InputError(
                f"{type(processor).__name__} failed on this input: {error}. Its settings "
                f"{', '.join(missing)} have no value in the processor or the model's config. Set "
                f"processor.{missing[0]}."
            ) from error
        raise InputError(
            f"{type(processor).__name__} failed on this input: {error} (images of "
            f"{', '.join(f'{one.width} x {one.height}' for one in flat(images)) or 'none'} px)."
        ) from error
    for name in _UNREAD:
        outputs.pop(name, None)
    replacements = outputs.pop("text_replacement_offsets", None) or [None] * len(texts)
    return outputs, replacements


def _texts_and_images(
    family: Family, texts: Sequence[str], images: Sequence[tuple[Image.Image, ...]]
) -> dict[str, Any]:
    """Return the texts and images as the family's processor takes them.

    Families with an image mark take texts and images in one list. In the other families, a sample
    without images gets an empty list, or is left out if the processor puts images before prompts.
    """
    mark = family.image_mark
    if mark is not None:
        pairs = zip(texts, images, strict=True)
        return {"text": [_interleaved(text, mark, of_sample) for text, of_sample in pairs]}
    nested = [list(of_sample) for of_sample in images if of_sample or not family.in_front]
    given = (flat(nested) if family.flat_images else nested) if any(images) else None
    return {"images": given, "text": list(texts)} if any(texts) else {"images": given}


def _interleaved(prompt: str, mark: str, images: Sequence[Any]) -> list[Any]:
    """Return texts and images in the order of the prompt; without marks, the images come first.

    Raises:
        InputError: The prompt has another number of marks than images.
    """
    texts = prompt.split(mark) if mark in prompt else [""] * len(images) + [prompt]
    if len(texts) != len(images) + 1:
        raise InputError(
            f"The prompt {prompt!r} contains {mark} {len(texts) - 1} times for {len(images)} "
            "images. Write it once for each image, or leave it out."
        )
    parts = [part for pair in zip(texts, images, strict=False) for part in pair]
    return [part for part in (*parts, texts[-1]) if part != ""]


def _options(vlm: VLM, texts: Sequence[str]) -> dict[str, Any]:
    """Return the options of the processor call.

    The prompt of a decoder is padded on the left, because the answer follows its last token. The
    prompt of an encoder is padded on the right, so that the positions of its tokens stay the same.
    """
    family = vlm.family
    chosen: dict[str, Any] = {"return_tensors": "pt"}
    if len(texts) > 1:
        in_encoder = vlm.model.config.is_encoder_decoder and family.in_sequence
        chosen |= {"padding": True, "padding_side": "right" if in_encoder else "left"}
    begin = vlm.tokenizer.bos_token
    if begin is not None and texts[0].startswith(begin):  # most chat templates write it themselves
        chosen |= {"add_special_tokens": False}
    reports = getattr(type(vlm.processor), "replace_image_token", None)
    if reports is not None and reports is not ProcessorMixin.replace_image_token:
        chosen |= {"return_text_replacement_offsets": True}
    if family.token_types:
        chosen |= {"return_mm_token_type_ids": True}
    return chosen


def _videos(shown: Sequence[tuple[Video, ...]]) -> dict[str, Any]:
    """Return the video arguments, with frame sampling turned off: every frame is used."""
    every = flat(shown)
    if not every:
        return {}
    return {
        "videos": [video.pixels() for video in every],
        "videos_kwargs": {
            "video_metadata": [video.metadata() for video in every],
            "do_sample_frames": False,
            "return_metadata": True,  # some processors write frame times into the prompt
        },
    }


def _policy(questions: Sequence[str]) -> dict[str, Any]:
    """Return the policy arguments for processors that write the prompts themselves.

    Raises:
        InputError: The questions differ; the processor would pair every image with every policy.
    """
    if len(set(questions)) > 1:
        raise InputError(
            "This processor applies one policy (the question) to all images of a batch; got "
            f"{len(set(questions))} questions. Prepare a separate batch for each question."
        )
    return {"policies": ["question"], "custom_policies": {"question": questions[0]}}


def _refuse_other_numbers(
    placeholder: str | None,
    texts: Sequence[str],
    opened: Sequence[tuple[Image.Image, ...]],
    cause: Exception,
) -> None:
    """Raise InputError if a processor failed on a wrong number of image placeholders.

    This is checked only after a failure: some valid prompts contain no placeholder, or all tokens
    of an image.

    Raises:
        InputError: A prompt has another number of placeholders than images.
    """
    for text, images in zip(texts, opened, strict=True):
        found = 0 if placeholder is None else text.count(placeholder)
        if placeholder is not None and found != len(images):
            raise InputError(
                f"The prompt {text!r} contains {placeholder} {found} times for {len(images)} "
                "images. Write it once for each image."
            ) from cause


def composite_of(processor: Any) -> Composite | None:
    """Return the function for transparent images of a processor, or of an image processor.

    None if their background is white.
    """
    of_images = getattr(processor, "image_processor", processor)
    method = getattr(of_images, "convert_to_rgb", None)
    if method is None or not str(method.__module__).startswith("transformers.models."):
        return None

    def composite(image: Image.Image) -> Image.Image:
        """Convert an RGBA image as the processor does."""
        channels_first = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        return Image.fromarray(method(channels_first).permute(1, 2, 0).numpy())

    return composite
