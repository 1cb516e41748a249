"""Every image becomes pixels of one size, and these a grid of squares, each of them a token."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from xmodal_interp.models.geometry.cells import (
    Box,
    Cells,
    image_grid,
    nowhere,
    rectangle,
    shifted,
)
from xmodal_interp.models.geometry.grid import ImageGrid
from xmodal_interp.models.geometry.patches import patch_side
from xmodal_interp.models.geometry.replaying import shown

Show = Callable[[Any, Image.Image, int, int], Box]
"""``(processor, image, width, height) -> box``: what an image's pixels show of it."""

Count = Callable[[Any, Any], int]
"""``(config, processor) -> number``."""


def kept_class_token(config: Any, _processor: Any) -> int:
    """One where the features keep the tower's class token, as a LLaVA's configuration says."""
    return int(getattr(config, "vision_feature_select_strategy", "default") == "full")


def counted_class_token(_config: Any, processor: Any) -> int:
    """One where the processor counts a class token beside the patches."""
    return int(bool(getattr(processor, "num_additional_image_tokens", 0)))


@dataclass(frozen=True)
class FixedGrid:
    """Every image is resized, and cropped or padded, to the same size, then cut into squares.

    Attributes:
        cell: The side of a token's square, px of the resized image.
        show: What the resized image shows.
        before: How many tokens without a place the model puts before those of the grid, or what
            says so.
        shift: How far up and left of its square a token looks, in squares.
        tower_before: How many positions without a place the vision tower has before the patches,
            or what says so; None where it reads them window by window, so that no position has one
            patch.
    """

    cell: Count = patch_side
    show: Show = shown
    before: int | Count = 0
    shift: float = 0.0
    tower_before: int | Count | None = 0

    def __call__(
        self, processor: Any, config: Any, inputs: Mapping[str, Any], images: Sequence[Image.Image]
    ) -> list[ImageGrid]:
        """One grid per image."""
        pixels = inputs.get("pixel_values_images", inputs.get("pixel_values"))
        height, width = pixels.shape[-2:]
        side = self.cell(config, processor)
        grids = []
        for image in images:
            cells = squares(self.show(processor, image, width, height), width, height, side)
            cells = shifted(cells, self.shift)
            tokens = [nowhere(_number(self.before, config, processor)), cells]
            tower = []
            if self.tower_before is not None:
                tower = [nowhere(_number(self.tower_before, config, processor)), cells]
            grids.append(image_grid(image.size, tokens, tower))
        return grids


def _number(told: int | Count, config: Any, processor: Any) -> int:
    return told if isinstance(told, int) else told(config, processor)


fixed_grid = FixedGrid(before=kept_class_token, tower_before=counted_class_token)
"""Of patches; features and tower may have a class token, as is configured (LLaVA)."""


def squares(box: Box, width: int, height: int, side: int) -> Cells:
    """Whole squares from the top left of pixels that show a box."""
    rows, cols = height // side, width // side
    x0, y0, x1, y1 = box
    right, bottom = x0 + (x1 - x0) * cols * side / width, y0 + (y1 - y0) * rows * side / height
    return rectangle(rows, cols, (x0, y0, right, bottom))
