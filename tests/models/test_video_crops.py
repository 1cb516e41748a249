"""Frames that are read as pictures are: pooled from patches."""

from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.models.painting import vlm_of
from tests.tiny import QUESTION
from xmodal_interp.errors import GeometryError
from xmodal_interp.models import FAMILIES, VLM, Video, VideoGrid

pytestmark = pytest.mark.filterwarnings(  # of the processors, about themselves
    "ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning"
)


def clip(width: int, height: int, n_frames: int = 2) -> Video:
    return Video([Image.new("RGB", (width, height), (40 + i, 40, 40)) for i in range(n_frames)], 2)


def prepared(vlm: VLM, *videos: Video) -> tuple[dict[str, Any], tuple[VideoGrid, ...]]:
    inputs, (prompt,) = vlm.prepare([[]], [QUESTION], videos=[list(videos)])
    return inputs, prompt.video_grids


def test_windows_at_the_edges_of_a_frame_pool_fewer_patches() -> None:
    """13 patches in windows of 3: one is missing at both ends."""
    vlm = vlm_of("molmo2")
    _, (grid,) = prepared(vlm, clip(130, 65, n_frames=3))
    assert (grid.frames, grid.rows, grid.cols) == (3, 5, 5)
    assert (grid.patch_frames, grid.patch_rows, grid.patch_cols) == (3, 13, 13)
    x0, y0, x1, y1 = grid.boxes.reshape(3, 5, 5, 4)[1].transpose(2, 0, 1)
    assert np.allclose(x1 - x0, [20, 30, 30, 30, 20])
    assert np.allclose((y1 - y0).T, [10, 15, 15, 15, 10])
    assert np.array_equal(grid.boxes[:25], grid.boxes[50:])


def test_pooled_frames_that_are_not_those_of_the_video_are_refused() -> None:
    vlm, video = vlm_of("molmo2"), clip(96, 64)
    inputs, _ = prepared(vlm, video)
    rule = FAMILIES["molmo2"].video
    assert rule is not None
    with pytest.raises(GeometryError) as refusal:
        rule(vlm.processor, vlm.model.config, inputs, [clip(96, 64, n_frames=3)])
    assert str(refusal.value) == (
        "A processor must return each frame of a video once. It returned 2 for a video of 3."
    )
    fewer = {**inputs, "pixel_values_videos": inputs["pixel_values_videos"][:, 1:]}
    with pytest.raises(GeometryError) as refusal:
        rule(vlm.processor, vlm.model.config, fewer, [video])
    assert str(refusal.value) == (
        "The video processor's settings must lead to the patches it returned. Replayed were "
        "13 x 13 of each frame; returned 168."
    )
