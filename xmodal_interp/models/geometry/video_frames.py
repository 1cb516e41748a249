"""Rules for processors that handle frames in a special way.

They return the positions of patches (Gemma 4), resize frames to squares (SmolVLM) or pad them
(GLM-5).
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
    """Frames that are read as separate images; blocks of their patches give a token.

    As for images, the sides are rounded down to whole blocks, so the boxes fill the frame exactly.
    The patches of each frame are followed by padding, which is outside the grid.

    Attributes:
        merged: Whether the processor has already merged the blocks, so each patch gives a token.
    """

    merged: bool = False

    def __call__(
        self, processor: Any, _config: Any, inputs: Mapping[str, Any], videos: Sequence[Video]
    ) -> list[VideoGrid]:
        """Return one grid per video.

        Raises:
            GeometryError: The processor returned another number of frames than the videos have.
        """
        counts = np.asarray(inputs["num_frames_per_video"]).tolist()
        given = [len(video) for video in videos]
        if counts != given:
            raise GeometryError(
                f"The processor returned {', '.join(map(str, counts))} frames for videos of "
                f"{', '.join(map(str, given))}. Set it to return each frame once."
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
    """Return the box of a frame of ``size`` that is resized to a square: the whole frame.

    Args:
        settings: The video processor.
        size: Width and height of the frame, px.
        width: Width of the returned pixels.
        height: Height of the returned pixels.

    Raises:
        GeometryError: The settings do not lead to these pixels.
    """
    side = settings.max_image_size["longest_edge"]
    check_replayed((side, side) if settings.do_resize else size, (width, height))
    return 0.0, 0.0, float(size[0]), float(size[1])


def within_video_tokens(settings: Any, video: Video, width: int, height: int) -> tuple[int, int]:
    """Return the size of frames enlarged only if all together have too few tokens, then padded."""
    return size_within_tokens(settings, video.size, len(video), width, height)
