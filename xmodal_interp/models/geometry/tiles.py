"""The image on tiles that are read one by one, with or without a thumbnail of all of it."""

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
    """Tiles of one size, row by row, and a thumbnail before or behind them.

    Where the image fills a single tile there is no thumbnail, and no tile to speak of. The sides of
    the image are rounded to whole tiles each for itself, so that the tiles fill it exactly, unless
    the layout pads.

    Attributes:
        layout: How an image is cut.
        merge: The side of the square of patches that gives a token: a number, or the attribute of
            the configuration that holds it, its inverse, or the number of tokens of a tile.
        thumbnail: Where the thumbnail stands.
        class_token: Where the vision tower has a class token in each tile.
        class_token_if: Attribute of the configuration that says whether it has one; if there is
            none, it has.
        thumbnail_of_one: Whether a single tile comes with a thumbnail, too.
        shift: How far up and left of its square of patches a token looks, in squares.
        halved_with: An input with which the processor says that squares have half the side.
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
        """One grid per image."""
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
        """The cells of each tile, and of the thumbnail, in sequence order."""
        if tiling is None or (len(tiling.boxes) == 1 and not self.thumbnail_of_one):
            return [rectangle(rows, cols, whole(image) if tiling is None else tiling.boxes[0])]
        parts = on_tiles(tiling, rows, cols)
        small = [rectangle(rows, cols, whole(image), thumbnail=True)]
        return [*small, *parts] if self.thumbnail == "first" else [*parts, *small]


def on_tiles(tiling: Tiling, rows: int, cols: int) -> list[Cells]:
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
