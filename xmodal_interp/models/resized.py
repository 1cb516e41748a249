"""Pictures that were resized before they reach the processor, and their original size.

Utilities of some models resize pictures first; qwen-vl-utils returns pictures and frames on
multiples of 28 or 56 pixels. The processor, and so a rule for boxes, is given the resized picture.
If the original size is known, boxes are scaled to it: the whole picture was resized, so that both
axes are scaled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

from PIL import Image

from xmodal_interp.models.geometry import ImageGrid, VideoGrid
from xmodal_interp.models.media import ImageLike, Video, checked_size, open_image

_KEY = "xmodal_interp_original_size"
"""Member of ``info`` of a PIL image, which transformers does not read."""

Grid = TypeVar("Grid", ImageGrid, VideoGrid)


def resized(image: ImageLike, original_size: Sequence[int]) -> Image.Image:
    """Return an image that was resized before, with the size that it had.

    The model reads the pixels as they are. Boxes of tokens are in pixels of the original image.
    For videos, use ``xi.Video(frames, original_size=...)``.

    Args:
        image: The whole picture, resized; not a crop, and without padding.
        original_size: Width and height of the original image, px.

    Raises:
        InputError: The image cannot be read, or the size is invalid.
    """
    opened = open_image(image).copy()
    opened.info[_KEY] = checked_size(original_size)
    return opened


def size_before(image: Any) -> tuple[int, int] | None:
    """Return the original size of a picture of :func:`resized`; None for any other image."""
    return image.info.get(_KEY) if isinstance(image, Image.Image) else None


def original_size(picture: Image.Image | Video) -> tuple[int, int]:
    """Return width and height of the original image or of the original frames, px."""
    if isinstance(picture, Video):
        given = picture.original_size
        return picture.size if given is None else checked_size(given)
    return size_before(picture) or picture.size


def as_original(image: Any) -> Any:
    """Return an image that is taken as an original one, at its present size."""
    if size_before(image) is None:
        return image
    plain = image.copy()
    del plain.info[_KEY]
    return plain


def in_original_pixels(grid: Grid, size: tuple[int, int]) -> Grid:
    """Return a grid with its boxes in pixels of a picture of another size."""
    if size == (grid.width, grid.height):
        return grid
    scale = [size[0] / grid.width, size[1] / grid.height] * 2
    changes: dict[str, Any] = {"width": size[0], "height": size[1], "boxes": grid.boxes * scale}
    if isinstance(grid, ImageGrid) and grid.patch_boxes is not None:
        changes["patch_boxes"] = grid.patch_boxes * scale
    return replace(grid, **changes)
