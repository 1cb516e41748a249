"""Images cut into squares from the top left, with padding in the last of a row or column."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from transformers.image_utils import SizeDict

from xmodal_interp.models.geometry.cells import image_grid, in_blocks, nowhere, rectangle
from xmodal_interp.models.geometry.grid import ImageGrid
from xmodal_interp.models.geometry.patches import vision_of
from xmodal_interp.models.geometry.replaying import setting

Resized = Callable[[Any, Image.Image], tuple[int, int]]
"""``(processor, image) -> width, height``: the size of the image when it is cut."""


def as_it_is(_processor: Any, image: Image.Image) -> tuple[int, int]:
    """Return the size of an image that is not resized (Inkling 2)."""
    return image.size


def shrunk(processor: Any, image: Image.Image) -> tuple[int, int]:
    """Return the size of an image shrunk, aspect ratio kept, to a maximal size (Fuyu)."""
    if not setting(processor, "do_resize", default=False):
        return image.size
    size = setting(processor, "size")
    largest = SizeDict(height=size["height"], width=size["width"])
    blank = torch.empty(1, image.height, image.width, dtype=torch.float32)
    height, width = processor.image_processor.resize(blank, largest).shape[-2:]
    return width, height


def scaled(processor: Any, image: Image.Image) -> tuple[int, int]:
    """Return the size of an image scaled by a factor, up to a maximal longest edge (Inkling)."""
    fraction = setting(processor, "rescale_image_frac")
    if fraction is None:
        return image.size
    longest = max(image.size)
    wanted = longest * fraction
    largest = setting(processor, "rescale_image_max_upscaled_long_edge")
    if largest is not None:
        wanted = min(wanted, max(largest, longest))
    ratio = wanted / longest
    width, height = (math.floor(length * ratio + 0.5) for length in image.size)
    return width, height


@dataclass(frozen=True)
class PaddedSquares:
    """Squares of pixels with one token each, row by row; the aspect ratio is kept.

    Attributes:
        square: Setting of the image processor that holds the height and width of a square.
        resized: Function that returns the size of the image when it is cut.
        spare_column: Whether a column of padding is added even if the squares fill the width.
        merged: Whether a vision tower reads each square as a block of patches, after a class token.
            If not, there is no tower: each square is projected to a token.
    """

    square: str = "size"
    resized: Resized = as_it_is
    spare_column: bool = False
    merged: bool = False

    def __call__(
        self, processor: Any, config: Any, _inputs: Mapping[str, Any], images: Sequence[Image.Image]
    ) -> list[ImageGrid]:
        """Return one grid per image."""
        square = setting(processor, self.square)
        grids = []
        for image in images:
            width, height = self.resized(processor, image)
            rows = math.ceil(height / square["height"])
            cols = math.ceil(width / square["width"])
            if self.spare_column:
                cols = width // square["width"] + 1
            right = cols * square["width"] * image.width / width
            bottom = rows * square["height"] * image.height / height
            tower = []
            if self.merged:
                merge = vision_of(config).spatial_merge_size
                patches = rectangle(rows * merge, cols * merge, (0.0, 0.0, right, bottom))
                tower = [nowhere(1), in_blocks(patches, cols * merge, merge)]
            tokens = rectangle(rows, cols, (0.0, 0.0, right, bottom))
            grids.append(image_grid(image.size, [tokens], tower))
        return grids
