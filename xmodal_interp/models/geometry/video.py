"""The tokens of videos: one grid per frame, or per group of merged frames."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from xmodal_interp.errors import GeometryError
from xmodal_interp.models.geometry.cells import Box, Cells, in_blocks, joined, nowhere, rectangle
from xmodal_interp.models.geometry.grid import IMAGE, NOWHERE, Thumbnail, Viewed, place_on_grid
from xmodal_interp.models.geometry.patches import block_of, patch_side
from xmodal_interp.models.geometry.replaying import shown_by
from xmodal_interp.models.opening import Video


@dataclass(frozen=True, eq=False)
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
            f"got values of shape {values.shape}."
        )


VideoRule = Callable[[Any, Any, Mapping[str, Any], Sequence[Video]], list[VideoGrid]]
"""``(processor, config, inputs, videos) -> grids``: one grid per video, in order."""


FrameContent = Callable[[Any, Video, int, int], tuple[int, int]]
"""``(settings, video, width, height) -> width, height``: the pixels that are not padding."""


@dataclass(frozen=True)
class MergedFrames:
    """Frames that are resized to whole blocks of patches and merged in time (Qwen2-VL).

    If the processor drops tokens that repeat the frame before (VideoLLaMA3), its compression mask
    gives the tokens that are kept.

    Attributes:
        in_model: Whether the model merges frames. If not, the processor does, and returns the
            number of merged frames.
        by_rows: Whether the vision tower reads its patches row by row, not block by block.
        content: Function that returns the size of the frame at the top left of padded pixels. None
            if there is no padding.
    """

    in_model: bool = False
    by_rows: bool = False
    content: FrameContent | None = None

    def __call__(
        self, processor: Any, _config: Any, inputs: Mapping[str, Any], videos: Sequence[Video]
    ) -> list[VideoGrid]:
        """Return one grid per video."""
        grid_thw = np.asarray(inputs["video_grid_thw"]).tolist()
        settings = processor.video_processor
        merge = settings.merge_size
        told = inputs.get("video_compression_mask")
        left = None if told is None else np.asarray(told)
        grids = []
        for video, (n, patch_rows, patch_cols) in zip(videos, grid_thw, strict=True):
            together = settings.temporal_patch_size if self.in_model else 1
            box = self._box(settings, video, patch_rows, patch_cols)
            tokens = rectangle(patch_rows // merge, patch_cols // merge, box)
            patches = rectangle(patch_rows, patch_cols, box)
            patches = patches if self.by_rows else in_blocks(patches, patch_cols, merge)
            frames = [tokens] * (n // together)
            if left is not None:
                of_video, left = (
                    left[: len(tokens) * len(frames)],
                    left[len(tokens) * len(frames) :],
                )
                frames = [tokens[kept] for kept in of_video.reshape(len(frames), -1)]
            grids.append(video_grid(video, frames, [patches] * n))
        return grids

    def _box(self, settings: Any, video: Video, rows: int, cols: int) -> Box:
        """Return the box of all patches."""
        x0, y0, x1, y1 = whole(video)
        if self.content is None:
            return x0, y0, x1, y1
        width, height = cols * settings.patch_size, rows * settings.patch_size
        content_w, content_h = self.content(settings, video, width, height)
        return x0, y0, x1 * width / content_w, y1 * height / content_h


FrameShow = Callable[[Any, tuple[int, int], int, int], Box]
"""``(settings, size, width, height) -> box``: the part of a frame of ``size`` that is shown."""


@dataclass(frozen=True)
class SingleFrames:
    """Frames that are resized to one size and get a separate grid each.

    Frames that a processor appends to pad the shorter videos of a batch are ignored.

    Attributes:
        merge: The side of the block of patches that gives a token, as in :class:`SplitTiles`.
        before: Number of tokens outside the grid before those of each frame (class tokens).
        behind: Number of tokens outside the grid after the last frame (newline token).
        class_token: Whether the vision tower has a class token before the patches of each frame, or
            the configuration attribute that holds this; None to use the processor's number.
        show: Function that returns the part of a frame that is shown, from the video processor.
    """

    merge: str | int = 1
    before: int = 0
    behind: int = 0
    class_token: bool | str | None = None
    show: FrameShow = shown_by

    def __call__(
        self, processor: Any, config: Any, inputs: Mapping[str, Any], videos: Sequence[Video]
    ) -> list[VideoGrid]:
        """Return one grid per video.

        If the patches of a frame are not a whole number of blocks, the model pools them evenly, so
        the boxes are of equal size too.
        """
        pixels = inputs.get("pixel_values_videos", inputs.get("pixel_values"))
        height, width = pixels.shape[-2:]
        side = patch_side(config, processor)
        patch_rows, patch_cols = height // side, width // side
        block = block_of(config, self.merge, patch_rows, patch_cols)
        rows, cols = -(-patch_rows // block), -(-patch_cols // block)
        first = self._class_tokens(processor, config)
        grids = []
        for video in videos:
            box = self.show(processor.video_processor, video.size, width, height)
            tokens = joined([nowhere(self.before), rectangle(rows, cols, box)])
            patches = joined([nowhere(first), rectangle(patch_rows, patch_cols, box)])
            n = len(video)
            grids.append(video_grid(video, [tokens] * n, [patches] * n, behind=self.behind))
        return grids

    def _class_tokens(self, processor: Any, config: Any) -> int:
        if self.class_token is None:
            return int(getattr(processor, "num_additional_image_tokens", None) or 0)
        told = self.class_token
        return int(getattr(config, told) if isinstance(told, str) else told)


def video_grid(
    video: Video, frames: Sequence[Cells], tower: Sequence[Cells], *, behind: int = 0
) -> VideoGrid:
    """Return the grid of a video.

    Args:
        video: The video, with opened frames.
        frames: The cells of each frame of tokens.
        tower: The cells of each frame that the vision tower reads.
        behind: Number of tokens outside the grid after the last frame.

    Raises:
        GeometryError: There is no frame of tokens.
    """
    if not frames:
        raise GeometryError("The video has no frame of tokens. Give it more frames.")
    token, patch = joined([*frames, nowhere(behind)]), joined(tower)
    main, small = _by_view([*frames, nowhere(behind)])
    main_patches, small_patches = _by_view(tower)
    thumbnail = None
    if token.of_thumbnail.any() or patch.of_thumbnail.any():
        shape, patch_shape = _extent(small)[1:], _extent(small_patches)[1:]
        thumbnail = Thumbnail(*shape, small, *patch_shape, small_patches)
    together = -(-len(video) // len(frames))
    pace = np.nan if video.fps is None else 1 / video.fps
    return VideoGrid(
        *video.size,
        *_extent(main),
        main,
        token.boxes,
        np.arange(len(frames)) * together * pace,
        *_extent(main_patches),
        main_patches,
        tiles=token.tiles if (token.tiles != NOWHERE).any() else None,
        thumbnail=thumbnail,
    )


def _by_view(
    frames: Sequence[Cells],
) -> tuple[Int[np.ndarray, "token 3"], Int[np.ndarray, "token 3"]]:
    """Return frame, row and column of all cells: within the frames, and within the thumbnails."""
    cells = joined(frames)
    frame = np.repeat(np.arange(len(frames)), [len(each) for each in frames])
    places = np.column_stack([np.where(cells.places[:, 0] < 0, NOWHERE, frame), cells.places])
    small = cells.of_thumbnail[:, None]
    return np.where(small, NOWHERE, places), np.where(small, places, NOWHERE)


def _extent(places: Int[np.ndarray, "token 3"]) -> tuple[int, int, int]:
    """Return the numbers of frames, rows and columns that the cells span."""
    frames, rows, cols = (places.max(0) + 1).tolist()
    return frames, rows, cols


def _times(sizes: tuple[int, ...]) -> str:
    return " x ".join(map(str, sizes))


def whole(video: Video) -> Box:
    """Return the box of a whole frame, px."""
    width, height = video.size
    return 0.0, 0.0, float(width), float(height)
