"""The tokens of one image or video with their rows, columns and boxes: the result of a rule.

A tiled image has up to two views: the tiles side by side, in full detail, and a thumbnail of the
whole image. Each view has separate rows and columns.
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
"""The row and column of tokens outside the grid (class tokens, line breaks, padding tiles), and the
tile of tokens that belong to no tile."""

PADDING = "padding"
"""The name of vision-tower positions that hold padding."""

IMAGE, THUMBNAIL = "image", "thumbnail"
VIEWS: tuple[str, ...] = (IMAGE, THUMBNAIL)


@dataclass(frozen=True, eq=False)
class Thumbnail:
    """The thumbnail of a tiled image or video, with separate rows and columns.

    Attributes:
        rows: Number of rows of its tokens.
        cols: Number of columns of its tokens.
        places: Row and column of each token of the image (for videos: frame, row and column);
            ``NOWHERE`` for tokens of other views.
        patch_rows: Number of rows of its vision-tower patches.
        patch_cols: Number of columns of its vision-tower patches.
        patch_places: Row and column (for videos: frame, row and column) of each vision-tower
            position; ``NOWHERE`` for positions of other views.
    """

    rows: int
    cols: int
    places: Int[np.ndarray, "token axis"]
    patch_rows: int
    patch_cols: int
    patch_places: Int[np.ndarray, "patch axis"]

    def __repr__(self) -> str:
        """Return a line with the sizes of the grid."""
        return f"Thumbnail({self.rows} x {self.cols} tokens)"


class Viewed:
    """Common parts of images and videos: tokens of the tiles and of a thumbnail."""

    width: int
    height: int
    rows: int
    cols: int
    places: Int[np.ndarray, "token axis"]
    patch_rows: int
    patch_cols: int
    tiles: Int[np.ndarray, " token"] | None
    thumbnail: Thumbnail | None

    def __repr__(self) -> str:
        """Return a line with the sizes of the picture, of its grid and of the vision tower."""
        frames = f"{self.frames} frames of " if isinstance(self, VideoGrid) else ""
        parts = [
            f"{self.width} x {self.height} px",
            f"{frames}{self.rows} x {self.cols} tokens (row x col), {self.n_tokens} in total",
            f"{self.patch_rows} x {self.patch_cols} patches",
        ]
        if self.tiles is not None and self.tiles.size:
            parts.append(f"{int(self.tiles.max()) + 1} tiles")
        if self.thumbnail is not None:
            parts.append(repr(self.thumbnail))
        return f"{type(self).__name__}({'; '.join(parts)})"

    @property
    def n_tokens(self) -> int:
        """Number of tokens, including class tokens, line breaks and the thumbnail."""
        return len(self.places)

    @property
    def places_by_view(self) -> Int[np.ndarray, "token axis"]:
        """Row and column of each token in its own view."""
        if self.thumbnail is None:
            return self.places
        return np.where(self.in_thumbnail[:, None], self.thumbnail.places, self.places)

    @property
    def in_thumbnail(self) -> np.ndarray:
        """Whether each token belongs to the thumbnail, ``[token]``."""
        if self.thumbnail is None:
            return np.zeros(len(self.places), dtype=bool)
        inside: np.ndarray = self.thumbnail.places[:, 0] >= 0
        return inside

    def of_view(self, view: str, what: str) -> Any:
        """Return the object with the rows, columns and places of a view: self or the thumbnail.

        Raises:
            GeometryError: There is no such view.
        """
        if view not in VIEWS or (view == THUMBNAIL and self.thumbnail is None):
            known = VIEWS if self.thumbnail is not None else (IMAGE,)
            kind = what.partition(" ")[0].lower()
            raise GeometryError(
                f"{what} has no view {view!r}. The views of this {kind} are "
                f"{' and '.join(map(repr, known))}."
            )
        return self if view == IMAGE else self.thumbnail


@dataclass(frozen=True, eq=False, repr=False)
class ImageGrid(Viewed):
    """The tokens of one image, in sequence order.

    Attributes:
        width: Width of the original image, px.
        height: Height of the original image, px.
        rows: Number of rows of tokens, over all tiles side by side.
        cols: Number of columns of tokens, over all tiles side by side.
        places: Row and column of each token; ``NOWHERE`` for tokens outside the grid, and for those
            of the thumbnail, whose rows and columns are in ``thumbnail``.
        boxes: ``(x0, y0, x1, y1)`` of each token, thumbnail included, in pixels of the original
            image; NaN outside the grid.
        patch_rows: Number of rows of vision-tower patches.
        patch_cols: Number of columns of vision-tower patches.
        patch_places: Row and column of each vision-tower position, in the order of the tower;
            ``NOWHERE`` for class tokens, learned queries, padding, and patches in an overlap that
            no token pools.
        tiles: The tile of each token, 0-based in reading order; ``NOWHERE`` for tokens of no tile.
            None if the image is not tiled.
        thumbnail: The thumbnail view, if there is one.
        patch_boxes: ``(x0, y0, x1, y1)`` of each vision-tower position in pixels of the original
            image; NaN outside the grid. None if the patches fill the same box as the tokens.
        reason: Why the tokens have no rows and columns, if the family has no rule for them; or how
            their boxes were measured without a rule.
        patch_names: Name of each vision-tower position without a place, such as ``"class"`` or
            ``"register 0"``; empty for patches. None if the rule names no positions.
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
    patch_names: np.ndarray | None = None

    def arranged(
        self, values: Float[np.ndarray, " token"], view: str = IMAGE, *, number: int = 0
    ) -> Float[np.ndarray, "row col"]:
        """Arrange one value per token, or per vision-tower position, on the grid of a view.

        Args:
            values: Values in sequence order, including tokens outside the grid.
            view: ``"image"`` or ``"thumbnail"``.
            number: Number of the image, for messages.

        Returns:
            The values on the grid; NaN in cells without a token.

        Raises:
            GeometryError: The tokens have no rows and columns, there is no such view, or the number
                of values is neither that of the tokens nor that of the vision positions.
        """
        of = self.of_view(view, f"Image {number}")
        if values.shape == (len(of.places),) and of.rows:
            return place_on_grid(values, of.places, of.rows, of.cols)
        if values.shape == (len(of.patch_places),) and of.patch_rows:
            return place_on_grid(values, of.patch_places, of.patch_rows, of.patch_cols)
        if self.reason is not None and not self.rows:
            raise GeometryError(f"Image {number} has no grid. {self.reason}")
        if values.shape == (len(of.places),) and self.thumbnail is not None:
            raise GeometryError(
                f"Image {number} has no tokens in the view {view!r}: it is so narrow that the "
                "model removed them together with the padding. Use view='thumbnail', which has "
                f"{self.thumbnail.rows} x {self.thumbnail.cols} tokens."
            )
        raise GeometryError(
            f"Image {number} has {len(of.places)} tokens ({of.rows} x {of.cols}) and "
            f"{len(of.patch_places)} vision positions ({of.patch_rows} x {of.patch_cols}); "
            f"got values of shape {values.shape}. Pass one value per token, such as "
            f"sample.probs(keys=xi.at.image({number}))[head, query]."
        )


ImageRule = Callable[[Any, Any, Mapping[str, Any], Sequence[Image.Image]], list[ImageGrid]]
"""``(processor, config, inputs, images) -> grids``: one grid per image, in order."""


def unplaced(size: tuple[int, int], n_tokens: int, reason: str) -> ImageGrid:
    """Return the grid of an image whose tokens have no rows and columns, with the reason."""
    nothing = np.full((n_tokens, 2), NOWHERE)
    none = np.empty((0, 2), dtype=int)
    boxes = np.full((n_tokens, 4), np.nan)
    return ImageGrid(*size, 0, 0, nothing, boxes, 0, 0, none, reason=reason)


def place_on_grid(
    values: Float[np.ndarray, " token"], places: Int[np.ndarray, "token axis"], *shape: int
) -> Float[np.ndarray, "..."]:
    """Return values on the cells of a grid; NaN in cells without a token.

    Args:
        values: One value per token.
        places: Row and column of each token (for videos: frame, row and column).
        *shape: Number of rows and columns (for videos: frames, rows and columns).
    """
    out = np.full(shape, np.nan)
    placed = places[:, 0] >= 0
    out[tuple(places[placed].T)] = values[placed]
    return out


def raster(rows: int, cols: int) -> Int[np.ndarray, "token 2"]:
    """Return row and column of every cell, row by row."""
    return np.stack(np.divmod(np.arange(rows * cols), cols), axis=1)


Box = tuple[float, float, float, float]
"""``(x0, y0, x1, y1)`` in pixels of the original image."""


@dataclass(frozen=True, eq=False, repr=False)
class VideoGrid(Viewed):
    """The tokens of one video, in sequence order.

    Attributes:
        width: Width of the original frames, px.
        height: Height of the original frames, px.
        frames: Number of frames of tokens; each may merge several frames of the video.
        rows: Number of rows of tokens of a frame, over all its tiles side by side.
        cols: Number of columns of tokens of a frame, over all its tiles side by side.
        places: Frame, row and column of each token; ``NOWHERE`` for tokens outside the grid, and
            for those of thumbnails, whose places are in ``thumbnail``.
        boxes: ``(x0, y0, x1, y1)`` of each token in pixels of the original frames; NaN outside the
            grid.
        times: Start of each frame of tokens, in seconds; NaN if ``fps`` is not known.
        patch_frames: Number of frames that the vision tower reads.
        patch_rows: Number of rows of vision-tower patches in a frame.
        patch_cols: Number of columns of vision-tower patches in a frame.
        patch_places: Frame, row and column of each vision-tower position, in the order of the
            tower; ``NOWHERE`` for class tokens.
        tiles: The tile of each token within its frame, 0-based in reading order; ``NOWHERE`` for
            tokens of no tile. None if frames are not tiled.
        thumbnail: The view of untiled frames, if there is one.
        frame_indices: Index of the first frame of each frame of tokens, in the video from which the
            frames were taken.
    """

    width: int
    height: int
    frames: int
    rows: int
    cols: int
    places: Int[np.ndarray, "token 3"]
    boxes: Float[np.ndarray, "token 4"]
    times: Float[np.ndarray, " frame"]
    patch_frames: int
    patch_rows: int
    patch_cols: int
    patch_places: Int[np.ndarray, "patch 3"]
    tiles: Int[np.ndarray, " token"] | None = None
    thumbnail: Thumbnail | None = None
    frame_indices: Int[np.ndarray, " frame"] | None = None

    def arranged(
        self, values: Float[np.ndarray, " token"], view: str = IMAGE, *, number: int = 0
    ) -> Float[np.ndarray, "frame row col"]:
        """Arrange one value per token, or per vision-tower position, on the grid of each frame.

        Args:
            values: Values in sequence order, including tokens outside the grid.
            view: ``"image"`` for the frames, ``"thumbnail"`` for the thumbnails of tiled frames.
            number: Number of the video, for messages.

        Returns:
            The values on the grid; NaN in cells without a token.

        Raises:
            GeometryError: There is no such view, or the number of values is neither that of the
                tokens nor that of the vision positions.
        """
        of = self.of_view(view, f"Video {number}")
        tokens = (self.frames, of.rows, of.cols)
        patches = (self.patch_frames, of.patch_rows, of.patch_cols)
        for places, shape in ((of.places, tokens), (of.patch_places, patches)):
            if values.shape == (len(places),):
                return place_on_grid(values, places, *shape)
        raise GeometryError(
            f"Video {number} has {len(self.places)} tokens ({_times(tokens)}) and "
            f"{len(self.patch_places)} vision positions ({_times(patches)}); "
            f"got values of shape {values.shape}. Pass one value per token, such as "
            f"sample.probs(keys=xi.at.video({number}))[head, query]."
        )


def _times(sizes: tuple[int, ...]) -> str:
    return " x ".join(map(str, sizes))
