"""Every image becomes pixels of one size, and these a grid of patches, joined by blocks or not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from xmodal_interp.errors import GeometryError
from xmodal_interp.models.geometry.cells import image_grid, joined, nowhere, rectangle
from xmodal_interp.models.geometry.grid import ImageGrid
from xmodal_interp.models.geometry.replaying import shown


def fixed_grid(
    processor: Any, config: Any, inputs: Mapping[str, Any], images: Sequence[Image.Image]
) -> list[ImageGrid]:
    """Every image is resized and cropped to the same size, then cut into patches (LLaVA).

    The features may keep the tower's class token, which has no place.
    """
    patch = _side(config.vision_config.patch_size)
    height, width = inputs["pixel_values"].shape[-2:]
    rows, cols = height // patch, width // patch
    with_class = getattr(config, "vision_feature_select_strategy", "default") == "full"
    has_class = bool(getattr(processor, "num_additional_image_tokens", 0))
    grids = []
    for image in images:
        x0, y0, x1, y1 = shown(processor, image, width, height)
        inside = (
            *(x0, y0, x0 + (x1 - x0) * cols * patch / width),
            y0 + (y1 - y0) * rows * patch / height,
        )
        cells = rectangle(rows, cols, inside)
        headed = joined([nowhere(1), cells])
        grids.append(
            image_grid(
                image.size, [headed if with_class else cells], [headed if has_class else cells]
            )
        )
    return grids


def pooled_grid(
    processor: Any,
    config: Any,
    inputs: Mapping[str, Any],
    images: Sequence[Image.Image],
    *,
    n_tokens: str,
) -> list[ImageGrid]:
    """Every image is resized to the same size; square blocks of patches give one token each.

    Args:
        processor: The processor.
        config: The model's configuration.
        inputs: What the processor returned.
        images: The images in order.
        n_tokens: Attribute of the configuration that says how many tokens an image has.
    """
    patch = _side(config.vision_config.patch_size)
    height, width = inputs["pixel_values"].shape[-2:]
    rows, cols = height // patch, width // patch
    block = block_side(rows, cols, getattr(config, n_tokens))
    return [
        image_grid(
            image.size,
            [rectangle(rows // block, cols // block, shown(processor, image, width, height))],
            [rectangle(rows, cols, shown(processor, image, width, height))],
        )
        for image in images
    ]


def block_side(rows: int, cols: int, n_tokens: int) -> int:
    """The side of the square blocks by which rows x cols patches give so many tokens.

    Raises:
        GeometryError: No side divides both and gives this number.
    """
    for side in range(1, min(rows, cols) + 1):
        divides = rows % side == 0 and cols % side == 0
        if divides and (rows // side) * (cols // side) == n_tokens:
            return side
    raise GeometryError(
        f"Square blocks of patches must give the image's tokens. {rows} x {cols} patches cannot "
        f"give {n_tokens} tokens."
    )


def _side(patch_size: Any) -> int:
    """The side of a square patch."""
    return int(patch_size[0] if isinstance(patch_size, (list, tuple)) else patch_size)
