"""Tiles of one size, and behind them all of the image at another: two inputs, read one by one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from xmodal_interp.errors import GeometryError
from xmodal_interp.models.geometry.cells import (
    Box,
    Cells,
    image_grid,
    joined,
    nowhere,
    rectangle,
    shifted,
    with_breaks,
)
from xmodal_interp.models.geometry.fixed import Show
from xmodal_interp.models.geometry.grid import ImageGrid
from xmodal_interp.models.geometry.patches import patch_side
from xmodal_interp.models.geometry.replaying import fitted, setting
from xmodal_interp.models.geometry.tiles import on_tiles
from xmodal_interp.models.geometry.tiling import Layout, Tiling, even, own_function, whole

_MERGE, _SHIFT = 4, 1.5 / 4  # of two convolutions, each of kernel 3 and stride 2


@dataclass(frozen=True)
class SeparateTiles:
    """Tokens of the tiles, then of the whole image; two convolutions make cells of the patches.

    The vision tower reads the whole image first (``pixel_values``), and then the tiles
    (``pixel_values_local``). Cells look a little up and left of their squares of patches, but not
    over the edge of their tile.

    Attributes:
        layout: How an image is cut; None where it has no tiles.
        show: What the whole image shows.
        encoded: Whether an encoder behind the convolutions reads the cells; its positions are then
            those of the tower.
        class_token: Whether that encoder has a class token before the cells.
        queries: Whether it has learned queries behind the cells, one for each: these are the
            tokens, and have no place.
        by_rows: Whether tokens go row by row through all tiles side by side, with a token without a
            place behind each row, and behind each row of the whole image.
        behind: Tokens without a place behind all others.
    """

    layout: Layout
    show: Show
    encoded: bool = False
    class_token: bool = False
    queries: bool = False
    by_rows: bool = False
    behind: int = 0

    def __call__(
        self, processor: Any, config: Any, inputs: Mapping[str, Any], images: Sequence[Image.Image]
    ) -> list[ImageGrid]:
        """One grid per image.

        Raises:
            GeometryError: The settings do not lead to as many tiles as the processor returned.
        """
        tilings = [self.layout(processor, image) for image in images]
        _check_tiles(tilings, inputs)
        side = patch_side(config, processor)
        large = inputs["pixel_values"]
        height, width = large.shape[-2:]
        shapes = [
            (pixels.shape[-2] // side, pixels.shape[-1] // side)
            for pixels in (large, inputs.get("pixel_values_local", large))
        ]
        merged = [(rows // _MERGE, cols // _MERGE) for rows, cols in shapes]
        grids = []
        for image, tiling in zip(images, tilings, strict=True):
            box = self.show(processor, image, width, height)
            cells = [_looking(view) for view in _views(tiling, box, *merged)]
            tower = _views(tiling, box, *shapes)
            if self.encoded:
                tower = [self._encoded(view) for view in cells]
            grids.append(image_grid(image.size, self._tokens(cells), tower))
        return grids

    def _encoded(self, cells: Cells) -> Cells:
        """The positions of the encoder."""
        n_queries = len(cells) if self.queries else 0
        return joined([nowhere(int(self.class_token)), cells, nowhere(n_queries)])

    def _tokens(self, cells: Sequence[Cells]) -> list[Cells]:
        """The tokens in sequence order, from the cells of the whole image and of each tile."""
        views = [*cells[1:], cells[0]]
        if self.queries:
            views = [nowhere(len(view)) for view in views]
        elif self.by_rows:
            tiles = [_by_rows(joined(cells[1:]))] if len(cells) > 1 else []
            views = [*tiles, _by_rows(cells[0])]
        return [*views, nowhere(self.behind)]


def _check_tiles(tilings: Sequence[Tiling | None], inputs: Mapping[str, Any]) -> None:
    wanted = [0 if tiling is None else len(tiling.boxes) for tiling in tilings]
    returned = np.asarray(inputs["num_local_patches"]).reshape(-1).tolist()
    if wanted != returned:
        raise GeometryError(
            "The processor's settings must lead to the tiles it returned for each image. Replayed "
            f"were {wanted}, returned {returned}."
        )


def _views(
    tiling: Tiling | None, box: Box, of_whole: tuple[int, int], of_tile: tuple[int, int]
) -> list[Cells]:
    """The whole image, then each tile, cut into rows and columns."""
    tiles = [] if tiling is None else on_tiles(tiling, *of_tile)
    return [rectangle(*of_whole, box, thumbnail=tiling is not None), *tiles]


def _looking(cells: Cells) -> Cells:
    """The cells of a tile where the convolutions look, within the tile."""
    boxes = shifted(cells, _SHIFT).boxes
    low, high = cells.boxes[:, :2].min(0), cells.boxes[:, 2:].max(0)
    return replace(cells, boxes=np.clip(boxes, np.tile(low, 2), np.tile(high, 2)))


def _by_rows(cells: Cells) -> Cells:
    """Row by row, a token without a place behind each."""
    row, col = cells.places.T
    return with_breaks(cells[np.lexsort((col, row))], int(row.max()) + 1)


def windows(processor: Any, image: Image.Image) -> Tiling | None:
    """Square windows on an image whose sides are rounded to a number of them (Step-3.7)."""
    plan = processor.image_processor._plan_patches(
        *image.size, setting(processor, "size")["height"], setting(processor, "patch_size")
    )
    window, cols, rows = plan[2:5]
    return even(rows, cols, squared(processor, image, 0, 0)) if window else None


def squared(processor: Any, image: Image.Image, _width: int, _height: int) -> Box:
    """All of an image; a thin line of one is padded, right or below, to a square (Step-3.7)."""
    if not processor.image_processor._is_extreme_aspect(*image.size):
        return whole(image)
    side = float(max(image.size))
    return 0.0, 0.0, side, side


def large_pages(processor: Any, image: Image.Image) -> Tiling | None:
    """An image larger than a tile, resized onto the canvas of nearest aspect (DeepSeek-OCR 2)."""
    tile = setting(processor, "tile_size")
    if not setting(processor, "crop_to_patches", default=False) or max(image.size) <= tile:
        return None
    cols, rows = own_function(processor, "get_optimal_tiled_canvas")(
        (image.height, image.width),
        (tile, tile),
        setting(processor, "min_patches"),
        setting(processor, "max_patches"),
    )
    return even(rows, cols, whole(image))


def fitted_or_squeezed(processor: Any, image: Image.Image, width: int, height: int) -> Box:
    """Padded to a square; stretched to a small one where nothing is cut (Unlimited-OCR)."""
    cut = setting(processor, "crop_to_patches", default=False)
    if not cut and max(width, height) <= setting(processor, "maximum_pad_value"):
        return whole(image)
    return fitted(processor, image, width, height)
