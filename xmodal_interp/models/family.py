"""What differs between model families, as data.

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
    """What the toolkit has to know about a model type.

    Attributes:
        model_type: ``config.model_type`` in transformers.
        image_token: Configuration attribute that holds the id of the tokens whose embeddings are
            the image's features; dots lead through nested attributes and mapping keys. None where
            images are not among the text tokens.
        geometry: The rule that places image tokens on images. None where there is none; then
            ``reason`` says why.
        in_sequence: Whether image tokens stand among the text tokens. If not, text reaches the
            image by cross-attention, whose keys the rule places.
        video: The rule that places video tokens on frames, if there is one.
        video_token: Attribute that holds the id of the video placeholder, if there is one.
        placeholder: Attribute of the processor that holds what a prompt has where an image goes;
            None where it has nothing there.
        video_tower: Name of the module that reads videos only, where there is one; the others then
            read images.
        in_order: Whether images and videos are read together in the order of the prompt, not all
            images of a batch and then all of its videos.
        flat_images: Whether the processor takes a plain list of images, not one list per prompt.
        in_front: Whether the processor puts images before the prompt by itself, so that a bare
            question is a whole prompt.
        writes_prompt: Whether the processor writes the prompt itself, from the text of a policy
            that the images are held against: the question is that policy.
        image_mask: The model's input that says by a 1 where image tokens stand, if their ids don't.
        prepended: Whether the model itself puts the image's features in front of the ids.
        image_mark: What a prompt has where an image goes, for processors that take texts and images
            in one list.
        reads_text: Whether the model reads a prompt. If not, its decoder's start token is all.
        rewritten: Whether ``generate`` leaves out the last id of a prompt, and puts the text
            model's beginning-of-sequence token in place of the first.
        token_types: Whether the model wants ``mm_token_type_ids``; processors return it when asked.
        reason: Why image tokens have no place in the image, or why there is no rule for it.
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
        """Whether image tokens are among the text tokens and known by an id or a mask."""
        named = self.image_token is not None or self.image_mask is not None
        return self.in_sequence and named

    @property
    def video_rule(self) -> str:
        """Name of the rule that places video tokens, empty without one."""
        return "" if self.video is None else name_of(self.video)

    def image_token_id(self, config: PretrainedConfig) -> int | None:
        """The id of image tokens, or None where the configuration knows none."""
        return _id(config, self.image_token)

    def video_token_id(self, config: PretrainedConfig) -> int | None:
        """The id of video tokens, or None."""
        return _id(config, self.video_token)


def _id(config: PretrainedConfig, name: str | None) -> int | None:
    value: Any = config
    for part in (name or "").split("."):
        value = value.get(part) if isinstance(value, Mapping) else getattr(value, part, None)
    return None if value is None else int(value)
