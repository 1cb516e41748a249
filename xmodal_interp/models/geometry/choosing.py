"""Choose a rule by the configuration, for types with exchangeable parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from xmodal_interp.models.geometry.grid import ImageGrid, Rule, unplaced


@dataclass(frozen=True)
class Chosen:
    """Applies one of several rules; without a rule, tokens get no rows and columns.

    Attributes:
        by: Function of the configuration that returns a key of ``rules``, such as the type of the
            encoder.
        rules: The rules by key.
        reason: The reason given if no rule has the key; ``{}`` is replaced by the key.
    """

    by: Callable[[Any], Any]
    rules: Mapping[Any, Rule]
    reason: str = "There is no geometry rule for {!r}."

    def __call__(
        self, processor: Any, config: Any, inputs: Mapping[str, Any], images: Sequence[Image.Image]
    ) -> list[ImageGrid]:
        """Return one grid per image."""
        kind = self.by(config)
        if kind in self.rules:
            return self.rules[kind](processor, config, inputs, images)
        return [unplaced(image.size, 0, self.reason.format(kind)) for image in images]
