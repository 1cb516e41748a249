"""Frames that are read as pictures are: cut into tiles with a thumbnail, or pooled from patches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from xmodal_interp.errors import GeometryError
from xmodal_interp.models.geometry.cells import Cells, joined, rectangle
from xmodal_interp.models.geometry.grid import NOWHERE, raster
from xmodal_interp.models.geometry.overlapping import pooled_cells
from xmodal_interp.models.geometry.replaying import video_setting
from xmodal_interp.models.geometry.sized_tiles import (
    Shape,
    frame_slice_block,
    frame_slices,
    sized_views,
)
from xmodal_interp.models.geometry.tiling import Tiling
from xmodal_interp.models.geometry.video import VideoGrid, video_grid, whole
from xmodal_interp.models.opening import Video

_SIZES = "target_sizes_videos"


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
        if n_frames != len(video):
            raise GeometryError(
                "A processor must return each frame of a video once. It returned "
                f"{n_frames} for a video of {len(video)}."
            )
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


def sliced_frames(
    processor: Any, _config: Any, inputs: Mapping[str, Any], videos: Sequence[Video]
) -> list[VideoGrid]:
    """Each frame is read whole, and cut into slices behind that if it is large (MiniCPM-V).

    Where it is cut, the whole frame is its thumbnail.

    Raises:
        GeometryError: The processor puts several frames into one picture or does not resize them;
            or the sizes it returned are not those of the frames and their slices.
    """
    for name, wanted in {"stack_frames": 1, "do_resize": True}.items():
        told = video_setting(processor, name, wanted)
        if told != wanted:
            raise GeometryError(
                "Each frame of a video must be resized by itself to be placed. The video processor "
                f"has {name}={told}; set it to {wanted}."
            )
    tilings = [frame_slices(processor, video) for video in videos]
    counts = [1 if tiling is None else 1 + len(tiling.boxes) for tiling in tilings]
    shapes = [(rows, cols) for rows, cols in np.asarray(inputs[_SIZES]).tolist()]
    n_expected = sum(count * len(video) for count, video in zip(counts, videos, strict=True))
    if n_expected != len(shapes):
        raise GeometryError(
            f"The processor must return {_SIZES} for each frame and slice. Its settings "
            f"lead to {n_expected} of them; it returned {len(shapes)}."
        )
    block = frame_slice_block(processor)
    grids, start = [], 0
    for video, tiling, count in zip(videos, tilings, counts, strict=True):
        frames, tower = [], []
        for _ in range(len(video)):
            own = shapes[start : start + count]
            start += count
            merged = [(rows // block, cols // block) for rows, cols in own]
            frames.append(_frame(video, tiling, merged))
            tower.append(_frame(video, tiling, own))
        grids.append(video_grid(video, frames, tower))
    return grids


def _frame(video: Video, tiling: Tiling | None, shapes: Sequence[Shape]) -> Cells:
    """The cells of a frame: of all of it, then of its slices."""
    return joined(sized_views(tiling, shapes, whole(video), "first", told_by=_SIZES))
