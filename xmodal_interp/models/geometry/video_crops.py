"""Frames processed like images: cut into tiles with a thumbnail, or pooled from patches."""

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
    """Place tokens that pool patches of frames resized without their aspect ratio (Molmo 2).

    ``video_token_pooling`` of the processor gives the patches of each token. If the patches are not
    a whole number of windows, the tokens at the edges are smaller.

    Raises:
        GeometryError: The processor returned another number of patches than its settings give, or
            another number of frames than the videos have.
    """
    pooling = np.asarray(inputs["video_token_pooling"])
    n = video_setting(processor, "size")["height"] // video_setting(processor, "patch_size")
    if n**2 != inputs["pixel_values_videos"].shape[1]:
        raise GeometryError(
            f"The video processor returned {inputs['pixel_values_videos'].shape[1]} patches per "
            f"frame, but its settings lead to {n} x {n}. Use the checkpoint's own settings."
        )
    grids, first_token, first_patch = [], 0, 0
    shapes = np.asarray(inputs["video_grids"]).tolist()
    for video, (n_frames, rows, cols) in zip(videos, shapes, strict=True):
        if n_frames != len(video):
            raise GeometryError(
                f"The processor returned {n_frames} frames for a video of {len(video)}. Set it to "
                "return each frame once."
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
    """Place each frame, followed by its slices if the frame is large (MiniCPM-V).

    The whole frame is the thumbnail of its slices.

    Raises:
        GeometryError: The processor stacks several frames into one picture or does not resize them,
            or the number of sizes is not that of the frames and their slices.
    """
    for name, wanted in {"stack_frames": 1, "do_resize": True}.items():
        told = video_setting(processor, name, wanted)
        if told != wanted:
            raise GeometryError(
                f"The video processor has {name}={told}, so frames are not resized one by one and "
                f"cannot be placed. Set {name}={wanted}."
            )
    tilings = [frame_slices(processor, video) for video in videos]
    counts = [1 if tiling is None else 1 + len(tiling.boxes) for tiling in tilings]
    shapes = [(rows, cols) for rows, cols in np.asarray(inputs[_SIZES]).tolist()]
    n_expected = sum(count * len(video) for count, video in zip(counts, videos, strict=True))
    if n_expected != len(shapes):
        raise GeometryError(
            f"The processor returned {len(shapes)} {_SIZES}, but its settings lead to {n_expected} "
            "frames and slices. Use the checkpoint's own processor settings."
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
    """Return the cells of the whole frame, then those of its slices."""
    return joined(sized_views(tiling, shapes, whole(video), "first", told_by=_SIZES))
