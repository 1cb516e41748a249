"""The settings of a tiny offline copy of one model type."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

EMPTY: Mapping[str, Any] = MappingProxyType({})


class Token(str):
    """A token that is replaced by its id in a configuration."""

    __slots__ = ()


@dataclass(frozen=True)
class Record:
    """One model type: the settings of its processor, and of a tiny model that agrees with it.

    Attributes:
        model_type: The key of transformers' mapping of image-text-to-text models.
        note: What the processor does with an image, and the settings that control it.
        image: The placeholder of an image that a user writes into a prompt; may be empty.
        video: The placeholder of a video; by default that of an image with "image" replaced by
            "video".
        tokens: Special tokens of the tokenizer, besides padding, beginning, end and unknown.
        words: Tokens that the tokenizer treats as ordinary words of its vocabulary. If there are
            any, every text starts with a space.
        named: Special tokens that are attributes of the tokenizer: attribute name to token.
        images: Settings of the image processor; ``{"@": "ClassName"}`` chooses the class if
            transformers registers none.
        videos: Settings of the video processor, likewise.
        audio: Settings of the audio feature extractor, likewise.
        processor: Settings of the processor itself.
        call: Settings that this processor takes only as call arguments.
        beside: Model inputs that the processor does not return, as nested lists.
        config: Settings of the model's configuration that override those of the generic tiny one,
            nested like the configuration. A :class:`Token` is replaced by its id.
        processor_class: The processor class that checkpoints name, if transformers registers none.
        asks: Whether a user writes a prompt.
        template: Whether the processor has a chat template.
        begins: Whether the tokenizer puts the beginning-of-sequence token before every text.
        n_frames: Number of frames per clip, if the processor takes clips instead of images.
        nested: Whether the processor takes a separate list of images for each prompt.
        several: Whether one prompt may contain several images.
        needs: Modules that building requires besides the project's dependencies.
        unbuildable: Why there is no real processor, or no model that runs on its outputs.
    """

    model_type: str
    note: str = ""
    image: str = "<image>"
    video: str | None = None
    tokens: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    named: Mapping[str, str] = field(default_factory=lambda: EMPTY)
    images: Mapping[str, Any] = field(default_factory=lambda: EMPTY)
    videos: Mapping[str, Any] = field(default_factory=lambda: EMPTY)
    audio: Mapping[str, Any] = field(default_factory=lambda: EMPTY)
    processor: Mapping[str, Any] = field(default_factory=lambda: EMPTY)
    call: Mapping[str, Any] = field(default_factory=lambda: EMPTY)
    beside: Mapping[str, Any] = field(default_factory=lambda: EMPTY)
    config: Mapping[str, Any] = field(default_factory=lambda: EMPTY)
    processor_class: str | None = None
    asks: bool = True
    template: bool = True
    begins: bool = True
    n_frames: int | None = None
    nested: bool = False
    several: bool = True
    needs: tuple[str, ...] = ()
    unbuildable: str | None = None

    @property
    def clip(self) -> str:
        """The placeholder of a video in a prompt."""
        if self.video is not None:
            return self.video
        return self.image.replace("image", "video").replace("IMAGE", "VIDEO")

    @property
    def obstacle(self) -> str | None:
        """Why nothing can be built here, or None."""
        missing = [module for module in self.needs if importlib.util.find_spec(module) is None]
        return f"it requires {', '.join(missing)}." if missing else self.unbuildable
