"""What some processors do with frames, and others don't.

They tell the places of their patches (Gemma 4), make them square (SmolVLM) or pad them (GLM-5).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from xmodal_interp.errors import GeometryError
from xmodal_interp.models.geometry.cells import Box, joined, nowhere, rectangle
from xmodal_interp.models.geometry.merged import size_within_tokens
from xmodal_interp.models.geometry.replaying import check_replayed
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


def squeezed(settings: Any, size: tuple[int, int], width: int, height: int) -> Box:
    """What is shown where a frame of ``size`` is made square without regard to its shape: all.

    Args:
        settings: The video processor.
        size: Width and height of the frame, px.
        width: Width of the pixels that were returned.
        height: Height of them.

    Raises:
        GeometryError: The settings do not lead to these pixels.
    """
    side = settings.max_image_size["longest_edge"]
    check_replayed((side, side) if settings.do_resize else size, (width, height))
    return 0.0, 0.0, float(size[0]), float(size[1])


def within_video_tokens(settings: Any, video: Video, width: int, height: int) -> tuple[int, int]:
    """Frames that are made larger only where all of them have too few tokens, then padded."""
    return size_within_tokens(settings, video.size, len(video), width, height)
