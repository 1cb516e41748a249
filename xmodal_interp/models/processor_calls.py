"""Build the arguments of a processor call: texts, images, videos and options."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import ProcessorMixin

from xmodal_interp.errors import InputError
from xmodal_interp.models.media import Composite, Video, flat
from xmodal_interp.models.prompts import interleaved
from xmodal_interp.models.records import Family


def texts_and_images(
    family: Family, texts: Sequence[str], opened: Sequence[tuple[Image.Image, ...]]
) -> dict[str, Any]:
    """Return the texts and images as the family's processor takes them.

    Families with an image mark take texts and images in one list. In the other families, a sample
    without images gets an empty list, or is left out if the processor puts images before prompts.
    """
    mark = family.image_mark
    if mark is not None:
        pairs = zip(texts, opened, strict=True)
        return {"text": [interleaved(text, mark, of_sample) for text, of_sample in pairs]}
    nested = [list(of_sample) for of_sample in opened if of_sample or not family.in_front]
    images = (flat(nested) if family.flat_images else nested) if any(opened) else None
    return {"images": images, "text": list(texts)} if any(texts) else {"images": images}


def composite_of(processor: Any) -> Composite | None:
    """Return the processor's function for transparent images; None if their background is white."""
    of_images = getattr(processor, "image_processor", None)
    method = getattr(of_images, "convert_to_rgb", None)
    if method is None or not str(method.__module__).startswith("transformers.models."):
        return None

    def composite(image: Image.Image) -> Image.Image:
        """Convert an RGBA image as the processor does."""
        channels_first = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        return Image.fromarray(method(channels_first).permute(1, 2, 0).numpy())

    return composite


def options(processor: Any, config: Any, family: Family, texts: Sequence[str]) -> dict[str, Any]:
    """Return the options of the processor call.

    The prompt of a decoder is padded on the left, because the answer follows its last token. The
    prompt of an encoder is padded on the right, so that the positions of its tokens stay the same.
    """
    chosen: dict[str, Any] = {"return_tensors": "pt"}
    if len(texts) > 1:
        in_encoder = config.is_encoder_decoder and family.in_sequence
        chosen |= {"padding": True, "padding_side": "right" if in_encoder else "left"}
    begin = processor.tokenizer.bos_token
    if begin is not None and texts[0].startswith(begin):  # most chat templates write it themselves
        chosen |= {"add_special_tokens": False}
    if _reports_replacements(processor):
        chosen |= {"return_text_replacement_offsets": True}
    if family.token_types:
        chosen |= {"return_mm_token_type_ids": True}
    return chosen


def videos(shown: Sequence[tuple[Video, ...]]) -> dict[str, Any]:
    """Return the video arguments; the processor uses all frames and samples none."""
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


def policy(questions: Sequence[str]) -> dict[str, Any]:
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


def refuse_other_numbers(
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


def _reports_replacements(processor: Any) -> bool:
    """Whether a processor can report how it expanded its placeholders."""
    own = getattr(type(processor), "replace_image_token", None)
    return own is not None and own is not ProcessorMixin.replace_image_token
