"""Which samples may share a padded batch, and on which side they are padded.

The results of a sample must not depend on the other samples of its batch. Padding changes them if a
model counts padding in its positions, or if images are padded to the largest image or to the
largest number of images. Such samples are run one by one.

The prompt of a decoder is padded on the left, because the answer follows its last token. The prompt
of an encoder is padded on the right, so that the positions of its tokens stay the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
