"""Where image tokens stand.

Rules from processor outputs to rows, columns and boxes in the original image.

A rule replays what the image processor did (resize, crop, tiling, merging) from the processor's own
settings and outputs, and returns one :class:`ImageGrid` per image. Several families share a rule;
nothing is ever guessed from a token count.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from PIL import Image

from xmodal_interp.errors import GeometryError

NOWHERE = -1  # the row and column of a token without a place: class tokens, padding tiles


@dataclass(frozen=True, eq=False)
class ImageGrid:
    """The tokens of one image, in sequence order.

    Attributes:
        width: Width of the original image, px.
        height: Height of the original image, px.
        rows: Rows of the grid of tokens.
        cols: Columns of the grid of tokens.
        places: Row and column of each token; ``NOWHERE`` for tokens without one.
        boxes: ``(x0, y0, x1, y1)`` of each token in pixels of the original image, NaN without a
            place.
        patch_rows: Rows of the grid of vision-tower patches.
        patch_cols: Columns of it.
        patch_places: Row and column of each vision-tower position; ``NOWHERE`` for a class token.
    """

    width: int
    height: int
    rows: int
    cols: int
    places: Int[np.ndarray, "token 2"]
    boxes: Float[np.ndarray, "token 4"]
    patch_rows: int
    patch_cols: int
    patch_places: Int[np.ndarray, "patch 2"]

    @property
    def n_tokens(self) -> int:
        """Tokens this image takes, class tokens included."""
        return len(self.places)


Rule = Callable[[Any, Any, Mapping[str, Any], Sequence[Image.Image]], list[ImageGrid]]
"""``(processor, config, inputs, images) -> grids``: one grid per image, in order."""


def fixed_grid(
    processor: Any, config: Any, inputs: Mapping[str, Any], images: Sequence[Image.Image]
) -> list[ImageGrid]:
    """Every image is resized and cropped to the same size, then cut into patches (LLaVA)."""
    patch = config.vision_config.patch_size
    height, width = inputs["pixel_values"].shape[-2:]
    rows, cols = height // patch, width // patch
    with_class = config.vision_feature_select_strategy == "full"
    grid = raster(rows, cols)
    has_class = bool(getattr(processor, "num_additional_image_tokens", 0))
    x, y = grid[:, 1] * patch, grid[:, 0] * patch
    cells = np.column_stack([x, y, x + patch, y + patch])
    grids = []
    for image in images:
        scale_x, scale_y, left, top = _resize_and_crop(
            processor.image_processor, image, width, height
        )
        start = np.array([left, top, left, top])
        boxes = (cells + start) / [scale_x, scale_y, scale_x, scale_y]
        grids.append(
            ImageGrid(
                *image.size,
                rows,
                cols,
                _after_class(grid, NOWHERE) if with_class else grid,
                _after_class(boxes, np.nan) if with_class else boxes,
                rows,
                cols,
                _after_class(grid, NOWHERE) if has_class else grid,
            )
        )
    return grids


def merged_patches(
    _processor: Any, config: Any, inputs: Mapping[str, Any], images: Sequence[Image.Image]
) -> list[ImageGrid]:
    """Every image keeps its aspect; blocks of patches are merged into one token (Qwen2-VL).

    The processor tells the grid.
    """
    grid_thw = inputs.get("image_grid_thw")
    if grid_thw is None or len(grid_thw) != len(images):
        raise GeometryError(
            "The processor must return one row of image_grid_thw per image. There are "
            f"{len(images)} images and "
            f"{0 if grid_thw is None else len(grid_thw)} rows."
        )
    merge = config.vision_config.spatial_merge_size
    grids = []
    for image, (_, patch_rows, patch_cols) in zip(
        images, np.asarray(grid_thw).tolist(), strict=True
    ):
        rows, cols = patch_rows // merge, patch_cols // merge
        width, height = image.size
        places = raster(rows, cols)
        row, col = places[:, 0], places[:, 1]
        boxes = np.column_stack(
            [
                col * width / cols,
                row * height / rows,
                (col + 1) * width / cols,
                (row + 1) * height / rows,
            ]
        )
        inner = raster(merge, merge)
        patches = (places[:, None] * merge + inner[None]).reshape(-1, 2)
        grids.append(
            ImageGrid(width, height, rows, cols, places, boxes, patch_rows, patch_cols, patches)
        )
    return grids


def place_on_grid(
    values: Float[np.ndarray, " token"], places: Int[np.ndarray, "token 2"], rows: int, cols: int
) -> Float[np.ndarray, "row col"]:
    """Values on their cells; NaN on cells without a token."""
    out = np.full((rows, cols), np.nan)
    placed = places[:, 0] >= 0
    out[tuple(places[placed].T)] = values[placed]
    return out


def raster(rows: int, cols: int) -> Int[np.ndarray, "token 2"]:
    """Row and column of every cell, row by row."""
    return np.stack(np.divmod(np.arange(rows * cols), cols), axis=1)


def _after_class(cells: np.ndarray, nothing: float) -> np.ndarray:
    return np.concatenate([np.full((1, cells.shape[1]), nothing, dtype=cells.dtype), cells])


def _resize_and_crop(
    image_processor: Any, image: Image.Image, width: int, height: int
) -> tuple[float, float, float, float]:
    """Scale in x and y, then left and top of the crop, of an image that ended at this size."""
    w, h = image.size
    if getattr(image_processor, "do_resize", False):
        size = image_processor.size
        shortest = size.get("shortest_edge")
        if shortest is not None:
            w, h = (
                (shortest, int(shortest * h / w)) if w <= h else (int(shortest * w / h), shortest)
            )
        elif size.get("height") is not None and size.get("width") is not None:
            w, h = size["width"], size["height"]
        else:
            raise GeometryError(
                "A fixed grid needs a size with a shortest_edge, or with height and width. "
                f"{type(image_processor).__name__} has {dict(size)}."
            )
    left, top = 0.0, 0.0
    if getattr(image_processor, "do_center_crop", False):
        left, top = _crop_start(w, width), _crop_start(h, height)
    elif (w, h) != (width, height):
        raise GeometryError(
            f"The processor's settings must lead to the pixels it returned. Replayed were {w} x "
            f"{h}, returned {width} x {height}."
        )
    return w / image.size[0], h / image.size[1], left, top


def _crop_start(length: int, wanted: int) -> float:
    """Where a centred crop starts; negative where the image was padded to it."""
    return (length - wanted) // 2 if length >= wanted else -((wanted - length) // 2)


def aspect_ratio_tiles(
    _processor: Any, config: Any, inputs: Mapping[str, Any], images: Sequence[Image.Image]
) -> list[ImageGrid]:
    """The image fills a canvas of square tiles from the top left.

    Text reaches it by cross-attention (Mllama).

    Each image has ``max_num_tiles`` times (class token, then patches) keys; unused tiles and class
    tokens have no place.
    """
    vision = config.vision_config
    tile, patch, max_tiles = vision.image_size, vision.patch_size, vision.max_num_tiles
    supported = [tuple(pair) for pair in vision.supported_aspect_ratios]
    ratio_ids = np.asarray(inputs["aspect_ratio_ids"]).reshape(-1)
    ratio_ids = ratio_ids[ratio_ids > 0]
    if len(ratio_ids) != len(images):
        raise GeometryError(
            f"There must be one aspect_ratio_id per image; there are {len(images)} images, "
            f"{len(ratio_ids)} ids."
        )
    side = tile // patch
    grids = []
    for image, ratio_id in zip(images, ratio_ids.tolist(), strict=True):
        tile_rows, tile_cols = supported[ratio_id - 1]
        width, height = image.size
        scale_x, scale_y = _scale_on_canvas(image, tile_rows * tile, tile_cols * tile, tile)
        within = raster(side, side)
        tiles = [
            _after_class(within + np.array([r, c]) * side, NOWHERE)
            for r, c in raster(tile_rows, tile_cols).tolist()
        ]
        unused = np.full(((max_tiles - len(tiles)) * (side * side + 1), 2), NOWHERE)
        places = np.concatenate([*tiles, unused])
        boxes = (
            np.column_stack(
                [places[:, 1], places[:, 0], places[:, 1] + 1, places[:, 0] + 1]
            ).astype(float)
            * patch
        )
        boxes /= [scale_x, scale_y, scale_x, scale_y]
        beyond = (
            (places[:, 0] == NOWHERE) | (boxes[:, 0] >= width) | (boxes[:, 1] >= height)
        )  # on the padding of the canvas
        boxes[beyond] = np.nan
        rows, cols = tile_rows * side, tile_cols * side
        grids.append(ImageGrid(width, height, rows, cols, places, boxes, rows, cols, places))
    return grids


def _scale_on_canvas(
    image: Image.Image, canvas_height: int, canvas_width: int, tile: int
) -> tuple[float, float]:
    """How far an image is stretched, in x and y, to fit its canvas without losing its aspect."""
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
