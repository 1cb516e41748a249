"""Build the arguments of a processor call: texts, images, videos and options.

Which samples may share a padded batch, and on which side they are padded.

The results of a sample must not depend on the other samples of its batch. Padding changes them if a
model counts padding in its positions, or if images are padded to the largest image or to the
largest number of images. Such samples are run one by one.

The prompt of a decoder is padded on the left, because the answer follows its last token. The prompt
of an encoder is padded on the right, so that the positions of its tokens stay the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import ProcessorMixin

from xmodal_interp.errors import InputError
from xmodal_interp.models.family import Family
from xmodal_interp.models.media import Composite, Video, flat
from xmodal_interp.models.prompts import interleaved

_SPARSE = "which of several equal keys an indexer chooses depends on the number of keys"
_ABSOLUTE = "positions are counted from the first one, padding included"
_IMAGES = "images are padded to the largest image of a batch"

ALONE: dict[str, str] = {
    "dots3_note": _SPARSE,
    "mistral_large4": _SPARSE,
    "blip": _ABSOLUTE,
    "git": _ABSOLUTE,
    **dict.fromkeys(("gpt2", "gpt_neo", "gpt_bigcode"), _ABSOLUTE),
    "hunyuan_vl": _ABSOLUTE,
    "kosmos-2": _ABSOLUTE,
    "kosmos-2.5": _ABSOLUTE,
    "instructblip": "the query tokens read the question at positions that padding shifts",
    "instructblipvideo": "the query tokens read the question at positions that padding shifts",
    "emu3": _IMAGES,
    "idefics2": _IMAGES,
    "perception_lm": "images with different numbers of tiles cannot be stacked",
}
"""Types (of the whole model or its text model) whose samples are run one by one, and why."""


def padding_side(config: Any, *, in_encoder: bool) -> str:
    """Return the side on which the prompts of a batch are padded: ``"left"`` or ``"right"``.

    Args:
        config: The configuration of the model.
        in_encoder: Whether the encoder of an encoder-decoder model reads the prompts.
    """
    return "right" if config.is_encoder_decoder and in_encoder else "left"


def runs_alone(config: Any) -> bool:
    """Whether padding changes the results of a model with this configuration."""
    text = config.get_text_config(decoder=True)
    return bool(ALONE.keys() & {config.model_type, getattr(text, "model_type", None)})


def batches_alike(
    config: Any, images: Sequence[Sequence[Any]], *, by_count: bool
) -> list[list[int]]:
    """Return the samples of each batch, in order.

    A batch holds all samples, those with the same number of images, or a single one.

    Args:
        config: The configuration of the model.
        images: The images of each sample.
        by_count: Whether the model pads the images of a sample to the largest number of them.
    """
    if runs_alone(config):
        return [[index] for index in range(len(images))]
    groups: dict[int, list[int]] = {}
    for index, of_sample in enumerate(images):
        groups.setdefault(len(of_sample) if by_count else 0, []).append(index)
    return list(groups.values())


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


def options(
    processor: Any, family: Family, texts: Sequence[str], padding_side: str
) -> dict[str, Any]:
    """Return the options of the processor call."""
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
