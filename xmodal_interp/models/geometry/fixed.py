"""Images of one size, cut into a grid of squares with one token each."""

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
"""``(processor, image, width, height) -> box``: the part of the image that the pixels show."""

Count = Callable[[Any, Any], int]
"""``(config, processor) -> number``."""


def kept_class_token(config: Any, _processor: Any) -> int:
    """Return 1 if the image features include the tower's class token (LLaVA), else 0."""
    return int(getattr(config, "vision_feature_select_strategy", "default") == "full")


def counted_class_token(_config: Any, processor: Any) -> int:
    """Return 1 if the processor counts a class token besides the patches, else 0."""
    return int(bool(getattr(processor, "num_additional_image_tokens", 0)))


@dataclass(frozen=True)
class FixedGrid:
    """Images resized, and cropped or padded, to one size, then cut into squares.

    Attributes:
        cell: Function that returns the side of a token's square, px of the resized image.
        show: Function that returns the part of the image that the resized pixels show.
        before: Number of tokens before those of the grid (class tokens), or a function for it.
        shift: How far up and left of its square a token's receptive field is centred, in squares.
        tower_before: Number of vision-tower positions before the patches, or a function for it.
            None if the tower reads windows, so that a position has no single patch.
    """

    cell: Count = patch_side
    show: Show = shown
    before: int | Count = 0
    shift: float = 0.0
    tower_before: int | Count | None = 0

    def __call__(
        self, processor: Any, config: Any, inputs: Mapping[str, Any], images: Sequence[Image.Image]
    ) -> list[ImageGrid]:
        """Return one grid per image."""
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
"""One token per patch; features and tower may have a class token, by configuration (LLaVA)."""


def squares(box: Box, width: int, height: int, side: int) -> Cells:
    """Cut pixels that show a box into whole squares, from the top left."""
    rows, cols = height // side, width // side
    x0, y0, x1, y1 = box
    right, bottom = x0 + (x1 - x0) * cols * side / width, y0 + (y1 - y0) * rows * side / height
    return rectangle(rows, cols, (x0, y0, right, bottom))
