"""Tiles and a thumbnail whose rows and columns the processor returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from PIL import Image

from xmodal_interp.errors import GeometryError
from xmodal_interp.models.geometry.cells import Box, Cells, image_grid, nowhere, rectangle
from xmodal_interp.models.geometry.grid import ImageGrid
from xmodal_interp.models.geometry.replaying import setting, video_setting
from xmodal_interp.models.geometry.tiles import End, on_tiles
from xmodal_interp.models.geometry.tiling import Layout, Tiling, even, whole
from xmodal_interp.models.opening import Video

Shape = tuple[int, int]
"""Rows and columns."""


@dataclass(frozen=True)
class SizedTiles:
    """Tiles of one size, row by row, and a thumbnail of another size before or after them.

    Each side of the image is rounded to whole blocks of patches independently, for the tiles and
    for the thumbnail, so both fill the image exactly. The vision tower reads the patches of each
    view row by row.

    Attributes:
        layout: Function that returns the tiles of an image, or None if it is not tiled.
        sizes: Name of the input with the rows and columns of patches of each view, in order.
        block: Function of processor and configuration that returns the side of the block of patches
            that gives one token.
        thumbnail: Whether the thumbnail is first or last.
        padded: Whether the patches of each view are padded to a common length for the tower.
    """

    layout: Layout
    sizes: str
    block: Callable[[Any, Any], int]
    thumbnail: End
    padded: bool = False

    def __call__(
        self, processor: Any, config: Any, inputs: Mapping[str, Any], images: Sequence[Image.Image]
    ) -> list[ImageGrid]:
        """Return one grid per image.

        Raises:
            GeometryError: The number of sizes is not that of the tiles and thumbnails, or the tiles
                of an image differ in size.
        """
        tilings = [self.layout(processor, image) for image in images]
        counts = [self._count(processor, tiling) for tiling in tilings]
        shapes = [(rows, cols) for rows, cols in np.asarray(inputs[self.sizes]).tolist()]
        if sum(counts) != len(shapes):
            raise GeometryError(
                f"The processor returned {len(shapes)} {self.sizes}, but its settings lead to "
                f"{sum(counts)} tiles and thumbnails. Use the checkpoint's own processor settings."
            )
        block = self.block(processor, config)
        length = inputs["pixel_values"].shape[1] if self.padded else None
        grids, start = [], 0
        for image, tiling, count in zip(images, tilings, counts, strict=True):
            own = shapes[start : start + count]
            start += count
            tower = self._views(tiling, own, image)
            merged = [(rows // block, cols // block) for rows, cols in own]
            tokens = self._views(tiling, merged, image)
            if length is not None:
                tower = [part for view in tower for part in (view, nowhere(length - len(view)))]
            grids.append(image_grid(image.size, tokens, tower))
        return grids

    def _views(
        self, tiling: Tiling | None, shapes: Sequence[Shape], image: Image.Image
    ) -> list[Cells]:
        return sized_views(tiling, shapes, whole(image), self.thumbnail, told_by=self.sizes)

    def _count(self, processor: Any, tiling: Tiling | None) -> int:
        """Return the number of tiles of an image, thumbnail included."""
        if tiling is None or len(tiling.boxes) == 1:
            return 1
        return len(tiling.boxes) + bool(setting(processor, "use_thumbnail", default=True))


def sized_views(
    tiling: Tiling | None, shapes: Sequence[Shape], box: Box, thumbnail: End, *, told_by: str
) -> list[Cells]:
    """Return the cells of each tile of a picture and of its thumbnail, in sequence order.

    Args:
        tiling: The tiles of the picture; None if it is not tiled.
        shapes: Rows and columns of each tile and of the thumbnail, in sequence order.
        box: The box of the whole picture, px.
        thumbnail: Whether the thumbnail is first or last.
        told_by: Name of the input with the shapes, for messages.

    Raises:
        GeometryError: The tiles differ in rows or columns.
    """
    if tiling is None or len(shapes) == 1:
        return [rectangle(*shapes[0], box)]
    n_tiles = len(tiling.boxes)
    first = len(shapes) - n_tiles if thumbnail == "first" else 0
    of_tiles = set(shapes[first : first + n_tiles])
    if len(of_tiles) > 1:
        known = ", ".join(f"{rows} x {cols}" for rows, cols in sorted(of_tiles))
        raise GeometryError(
            f"The tiles of an image differ in rows and columns ({told_by}: {known}). Set the image "
            "processor to resize all tiles to one size."
        )
    parts = on_tiles(tiling, *of_tiles.pop())
    small = [
        rectangle(*shape, box, thumbnail=True)
        for shape in (*shapes[:first], *shapes[first + n_tiles :])
    ]
    return [*small, *parts] if thumbnail == "first" else [*parts, *small]


def large_on_canvas(processor: Any, image: Image.Image) -> Tiling | None:
    """Return tiles of an image with too many tokens, on the closest canvas (LFM2-VL)."""
    settings = processor.image_processor
    fewest, most = setting(processor, "min_tiles"), setting(processor, "max_tiles")
    if not setting(processor, "do_image_splitting", default=False) or fewest == most == 1:
        return None
    names = ("max_image_tokens", "encoder_patch_size", "downsample_factor", "max_pixels_tolerance")
    limits = {name: setting(processor, name) for name in names}
    if not settings._is_image_too_large(height=image.height, width=image.width, **limits):
        return None
    cols, rows, *_ = settings._get_grid_layout(
        image.height, image.width, fewest, most, setting(processor, "tile_size")
    )
    return even(rows, cols, whole(image))


def slices(processor: Any, image: Image.Image) -> Tiling | None:
    """Return slices of an image with more pixels than one slice holds (MiniCPM-V)."""
    return _sliced(processor.image_processor, partial(setting, processor), image.size)


def frame_slices(processor: Any, video: Video) -> Tiling | None:
    """Return slices of the frames of a video, by the settings of the video processor."""
    return _sliced(processor.video_processor, partial(video_setting, processor), video.size)


def _sliced(own: Any, told: Callable[..., Any], size: tuple[int, int]) -> Tiling | None:
    """Return the tiles of a picture, from the processor's function and settings."""
    if not told("slice_mode", default=False):
        return None
    width, height = size
    grid = own.get_sliced_grid((height, width), told("max_slice_nums"), told("scale_resolution"))
    if grid is None:
        return None
    rows, cols = grid
    return even(rows, cols, (0.0, 0.0, float(width), float(height)))


def slice_block(processor: Any, _config: Any) -> int:
    """Return the side of the block of patches that gives a token of a slice (MiniCPM-V)."""
    return _merged(setting(processor, "downsample_mode"))


def frame_slice_block(processor: Any) -> int:
    """Return the side of the block of patches that gives a token of a frame (MiniCPM-V)."""
    return _merged(video_setting(processor, "downsample_mode"))


def _merged(downsample_mode: str) -> int:
    return 2 if downsample_mode == "4x" else 4
