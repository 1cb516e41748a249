"""Exceptions of one model type to the generic rules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Record:
    """The exceptions of one model type.

    Attributes:
        model_type: The model type, if it differs from the record's name.
        model_class: Name of the model class, if it is not that of the mapping.
        config: Values of config fields that override the rules, nested for sub-configs.
        pixels: Name of the layout of images, a function in ``pictures``. By default, the signature
            of the forward decides between packed patches and square images.
        prompt: Name of the layout of prompts, a function in ``prompts``.
        extras: Names of further inputs, functions in ``extras``.
        methods: Names of further calls with attention, functions in ``methods``.
        images_per_row: Number of images in each row of the batch.
        side: Side of an image in pixels, if the config does not contain it.
        image_token: The placeholder id, if the config does not contain it.
        tokens_per_image: Number of placeholders per image (or of each image), if it cannot be
            computed by the model.
        generate: Further arguments of ``generate``.
        even: Modules whose attention is uniform by construction, because their keys are equal.
        idle: Suffixes of module names whose attention output the architecture does not use.
        generates: Whether the model can generate text from these inputs.
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    pixels: str | None = None
    prompt: str = "placeholders"
    extras: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()
    images_per_row: tuple[int, ...] = (1, 1)
    side: int | None = None
    image_token: int | None = None
    tokens_per_image: int | tuple[int, ...] | None = None
    generate: Mapping[str, Any] = field(default_factory=dict)
    even: tuple[str, ...] = ()
    idle: tuple[str, ...] = ()
    generates: bool = True
    model_type: str | None = None
    model_class: str | None = None
