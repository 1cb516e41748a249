"""Positions of image tokens on their image, in pixels of the original image.

Only this module turns token boxes into drawing coordinates. An image is drawn from its pixel edges
(0, 0) to (width, height), and a token with the box (x0, y0, x1, y1) covers these coordinates. Parts
of the image that no token covers, such as the borders left by a centre crop, are dimmed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
import pandas as pd
from jaxtyping import Bool
from PIL import Image

from xmodal_interp.analysis.connector_rollout import are_queries, query_patches
from xmodal_interp.analysis.selection import not_padding
from xmodal_interp.arguments import one_of, whole_number
from xmodal_interp.boxes.number_formats import Boxes
from xmodal_interp.errors import GeometryError, InputError
from xmodal_interp.models import ImageGrid, place_on_grid
from xmodal_interp.sample import Sample
from xmodal_interp.vocabulary import AttentionKind, Tower

PixelBox = tuple[float, float, float, float]
"""``(x0, y0, x1, y1)`` in pixels of the original image."""

PixelBoxes = Sequence[Boxes] | Mapping[str, Boxes] | np.ndarray | pd.DataFrame
"""Boxes to draw, optionally with names: see :func:`xmodal_interp.boxes.pixel_boxes`."""


@dataclass(frozen=True, eq=False)
class PlacedImage:
    """One image of a sample, and the keys of its tokens.

    Attributes:
        number: Index of the image.
        image: The pixels.
        grid: The grid of image tokens.
        name: Title of the image's panel.
        kind: Kind of attention by which text attends to the image: ``"self"`` or ``"cross"``.
        keys: Key positions of its tokens, in the order of ``grid.places``.
        unit: Name of one cell.
        shares: ``[key, cell]``, only if cells are not keys: the share of each key that comes from
            each cell.
        present: True on positions of the sequence that are not padding.
        tower: The tower whose attention is drawn, ``"language"`` or ``"vision"``. In the vision
            tower, the keys are the positions of the tower.
        medium: ``"image"``, or ``"video"`` for a frame of one.
    """

    number: int
    image: Image.Image
    grid: ImageGrid
    name: str
    kind: AttentionKind
    keys: np.ndarray
    unit: str = "image token"
    shares: np.ndarray | None = None
    present: np.ndarray | None = None
    tower: Tower = "language"
    medium: Literal["image", "video"] = "image"

    @property
    def call(self) -> int:
        """Number of the calls of a layer that read this image."""
        return self.number if self.tower == "vision" else 0

    @property
    def cells(self) -> str:
        """What a cell is, for labels: ``"patches"`` or ``"tokens"``."""
        return "patches" if self.unit.startswith("patch") else "tokens"

    @property
    def without_cell(self) -> Bool[np.ndarray, " key"]:
        """True on keys without a cell: tokens of a thumbnail, line breaks."""
        if self.shares is not None:
            return np.zeros(len(self.keys), dtype=bool)
        without: np.ndarray = self.grid.places[:, 0] < 0
        return without

    def on_cells(self, values: np.ndarray, *, mean: bool = False) -> np.ndarray:
        """Convert values per key, ``[..., key]``, to values per cell; NaN if its keys have none.

        Args:
            values: Values on keys. Each is distributed over the key's cells.
            mean: Average over the keys of a cell instead of summing, as for a lift.
        """
        if self.shares is None:
            return values
        known = ~np.isnan(values)
        amounts = np.where(known, values, 0.0) @ self.shares
        parts = known.astype(float) @ self.shares
        with np.errstate(invalid="ignore"):
            return np.where(parts > 0, amounts / parts if mean else amounts, np.nan)

    def on_grid(self, values: np.ndarray) -> np.ndarray:
        """Arrange values per cell as ``[row, col]``, NaN where the image has no cell."""
        return place_on_grid(values, self.grid.places, self.grid.rows, self.grid.cols)


View = Literal["image", "thumbnail"]


def placed_image(
    sample: Sample, image: int = 0, tower: Tower | None = None, view: View = "image"
) -> PlacedImage:
    """Return an image of a sample with its keys in a tower; ``Sample.tower`` if not given.

    If the image's tokens are learned queries, the cells are the patches of the vision tower, and
    values are distributed over them with the connector's attention.

    Args:
        sample: The sample.
        image: Index of the image.
        tower: ``"language"`` or ``"vision"``.
        view: ``"thumbnail"`` for the tokens of a tiled image's thumbnail.

    Raises:
        InputError: The sample has no images, no image of this index or view, or does not hold its
            pixels.
        NotRecordedError: The tokens are learned queries, and the connector's layers were not
            recorded.
    """
    if not isinstance(sample, Sample):
        raise InputError(
            f"sample must be one Sample, such as store[0]; got a {type(sample).__name__}."
        )
    tower = tower or sample.tower
    if tower not in ("language", "vision"):
        raise InputError(
            f"Attention of tower {tower!r} cannot be drawn on the image. Choose tower='language' "
            "or tower='vision'."
        )
    whole_number(image, "image", 0)
    one_of(view, "view", get_args(View))
    if view == "thumbnail" and (tower == "vision" or not _has_thumbnail(sample, image)):
        raise InputError(
            f"view='thumbnail' requires the language tower and a tiled image with a thumbnail; "
            f"image {image} of sample {sample.name!r} is drawn without view."
        )
    n_images = len(sample.grids)
    if n_images == 0:
        raise InputError(
            f"Sample {sample.name!r} has no image to draw on. Capture it with an image."
        )
    if not 0 <= image < n_images:
        raise InputError(f"image must be between 0 and {n_images - 1}; got {image}.")
    if len(sample.images) != n_images:
        raise InputError(
            f"Sample {sample.name!r} has the grids of {n_images} images, but the pixels of "
            f"{len(sample.images)}. Add the images with dataclasses.replace(sample, images=...)."
        )
    crossed = sample.cross_keys is not None
    table = sample.cross_keys if sample.cross_keys is not None else sample.tokens
    keys = np.flatnonzero(table["image"].eq(image).fillna(value=False).to_numpy(dtype=bool))
    placed = PlacedImage(
        image,
        sample.images[image],
        sample.grids[image],
        f"image {image}" if n_images > 1 else "image",
        "cross" if crossed else "self",
        keys,
        present=not_padding(sample).numpy(),
    )
    if tower == "vision":
        present = sample.patch_names(image) != "padding"
        return replace(with_patches(placed), kind="self", tower=tower, present=present)
    if not are_queries(placed.grid):
        return _as_thumbnail(placed, asked=view == "thumbnail")
    shares = query_patches(sample, image).double().numpy()
    return replace(
        with_patches(placed), keys=keys, shares=shares, unit="patch, through the connector"
    )


def _has_thumbnail(sample: Sample, image: int) -> bool:
    return image < len(sample.grids) and sample.grids[image].thumbnail is not None


def _as_thumbnail(placed: PlacedImage, *, asked: bool) -> PlacedImage:
    """Return the image on the grid of its thumbnail if asked or if no other token has a place.

    The latter happens for long and narrow images whose tiles were removed together with their
    padding.
    """
    grid, view = placed.grid, placed.grid.thumbnail
    if view is None or (not asked and (grid.places[:, 0] >= 0).any()):
        return placed
    shown = replace(grid, **vars(view), thumbnail=None)
    return replace(placed, grid=shown, unit="thumbnail token")


def with_patches(placed: PlacedImage) -> PlacedImage:
    """Return the same image with the patches of the vision tower as cells."""
    if placed.shares is not None:
        return replace(placed, keys=np.arange(len(placed.grid.places)), shares=None, unit="patch")
    grid = placed.grid
    boxes = grid.patch_boxes
    if boxes is None:
        left, right, bottom, top = extent(grid)
        width, height = (right - left) / grid.patch_cols, (bottom - top) / grid.patch_rows
        row, col = grid.patch_places.T.astype(float)
        x, y = left + col * width, top + row * height
        boxes = np.column_stack([x, y, x + width, y + height])
        boxes[row < 0] = np.nan
    finer = replace(
        grid, rows=grid.patch_rows, cols=grid.patch_cols, places=grid.patch_places, boxes=boxes
    )
    return replace(placed, grid=finer, keys=np.arange(len(boxes)), unit="patch")


def extent(grid: ImageGrid) -> tuple[float, float, float, float]:
    """Return left, right, bottom and top of a token grid, in pixels of the original image.

    Raises:
        GeometryError: The boxes are not the cells of one regular grid.
    """
    with_box = (grid.places[:, 0] >= 0) & ~np.isnan(grid.boxes).any(1)
    if not with_box.any():
        raise GeometryError(
            "No token of this image has a box, so nothing can be drawn on it. Draw an attention "
            "matrix instead."
        )
    boxes, (row, col) = grid.boxes[with_box], grid.places[with_box].T
    width, height = (boxes[:, 2:] - boxes[:, :2]).mean(0)
    x, y = float((boxes[:, 0] - col * width).mean()), float((boxes[:, 1] - row * height).mean())
    left, top = x + col * width, y + row * height
    even = np.column_stack([left, top, left + width, top + height])
    off = np.abs(even - boxes).max()
    if off > 0.01 * min(width, height):
        raise GeometryError(
            f"The token boxes of this image do not form a regular {grid.rows} x {grid.cols} grid: "
            f"a box is {off:.2f} px off. Overlays require a regular grid."
        )
    return x, x + grid.cols * float(width), y + grid.rows * float(height), y


def uncovered(placed: PlacedImage) -> list[PixelBox]:
    """Return the parts of the image that no token covers: cropped borders and empty cells."""
    grid = placed.grid
    left, right, bottom, top = extent(grid)
    borders = [
        (0.0, 0.0, left, grid.height),
        (right, 0.0, grid.width, grid.height),
        (left, 0.0, right, top),
        (left, bottom, right, grid.height),
    ]
    empty = np.argwhere(np.isnan(placed.on_grid(np.ones(len(grid.places)))))
    width, height = (right - left) / grid.cols, (bottom - top) / grid.rows
    x, y = left + empty[:, 1] * width, top + empty[:, 0] * height
    borders += list(zip(x, y, x + width, y + height, strict=True))
    return [box for box in borders if box[2] - box[0] > 1e-6 and box[3] - box[1] > 1e-6]
