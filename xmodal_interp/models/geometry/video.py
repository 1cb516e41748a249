"""Rules for videos: each returns the frame, row, column and box of every token of a video.

* :class:`MergedFrames`: frames merged in time (Qwen2-VL), with padding in GLM-5.
* :class:`SingleFrames`: frames resized to one size; SmolVLM resizes them to squares.
* :func:`pooled_frames`: tokens that pool patches of a frame (Molmo 2).
* :func:`sliced_frames`: frames cut into tiles, with the whole frame as the thumbnail (MiniCPM-V).
* :class:`PositionedFrames`: patches whose column and row the processor returns (Gemma 4).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int

from xmodal_interp.errors import GeometryError
from xmodal_interp.models.geometry.cells import (
    Cells,
    block_of,
    extent,
    in_blocks,
    joined,
    nowhere,
    patch_side,
    rectangle,
    split_views,
)
from xmodal_interp.models.geometry.grid import (
    NOWHERE,
    Box,
    Thumbnail,
    VideoGrid,
    raster,
)
from xmodal_interp.models.geometry.overlapping_crops import pooled_cells
from xmodal_interp.models.geometry.processor_steps import (
    Tiling,
    check_replayed,
    setting,
    shown,
    whole,
)
from xmodal_interp.models.geometry.resized_images import Content, content_box
from xmodal_interp.models.geometry.tiles import Shape, sized_views, slice_block, slices
from xmodal_interp.models.media import Video

VideoRule = Callable[[Any, Any, Mapping[str, Any], Sequence[Video]], list[VideoGrid]]
"""``(processor, config, inputs, videos) -> grids``: one grid per video, in order."""


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
    content: Content | None = None

    def __call__(
        self, processor: Any, _config: Any, inputs: Mapping[str, Any], videos: Sequence[Video]
    ) -> list[VideoGrid]:
        """Return one grid per video."""
        grid_thw = np.asarray(inputs["video_grid_thw"]).tolist()
        settings = processor.video_processor
        merge = settings.merge_size
        mask = inputs.get("video_compression_mask")
        left = None if mask is None else np.asarray(mask)
        grids = []
        for video, (n, patch_rows, patch_cols) in zip(videos, grid_thw, strict=True):
            together = settings.temporal_patch_size if self.in_model else 1
            box = content_box(processor, video, self.content, patch_rows, patch_cols)
            tokens = rectangle(patch_rows // merge, patch_cols // merge, box)
            patches = rectangle(patch_rows, patch_cols, box)
            patches = patches if self.by_rows else in_blocks(patches, patch_cols, merge)
            frames = [tokens] * (n // together)
            if left is not None:
                n_tokens = len(tokens) * len(frames)
                of_video, left = left[:n_tokens], left[n_tokens:]
                frames = [tokens[kept] for kept in of_video.reshape(len(frames), -1)]
            grids.append(video_grid(video, frames, [patches] * n))
        return grids


FrameShow = Callable[[Any, Video, int, int], Box]
"""``(processor, video, width, height) -> box``: the part of each frame that the pixels show."""


@dataclass(frozen=True)
class SingleFrames:
    """Frames that are resized to one size and get a separate grid each.

    Frames that a processor appends to pad the shorter videos of a batch are ignored.

    Attributes:
        merge: The side of the block of patches that gives a token, as in :class:`SplitTiles`.
        before: Number of tokens outside the grid before those of each frame (class tokens).
        after: Number of tokens outside the grid after the last frame (newline token).
        class_token: Whether the vision tower has a class token before the patches of each frame, or
            the configuration attribute that holds this; None to use the processor's number.
        show: Function that returns the part of a frame that is shown.
    """

    merge: str | int = 1
    before: int = 0
    after: int = 0
    class_token: bool | str | None = None
    show: FrameShow = shown

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
            box = self.show(processor, video, width, height)
            tokens = joined([nowhere(self.before), rectangle(rows, cols, box)])
            patches = joined([nowhere(first), rectangle(patch_rows, patch_cols, box)])
            n = len(video)
            grids.append(video_grid(video, [tokens] * n, [patches] * n, after=self.after))
        return grids

    def _class_tokens(self, processor: Any, config: Any) -> int:
        if self.class_token is None:
            return int(getattr(processor, "num_additional_image_tokens", None) or 0)
        value = self.class_token
        return int(getattr(config, value) if isinstance(value, str) else value)


def squeezed(processor: Any, video: Video, width: int, height: int) -> Box:
    """Return the box of frames that are resized to a square: the whole frame.

    Raises:
        GeometryError: The settings do not lead to these pixels.
    """
    settings = processor.video_processor
    side = settings.max_image_size["longest_edge"]
    check_replayed((side, side) if settings.do_resize else video.size, (width, height))
    return whole(video)


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
    size, side = (setting(processor, name, part="video") for name in ("size", "patch_size"))
    n = size["height"] // side
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
    processor: Any, config: Any, inputs: Mapping[str, Any], videos: Sequence[Video]
) -> list[VideoGrid]:
    """Place each frame, followed by its slices if the frame is large (MiniCPM-V).

    The whole frame is the thumbnail of its slices.

    Raises:
        GeometryError: The processor stacks several frames into one picture or does not resize them,
            or the number of sizes is not that of the frames and their slices.
    """
    for name, wanted in {"stack_frames": 1, "do_resize": True}.items():
        value = setting(processor, name, wanted, part="video")
        if value != wanted:
            raise GeometryError(
                f"The video processor has {name}={value}, so frames are not resized one by one and "
                f"cannot be placed. Set {name}={wanted}."
            )
    tilings = [slices(processor, video) for video in videos]
    counts = [1 if tiling is None else 1 + len(tiling.boxes) for tiling in tilings]
    shapes = [(rows, cols) for rows, cols in np.asarray(inputs[_SIZES]).tolist()]
    n_expected = sum(count * len(video) for count, video in zip(counts, videos, strict=True))
    if n_expected != len(shapes):
        raise GeometryError(
            f"The processor returned {len(shapes)} {_SIZES}, but its settings lead to {n_expected} "
            "frames and slices. Use the checkpoint's own processor settings."
        )
    block = slice_block(processor, config, part="video")
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
    return joined(sized_views(tiling, shapes, whole(video), "first", input_name=_SIZES))


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


def video_grid(
    video: Video, frames: Sequence[Cells], tower: Sequence[Cells], *, after: int = 0
) -> VideoGrid:
    """Return the grid of a video.

    Args:
        video: The video; its frames are PIL images.
        frames: The cells of each frame of tokens.
        tower: The cells of each frame that the vision tower reads.
        after: Number of tokens outside the grid after the last frame.

    Raises:
        GeometryError: There is no frame of tokens.
    """
    if not frames:
        raise GeometryError("The video is too short: it has no frame of tokens. Pass more frames.")
    token, patch = joined([*frames, nowhere(after)]), joined(tower)
    main, small = _places_by_view([*frames, nowhere(after)])
    main_patches, small_patches = _places_by_view(tower)
    thumbnail = None
    if token.of_thumbnail.any() or patch.of_thumbnail.any():
        thumbnail = Thumbnail(*extent(small), small, *extent(small_patches), small_patches)
    together = -(-len(video) // len(frames))
    return VideoGrid(
        *video.size,
        int(main[:, 0].max()) + 1,
        *extent(main),
        main,
        token.boxes,
        np.array(video.seconds[::together]),
        int(main_patches[:, 0].max()) + 1,
        *extent(main_patches),
        main_patches,
        tiles=token.tiles if (token.tiles != NOWHERE).any() else None,
        thumbnail=thumbnail,
        frame_indices=np.array(video.frame_indices[::together]),
    )


def _places_by_view(
    frames: Sequence[Cells],
) -> tuple[Int[np.ndarray, "token 3"], Int[np.ndarray, "token 3"]]:
    """Return frame, row and column of all cells: within the frames, and within the thumbnails."""
    cells = joined(frames)
    frame = np.repeat(np.arange(len(frames)), [len(each) for each in frames])
    places = np.column_stack([np.where(cells.places[:, 0] < 0, NOWHERE, frame), cells.places])
    return split_views(places, cells.of_thumbnail)
