"""The rule for AnyRes images (LLaVA-NeXT, LLaVA-OneVision).

The tokens are those of a thumbnail, then those of the image on a canvas of tiles, without padding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from PIL import Image
from transformers.image_processing_utils import select_best_resolution

from xmodal_interp.models.geometry.cells import Cells, image_grid, nowhere, rectangle, with_breaks
from xmodal_interp.models.geometry.grid import Box, ImageGrid, raster
from xmodal_interp.models.geometry.processor_steps import whole


def anyres_tiles(
    processor: Any, config: Any, inputs: Mapping[str, Any], images: Sequence[Image.Image]
) -> list[ImageGrid]:
    """Place the thumbnail's tokens, then those of the image row by row, each row with a newline.

    The image is resized into the centre of the best fitting canvas, and the canvas is cut into
    tiles. Rows or columns of tokens on padding are dropped in pairs, one at each end, so the
    outermost cells may extend beyond the image. A very tall image may lose all columns, so that
    only newline tokens are left; a very wide image may lose all tokens. If LLaVA-OneVision
    downsamples the features (``anyres_max_N``), each token is a cell of the smaller grid, and the
    bilinear filter also reads neighbouring cells. If a prompt has several images, LLaVA-OneVision
    pads each to a square and does not tile it.
    """
    patches = config.vision_config.image_size // config.vision_config.patch_size
    side = int(patches * Fraction(getattr(config, "downsample_rate", None) or 1))
    limit = getattr(config, "vision_aspect_ratio", None)
    largest = None if limit is None else int(limit.removeprefix("anyres_max_"))
    has_class = bool(getattr(processor, "num_additional_image_tokens", 0))
    grids = []
    for image, untiled in zip(images, _read_whole(inputs, len(images)), strict=True):
        if untiled:
            box = _padded_to_square(image)
            tokens = [rectangle(side, side, box), nowhere(1)]
            tower = [rectangle(patches, patches, box)]
        else:
            box, (tile_rows, tile_cols) = _canvas(config, image)
            everything = whole(image)
            canvas = _tiled(tile_rows, tile_cols, side, box)
            fine, shape = _unpadded(canvas, (tile_rows * side, tile_cols * side), image)
            fine, rows = _shrunk(fine, shape, side, largest)
            tokens = [rectangle(side, side, everything, thumbnail=True), with_breaks(fine, rows)]
            all_patches = _tiled(tile_rows, tile_cols, patches, box)
            tower = [
                rectangle(patches, patches, everything, thumbnail=True),
                *(all_patches[all_patches.tiles == i] for i in range(tile_rows * tile_cols)),
            ]
        if has_class:
            tower = [part for tile in tower for part in (nowhere(1), tile)]
        grids.append(image_grid(image.size, tokens, tower))
    return grids


def _read_whole(inputs: Mapping[str, Any], n_images: int) -> list[bool]:
    """Return, for each image, whether it is encoded whole because its prompt has several images."""
    counts = inputs.get("batch_num_images")
    if counts is None:
        return [False] * n_images
    return [n > 1 for n in np.asarray(counts).reshape(-1).tolist() for _ in range(n)]


def _padded_to_square(image: Image.Image) -> Box:
    side = max(image.size)
    x0, y0 = -float((side - image.width) // 2), -float((side - image.height) // 2)
    return x0, y0, x0 + side, y0 + side


def _canvas(config: Any, image: Image.Image) -> tuple[Box, tuple[int, int]]:
    """Return the box of the canvas in pixels of the image, and its rows and columns of tiles."""
    width, height = image.size
    tile = config.vision_config.image_size
    canvas_h, canvas_w = select_best_resolution((height, width), config.image_grid_pinpoints)
    scale_w, scale_h = canvas_w / width, canvas_h / height
    if scale_w < scale_h:
        new_w, new_h = canvas_w, min(math.ceil(height * scale_w), canvas_h)
    else:
        new_w, new_h = min(math.ceil(width * scale_h), canvas_w), canvas_h
    per_x, per_y = width / new_w, height / new_h
    x0, y0 = -((canvas_w - new_w) // 2) * per_x, -((canvas_h - new_h) // 2) * per_y
    box = (x0, y0, x0 + canvas_w * per_x, y0 + canvas_h * per_y)
    return box, (canvas_h // tile, canvas_w // tile)


def _tiled(tile_rows: int, tile_cols: int, side: int, box: Box) -> Cells:
    """Return the cells of the whole canvas row by row, each with its tile."""
    cells = rectangle(tile_rows * side, tile_cols * side, box)
    row, col = cells.places.T // side
    return Cells(cells.places, cells.boxes, row * tile_cols + col, cells.of_thumbnail)


def _unpadded(
    cells: Cells, shape: tuple[int, int], image: Image.Image
) -> tuple[Cells, tuple[int, int]]:
    """Drop the cells on padding; return the others, with the number of rows and columns."""
    rows, cols = shape
    cut_rows = cut_cols = 0
    if image.width / image.height > cols / rows:
        cut_rows = (rows - int(round(image.height * (cols / image.width), 7))) // 2
    else:
        cut_cols = (cols - int(round(image.width * (rows / image.height), 7))) // 2
    row, col = cells.places.T
    kept = cells[
        (row >= cut_rows) & (row < rows - cut_rows) & (col >= cut_cols) & (col < cols - cut_cols)
    ]
    moved = kept.places - np.array([cut_rows, cut_cols])
    left = Cells(moved, kept.boxes, kept.tiles, kept.of_thumbnail)
    return left, (rows - 2 * cut_rows, cols - 2 * cut_cols)


def _shrunk(
    cells: Cells, shape: tuple[int, int], side: int, largest: int | None
) -> tuple[Cells, int]:
    """Return a smaller grid of cells if there are too many, and its number of rows."""
    rows, cols = shape
    ratio = 0.0 if largest is None else math.sqrt(rows * cols / (largest * side**2))
    if ratio <= 1.1:  # the threshold of LLaVA-OneVision
        return cells, rows
    new_rows, new_cols = int(rows // ratio), int(cols // ratio)
    box = (*cells.boxes[0, :2].tolist(), *cells.boxes[-1, 2:].tolist())
    fewer = rectangle(new_rows, new_cols, box)
    middle = (raster(new_rows, new_cols) + 0.5) * [rows / new_rows, cols / new_cols]
    row, col = middle.astype(int).T
    tiles = cells.tiles[row * cols + col]
    return Cells(fewer.places, fewer.boxes, tiles, fewer.of_thumbnail), new_rows
