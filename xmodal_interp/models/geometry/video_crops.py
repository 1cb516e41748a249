"""Frames that are read as pictures are: cut into tiles with a thumbnail, or pooled from patches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from xmodal_interp.errors import GeometryError
from xmodal_interp.models.geometry.cells import rectangle
from xmodal_interp.models.geometry.grid import NOWHERE, raster
from xmodal_interp.models.geometry.overlapping import pooled_cells
from xmodal_interp.models.geometry.replaying import video_setting
from xmodal_interp.models.geometry.video import VideoGrid, video_grid, whole
from xmodal_interp.models.opening import Video


def pooled_frames(
    processor: Any, _config: Any, inputs: Mapping[str, Any], videos: Sequence[Video]
) -> list[VideoGrid]:
    """Each frame is resized without regard to its shape; tokens pool patches (Molmo 2).

    Which patches a token pools, the processor says (``video_token_pooling``). Where they are no
    whole number of windows, the tokens at the edges are smaller.

    Raises:
        GeometryError: The processor's settings do not lead to the patches that it returned, or it
            returned other frames than those of the videos.
    """
    pooling = np.asarray(inputs["video_token_pooling"])
    n = video_setting(processor, "size")["height"] // video_setting(processor, "patch_size")
    if n**2 != inputs["pixel_values_videos"].shape[1]:
        raise GeometryError(
            "The video processor's settings must lead to the patches it returned. Replayed were "
            f"{n} x {n} of each frame; returned {inputs['pixel_values_videos'].shape[1]}."
        )
    grids, first_token, first_patch = [], 0, 0
    shapes = np.asarray(inputs["video_grids"]).tolist()
    for video, (n_frames, rows, cols) in zip(videos, shapes, strict=True):
        check_frames(video, n_frames)
        patches, places = rectangle(n, n, whole(video)), raster(rows, cols)
        frames = []
        for _ in range(n_frames):
            read = pooling[first_token : first_token + len(places)]
            frames.append(
                pooled_cells(patches, np.where(read < 0, NOWHERE, read - first_patch), places)
            )
            first_token, first_patch = first_token + len(places), first_patch + len(patches)
        grids.append(video_grid(video, frames, [patches] * n_frames))
    return grids


def check_frames(video: Video, n_frames: int) -> None:
    """Check that a processor made its pictures of a video's own frames, one of each.

    Raises:
        GeometryError: It did not.
    """
    if n_frames != len(video):
        raise GeometryError(
            "A processor must return each frame of a video once. It returned "
            f"{n_frames} for a video of {len(video)}."
        )
