"""What a tiny offline copy of one model type is made of."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

EMPTY: Mapping[str, Any] = MappingProxyType({})


class Token(str):
    """A token whose id goes into a configuration, where an id is wanted."""

    __slots__ = ()


@dataclass(frozen=True)
class Record:
    """One model type: the settings of its processor, and of a tiny model that agrees with it.

    Attributes:
        model_type: The key of transformers' mapping of image-text-to-text models.
        note: What the processor does with an image, and which settings say so.
        image: What a user writes into a prompt for one image; empty where nothing is written.
        video: What a user writes for one video, where it is not the same with video for image.
        tokens: Special tokens of the tokenizer, besides padding, beginning, end and unknown.
        words: Tokens that the tokenizer treats as ordinary words of its vocabulary; where there are
            any, a space leads every text.
        named: Special tokens that the tokenizer offers as attributes: attribute to token.
        images: Settings of the image processor; ``{"@": "ClassName"}`` chooses the class where
            transformers registers none.
        videos: Settings of the video processor, likewise.
        audio: Settings of the audio feature extractor, likewise.
        processor: Settings of the processor itself.
        call: Settings that this processor takes only when called.
        beside: What the model takes besides what its processor returns, as nested lists.
        config: Settings of the model's configuration over those of the generic tiny one, nested as
            the configuration is. A :class:`Token` stands for its id.
        processor_class: Where transformers registers none: the class that checkpoints name.
        asks: Whether a user writes a prompt at all.
        template: Whether users get a chat template.
        begins: Whether the tokenizer puts the beginning-of-sequence token before every text.
        n_frames: Where the processor takes clips for images: how many frames one has.
        nested: Whether the processor wants the images of each prompt in a list of their own.
        several: Whether one prompt may hold several images.
        needs: Modules, besides those that the project installs, without which nothing is built.
        unbuildable: Why there is no real processor, or no model that runs on its output.
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
        """What a user writes into a prompt for one video."""
        if self.video is not None:
            return self.video
        return self.image.replace("image", "video").replace("IMAGE", "VIDEO")

    @property
    def obstacle(self) -> str | None:
        """Why nothing can be built here, or None."""
        missing = [module for module in self.needs if importlib.util.find_spec(module) is None]
        return f"it needs {', '.join(missing)}." if missing else self.unbuildable
