"""What a rule returns: the tokens of one image with their rows, columns and boxes.

A tiled image has two views: the image itself in full detail, from the tiles side by side, and often
a thumbnail of all of it. Each view has rows and columns of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from PIL import Image

from xmodal_interp.errors import GeometryError

NOWHERE = -1
"""The row and column of a token without a place: class tokens, line breaks, padding tiles; also the
tile of a token that is of no tile."""

IMAGE, THUMBNAIL = "image", "thumbnail"
VIEWS: tuple[str, ...] = (IMAGE, THUMBNAIL)


@dataclass(frozen=True, eq=False)
class Thumbnail:
    """The thumbnail of a tiled image or video: rows and columns of its own, for the same tokens.

    Attributes:
        rows: Rows of its tokens.
        cols: Columns of its tokens.
        places: Row and column of each token of the image, of a video frame, row and column;
            ``NOWHERE`` for those not of this view.
        patch_rows: Rows of its vision-tower patches.
        patch_cols: Columns of them.
        patch_places: The same of each vision-tower position; ``NOWHERE`` for those not of this
            view.
    """

    rows: int
    cols: int
    places: Int[np.ndarray, "token axis"]
    patch_rows: int
    patch_cols: int
    patch_places: Int[np.ndarray, "patch axis"]


class Viewed:
    """What images and videos have in common: tokens of the tiles, and of a thumbnail."""

    places: Int[np.ndarray, "token axis"]
    thumbnail: Thumbnail | None

    @property
    def n_tokens(self) -> int:
        """Tokens it takes: class tokens, line breaks and thumbnail included."""
        return len(self.places)

    @property
    def places_by_view(self) -> Int[np.ndarray, "token axis"]:
        """The place of each token in the view that it is of."""
        if self.thumbnail is None:
            return self.places
        return np.where(self.in_thumbnail[:, None], self.thumbnail.places, self.places)

    @property
    def in_thumbnail(self) -> np.ndarray:
        """Whether each token is of the thumbnail, ``[token]``."""
        if self.thumbnail is None:
            return np.zeros(len(self.places), dtype=bool)
        inside: np.ndarray = self.thumbnail.places[:, 0] >= 0
        return inside

    def of_view(self, view: str, what: str) -> Any:
        """Itself, or its thumbnail: what has the rows, columns and places of a view.

        Raises:
            GeometryError: It has no such view.
        """
        if view not in VIEWS or (view == THUMBNAIL and self.thumbnail is None):
            known = VIEWS if self.thumbnail is not None else (IMAGE,)
            kind = what.partition(" ")[0].lower()
            raise GeometryError(
                f"A view must be one that the {kind} has. {what} has "
                f"{' and '.join(map(repr, known))}; got {view!r}."
            )
        return self if view == IMAGE else self.thumbnail


@dataclass(frozen=True, eq=False)
class ImageGrid(Viewed):
    """The tokens of one image, in sequence order.

    Attributes:
        width: Width of the original image, px.
        height: Height of the original image, px.
        rows: Rows of the grid of tokens; of the tiles side by side, where there are several.
        cols: Columns of the grid of tokens.
        places: Row and column of each token; ``NOWHERE`` for tokens without one, and for those of
            the thumbnail, whose rows and columns are in ``thumbnail``.
        boxes: ``(x0, y0, x1, y1)`` of each token in pixels of the original image, those of the
            thumbnail included; NaN without a place.
        patch_rows: Rows of the grid of vision-tower patches.
        patch_cols: Columns of it.
        patch_places: Row and column of each vision-tower position, tile by tile as the tower reads
            them; ``NOWHERE`` for a class token, a learned query, padding, and for a patch of an
            overlap that no token reads.
        tiles: Which tile each token is of, 0-based in reading order; ``NOWHERE`` for tokens of no
            tile. None where the image is not tiled.
        thumbnail: The view of the whole image beside the tiles, if there is one.
        patch_boxes: ``(x0, y0, x1, y1)`` of each vision-tower position in pixels of the original
            image, NaN without a place. None where the patches fill the same box as the tokens.
        reason: Why the tokens have no places, where the family has no rule for them.
    """

    width: int
    height: int
    rows: int
    cols: int
    places: Int[np.ndarray, "token 2"]
    boxes: Float[np.ndarray, "token 4"]
    patch_rows: int
    patch_cols: int
    patch_places: Int[np.ndarray, "patch 2"]
    tiles: Int[np.ndarray, " token"] | None = None
    thumbnail: Thumbnail | None = None
    patch_boxes: Float[np.ndarray, "patch 4"] | None = None
    reason: str | None = None

    def arranged(
        self, values: Float[np.ndarray, " token"], view: str = IMAGE, *, number: int = 0
    ) -> Float[np.ndarray, "row col"]:
        """One value per token, or per vision-tower position, on the cells of a view.

        Args:
            values: In sequence order, tokens without a place included.
            view: ``"image"`` or ``"thumbnail"``.
            number: Which image it is, for messages.

        Raises:
            GeometryError: The tokens have no places, there is no such view, or the number of values
                is neither that of the tokens nor that of the vision positions.
        """
        of = self.of_view(view, f"Image {number}")
        if values.shape == (len(of.places),) and of.rows:
            return place_on_grid(values, of.places, of.rows, of.cols)
        if values.shape == (len(of.patch_places),) and of.patch_rows:
            return place_on_grid(values, of.patch_places, of.patch_rows, of.patch_cols)
        if self.reason is not None:
            raise GeometryError(f"Image {number} has no grid. {self.reason}")
        if values.shape == (len(of.places),) and self.thumbnail is not None:
            raise GeometryError(
                f"A view must have rows of tokens. Those of image {number} in the view {view!r} "
                "were all cut off with its padding, for it is long and narrow; its thumbnail has "
                f"{self.thumbnail.rows} x {self.thumbnail.cols}: view='thumbnail'."
            )
        raise GeometryError(
            f"Image {number} has {len(of.places)} tokens ({of.rows} x {of.cols}) and "
            f"{len(of.patch_places)} vision positions ({of.patch_rows} x {of.patch_cols}); "
            f"got values of shape {values.shape}."
        )


Rule = Callable[[Any, Any, Mapping[str, Any], Sequence[Image.Image]], list[ImageGrid]]
"""``(processor, config, inputs, images) -> grids``: one grid per image, in order."""


def unplaced(size: tuple[int, int], n_tokens: int, reason: str) -> ImageGrid:
    """The grid of an image whose tokens have no known places, and why."""
    nothing = np.full((n_tokens, 2), NOWHERE)
    none = np.empty((0, 2), dtype=int)
    boxes = np.full((n_tokens, 4), np.nan)
    return ImageGrid(*size, 0, 0, nothing, boxes, 0, 0, none, reason=reason)


def place_on_grid(
    values: Float[np.ndarray, " token"], places: Int[np.ndarray, "token axis"], *shape: int
) -> Float[np.ndarray, "..."]:
    """Values on their cells; NaN on cells without a token.

    Args:
        values: One per token.
        places: The cell of each token: row and column, of a video frame, row and column.
        *shape: How many rows and columns there are, or frames, rows and columns.
    """
    out = np.full(shape, np.nan)
    placed = places[:, 0] >= 0
    out[tuple(places[placed].T)] = values[placed]
    return out


def raster(rows: int, cols: int) -> Int[np.ndarray, "token 2"]:
    """Row and column of every cell, row by row."""
    return np.stack(np.divmod(np.arange(rows * cols), cols), axis=1)
