"""Types whose parts may be of several kinds: the configuration chooses the rule."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from xmodal_interp.models.geometry.grid import ImageGrid, Rule, unplaced


@dataclass(frozen=True)
class Chosen:
    """One of several rules; images without places where there is none.

    Attributes:
        by: What of a configuration chooses: the type of the encoder, whether there is a resampler.
        rules: The rules, by what chooses them.
        reason: Why there is no place without a rule; ``{}`` is what ``by`` returned.
    """

    by: Callable[[Any], Any]
    rules: Mapping[Any, Rule]
    reason: str = "There is no rule for {!r}."

    def __call__(
        self, processor: Any, config: Any, inputs: Mapping[str, Any], images: Sequence[Image.Image]
    ) -> list[ImageGrid]:
        """One grid per image."""
        kind = self.by(config)
        if kind in self.rules:
            return self.rules[kind](processor, config, inputs, images)
        return [unplaced(image.size, 0, self.reason.format(kind)) for image in images]
