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
    joined,
    nowhere,
    rectangle,
    shifted,
)
from xmodal_interp.models.geometry.grid import ImageGrid
from xmodal_interp.models.geometry.patches import patch_side
from xmodal_interp.models.geometry.replaying import shown

Show = Callable[[Any, Image.Image, int, int], Box]
"""``(processor, image, width, height) -> box``: what an image's pixels show of it."""


@dataclass(frozen=True)
class FixedGrid:
    """Every image is resized, and cropped or padded, to the same size, then cut into squares.

    Attributes:
        cell: The side of a token's square, px of the resized image, from the configuration and the
            processor.
        show: What the resized image shows.
        before: How many tokens without a place the model puts before those of the grid.
        shift: How far up and left of its square a token looks, in squares.
        tower_before: How many positions without a place the vision tower has before the patches;
            None where it reads them window by window, so that no position has one patch.
    """

    cell: Callable[[Any, Any], int] = patch_side
    show: Show = shown
    before: int = 0
    shift: float = 0.0
    tower_before: int | None = 0

    def __call__(
        self, processor: Any, config: Any, inputs: Mapping[str, Any], images: Sequence[Image.Image]
    ) -> list[ImageGrid]:
        """One grid per image."""
        height, width = inputs["pixel_values"].shape[-2:]
        side = self.cell(config, processor)
        grids = []
        for image in images:
            cells = squares(self.show(processor, image, width, height), width, height, side)
            cells = shifted(cells, self.shift)
            tower = [] if self.tower_before is None else [nowhere(self.tower_before), cells]
            grids.append(image_grid(image.size, [nowhere(self.before), cells], tower))
        return grids


def fixed_grid(
    processor: Any, config: Any, inputs: Mapping[str, Any], images: Sequence[Image.Image]
) -> list[ImageGrid]:
    """Every image is resized and cropped to the same size, then cut into patches (LLaVA).

    The features may keep the tower's class token, which has no place.
    """
    pixels = inputs.get("pixel_values_images", inputs.get("pixel_values"))
    height, width = pixels.shape[-2:]
    side = patch_side(config)
    with_class = getattr(config, "vision_feature_select_strategy", "default") == "full"
    has_class = bool(getattr(processor, "num_additional_image_tokens", 0))
    grids = []
    for image in images:
        cells = squares(shown(processor, image, width, height), width, height, side)
        headed = joined([nowhere(1), cells])
        tokens, patches = headed if with_class else cells, headed if has_class else cells
        grids.append(image_grid(image.size, [tokens], [patches]))
    return grids


def squares(box: Box, width: int, height: int, side: int) -> Cells:
    """Whole squares from the top left of pixels that show a box."""
    rows, cols = height // side, width // side
    x0, y0, x1, y1 = box
    right, bottom = x0 + (x1 - x0) * cols * side / width, y0 + (y1 - y0) * rows * side / height
    return rectangle(rows, cols, (x0, y0, right, bottom))
