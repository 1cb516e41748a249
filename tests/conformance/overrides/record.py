"""What the generic rules cannot know about one model type."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Record:
    """What is special about one model type.

    Attributes:
        model_type: The model type, where the record's name is another.
        model_class: Name of the class, where it is not the one that its mapping chooses.
        config: Values of config fields that win over the rules, nested for sub-configs.
        pixels: Name of the layout of its images in ``pictures``; if not given, the signature of its
            forward tells packed patches from square images.
        prompt: Name of the way it joins text and image, in ``prompts``.
        extras: Names of what else it takes, in ``extras``.
        methods: Names of what else it offers that attends, in ``methods``.
        images_per_row: How many images each row of the batch holds.
        side: Side of an image in pixels, where the config doesn't say it.
        image_token: The placeholder, where the config doesn't say it.
        tokens_per_image: How many placeholders an image has (or each of them), where the model
            doesn't say it.
        generate: What ``generate`` takes besides the inputs.
        even: Modules whose attention is uniform by construction, since their keys are equal.
        idle: Ends of names of modules that attend, but whose result the architecture drops.
        generates: Whether it can generate text from these inputs.
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
