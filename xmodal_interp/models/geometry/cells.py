"""Cells: the building blocks of geometry rules.

For each tile, a rule gives the part of the image that it shows, the number of its rows and columns
of tokens, and their offset in the rows and columns of the whole image. The part is a box in pixels
of the original image; it extends beyond the image if the tile is padded. The cells of the tiles are
joined in sequence order. :func:`applied` applies a rule and raises a clear error if the rule does
not fit the model or the processor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Bool, Float, Int

from xmodal_interp.errors import GeometryError, XmodalError
from xmodal_interp.models.geometry.grid import (
    NOWHERE,
    Box,
    ImageGrid,
    Thumbnail,
    raster,
)


@dataclass(frozen=True, eq=False)
class Cells:
    """Some tokens (or vision-tower positions) in sequence order.

    Attributes:
        places: Row and column of each token; ``NOWHERE`` outside the grid.
        boxes: Box of each token in pixels of the original image; NaN outside the grid.
        tiles: Tile of each token, or ``NOWHERE``.
        of_thumbnail: Whether row and column are those of the thumbnail.
    """

    places: Int[np.ndarray, "token 2"]
    boxes: Float[np.ndarray, "token 4"]
    tiles: Int[np.ndarray, " token"]
    of_thumbnail: Bool[np.ndarray, " token"]

    def __len__(self) -> int:
        """Number of tokens, including those outside the grid."""
        return len(self.places)

    def __getitem__(self, order: np.ndarray) -> Cells:
        """Select tokens by indices or by a mask, in that order."""
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
    """Return cells of equal size that fill a box, row by row.

    Args:
        rows: Number of rows.
        cols: Number of columns.
        box: The box that they fill, in pixels of the original image.
        at: Row and column of the first cell.
        tile: The tile that they belong to.
        thumbnail: Whether they belong to the thumbnail.

    Raises:
        GeometryError: The number of rows or columns is zero.
    """
    if rows < 1 or cols < 1:
        raise GeometryError(
            f"The image is too small or too narrow: it would have {rows} x {cols} tokens after "
            "resizing. Give a larger image, or one that is less elongated."
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
    """Return tokens outside the grid."""
    return Cells(
        np.full((n, 2), NOWHERE), np.full((n, 4), np.nan), np.full(n, NOWHERE), np.zeros(n, bool)
    )


def joined(parts: Sequence[Cells]) -> Cells:
    """Return the cells of all parts, concatenated."""
    return Cells(
        *(
            np.concatenate([getattr(part, name) for part in parts])
            for name in ("places", "boxes", "tiles", "of_thumbnail")
        )
    )


def shifted(cells: Cells, share: float) -> Cells:
    """Move boxes up and left by a fraction of their size.

    The receptive field of a strided convolution with an odd kernel is centred on the first input of
    each stride, not on the middle of the stride: half a stride minus half an input up and left.
    """
    size = cells.boxes[:, 2:] - cells.boxes[:, :2]
    return replace(cells, boxes=cells.boxes - share * np.concatenate([size, size], axis=1))


def with_breaks(cells: Cells, rows: int) -> Cells:
    """Insert a token outside the grid after each of ``rows`` rows; the rows may be empty."""
    lines = np.arange(len(cells)).reshape(rows, len(cells) // max(rows, 1))
    return joined([nowhere(0), *(part for line in lines for part in (cells[line], nowhere(1)))])


def in_blocks(cells: Cells, cols: int, merge: int) -> Cells:
    """Reorder cells from raster order to blocks of ``merge`` x ``merge`` cells."""
    index = np.arange(len(cells)).reshape(-1, merge, cols // merge, merge)
    return cells[index.swapaxes(1, 2).reshape(-1)]


def at_top_left(cells: Cells, cols: int, all_rows: int, all_cols: int) -> Cells:
    """Put rows of ``cols`` cells at the top left of a raster; the rest is outside the grid."""
    index = np.arange(len(cells)) // cols * all_cols + np.arange(len(cells)) % cols
    order = np.full(all_rows * all_cols, len(cells))
    order[index] = np.arange(len(cells))
    return joined([cells, nowhere(1)])[order]


def outside_is_nowhere(cells: Cells, width: int, height: int) -> Cells:
    """Remove the boxes of cells that lie entirely on padding, outside an image of this size."""
    x0, y0, x1, y1 = cells.boxes.T
    outside = (x0 >= width) | (y0 >= height) | (x1 <= 0) | (y1 <= 0)
    return replace(cells, boxes=np.where(outside[:, None], np.nan, cells.boxes))


def image_grid(
    size: tuple[int, int], tokens: Sequence[Cells], patches: Sequence[Cells]
) -> ImageGrid:
    """Return the grid of an image.

    Args:
        size: Width and height of the original image, px.
        tokens: Cells of its tokens, in sequence order.
        patches: Cells of its vision-tower positions, in the order of the tower.
    """
    token, patch = joined(tokens), joined(patches) if patches else nowhere(0)
    width, height = size
    token = outside_is_nowhere(token, width, height)
    main, small = split_views(token.places, token.of_thumbnail)
    main_patches, small_patches = split_views(patch.places, patch.of_thumbnail)
    thumbnail = None
    if token.of_thumbnail.any() or patch.of_thumbnail.any():
        thumbnail = Thumbnail(*extent(small), small, *extent(small_patches), small_patches)
    return ImageGrid(
        width,
        height,
        *extent(main),
        main,
        token.boxes,
        *extent(main_patches),
        main_patches,
        tiles=token.tiles if (token.tiles != NOWHERE).any() else None,
        thumbnail=thumbnail,
        patch_boxes=outside_is_nowhere(patch, width, height).boxes,
    )


def split_views(
    places: Int[np.ndarray, "token axis"], of_thumbnail: Bool[np.ndarray, " token"]
) -> tuple[Int[np.ndarray, "token axis"], Int[np.ndarray, "token axis"]]:
    """Return the places in the image, and those in the thumbnail; ``NOWHERE`` for the others."""
    small = of_thumbnail[:, None]
    return np.where(small, NOWHERE, places), np.where(small, places, NOWHERE)


def extent(places: Int[np.ndarray, "token axis"]) -> tuple[int, int]:
    """Return the numbers of rows and columns that places span, from their last two columns."""
    rows, cols = (places[:, -2:].max(0, initial=NOWHERE) + 1).tolist()
    return rows, cols


def patch_side(config: Any, processor: Any = None) -> int:
    """Return the side of the vision tower's square patches, px.

    The configuration of a timm tower has no patch size; the processor's is used instead.
    """
    vision = vision_of(config)
    side = vision.patch_size if hasattr(vision, "patch_size") else processor.patch_size
    return int(side[0] if isinstance(side, (list, tuple)) else side)


def block_of(config: Any, merge: str | int, rows: int, cols: int) -> int:
    """Return the side of the block of patches that gives one token, in patches.

    For encoder-decoder models it is read from the configuration of the encoder.

    Raises:
        GeometryError: No square block leads to the number of tokens in the configuration.
    """
    if isinstance(merge, int):
        return merge
    value = attrgetter(merge)(getattr(config, "encoder", None) or config)
    if merge.endswith(("length", "tokens", "tokens_per_image")):
        return block_side(rows, cols, int(value))
    return round(1 / value) if value < 1 else int(value)


def block_side(rows: int, cols: int, n_tokens: int) -> int:
    """Return the side of the square blocks that merge patches into a number of tokens.

    Raises:
        GeometryError: There is no such side.
    """
    for side in range(1, min(rows, cols) + 1):
        divides = rows % side == 0 and cols % side == 0
        if divides and (rows // side) * (cols // side) == n_tokens:
            return side
    raise GeometryError(
        f"{rows} x {cols} patches cannot be merged into {n_tokens} tokens by square blocks. Check "
        "that processor and model belong together."
    )


def vision_of(config: Any) -> Any:
    """Return the configuration of the vision tower.

    For an encoder-decoder model it is in the encoder's configuration or is that configuration. For
    a model that contains a vision-language model it is in the inner configuration. For a vision
    model it is that of the backbone, or the configuration itself.
    """
    encoder = getattr(config, "encoder", None)
    owners = (config, encoder, getattr(config, "vlm_config", None))
    found = [getattr(owner, "vision_config", None) for owner in owners]
    found += [encoder, getattr(config, "backbone_config", None)]
    return next((vision for vision in found if vision is not None), config)


Grid = TypeVar("Grid")

_MISFITS = (
    *(AttributeError, LookupError, TypeError, ValueError, ArithmeticError),
    *(RuntimeError, StopIteration),
)
"""Errors that a rule may raise if the settings or inputs that it reads are missing."""


def applied(
    rule: Callable[[Any, Any, Mapping[str, Any], Sequence[Any]], list[Grid]],
    processor: Any,
    config: Any,
    inputs: Mapping[str, Any],
    pictures: Sequence[Any],
) -> list[Grid]:
    """Return the grids of images or videos, one each.

    Args:
        rule: A rule of a family.
        processor: The processor.
        config: The model's configuration.
        inputs: The outputs of the processor.
        pictures: The images, or the videos.

    Raises:
        GeometryError: The rule does not fit this model and processor: a setting or input is
            missing, or the number of grids is wrong.
    """
    name = f"The geometry rule {name_of(rule)}"
    of_processor = getattr(processor, "class_name", type(processor).__name__)
    fix = "Pass VLM(model, processor, family=...) a family record with a rule for this model."
    try:
        grids = rule(processor, config, inputs, pictures)
    except XmodalError:
        raise
    except _MISFITS as error:
        raise GeometryError(
            f"{name} does not fit a {config.model_type!r} model with {of_processor} "
            f"({type(error).__name__}: {error}). {fix}"
        ) from error
    if len(grids) != len(pictures):
        raise GeometryError(
            f"{name} returned {len(grids)} grids for {len(pictures)} images or videos of a "
            f"{config.model_type!r} model. {fix}"
        )
    return grids


def name_of(rule: Any) -> str:
    """Return the name of a function, or of the class of an object."""
    return str(getattr(rule, "__name__", type(rule).__name__))
