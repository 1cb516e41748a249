"""Tiles of one size, then the whole image at another size, as two inputs of the tower."""

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

_MERGE, _SHIFT = 4, 1.5 / 4  # two convolutions with kernel 3 and stride 2


@dataclass(frozen=True)
class SeparateTiles:
    """Tokens of the tiles, then of the whole image; two convolutions merge patches into cells.

    The vision tower reads the whole image first (``pixel_values``), then the tiles
    (``pixel_values_local``). The receptive field of a cell is centred slightly up and left of its
    block of patches, within its tile.

    Attributes:
        layout: Function that returns the tiles of an image, or None if it is not tiled.
        show: Function that returns the part of the image that the whole view shows.
        encoded: Whether an encoder after the convolutions reads the cells. Its positions then are
            the positions of the tower.
        class_token: Whether that encoder has a class token before the cells.
        queries: Whether that encoder has one learned query per cell, after the cells. The queries
            then are the tokens, and are outside the grid.
        by_rows: Whether tokens are ordered row by row over all tiles side by side. Each row, also
            of the whole image, then ends with a newline token.
        behind: Number of tokens outside the grid after all others.
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
        """Return one grid per image.

        Raises:
            GeometryError: The processor returned another number of tiles than its settings give.
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
        """Return the positions of the encoder."""
        n_queries = len(cells) if self.queries else 0
        return joined([nowhere(int(self.class_token)), cells, nowhere(n_queries)])

    def _tokens(self, cells: Sequence[Cells]) -> list[Cells]:
        """Return the tokens in sequence order, from the cells of the whole image and each tile."""
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
            f"The processor returned {returned} tiles for the images, but its settings lead to "
            f"{wanted}. Use the checkpoint's own processor settings."
        )


def _views(
    tiling: Tiling | None, box: Box, of_whole: tuple[int, int], of_tile: tuple[int, int]
) -> list[Cells]:
    """Return the cells of the whole image, then those of each tile."""
    tiles = [] if tiling is None else on_tiles(tiling, *of_tile)
    return [rectangle(*of_whole, box, thumbnail=tiling is not None), *tiles]


def _looking(cells: Cells) -> Cells:
    """Shift the boxes of a tile's cells to their receptive fields, within the tile."""
    boxes = shifted(cells, _SHIFT).boxes
    low, high = cells.boxes[:, :2].min(0), cells.boxes[:, 2:].max(0)
    return replace(cells, boxes=np.clip(boxes, np.tile(low, 2), np.tile(high, 2)))


def _by_rows(cells: Cells) -> Cells:
    """Order cells row by row, with a newline token after each row."""
    row, col = cells.places.T
    return with_breaks(cells[np.lexsort((col, row))], int(row.max()) + 1)


def windows(processor: Any, image: Image.Image) -> Tiling | None:
    """Return square tiles of an image whose sides are rounded to whole tiles (Step-3.7)."""
    plan = processor.image_processor._plan_patches(
        *image.size, setting(processor, "size")["height"], setting(processor, "patch_size")
    )
    window, cols, rows = plan[2:5]
    return even(rows, cols, squared(processor, image, 0, 0)) if window else None


def squared(processor: Any, image: Image.Image, _width: int, _height: int) -> Box:
    """Return the box of an image that is padded to a square if it is very narrow (Step-3.7)."""
    if not processor.image_processor._is_extreme_aspect(*image.size):
        return whole(image)
    side = float(max(image.size))
    return 0.0, 0.0, side, side


def large_pages(processor: Any, image: Image.Image) -> Tiling | None:
    """Return tiles of an image larger than one tile, on the closest canvas (DeepSeek-OCR 2)."""
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
    """Return the box of an image padded to a square, or stretched if small and not tiled."""
    cut = setting(processor, "crop_to_patches", default=False)
    if not cut and max(width, height) <= setting(processor, "maximum_pad_value"):
        return whole(image)
    return fitted(processor, image, width, height)
