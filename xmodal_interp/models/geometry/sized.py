"""Images that keep their aspect ratio; the processor returns the resized size of each."""

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
    """Patches with column and row from the processor; blocks of them give a token (Gemma 4).

    Each side is rounded down to whole blocks independently, so the boxes fill the image exactly.
    The tower also reads padding patches, which are outside the grid.

    Attributes:
        merged: Whether the processor has already merged the blocks, so each patch gives a token.
    """

    merged: bool = False

    def __call__(
        self, processor: Any, _config: Any, inputs: Mapping[str, Any], images: Sequence[Image.Image]
    ) -> list[ImageGrid]:
        """Return one grid per image."""
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
    """Place rows of tokens, each from a block of patches; the tower is in raster order (Pixtral).

    Each side is rounded up to whole blocks independently, so the boxes fill the image exactly.
    Tokens between the rows in the sequence are not image tokens.
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
    """Return the height and width that each image was resized to, px, from ``image_sizes``.

    Raises:
        GeometryError: The processor did not return one size per image.
    """
    sizes = np.asarray(inputs["image_sizes"]).reshape(-1, 2).tolist()
    if len(sizes) != len(images):
        raise GeometryError(
            f"The processor returned {len(sizes)} image_sizes for {len(images)} images; it must "
            "return one per image."
        )
    return [(height, width) for height, width in sizes]


def counted_patches(
    _processor: Any, config: Any, inputs: Mapping[str, Any], images: Sequence[Image.Image]
) -> list[ImageGrid]:
    """Place rows of tokens, each from a block of patches, by ``image_grid_hw`` (Nemotron).

    Each side is rounded to whole blocks independently. The tower reads class tokens and registers,
    then the patches row by row.
    """
    counts = np.asarray(inputs["image_grid_hw"]).reshape(-1, 2).tolist()
    if len(counts) != len(images):
        raise GeometryError(
            f"The processor returned {len(counts)} rows of image_grid_hw for {len(images)} images; "
            "it must return one per image."
        )
    merge, before = round(1 / config.downsample_ratio), vision_of(config).num_summary_tokens
    grids = []
    for image, (rows, cols) in zip(images, counts, strict=True):
        tokens = rectangle(rows // merge, cols // merge, whole(image))
        tower = [nowhere(before), rectangle(rows, cols, whole(image))]
        grids.append(image_grid(image.size, [tokens], tower))
    return grids
