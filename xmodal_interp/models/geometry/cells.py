"""What rules are made of: rectangles of cells, put one behind the other as the sequence has them.

A rule says for each tile which part of the image it shows (a box in pixels of the original image,
which may reach over the edge where the tile is padded), how many rows and columns of tokens it
gives, and where these stand among the rows and columns of the whole image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Float, Int

from xmodal_interp.errors import GeometryError
from xmodal_interp.models.geometry.grid import NOWHERE, ImageGrid, Thumbnail, raster

Box = tuple[float, float, float, float]
"""``(x0, y0, x1, y1)`` in pixels of the original image."""


@dataclass(frozen=True, eq=False)
class Cells:
    """Some tokens (or vision-tower positions) in sequence order.

    Attributes:
        places: Row and column of each; ``NOWHERE`` without a place.
        boxes: Box of each, in pixels of the original image; NaN without a place.
        tiles: Tile of each, or ``NOWHERE``.
        of_thumbnail: Whether its row and column are those of the thumbnail.
    """

    places: Int[np.ndarray, "token 2"]
    boxes: Float[np.ndarray, "token 4"]
    tiles: Int[np.ndarray, " token"]
    of_thumbnail: Bool[np.ndarray, " token"]

    def __len__(self) -> int:
        """Tokens, those without a place included."""
        return len(self.places)

    def __getitem__(self, order: np.ndarray) -> Cells:
        """Those of these indices (or of this mask), in that order."""
        return Cells(
            self.places[order], self.boxes[order], self.tiles[order], self.of_thumbnail[order]
        )


def rectangle(
    rows: int,
    cols: int,
    box: Box,
    *,
    at: tuple[int, int] = (0, 0),
    tile: int = NOWHERE,
    thumbnail: bool = False,
) -> Cells:
    """Cells of one size that fill a box row by row.

    Args:
        rows: Rows of cells.
        cols: Columns of cells.
        box: What they show, px of the original image.
        at: Row and column of the first cell.
        tile: Which tile they are of.
        thumbnail: Whether they are of the thumbnail.

    Raises:
        GeometryError: There is no row or no column of them.
    """
    if rows < 1 or cols < 1:
        raise GeometryError(
            "An image must be large enough for a row and a column of tokens. It is resized to "
            f"{rows} x {cols} of them; give a larger one, or one that is less long and narrow."
        )
    places = raster(rows, cols)
    x0, y0, x1, y1 = box
    size = np.array([(x1 - x0) / cols, (y1 - y0) / rows])
    start = np.array([x0, y0]) + places[:, ::-1] * size
    n = rows * cols
    return Cells(
        places + np.array(at),
        np.concatenate([start, start + size], axis=1),
        np.full(n, tile),
        np.full(n, thumbnail),
    )


def nowhere(n: int) -> Cells:
    """Tokens without a place."""
    return Cells(
        np.full((n, 2), NOWHERE), np.full((n, 4), np.nan), np.full(n, NOWHERE), np.zeros(n, bool)
    )


def joined(parts: Sequence[Cells]) -> Cells:
    """One behind the other."""
    return Cells(
        *(
            np.concatenate([getattr(part, name) for part in parts])
            for name in ("places", "boxes", "tiles", "of_thumbnail")
        )
    )


def shifted(cells: Cells, share: float) -> Cells:
    """Boxes moved up and left by a share of their own size.

    A convolution with an odd kernel and a stride looks around the first of the inputs that it
    steps over, not around their middle: half an input less than half a cell further up and left.
    """
    size = cells.boxes[:, 2:] - cells.boxes[:, :2]
    return replace(cells, boxes=cells.boxes - share * np.concatenate([size, size], axis=1))


def with_breaks(cells: Cells, rows: int) -> Cells:
    """A token without a place behind each of so many rows, which may be empty."""
    lines = np.arange(len(cells)).reshape(rows, len(cells) // max(rows, 1))
    return joined([nowhere(0), *(part for line in lines for part in (cells[line], nowhere(1)))])


def in_blocks(cells: Cells, cols: int, merge: int) -> Cells:
    """Cells in raster order, read block by block of ``merge`` x ``merge`` instead."""
    index = np.arange(len(cells)).reshape(-1, merge, cols // merge, merge)
    return cells[index.swapaxes(1, 2).reshape(-1)]


def at_top_left(cells: Cells, cols: int, all_rows: int, all_cols: int) -> Cells:
    """Rows of ``cols`` cells at the top left of a larger grid, whose other cells have no place."""
    index = np.arange(len(cells)) // cols * all_cols + np.arange(len(cells)) % cols
    order = np.full(all_rows * all_cols, len(cells))
    order[index] = np.arange(len(cells))
    return joined([cells, nowhere(1)])[order]


def outside_is_nowhere(cells: Cells, width: int, height: int) -> Cells:
    """Cells that show nothing of an image of this size (they lie on padding) lose their box."""
    x0, y0, x1, y1 = cells.boxes.T
    outside = (x0 >= width) | (y0 >= height) | (x1 <= 0) | (y1 <= 0)
    return replace(cells, boxes=np.where(outside[:, None], np.nan, cells.boxes))


def image_grid(
    size: tuple[int, int], tokens: Sequence[Cells], patches: Sequence[Cells]
) -> ImageGrid:
    """The grid of an image.

    Args:
        size: Width and height of the original image, px.
        tokens: Its tokens, in sequence order.
        patches: Its vision-tower positions, in the tower's order.
    """
    token, patch = joined(tokens), joined(patches) if patches else nowhere(0)
    width, height = size
    token = outside_is_nowhere(token, width, height)
    main, small = _split(token)
    main_patches, small_patches = _split(patch)
    thumbnail = None
    if token.of_thumbnail.any() or patch.of_thumbnail.any():
        thumbnail = Thumbnail(*_extent(small), small, *_extent(small_patches), small_patches)
    return ImageGrid(
        width,
        height,
        *_extent(main),
        main,
        token.boxes,
        *_extent(main_patches),
        main_patches,
        tiles=token.tiles if (token.tiles != NOWHERE).any() else None,
        thumbnail=thumbnail,
        patch_boxes=outside_is_nowhere(patch, width, height).boxes,
    )


def _split(cells: Cells) -> tuple[np.ndarray, np.ndarray]:
    """Places in the image, and places in the thumbnail."""
    small = cells.of_thumbnail[:, None]
    return np.where(small, NOWHERE, cells.places), np.where(small, cells.places, NOWHERE)


def _extent(places: np.ndarray) -> tuple[int, int]:
    """Rows and columns that these places fill."""
    if not len(places):
        return 0, 0
    rows, cols = (places.max(0) + 1).tolist()
    return rows, cols
