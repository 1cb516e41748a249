"""Images that text attends to by cross-attention: image tokens are keys outside the sequence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from xmodal_interp.errors import GeometryError
from xmodal_interp.models.geometry.cells import image_grid, joined, nowhere, rectangle
from xmodal_interp.models.geometry.grid import ImageGrid, raster

_TOWER_MULTIPLE = 8  # the tower pads each tile to a multiple of it; it is a constant of the code


def aspect_ratio_tiles(
    _processor: Any, config: Any, inputs: Mapping[str, Any], images: Sequence[Image.Image]
) -> list[ImageGrid]:
    """Place images at the top left of a canvas of square tiles (Mllama).

    The keys of an image are ``max_num_tiles`` tiles, each a class token and its patches. Class
    tokens and unused tiles are outside the grid. Cells on the padding of the canvas have a row and
    column but no box. In the tower, each tile is followed by padding.
    """
    vision = config.vision_config
    tile, patch, max_tiles = vision.image_size, vision.patch_size, vision.max_num_tiles
    supported = [tuple(pair) for pair in vision.supported_aspect_ratios]
    ratio_ids = np.asarray(inputs["aspect_ratio_ids"]).reshape(-1)
    ratio_ids = ratio_ids[ratio_ids > 0]
    if len(ratio_ids) != len(images):
        raise GeometryError(
            f"The processor returned {len(ratio_ids)} aspect_ratio_ids for {len(images)} images; "
            "it must return one per image."
        )
    side = tile // patch
    grids = []
    for image, ratio_id in zip(images, ratio_ids.tolist(), strict=True):
        tile_rows, tile_cols = supported[ratio_id - 1]
        scale_x, scale_y = _scale_on_canvas(image, tile_rows * tile, tile_cols * tile, tile)
        width, height = tile / scale_x, tile / scale_y
        tiles = []
        for number, (row, col) in enumerate(raster(tile_rows, tile_cols).tolist()):
            box = (col * width, row * height, (col + 1) * width, (row + 1) * height)
            at = (row * side, col * side)
            tiles.append(joined([nowhere(1), rectangle(side, side, box, at=at, tile=number)]))
        tiles += [nowhere(side * side + 1)] * (max_tiles - len(tiles))
        padding = nowhere(-len(tiles[0]) % _TOWER_MULTIPLE)
        tower = [part for tile in tiles for part in (tile, padding)]
        grids.append(image_grid(image.size, tiles, tower))
    return grids


def _scale_on_canvas(
    image: Image.Image, canvas_height: int, canvas_width: int, tile: int
) -> tuple[float, float]:
    """Return the scale, in x and y, by which an image is resized to its canvas."""
    width, height = image.size
    target_width, target_height = (
        np.clip(width, tile, canvas_width),
        np.clip(height, tile, canvas_height),
    )
    if target_width / width < target_height / height:
        new = target_width, min(int(height * target_width / width) or 1, target_height)
    else:
        new = min(int(width * target_height / height) or 1, target_width), target_height
    return float(new[0] / width), float(new[1] / height)
