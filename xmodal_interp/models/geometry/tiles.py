"""The image on tiles that are read one by one, with or without a thumbnail of all of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Any, Literal

from PIL import Image

from xmodal_interp.models.geometry.cells import Cells, image_grid, joined, nowhere, rectangle
from xmodal_interp.models.geometry.fixed import block_side
from xmodal_interp.models.geometry.grid import ImageGrid
from xmodal_interp.models.geometry.tiling import Layout, Tiling, whole

End = Literal["first", "last"]


def split_tiles(
    processor: Any,
    config: Any,
    inputs: Mapping[str, Any],
    images: Sequence[Image.Image],
    *,
    layout: Layout,
    merge: str | int,
    thumbnail: End = "last",
    class_token: End | None = None,
    thumbnail_of_one: bool = False,
) -> list[ImageGrid]:
    """Tiles of one size, row by row, and a thumbnail before or behind them.

    Where the image fills a single tile there is no thumbnail, and no tile to speak of. The sides of
    the image are rounded to whole tiles each for itself, so that the tiles fill it exactly, unless
    the layout pads.

    Args:
        processor: The processor.
        config: The model's configuration.
        inputs: What the processor returned.
        images: The images in order.
        layout: How an image is cut.
        merge: The side of the square of patches that gives a token: a number, or the attribute of
            the configuration that holds it, its inverse, or the number of tokens of a tile.
        thumbnail: Where the thumbnail stands.
        class_token: Where the vision tower has a class token in each tile.
        thumbnail_of_one: Whether a single tile comes with a thumbnail, too.
    """
    height, width = inputs["pixel_values"].shape[-2:]
    patch_rows, patch_cols = height // (side := patch_side(config)), width // side
    block = block_of(config, merge, patch_rows, patch_cols)

    def arranged(tiling: Tiling, rows: int, cols: int, image: Image.Image) -> list[Cells]:
        parts = _on_tiles(tiling, rows, cols)
        small = [rectangle(rows, cols, whole(image), thumbnail=True)]
        return [*small, *parts] if thumbnail == "first" else [*parts, *small]

    def alone(rows: int, cols: int, image: Image.Image, tiling: Tiling | None) -> list[Cells]:
        return [rectangle(rows, cols, whole(image) if tiling is None else tiling.boxes[0])]

    grids = []
    for image in images:
        tiling = layout(processor, image)
        shapes = (patch_rows // block, patch_cols // block), (patch_rows, patch_cols)
        if tiling is None or (len(tiling.boxes) == 1 and not thumbnail_of_one):
            tokens, patches = (alone(*shape, image, tiling) for shape in shapes)
        else:
            tokens, patches = (arranged(tiling, *shape, image) for shape in shapes)
        grids.append(image_grid(image.size, tokens, [_with_class(p, class_token) for p in patches]))
    return grids


def _on_tiles(tiling: Tiling, rows: int, cols: int) -> list[Cells]:
    """The cells of each tile, in the rows and columns of the whole image."""
    return [
        rectangle(
            rows,
            cols,
            box,
            at=(number // tiling.cols * rows, number % tiling.cols * cols),
            tile=number,
        )
        for number, box in enumerate(tiling.boxes)
    ]


def _with_class(cells: Cells, end: End | None) -> Cells:
    if end is None:
        return cells
    return joined([nowhere(1), cells] if end == "first" else [cells, nowhere(1)])


def patch_side(config: Any) -> int:
    """The side of the vision tower's square patches, px."""
    side = config.vision_config.patch_size
    return int(side[0] if isinstance(side, (list, tuple)) else side)


def block_of(config: Any, merge: str | int, rows: int, cols: int) -> int:
    """The side of the square of patches that gives one token.

    Raises:
        GeometryError: The configuration gives a number of tokens that no square leads to.
    """
    if isinstance(merge, int):
        return merge
    value = attrgetter(merge)(config)
    if merge.endswith(("length", "tokens", "tokens_per_image")):
        return block_side(rows, cols, int(value))
    return round(1 / value) if value < 1 else int(value)
