"""One record per model type: where its image tokens are, and the rule that places them.

To add a family, write a record: its model type, where its configuration keeps the id of the image
tokens, and the geometry rule that they follow, or the reason why they have no place. Nothing else
in the package knows a model by name.
"""

from __future__ import annotations

from typing import Any

from xmodal_interp.errors import UnsupportedModelError
from xmodal_interp.models import geometry
from xmodal_interp.models.family import Family

_VIDEO = "video_token_id"

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family("llava", geometry=geometry.fixed_grid),
        Family("vipllava", geometry=geometry.fixed_grid),
        Family("qwen2_vl", geometry=geometry.merged_patches, video_token=_VIDEO),
        Family("qwen2_5_vl", geometry=geometry.merged_patches, video_token=_VIDEO),
        Family(
            "mllama", "image_token_index", geometry=geometry.aspect_ratio_tiles, in_sequence=False
        ),
    )
}


def family_of(config: Any) -> Family:
    """The record of a model's type.

    Raises:
        UnsupportedModelError: There is none, or the model reads text only.
    """
    model_type = getattr(config, "model_type", None)
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    known = ", ".join(sorted(FAMILIES))
    if getattr(config, "vision_config", None) is None:
        raise UnsupportedModelError(
            f"A vision-language model has a vision_config. The model type {model_type!r} has none: "
            "it reads text only. "
            f"Record its attention with xi.record(model), or load one of: {known}."
        )
    raise UnsupportedModelError(
        f"Labelling tokens needs a family record. There is none for the model type {model_type!r}; "
        f"known are {known}. "
        "Write one (xmodal_interp.models.Family) and pass it as VLM(model, processor, family=...), "
        "or record the bare "
        "attention with xi.record(model)."
    )
