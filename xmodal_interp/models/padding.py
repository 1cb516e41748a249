"""Which samples may share a padded run of the model, and on which side they are padded.

The numbers of a sample must not depend on the other samples of its batch. Padding changes them
where a model counts positions from the first one, padding included, or where images are padded to
the largest one or to the largest number of them. The samples are then run one by one.

A prompt that a decoder continues is padded on the left: its answer follows its last token. A prompt
that an encoder reads is padded on the right: the positions of its tokens then stay the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_SPARSE = "which keys an indexer chooses among equals depends on how many keys there are"
_ABSOLUTE = "positions are counted from the first one, padding included"
_IMAGES = "images are padded to the largest one of a batch"

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
    "perception_lm": "images with different numbers of tiles do not make one tensor",
}
"""Model types whose samples are run one by one, and why; of the whole model or its text model."""


def padding_side(config: Any, *, in_encoder: bool) -> str:
    """``"left"`` or ``"right"``: on which side the prompts of a batch are padded.

    Args:
        config: The configuration of the model.
        in_encoder: Whether prompts are read by the encoder of an encoder-decoder, if it is one.
    """
    return "right" if config.is_encoder_decoder and in_encoder else "left"


def runs_alone(config: Any) -> bool:
    """Whether padding changes the numbers of a model of this configuration."""
    text = config.get_text_config(decoder=True)
    return bool(ALONE.keys() & {config.model_type, getattr(text, "model_type", None)})


def batches_alike(
    config: Any, images: Sequence[Sequence[Any]], *, by_count: bool
) -> list[list[int]]:
    """Which samples share a run, in order: all, those with as many images each, or one each.

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
