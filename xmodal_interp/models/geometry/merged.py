"""Every image keeps its aspect; blocks of patches are merged into one token (Qwen2-VL and kin)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from xmodal_interp.errors import GeometryError
from xmodal_interp.models.geometry.cells import image_grid, in_blocks, rectangle
from xmodal_interp.models.geometry.grid import ImageGrid


def merged_patches(
    processor: Any, _config: Any, inputs: Mapping[str, Any], images: Sequence[Image.Image]
) -> list[ImageGrid]:
    """The image is resized to whole blocks; the processor tells the grid of patches.

    Its sides are rounded to multiples of a block, each for itself, so that the boxes fill the image
    exactly. The vision tower reads the patches block by block.
    """
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
        box = (0.0, 0.0, float(image.width), float(image.height))
        tokens = rectangle(rows // merge, cols // merge, box)
        patches = in_blocks(rectangle(rows, cols, box), cols, merge)
        grids.append(image_grid(image.size, [tokens], [patches]))
    return grids
