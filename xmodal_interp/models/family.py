"""The differences between model families, as data.

One :class:`Family` record per transformers model type; the records are in ``records``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from xmodal_interp.models.geometry import Rule, VideoRule, name_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class Family:
    """The properties of a model type that preparing and labelling its inputs depend on.

    Attributes:
        model_type: ``config.model_type`` in transformers.
        image_token: Configuration attribute that holds the id of the tokens whose embeddings are
            the image's features; dots separate nested attributes and mapping keys. None if images
            are not among the text tokens.
        geometry: The rule that places image tokens on images. None if there is no rule; ``reason``
            then explains why.
        in_sequence: Whether image tokens are among the text tokens. If not, text attends to the
            image by cross-attention, and the rule places its keys.
        video: The rule that places video tokens on frames, if there is one.
        video_token: Configuration attribute that holds the id of video tokens, if there is one.
        placeholder: Attribute of the processor that holds the placeholder of an image in a prompt;
            None if images have no placeholder.
        video_tower: Name of the vision tower for videos, if it is separate from the one for images.
        in_order: Whether images and videos of a batch are encoded together in the order of the
            prompt, instead of all images first and all videos after them.
        flat_images: Whether the processor takes a flat list of images, not one list per prompt.
        in_front: Whether the processor itself puts images before the prompt, so that a bare
            question is a whole prompt.
        writes_prompt: Whether the processor writes the prompt itself, from the text of a policy
            that images are checked against. The question then is that policy.
        image_mask: The model input whose ones mark image tokens, if their ids do not.
        prepended: Whether the model itself puts the image's features before the ids.
        image_mark: The mark of an image in a prompt, for processors that take texts and images in
            one list.
        reads_text: Whether the model takes a prompt. If not, the decoder reads only a start token.
        rewritten: Whether ``generate`` drops the last id of a prompt, and replaces the first by the
            text model's beginning-of-sequence token.
        token_types: Whether the model requires ``mm_token_type_ids``, which processors return on
            request.
        reason: Why image tokens have no row and column, or why there is no rule for them.
    """

    model_type: str
    image_token: str | None = "image_token_id"
    geometry: Rule | None = None
    in_sequence: bool = True
    video: VideoRule | None = None
    video_token: str | None = None
    video_tower: str | None = None
    in_order: bool = False
    placeholder: str | None = "image_token"
    flat_images: bool = False
    in_front: bool = False
    writes_prompt: bool = False
    image_mask: str | None = None
    prepended: bool = False
    image_mark: str | None = None
    reads_text: bool = True
    rewritten: bool = False
    token_types: bool = False
    reason: str | None = None

    @property
    def rule(self) -> str:
        """Name of the geometry rule, ``"none"`` without one."""
        return "none" if self.geometry is None else name_of(self.geometry)

    @property
    def marks_tokens(self) -> bool:
        """Whether image tokens are among the text tokens, marked by an id or a mask."""
        named = self.image_token is not None or self.image_mask is not None
        return self.in_sequence and named

    @property
    def video_rule(self) -> str:
        """Name of the rule that places video tokens, empty without one."""
        return "" if self.video is None else name_of(self.video)

    def image_token_id(self, config: PretrainedConfig) -> int | None:
        """The id of image tokens, or None if the configuration has none."""
        return _id(config, self.image_token)

    def video_token_id(self, config: PretrainedConfig) -> int | None:
        """The id of video tokens, or None."""
        return _id(config, self.video_token)


def _id(config: PretrainedConfig, name: str | None) -> int | None:
    value: Any = config
    for part in (name or "").split("."):
        value = value.get(part) if isinstance(value, Mapping) else getattr(value, part, None)
    return None if value is None else int(value)
