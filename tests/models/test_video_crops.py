"""Frames that are processed like images: pooled from patches, or cut into slices."""

import copy
import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import xmodal_interp as xi
from tests.helpers.pixel_changes import QUESTION, language_inputs, painted, textured, vlm_of
from xmodal_interp.errors import GeometryError
from xmodal_interp.models import FAMILIES, VLM, Video, VideoGrid

pytestmark = pytest.mark.filterwarnings(  # raised inside the processors
    "ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning"
)
MINICPM = ("minicpmv4_6", "minicpmv4_7", "minicpm_ocr")
SIZE = (200, 120)


def clip(width: int, height: int, n_frames: int = 2) -> Video:
    return Video([Image.new("RGB", (width, height), (40 + i, 40, 40)) for i in range(n_frames)], 2)


def prepared(vlm: VLM, *videos: Video) -> tuple[dict[str, Any], tuple[VideoGrid, ...]]:
    inputs, (prompt,) = vlm.prepare([[]], [QUESTION], videos=[list(videos)])
    return inputs, prompt.video_grids


def test_windows_at_the_edges_of_a_frame_pool_fewer_patches() -> None:
    """With 13 patches in windows of 3, the first and last window lack one patch each."""
    vlm = vlm_of("molmo2")
    _, (grid,) = prepared(vlm, clip(130, 65, n_frames=3))
    assert (grid.frames, grid.rows, grid.cols) == (3, 5, 5)
    assert (grid.patch_frames, grid.patch_rows, grid.patch_cols) == (3, 13, 13)
    x0, y0, x1, y1 = grid.boxes.reshape(3, 5, 5, 4)[1].transpose(2, 0, 1)
    assert np.allclose(x1 - x0, [20, 30, 30, 30, 20])
    assert np.allclose((y1 - y0).T, [10, 15, 15, 15, 10])
    assert np.array_equal(grid.boxes[:25], grid.boxes[50:])


def test_pooled_frames_that_do_not_match_the_video_are_refused() -> None:
    vlm, video = vlm_of("molmo2"), clip(96, 64)
    inputs, _ = prepared(vlm, video)
    rule = FAMILIES["molmo2"].video
    assert rule is not None
    with pytest.raises(GeometryError) as refusal:
        rule(vlm.processor, vlm.model.config, inputs, [clip(96, 64, n_frames=3)])
    assert str(refusal.value) == (
        "The processor returned 2 frames for a video of 3. Set it to return each frame once."
    )
    fewer = {**inputs, "pixel_values_videos": inputs["pixel_values_videos"][:, 1:]}
    with pytest.raises(GeometryError) as refusal:
        rule(vlm.processor, vlm.model.config, fewer, [video])
    assert str(refusal.value) == (
        "The video processor returned 168 patches per frame, but its settings lead to 13 x 13. Use "
        "the checkpoint's own settings."
    )


def with_settings(model_type: str, **settings: Any) -> VLM:
    """Return the model with other settings of the video processor."""
    vlm = vlm_of(model_type)
    processor = copy.copy(vlm.processor)
    processor.video_processor = copy.copy(processor.video_processor)
    for name, value in settings.items():
        setattr(processor.video_processor, name, value)
    return dataclasses.replace(vlm, processor=processor)


def slicing(model_type: str) -> VLM:
    return with_settings(model_type, max_slice_nums=4)


@pytest.mark.parametrize("model_type", MINICPM)
def test_a_painted_box_changes_its_slice_and_its_thumbnail(model_type: str) -> None:
    vlm = slicing(model_type)
    frames = [textured(*SIZE) for _ in range(3)]
    small = clip(64, 48)

    def read(shown: list[Image.Image]) -> np.ndarray:
        inputs, _ = vlm.prepare([[]], [QUESTION], videos=[[small, Video(shown, 2.0)]])
        return language_inputs(vlm, inputs)

    plain = read(frames)
    (prompt,) = vlm.prepare([[]], [QUESTION], videos=[[small, Video(frames, 2.0)]])[1]
    whole, sliced = prompt.video_grids
    assert whole.tiles is whole.thumbnail is None
    assert sliced.thumbnail is not None
    tokens = prompt.tokens[prompt.tokens["video"].eq(1).fillna(value=False)]
    assert len(tokens) == sliced.n_tokens
    assert tokens["tile"].isna().tolist() == tokens["view"].eq("thumbnail").tolist()
    per_frame = tokens.groupby(["frame", "view"]).size().unstack()
    assert per_frame["image"].eq(sliced.rows * sliced.cols).all()
    assert per_frame["thumbnail"].eq(sliced.thumbnail.rows * sliced.thumbnail.cols).all()
    for _, row in tokens.iloc[:: len(tokens) // 6].iterrows():
        box = row[["x0", "y0", "x1", "y1"]].to_numpy(float)
        other = [painted(each, box) if i == row["frame"] else each for i, each in enumerate(frames)]
        change = np.linalg.norm(read(other) - plain, axis=1)
        of_view = tokens.index[tokens["view"].eq(row["view"])]
        assert of_view[change[of_view].argmax()] == row.name


@pytest.mark.parametrize("model_type", MINICPM)
def test_slices_of_frames_through_capture(model_type: str) -> None:
    vlm, image, frames = slicing(model_type), textured(64, 48), [textured(*SIZE)] * 3
    before = xi.capture(vlm, image, QUESTION, videos=Video(frames, 2.0), max_new_tokens=2)
    (grid,) = before.video_grids
    assert grid.thumbnail is not None
    tokens = before.tokens.iloc[before.where("video")].reset_index(drop=True)
    for view in ("image", "thumbnail"):
        arranged = before.grid(tokens.index, video=0, view=view)
        read = tokens.iloc[arranged.astype(int).ravel()]
        assert read["view"].eq(view).all()
        cells = np.argwhere(np.isfinite(arranged))
        assert read[["frame", "row", "col"]].to_numpy(int).tolist() == cells.tolist()
    merged = {key[:2] for key in before.calls} & {("connector", "self")}
    full = [("vision", "self"), *merged]  # before and after patches are merged
    assert all(before.calls[*key, 0, 1].n_queries == len(grid.patch_places) for key in full)
    width, height = SIZE[0] / grid.patch_cols, SIZE[1] / grid.patch_rows
    for frame, row, col in [(0, 1, 2), (2, grid.patch_rows - 1, grid.patch_cols // 2)]:
        box = np.array([col, row, col + 1, row + 1]) * np.array([width, height] * 2)
        other = [painted(each, box) if i == frame else each for i, each in enumerate(frames)]
        after = xi.capture(vlm, image, QUESTION, videos=Video(other, 2.0))
        for key in full:
            queries = (each.calls[*key, 0, 1].q for each in (after, before))
            change = torch.sub(*queries).norm(dim=-1).sum(1)[0]
            in_slices = after.grid(change, video=0)
            assert np.unravel_index(in_slices.argmax(), in_slices.shape) == (frame, row, col)
            in_whole = after.grid(change, video=0, view="thumbnail")
            assert in_whole.reshape(3, -1).max(1).argmax() == frame
    with pytest.raises(GeometryError) as refusal:
        before.grid(tokens.index, video=0, view="slice")
    assert str(refusal.value) == (
        "Video 0 has no view 'slice'. The views of this video are 'image' and 'thumbnail'."
    )


@pytest.mark.parametrize(("name", "value"), [("stack_frames", 2), ("do_resize", False)])
def test_frames_that_are_not_resized_one_by_one_are_refused(name: str, value: object) -> None:
    vlm = with_settings("minicpmv4_6", **{name: value})
    wanted = {"stack_frames": 1, "do_resize": True}[name]
    with pytest.raises(GeometryError) as refusal:
        prepared(vlm, clip(64, 64, n_frames=4))
    assert str(refusal.value) == (
        f"The video processor has {name}={value}, so frames are not resized one by one and cannot "
        f"be placed. Set {name}={wanted}."
    )


def test_sizes_that_do_not_match_the_frames_are_refused() -> None:
    vlm, video = slicing("minicpm_ocr"), clip(*SIZE)
    inputs, (grid,) = prepared(vlm, video)
    assert grid.tiles is not None
    fewer = {**inputs, "target_sizes_videos": inputs["target_sizes_videos"][:-1]}
    rule = FAMILIES["minicpm_ocr"].video
    assert rule is not None
    n = 2 * (2 + grid.tiles.max())
    with pytest.raises(GeometryError) as refusal:
        rule(vlm.processor, vlm.model.config, fewer, [video])
    assert str(refusal.value) == (
        f"The processor returned {n - 1} target_sizes_videos, but its settings lead to {n} frames "
        "and slices. Use the checkpoint's own processor settings."
    )
