"""Images cut into tiles, with or without a thumbnail of the whole image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from PIL import Image

from xmodal_interp.models.geometry.cells import (
    Cells,
    image_grid,
    joined,
    nowhere,
    rectangle,
    shifted,
)
from xmodal_interp.models.geometry.grid import ImageGrid
from xmodal_interp.models.geometry.patches import block_of, patch_side
from xmodal_interp.models.geometry.tiling import Layout, Tiling, whole

End = Literal["first", "last"]


@dataclass(frozen=True)
class SplitTiles:
    """Tiles of one size, row by row, and a thumbnail before or after them.

    If the image fills a single tile, there is no thumbnail and tokens have no tile. Each side of
    the image is rounded to whole tiles independently, so the tiles fill the image exactly, unless
    the layout pads.

    Attributes:
        layout: Function that returns the tiles of an image, or None if it is not tiled.
        merge: The side of the block of patches that gives a token: a number, or a configuration
            attribute that holds it, its inverse, or the number of tokens of a tile.
        thumbnail: Whether the thumbnail is first or last.
        class_token: Whether the vision tower has a class token first or last in each tile; None if
            it has none.
        class_token_if: Boolean configuration attribute that enables the class token; always enabled
            if None.
        thumbnail_of_one: Whether an image of a single tile also has a thumbnail.
        shift: How far up and left of its block of patches a token's receptive field is centred, in
            blocks.
        halved_with: Name of an input whose presence halves the side of the blocks.
    """

    layout: Layout
    merge: str | int
    thumbnail: End = "last"
    class_token: End | None = None
    class_token_if: str | None = None
    thumbnail_of_one: bool = False
    shift: float = 0.0
    halved_with: str | None = None

    def __call__(
        self, processor: Any, config: Any, inputs: Mapping[str, Any], images: Sequence[Image.Image]
    ) -> list[ImageGrid]:
        """Return one grid per image."""
        height, width = inputs["pixel_values"].shape[-2:]
        side = patch_side(config, processor)
        rows, cols = height // side, width // side
        block = block_of(config, self.merge, rows, cols)
        if self.halved_with is not None and self.halved_with in inputs:
            block //= 2
        has_class = self.class_token_if is None or bool(getattr(config, self.class_token_if))
        end = self.class_token if has_class else None
        grids = []
        for image in images:
            tiling = self.layout(processor, image)
            tokens = [
                shifted(part, self.shift)
                for part in self._arranged(tiling, rows // block, cols // block, image)
            ]
            patches = self._arranged(tiling, rows, cols, image)
            tower = [_with_class(part, end) for part in patches]
            grids.append(image_grid(image.size, tokens, tower))
        return grids

    def _arranged(
        self, tiling: Tiling | None, rows: int, cols: int, image: Image.Image
    ) -> list[Cells]:
        """Return the cells of each tile and of the thumbnail, in sequence order."""
        if tiling is None or (len(tiling.boxes) == 1 and not self.thumbnail_of_one):
            return [rectangle(rows, cols, whole(image) if tiling is None else tiling.boxes[0])]
        parts = on_tiles(tiling, rows, cols)
        small = [rectangle(rows, cols, whole(image), thumbnail=True)]
        return [*small, *parts] if self.thumbnail == "first" else [*parts, *small]


def on_tiles(tiling: Tiling, rows: int, cols: int) -> list[Cells]:
    """Return the cells of each tile, with rows and columns of the whole image."""
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
