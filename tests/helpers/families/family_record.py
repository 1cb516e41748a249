"""The record of one model type: its processor, its tiny model, and what tests expect of both."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

EMPTY: Mapping[str, Any] = MappingProxyType({})


class Token(str):
    """A token that is replaced by its id in a configuration."""

    __slots__ = ()


@dataclass(frozen=True)
class Record:
    """One model type: the settings of its processor, of a tiny model that agrees with it, and more.

    Attributes:
        model_type: The key of transformers' mapping of image-text-to-text models; for dual
            encoders, a name.
        note: What the processor does with an image, and the settings that control it.
        image: The placeholder of an image that a user writes into a prompt; may be empty.
        video: The placeholder of a video; by default that of an image with "image" replaced by
            "video".
        sound: The placeholder of a sound in a prompt; empty if tests do not pass sounds.
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
        given: Model inputs for types without a real processor. A tuple is the shape of random
            numbers, a list holds the values.
        config_type: The model type of the configuration, if it is not ``model_type``.
        model_class: The model class, if it is not that of the mapping.
        generate: Further arguments of ``generate``.
        others: Functions of a model and its inputs, for attention that neither the forward nor
            ``generate`` runs.
        even: Modules whose attention is uniform by construction, because their keys are equal.
        idle: Suffixes of module names whose attention output the architecture does not use.
        not_square: Self-attention with more or fewer keys than queries, and cross-attention with as
            many: patterns of module names, with the reason.
        no_video: The error that this version of transformers raises for videos.
        processor_class: The processor class that checkpoints name, if transformers registers none.
        asks: Whether a user writes a prompt.
        template: Whether the processor has a chat template.
        begins: Whether the tokenizer puts the beginning-of-sequence token before every text.
        n_frames: Number of frames per clip, if the processor takes clips instead of images.
        nested: Whether the processor takes a separate list of images for each prompt.
        several: Whether one prompt may contain several images.
        alike: What must have one shape in a batch: ``"images"`` (the same number of tiles),
            ``"videos"`` (the same number of frames).
        needs: Modules that building requires besides the project's dependencies.
        unbuildable: Why there is no real processor, or no model that runs on its outputs.
    """

    model_type: str
    note: str = ""
    image: str = "<image>"
    video: str | None = None
    sound: str = ""
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
    given: Mapping[str, Any] = field(default_factory=lambda: EMPTY)
    config_type: str | None = None
    model_class: str | None = None
    generate: Mapping[str, Any] = field(default_factory=lambda: EMPTY)
    others: tuple[Callable[[Any, dict[str, Any]], Any], ...] = ()
    even: tuple[str, ...] = ()
    idle: tuple[str, ...] = ()
    not_square: Mapping[str, str] = field(default_factory=lambda: EMPTY)
    no_video: str = ""
    processor_class: str | None = None
    asks: bool = True
    template: bool = True
    begins: bool = True
    n_frames: int | None = None
    nested: bool = False
    several: bool = True
    alike: tuple[str, ...] = ()
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
