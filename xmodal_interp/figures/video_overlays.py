"""Overlays of videos: attention on each frame, as a strip and as an animation.

A frame of tokens may merge several frames of the video (Qwen2-VL: two). Its attention is drawn over
the first of them. All frames share one colour scale.
"""

from __future__ import annotations

import importlib
import io
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Unpack

import numpy as np
from PIL import Image

from xmodal_interp.arguments import checked, real_number
from xmodal_interp.at import Selector
from xmodal_interp.attention import Positions
from xmodal_interp.errors import GeometryError, InputError, quoted
from xmodal_interp.figures.overlay_panels import (
    AttentionOptions,
    OverlayOptions,
    Panel,
    panel_figure,
)
from xmodal_interp.figures.overlay_values import attention_on_image, query_groups, query_name
from xmodal_interp.figures.placement import PlacedImage
from xmodal_interp.figures.style import (
    FigurePath,
    Picture,
    about,
    heads_name,
    layer_name,
    saved,
    styled,
    target_of,
)
from xmodal_interp.models import ImageGrid, open_image
from xmodal_interp.sample import Sample

_IN_A_ROW = {None: 8, "page": 5, "column": 2}  # frames
_MOST_ROWS = 6  # of panels, with the frames themselves
_ANIMATION_DPI = 150
_FPS = 2.0  # frames of tokens per second, if the video has no times


@checked
@styled
def video_overlays(
    sample: Sample,
    queries: Selector | None = None,
    layer: int = -1,
    head: Positions | None = None,
    *,
    video: int = 0,
    frames: Sequence[int] | None = None,
    path: FigurePath = None,
    **options: Unpack[AttentionOptions],
) -> Picture:
    """Draw attention on the frames of a video as a strip, below the frames themselves.

    Args:
        sample: The sample.
        queries: A phrase or positions, whose attention is averaged; or a list of phrases and
            positions, drawn in one row per entry; all text after the video, averaged, if not given.
        layer: Layer index; negative ones count from the last.
        head: A head, or several to average; all heads are averaged if not given.
        video: Index of the video.
        frames: Frames of tokens to draw; if not given, all, or as many as fit, evenly spaced.
        path: Where to save the figure.
        **options: Drawing options; see ``OverlayOptions``. Shares are of the attention on the
            whole video.

    Raises:
        InputError: The sample has no such video or does not hold its frames, or a frame does not
            exist.
    """
    drawing = OverlayOptions(**options)
    strip = _read(sample, queries, layer, head, video, drawing)
    n_cols = _IN_A_ROW[drawing.width]
    most = n_cols * max(1, _MOST_ROWS // (1 + len(strip.names)))
    chosen = _chosen(frames, len(strip.frames), most)
    n_rows = -(-len(chosen) // n_cols)
    n_cols = -(-len(chosen) // n_rows)
    rows: list[list[Panel]] = []
    row_titles: list[str] = []
    for start in range(0, len(chosen), n_cols):
        part = chosen[start : start + n_cols]
        rows.append([Panel(strip.frames[i].name, placed=strip.frames[i]) for i in part])
        rows += [[panels[i] for i in part] for panels in strip.panels]
        row_titles += ["", *strip.names]
    shown = f"; {len(chosen)} of {len(strip.frames)} frames are drawn"
    remark = strip.merged + (shown if len(chosen) < len(strip.frames) else "")
    named = row_titles if len(strip.names) > 1 else ()
    figure = panel_figure(
        strip.frames[0], rows, drawing, strip.title, named, f"{remark[:1].upper()}{remark[1:]}."
    )
    return saved(figure, path)


@checked
@styled
def video_animation(
    sample: Sample,
    queries: Selector | None = None,
    layer: int = -1,
    head: Positions | None = None,
    *,
    path: str | Path,
    video: int = 0,
    fps: float | None = None,
    **options: Unpack[AttentionOptions],
) -> Path:
    """Write attention on a video as an animation, next to the video itself.

    Args:
        sample: The sample.
        queries: As for ``video_overlays``.
        layer: Layer index; negative ones count from the last.
        head: A head, or several to average; all heads are averaged if not given.
        path: The file: ``.gif``, or ``.mp4`` if ffmpeg or the package imageio-ffmpeg is installed.
        video: Index of the video.
        fps: Frames of tokens per second; those of the video if known, else 2.
        **options: Drawing options; see ``OverlayOptions``.

    Returns:
        The path.

    Raises:
        InputError: The file ends in another suffix, or is an ``.mp4`` without ffmpeg.
    """
    target = target_of(path, ("gif", "mp4"))
    encoder = _ffmpeg(path) if target.suffix.lower() == ".mp4" else None
    drawing = OverlayOptions(**options)
    strip = _read(sample, queries, layer, head, video, drawing)
    rate = strip.fps if fps is None else real_number(fps, "fps", 0.01, 1000)
    pictures = []
    for i, frame in enumerate(strip.frames):
        row = [
            Panel(frame.name, placed=frame),
            *(
                replace(panels[i], title=name)
                for name, panels in zip(strip.names, strip.panels, strict=True)
            ),
        ]
        figure = panel_figure(frame, [row], drawing, strip.title)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=_ANIMATION_DPI)
        with Image.open(buffer) as picture:
            pictures.append(picture.convert("RGB"))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if encoder is None:
            first, *others = pictures
            duration = round(1000 / rate)
            first.save(target, save_all=True, append_images=others, duration=duration, loop=0)
        else:
            _encode(encoder, pictures, rate, target)
    except OSError as error:
        raise InputError(f"Cannot write the animation to {str(path)!r}: {error}.") from error
    return target


@dataclass(frozen=True, eq=False)
class _Strip:
    """Attention on the frames of a video.

    Attributes:
        frames: The frames of tokens.
        names: Title of each group of queries.
        panels: For each group, one panel per frame.
        title: Title of the figure.
        merged: How frames of tokens relate to frames of the video.
        fps: Frames of tokens per second.
    """

    frames: Sequence[PlacedImage]
    names: Sequence[str]
    panels: Sequence[Sequence[Panel]]
    title: str
    merged: str
    fps: float


def placed_frames(sample: Sample, video: int = 0) -> list[PlacedImage]:
    """Return the frames of tokens of a video, with the keys of the whole video.

    Raises:
        InputError: The sample has no video, no video of this index, or does not hold its frames.
        GeometryError: The tokens have no places.
    """
    if not isinstance(sample, Sample):
        raise InputError(
            f"sample must be one Sample, such as store[0]; got a {type(sample).__name__}."
        )
    n_videos = len(sample.video_grids)
    if not n_videos:
        raise InputError(
            f"Sample {sample.name!r} has no video to draw on. Capture it with xi.Video(frames)."
        )
    if video >= n_videos:
        raise InputError(f"video must be between 0 and {n_videos - 1}; got {video}.")
    if len(sample.videos) != n_videos:
        raise InputError(
            f"Sample {sample.name!r} has the grids of {n_videos} videos, but the frames of "
            f"{len(sample.videos)}. Add the videos with dataclasses.replace(sample, videos=...)."
        )
    grid, pictures = sample.video_grids[video], sample.videos[video].frames
    if not (grid.places[:, 0] >= 0).any():
        raise GeometryError(
            f"The tokens of video {video} have no places, so nothing can be drawn on its frames. "
            "Draw an attention matrix instead."
        )
    crossed = sample.cross_keys is not None
    table = sample.cross_keys if sample.cross_keys is not None else sample.tokens
    keys = np.flatnonzero(table["video"].eq(video).fillna(value=False).to_numpy(dtype=bool))
    present = sample.tokens["kind"].ne("padding").to_numpy(dtype=bool)
    frames = []
    for frame in range(grid.frames):
        here = grid.places[:, 0] == frame
        places = np.where(here[:, None], grid.places[:, 1:], -1)
        boxes = np.where(here[:, None], grid.boxes, np.nan)
        size, cells = (grid.width, grid.height), (grid.rows, grid.cols)
        of_frame = ImageGrid(*size, *cells, places, boxes, *cells, places)
        time = grid.times[frame]
        frames.append(
            PlacedImage(
                video,
                open_image(pictures[frame * len(pictures) // grid.frames]),
                of_frame,
                f"frame {frame}" + ("" if np.isnan(time) else f" ({time:g} s)"),
                "cross" if crossed else "self",
                keys,
                unit="video token",
                present=present,
                medium="video",
            )
        )
    return frames


def _read(
    sample: Sample,
    queries: Selector | None,
    layer: int,
    head: Positions | None,
    video: int,
    drawing: OverlayOptions,
) -> _Strip:
    frames = placed_frames(sample, video)
    first, grid = frames[0], sample.video_grids[video]
    groups = query_groups(sample, first, queries)
    if queries is None or isinstance(queries, str) or not isinstance(queries, Sequence):
        groups = [[position for group in groups for position in group]]
    names, of_groups = [], []
    for group in groups:
        read = attention_on_image(sample, first, group, layer, head, [range(len(group))])
        left_out = drawing.left_out(first, read.call, head)
        values = read.values(drawing.show, left_out=left_out)
        without = grid.places[:, 0] < 0
        undrawn = read.to_tokens(without) if without.any() else None
        names.append(query_name(sample, first, group, short=True))
        of_groups.append(Panel("", values, left_out=left_out, undrawn=undrawn))
    one_per_frame = [replace(each, placed=frame) for each in of_groups for frame in frames]
    panels = drawing.of_attention(one_per_frame)
    n = len(frames)
    merged = len(sample.videos[video].frames) / n
    per_frame = (
        "one frame of tokens per frame of the video"
        if merged == 1
        else f"a frame of tokens is {merged:g} frames of the video, drawn over the first"
    )
    step = float(np.diff(grid.times).mean()) if n > 1 and not np.isnan(grid.times).any() else 0.0
    what = [] if len(names) > 1 else [query_name(sample, first, groups[0])]
    where = ", ".join([*what, layer_name(read.call), heads_name(read.call, head)])
    return _Strip(
        frames,
        names,
        [panels[i : i + n] for i in range(0, len(panels), n)],
        f"{about(sample)}\n{where}",
        per_frame,
        1 / step if step > 0 else _FPS,
    )


def _chosen(frames: Sequence[int] | None, n: int, most: int) -> list[int]:
    """Return the frames to draw.

    Raises:
        InputError: A frame does not exist, or there are more than fit into a figure.
    """
    if frames is None:
        return (
            list(range(n))
            if n <= most
            else np.linspace(0, n - 1, most).round().astype(int).tolist()
        )
    listed = [int(frame) for frame in frames]
    if not listed or min(listed) < 0 or max(listed) >= n or len(listed) > most:
        raise InputError(
            f"frames must be 1 to {most} frames between 0 and {n - 1}; got {quoted(frames)}."
        )
    return listed


def _ffmpeg(path: object) -> str:
    """Return the path of ffmpeg: that of imageio-ffmpeg, or an installed one.

    Raises:
        InputError: There is none.
    """
    try:
        found = str(importlib.import_module("imageio_ffmpeg").get_ffmpeg_exe())
    except (ImportError, RuntimeError):
        found = shutil.which("ffmpeg") or ""
    if not found:
        raise InputError(
            f"Writing {str(path)!r} requires ffmpeg. Install it, or run 'pip install "
            "imageio-ffmpeg'; or choose a path that ends in .gif."
        )
    return found


def _encode(ffmpeg: str, pictures: Sequence[Image.Image], fps: float, target: Path) -> None:
    """Encode pictures of one size as H.264.

    Raises:
        InputError: ffmpeg fails.
    """
    width, height = (side - side % 2 for side in pictures[0].size)  # H.264 requires even sides
    frames = b"".join(picture.crop((0, 0, width, height)).tobytes() for picture in pictures)
    command = [
        *(ffmpeg, "-y", "-loglevel", "error", "-f", "rawvideo", "-pix_fmt", "rgb24"),
        *("-s", f"{width}x{height}", "-r", f"{fps:g}", "-i", "-", "-an"),
        *("-c:v", "libx264", "-pix_fmt", "yuv420p", "-movflags", "+faststart", str(target)),
    ]
    done = subprocess.run(command, input=frames, capture_output=True, check=False)
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or ["no message"]
        raise InputError(
            f"ffmpeg could not write {str(target)!r}: {lines[-1]}. Choose a path that ends in .gif."
        )
