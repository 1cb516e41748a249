"""What differs between model families, as data.

One :class:`Family` record per transformers model type.

To add a family, write a record into ``FAMILIES``: its model type, where its configuration keeps the
id of the image placeholder, and the geometry rule that its image tokens follow. Nothing else in the
package knows a model by name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from xmodal_interp.errors import UnsupportedModelError
from xmodal_interp.models import geometry

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class Family:
    """What the toolkit has to know about a model type.

    Attributes:
        model_type: ``config.model_type`` in transformers.
        image_token: Attribute of the configuration that holds the id of the image placeholder.
        geometry: The rule that places image tokens on images.
        in_sequence: Whether image tokens stand among the text tokens. If not, text reaches the
            image by cross-attention, whose keys the rule places.
        video_token: Attribute that holds the id of the video placeholder, if there is one.
    """

    model_type: str
    image_token: str
    geometry: geometry.Rule
    in_sequence: bool = True
    video_token: str | None = None

    def image_token_id(self, config: PretrainedConfig) -> int:
        """The id of the image placeholder."""
        return int(getattr(config, self.image_token))

    def video_token_id(self, config: PretrainedConfig) -> int | None:
        """The id of the video placeholder, or None."""
        value = None if self.video_token is None else getattr(config, self.video_token, None)
        return None if value is None else int(value)


FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family("llava", "image_token_id", geometry.fixed_grid),
        Family("vipllava", "image_token_id", geometry.fixed_grid),
        Family("qwen2_vl", "image_token_id", geometry.merged_patches, video_token="video_token_id"),
        Family(
            "qwen2_5_vl", "image_token_id", geometry.merged_patches, video_token="video_token_id"
        ),
        Family("mllama", "image_token_index", geometry.aspect_ratio_tiles, in_sequence=False),
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
