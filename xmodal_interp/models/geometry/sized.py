"""Every image keeps its aspect, and the processor tells the size that it was resized to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from xmodal_interp.errors import GeometryError
from xmodal_interp.models.geometry.cells import image_grid, nowhere, rectangle
from xmodal_interp.models.geometry.grid import ImageGrid
from xmodal_interp.models.geometry.patches import patch_side, vision_of
from xmodal_interp.models.geometry.tiling import whole


@dataclass(frozen=True)
class PositionedPatches:
    """Patches that come with their column and row; squares of them give a token (Gemma 4).

    The sides are rounded down to whole squares, each for itself, so that the boxes fill the image
    exactly. The tower also reads padding, whose patches have no place.

    Attributes:
        merged: Whether the processor has merged the squares, so that each patch gives a token.
    """

    merged: bool = False

    def __call__(
        self, processor: Any, _config: Any, inputs: Mapping[str, Any], images: Sequence[Image.Image]
    ) -> list[ImageGrid]:
        """One grid per image."""
        block = 1 if self.merged else processor.image_processor.pooling_kernel_size
        grids = []
        for image, positions in zip(images, np.asarray(inputs["image_position_ids"]), strict=True):
            cols, rows = (positions.max(0) + 1).tolist()
            tokens = rectangle(rows // block, cols // block, whole(image))
            padding = nowhere(len(positions) - rows * cols)
            patches = rectangle(rows, cols, whole(image))
            grids.append(image_grid(image.size, [tokens], [patches, padding]))
        return grids


def sized_patches(
    _processor: Any, config: Any, inputs: Mapping[str, Any], images: Sequence[Image.Image]
) -> list[ImageGrid]:
    """Rows of tokens, each from a block of patches; the tower reads patch row by row (Pixtral).

    The sides are rounded up to whole blocks, each for itself, so that the boxes fill the image
    exactly. What stands between the rows in the sequence are no image tokens.
    """
    sizes = told_sizes(inputs, images)
    side, merge = patch_side(config), config.spatial_merge_size
    grids = []
    for image, (height, width) in zip(images, sizes, strict=True):
        rows, cols = height // side, width // side
        tokens = rectangle(rows // merge, cols // merge, whole(image))
        grids.append(image_grid(image.size, [tokens], [rectangle(rows, cols, whole(image))]))
    return grids


def told_sizes(inputs: Mapping[str, Any], images: Sequence[Image.Image]) -> list[tuple[int, int]]:
    """Height and width that each image was resized to, px, as the processor tells them.

    Raises:
        GeometryError: It does not tell one size per image.
    """
    sizes = np.asarray(inputs["image_sizes"]).reshape(-1, 2).tolist()
    if len(sizes) != len(images):
        raise GeometryError(
            f"The processor must return one of image_sizes per image. There are {len(images)} "
            f"images and {len(sizes)} sizes."
        )
    return [(height, width) for height, width in sizes]


def counted_patches(
    _processor: Any, config: Any, inputs: Mapping[str, Any], images: Sequence[Image.Image]
) -> list[ImageGrid]:
    """Rows of tokens, each from a block of patches, whose rows and columns are told (Nemotron).

    The sides are rounded to whole blocks, each for itself. The tower reads class tokens and
    registers before the patches, and these row by row.
    """
    counts = np.asarray(inputs["image_grid_hw"]).reshape(-1, 2).tolist()
    if len(counts) != len(images):
        raise GeometryError(
            f"The processor must return one row of image_grid_hw per image. There are "
            f"{len(images)} images and {len(counts)} rows."
        )
    merge, before = round(1 / config.downsample_ratio), vision_of(config).num_summary_tokens
    grids = []
    for image, (rows, cols) in zip(images, counts, strict=True):
        tokens = rectangle(rows // merge, cols // merge, whole(image))
        tower = [nowhere(before), rectangle(rows, cols, whole(image))]
        grids.append(image_grid(image.size, [tokens], tower))
    return grids
