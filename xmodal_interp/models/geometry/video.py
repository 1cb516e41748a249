"""The tokens of videos: a grid for each frame, or for each few frames that are merged."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from xmodal_interp.errors import GeometryError
from xmodal_interp.models.geometry.cells import Box, Cells, joined, nowhere, rectangle
from xmodal_interp.models.geometry.grid import NOWHERE
from xmodal_interp.models.geometry.patches import block_of, patch_side
from xmodal_interp.models.geometry.replaying import shown_by
from xmodal_interp.models.opening import Video


@dataclass(frozen=True, eq=False)
class VideoGrid:
    """The tokens of one video, in sequence order.

    Attributes:
        width: Width of the original frames, px.
        height: Height of the original frames, px.
        frames: How many frames of tokens there are; one may stand for several of the video's.
        rows: Rows of tokens of a frame.
        cols: Columns of tokens of a frame.
        places: Frame, row and column of each token; ``NOWHERE`` for tokens without a place.
        boxes: ``(x0, y0, x1, y1)`` of each token in pixels of the original frames, NaN without a
            place.
        times: When each frame of tokens begins, in seconds; NaN where the pace is not known.
    """

    width: int
    height: int
    frames: int
    rows: int
    cols: int
    places: Int[np.ndarray, "token 3"]
    boxes: Float[np.ndarray, "token 4"]
    times: Float[np.ndarray, " frame"]

    @property
    def n_tokens(self) -> int:
        """Tokens this video takes."""
        return len(self.places)


VideoRule = Callable[[Any, Any, Mapping[str, Any], Sequence[Video]], list[VideoGrid]]
"""``(processor, config, inputs, videos) -> grids``: one grid per video, in order."""


@dataclass(frozen=True)
class MergedFrames:
    """Frames that are resized to whole blocks of patches and merged in time (Qwen2-VL and kin).

    Attributes:
        in_model: Whether the model merges frames, after the processor; else the processor has done
            so, and tells how many are left.
    """

    in_model: bool = False

    def __call__(
        self, processor: Any, _config: Any, inputs: Mapping[str, Any], videos: Sequence[Video]
    ) -> list[VideoGrid]:
        """One grid per video."""
        grid_thw = np.asarray(inputs["video_grid_thw"]).tolist()
        settings = processor.video_processor
        grids = []
        for video, (n, patch_rows, patch_cols) in zip(videos, grid_thw, strict=True):
            together = settings.temporal_patch_size if self.in_model else 1
            rows, cols = patch_rows // settings.merge_size, patch_cols // settings.merge_size
            cells = rectangle(rows, cols, _whole(video))
            grids.append(_grid(video, [cells] * (n // together), rows, cols))
        return grids


@dataclass(frozen=True)
class SingleFrames:
    """Each frame is resized to one size and gives a grid of its own.

    Attributes:
        merge: The side of the square of patches that gives a token, as for tiles.
        before: Tokens without a place before each frame's: a class token.
        behind: Tokens without a place behind the last frame's: a newline token.
    """

    merge: str | int = 1
    before: int = 0
    behind: int = 0

    def __call__(
        self, processor: Any, config: Any, inputs: Mapping[str, Any], videos: Sequence[Video]
    ) -> list[VideoGrid]:
        """One grid per video.

        Where the patches of a frame are no whole number of squares, the last of a row or column is
        smaller in the tower, but the model spreads all of them evenly: so do the boxes.
        """
        pixels = inputs.get("pixel_values_videos", inputs.get("pixel_values"))
        height, width = pixels.shape[-2:]
        side = patch_side(config, processor)
        patch_rows, patch_cols = height // side, width // side
        block = block_of(config, self.merge, patch_rows, patch_cols)
        rows, cols = -(-patch_rows // block), -(-patch_cols // block)
        grids = []
        for video in videos:
            box = shown_by(processor.video_processor, video.size, width, height)
            cells = joined([nowhere(self.before), rectangle(rows, cols, box)])
            frames = [cells] * len(video)
            grids.append(_grid(video, frames, rows, cols, behind=self.behind))
        return grids


def _grid(
    video: Video, frames: Sequence[Cells], rows: int, cols: int, *, behind: int = 0
) -> VideoGrid:
    """The grid of a video whose frames of tokens have these cells."""
    if not frames:
        raise GeometryError("A video must have at least one frame of tokens; it has none.")
    cells = joined([*frames, nowhere(behind)])
    frame = np.concatenate([np.full(len(each), i) for i, each in enumerate(frames)])
    frame = np.concatenate([frame, np.full(behind, NOWHERE)])
    frame = np.where(cells.places[:, 0] < 0, NOWHERE, frame)
    together = -(-len(video) // len(frames))
    pace = np.nan if video.fps is None else 1 / video.fps
    return VideoGrid(
        *video.size,
        len(frames),
        rows,
        cols,
        np.column_stack([frame, cells.places]),
        cells.boxes,
        np.arange(len(frames)) * together * pace,
    )


def _whole(video: Video) -> Box:
    width, height = video.size
    return 0.0, 0.0, float(width), float(height)
