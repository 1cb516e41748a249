"""Rules for images that keep their aspect ratio, with one token per block of patches.

The processor returns the number of patches of each image (Qwen2-VL, Nemotron), the column and row
of each patch (Gemma 4), or the size to which each image was resized (Pixtral).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import floor
from typing import Any

import numpy as np
from PIL import Image

from xmodal_interp.models.geometry.cells import (
    image_grid,
    in_blocks,
    joined,
    nowhere,
    patch_side,
    rectangle,
    vision_of,
    with_breaks,
)
from xmodal_interp.models.geometry.grid import Box, ImageGrid
from xmodal_interp.models.geometry.processor_steps import (
    ImageOrVideo,
    check_count,
    own_function,
    setting,
    settings_for,
    whole,
)
from xmodal_interp.models.media import Video

Content = Callable[[Any, Any, int, int], tuple[int, int]]
"""``(processor, picture, width, height) -> width, height``: the pixels that are not padding."""


@dataclass(frozen=True)
class MergedPatches:
    """Blocks of patches with one token each; the processor returns the grid of patches.

    The vision tower reads the patches block by block. Unless the processor pads, it rounds each
    side of the image to whole blocks independently, so the boxes fill the image exactly.

    Attributes:
        content: Function that returns the size of the image at the top left of padded pixels. None
            if there is no padding.
        by_rows: Whether the vision tower reads its patches row by row instead of block by block.
        framed: Whether a marker token is before the first row, after each row, and at the end.
    """

    content: Content | None = None
    by_rows: bool = False
    framed: bool = False

    def __call__(
        self, processor: Any, _config: Any, inputs: Mapping[str, Any], images: Sequence[Image.Image]
    ) -> list[ImageGrid]:
        """Return one grid per image."""
        grid_thw = inputs.get("image_grid_thw")
        n_rows = 0 if grid_thw is None else len(grid_thw)
        check_count("rows of image_grid_thw", n_rows, images)
        merge = processor.image_processor.merge_size
        grids = []
        for image, (_, rows, cols) in zip(images, np.asarray(grid_thw).tolist(), strict=True):
            box = content_box(processor, image, self.content, rows, cols)
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


def content_box(
    processor: Any, picture: ImageOrVideo, content: Content | None, rows: int, cols: int
) -> Box:
    """Return the box of all patches of an image or of a frame, of which a part may be padding."""
    x0, y0, x1, y1 = whole(picture)
    if content is None:
        return x0, y0, x1, y1
    side = settings_for(processor, picture).patch_size
    width, height = cols * side, rows * side
    content_w, content_h = content(processor, picture, width, height)
    return x0, y0, x1 * width / content_w, y1 * height / content_h


merged_patches = MergedPatches()


def within_patches(
    processor: Any, image: Image.Image, _width: int, _height: int
) -> tuple[int, int]:
    """Return the size of an image shrunk to at most a number of patches, then padded (Kimi)."""
    (height, width), _ = own_function(processor, "navit_resize")(
        height=image.height,
        width=image.width,
        patch_size=setting(processor, "patch_size"),
        merge_kernel_size=setting(processor, "merge_size"),
        max_patches=setting(processor, "max_patches"),
        max_size_per_side=setting(processor, "size")["max_height"],
    )
    return width, height


def within_tokens(
    processor: Any, picture: ImageOrVideo, width: int, height: int
) -> tuple[int, int]:
    """Return the size of a picture enlarged only if it has too few tokens, then padded (GLM-5).

    The frames of a video are enlarged only if all of them together have too few tokens. The frames
    of an image are those that are merged into one token.
    """
    settings = settings_for(processor, picture)
    n_frames = len(picture) if isinstance(picture, Video) else settings.temporal_patch_size
    w, h = picture.size
    scale = min(height / h, width / w)
    side = settings.patch_size * settings.merge_size * settings.patch_expand_factor
    fewest = settings.min_image_tokens * settings.temporal_patch_size * side**2
    if n_frames * h * w >= fewest:
        scale = min(1.0, scale)
    return max(1, min(width, floor(w * scale))), max(1, min(height, floor(h * scale)))


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
    Tokens between the rows in the sequence are not image tokens. Without a language model, each
    patch is a token.
    """
    sizes = reported_sizes(inputs, images)
    side, merge = patch_side(config), getattr(config, "spatial_merge_size", 1)
    grids = []
    for image, (height, width) in zip(images, sizes, strict=True):
        rows, cols = height // side, width // side
        tokens = rectangle(rows // merge, cols // merge, whole(image))
        grids.append(image_grid(image.size, [tokens], [rectangle(rows, cols, whole(image))]))
    return grids


def reported_sizes(
    inputs: Mapping[str, Any], images: Sequence[Image.Image]
) -> list[tuple[int, int]]:
    """Return the height and width that each image was resized to, px, from ``image_sizes``.

    Raises:
        GeometryError: The processor did not return one size per image.
    """
    sizes = np.asarray(inputs["image_sizes"]).reshape(-1, 2).tolist()
    check_count("image_sizes", len(sizes), images)
    return [(height, width) for height, width in sizes]


def counted_patches(
    _processor: Any, config: Any, inputs: Mapping[str, Any], images: Sequence[Image.Image]
) -> list[ImageGrid]:
    """Place rows of tokens, each from a block of patches, by ``image_grid_hw`` (Nemotron).

    Each side is rounded to whole blocks independently. The tower reads class tokens and registers,
    then the patches row by row.
    """
    counts = np.asarray(inputs["image_grid_hw"]).reshape(-1, 2).tolist()
    check_count("rows of image_grid_hw", len(counts), images)
    merge, before = round(1 / config.downsample_ratio), vision_of(config).num_summary_tokens
    grids = []
    for image, (rows, cols) in zip(images, counts, strict=True):
        tokens = rectangle(rows // merge, cols // merge, whole(image))
        tower = [nowhere(before), rectangle(rows, cols, whole(image))]
        grids.append(image_grid(image.size, [tokens], tower))
    return grids
