"""Every image keeps its aspect; blocks of patches are merged into one token (Qwen2-VL and kin)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import floor
from typing import Any

import numpy as np
from PIL import Image

from xmodal_interp.errors import GeometryError
from xmodal_interp.models.geometry.cells import (
    Box,
    image_grid,
    in_blocks,
    joined,
    nowhere,
    rectangle,
    with_breaks,
)
from xmodal_interp.models.geometry.grid import ImageGrid
from xmodal_interp.models.geometry.replaying import setting
from xmodal_interp.models.geometry.tiling import own_function, whole

Content = Callable[[Any, Image.Image, int, int], tuple[int, int]]
"""``(processor, image, width, height) -> width, height``: which of the pixels are the image's."""


@dataclass(frozen=True)
class MergedPatches:
    """Squares of patches give one token each; the processor tells the grid of patches.

    The vision tower reads the patches square by square. Unless the processor pads, it rounds the
    sides of the image to whole squares, each for itself, so that the boxes fill the image exactly.

    Attributes:
        content: Which part of the pixels, from the top left, is the image, where the rest is
            padding. None where there is none.
        by_rows: Whether the vision tower reads its patches row by row instead.
        framed: Whether a token without a place stands before all others, one behind each row, and
            one behind all.
    """

    content: Content | None = None
    by_rows: bool = False
    framed: bool = False

    def __call__(
        self, processor: Any, _config: Any, inputs: Mapping[str, Any], images: Sequence[Image.Image]
    ) -> list[ImageGrid]:
        """One grid per image."""
        grid_thw = inputs.get("image_grid_thw")
        if grid_thw is None or len(grid_thw) != len(images):
            raise GeometryError(
                "The processor must return one row of image_grid_thw per image. There are "
                f"{len(images)} images and "
                f"{0 if grid_thw is None else len(grid_thw)} rows."
            )
        merge = processor.image_processor.merge_size
        grids = []
        for image, (_, rows, cols) in zip(images, np.asarray(grid_thw).tolist(), strict=True):
            box = self._box(processor, image, rows, cols)
            patches = rectangle(rows, cols, box)
            tokens = rectangle(rows // merge, cols // merge, box)
            if self.framed:
                tokens = joined([nowhere(1), with_breaks(tokens, rows // merge), nowhere(1)])
            grids.append(
                image_grid(
                    image.size,
                    [tokens],
                    [patches if self.by_rows else in_blocks(patches, cols, merge)],
                )
            )
        return grids

    def _box(self, processor: Any, image: Image.Image, rows: int, cols: int) -> Box:
        """What all of the patches show."""
        if self.content is None:
            return whole(image)
        side = processor.image_processor.patch_size
        width, height = cols * side, rows * side
        content_w, content_h = self.content(processor, image, width, height)
        return 0.0, 0.0, image.width * width / content_w, image.height * height / content_h


merged_patches = MergedPatches()


def within_patches(
    processor: Any, image: Image.Image, _width: int, _height: int
) -> tuple[int, int]:
    """An image that is only ever made smaller, to a number of patches, then padded (Kimi)."""
    (height, width), _ = own_function(processor, "navit_resize")(
        height=image.height,
        width=image.width,
        patch_size=setting(processor, "patch_size"),
        merge_kernel_size=setting(processor, "merge_size"),
        max_patches=setting(processor, "max_patches"),
        max_size_per_side=setting(processor, "size")["max_height"],
    )
    return width, height


def within_tokens(processor: Any, image: Image.Image, width: int, height: int) -> tuple[int, int]:
    """An image that is made larger only where it has too few tokens, then padded (GLM-5)."""
    settings = processor.image_processor
    return size_within_tokens(settings, image.size, settings.temporal_patch_size, width, height)


def size_within_tokens(
    settings: Any, size: tuple[int, int], n_frames: int, width: int, height: int
) -> tuple[int, int]:
    """Width and height of a picture in the padded pixels, px.

    It is made larger only where all of its frames have too few tokens.

    Args:
        settings: The processor of images or of videos.
        size: Width and height of the picture, px.
        n_frames: How many frames there are; an image counts as those that give a token.
        width: Width of the padded pixels.
        height: Height of them.
    """
    w, h = size
    scale = min(height / h, width / w)
    side = settings.patch_size * settings.merge_size * settings.patch_expand_factor
    fewest = settings.min_image_tokens * settings.temporal_patch_size * side**2
    if n_frames * h * w >= fewest:
        scale = min(1.0, scale)
    return max(1, min(width, floor(w * scale))), max(1, min(height, floor(h * scale)))
