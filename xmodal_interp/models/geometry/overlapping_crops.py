"""The rule for overlapping crops, in which each patch that is used has a margin (Molmo 2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from jaxtyping import Int
from PIL import Image

from xmodal_interp.errors import GeometryError
from xmodal_interp.models.geometry.cells import Cells, image_grid, joined, rectangle
from xmodal_interp.models.geometry.grid import NOWHERE, ImageGrid, raster
from xmodal_interp.models.geometry.processor_steps import own_function, setting, whole


def overlapping_crops(
    processor: Any, _config: Any, inputs: Mapping[str, Any], images: Sequence[Image.Image]
) -> list[ImageGrid]:
    """Place the thumbnail, then the image row by row; tokens pool patches of overlapping crops.

    The image is resized without keeping its aspect ratio to whole windows and a margin; each crop
    is a window with its margins. ``image_token_pooling`` of the processor says which crop a token
    pools in an overlap; patches that no token pools are outside the grid. The last token of an odd
    row or column is smaller. A token that pools patches of two crops belongs to no tile.

    Raises:
        GeometryError: The processor returned another number of crops than its settings give.
    """
    pooling = np.asarray(inputs["image_token_pooling"])
    shapes = np.asarray(inputs["image_grids"]).tolist()
    counts = np.asarray(inputs["image_num_crops"]).tolist()
    grids, first_token, first_patch = [], 0, 0
    for image, shape, count in zip(images, shapes, counts, strict=True):
        crops = _crops(processor, image)
        if len(crops) != count:
            raise GeometryError(
                f"The processor returned {count} crops, but its settings lead to {len(crops)}, the "
                "whole image included. Use the checkpoint's own processor settings."
            )
        patches = joined(crops)
        n_tokens = shape[0] * shape[1] + shape[2] * shape[3]
        read = pooling[first_token : first_token + n_tokens]
        read = np.where(read < 0, NOWHERE, read - first_patch)
        first_token, first_patch = first_token + n_tokens, first_patch + len(patches)
        unread = ~np.isin(np.arange(len(patches)), read)
        tower = replace(
            patches,
            places=np.where(unread[:, None], NOWHERE, patches.places),
            boxes=np.where(unread[:, None], np.nan, patches.boxes),
            of_thumbnail=patches.of_thumbnail & ~unread,
        )
        small_rows, small_cols, rows, cols = shape
        places = np.concatenate([raster(small_rows, small_cols), raster(rows, cols)])
        of_thumbnail = np.arange(n_tokens) < small_rows * small_cols
        tokens = replace(pooled_cells(patches, read, places), of_thumbnail=of_thumbnail)
        grids.append(image_grid(image.size, [tokens], [tower]))
    return grids


def _crops(processor: Any, image: Image.Image) -> list[Cells]:
    """Return the patches of the whole image, then those of each crop."""
    side, crop = setting(processor, "patch_size"), setting(processor, "size")["height"]
    margins = setting(processor, "overlap_margins")
    tile_rows, tile_cols, height, width = own_function(processor, "compute_crop_geometry")(
        image.height,
        image.width,
        max_crops=setting(processor, "max_crops"),
        overlap_margins=margins,
        crop_size=crop,
        patch_size=side,
    )
    n = crop // side
    step = n - sum(margins)
    per_x, per_y = image.width / width * side, image.height / height * side
    crops = [rectangle(n, n, whole(image), thumbnail=True)]
    for tile, (row, col) in enumerate((raster(tile_rows, tile_cols) * step).tolist()):
        box = (col * per_x, row * per_y, (col + n) * per_x, (row + n) * per_y)
        crops.append(rectangle(n, n, box, at=(row, col), tile=tile))
    return crops


def pooled_cells(
    patches: Cells, read: Int[np.ndarray, "token patch"], places: Int[np.ndarray, "token 2"]
) -> Cells:
    """Return the cells of tokens that pool patches.

    Args:
        patches: All patches.
        read: Indices of the patches that each token pools; ``NOWHERE`` for unused entries.
        places: Row and column of each token.

    Returns:
        For each token, the bounding box of its patches, and their tile if they all have the same.
    """
    none = (read < 0)[..., None]
    boxes, tiles = patches.boxes[read], patches.tiles[read]
    start = np.where(none, np.inf, boxes[..., :2]).min(1)
    end = np.where(none, -np.inf, boxes[..., 2:]).max(1)
    low = np.where(read < 0, len(patches), tiles).min(1)
    high = np.where(read < 0, NOWHERE, tiles).max(1)
    return Cells(
        places,
        np.concatenate([start, end], axis=1),
        np.where(low == high, high, NOWHERE),
        np.zeros(len(read), dtype=bool),
    )
