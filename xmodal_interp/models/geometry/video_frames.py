"""Videos whose frames come as patches with their column and row beside them (Gemma 4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from xmodal_interp.errors import GeometryError
from xmodal_interp.models.geometry.cells import joined, nowhere, rectangle
from xmodal_interp.models.geometry.video import VideoGrid, video_grid, whole
from xmodal_interp.models.opening import Video


@dataclass(frozen=True)
class PositionedFrames:
    """Each frame is read as an image of its own; squares of its patches give a token.

    As for images, the sides are rounded down to whole squares, so that the boxes fill the frame
    exactly, and the patches of each frame are followed by padding without a place.

    Attributes:
        merged: Whether the processor has merged the squares, so that each patch gives a token.
    """

    merged: bool = False

    def __call__(
        self, processor: Any, _config: Any, inputs: Mapping[str, Any], videos: Sequence[Video]
    ) -> list[VideoGrid]:
        """One grid per video.

        Raises:
            GeometryError: The processor returned another number of frames than were given.
        """
        counts = np.asarray(inputs["num_frames_per_video"]).tolist()
        given = [len(video) for video in videos]
        if counts != given:
            raise GeometryError(
                "The processor must return the frames that it was given. It got videos of "
                f"{', '.join(map(str, given))} frames, and returned {', '.join(map(str, counts))}."
            )
        positions = np.asarray(inputs["video_position_ids"])
        block = 1 if self.merged else processor.video_processor.pooling_kernel_size
        grids = []
        for video, first in zip(videos, np.cumsum([0, *counts]).tolist(), strict=False):
            cols, rows = (positions[first].max(0) + 1).tolist()
            tokens = rectangle(rows // block, cols // block, whole(video))
            padding = nowhere(positions.shape[1] - rows * cols)
            tower = joined([rectangle(rows, cols, whole(video)), padding])
            grids.append(video_grid(video, [tokens] * len(video), [tower] * len(video)))
        return grids
