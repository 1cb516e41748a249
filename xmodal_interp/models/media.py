"""Open the images and videos that users pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from io import BytesIO, IOBase
from os import PathLike
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from xmodal_interp.arguments import as_list, real_number, user_path, whole_number
from xmodal_interp.errors import InputError, quoted
from xmodal_interp.models.picture_sources import named, resolved
from xmodal_interp.models.pixel_arrays import Array, image_of, is_array, warn_of_scale, white_of

Bytes = bytes | bytearray | memoryview
ImageLike = Image.Image | str | PathLike[str] | Bytes | IOBase | Array | Mapping[str, Any]
"""An image as users pass it; :func:`open_image` lists the forms."""

Composite = Callable[[Image.Image], Image.Image]

_NOT_FRAMES = (
    "A video must be xi.Video([frame, ...], fps=...), each frame a path or another image; got {}. "
    "Video files are not decoded: decode yours and choose the frames for the model."
)


@dataclass(frozen=True, eq=False)
class Video:
    """The frames of a video for a model. All of them are used: no frame is dropped or sampled.

    Choose frames as your model does. Of 100 frames at 25 fps, for 2 frames per second, the video
    processor of Qwen2-VL in transformers 5.23.0 takes frames 0, 12, 25, 37, 50, 62, 75, 87 (steps
    of ``n / k``; the last frame is never taken), and that of Qwen3-VL and qwen-vl-utils 0.0.14 take
    frames 0, 14, 28, 42, 57, 71, 85, 99 (from the first to the last). Pass the ``indices`` or
    ``timestamps`` of the chosen frames: they are kept in the token table, and a processor that
    writes times into the prompt is given them.

    Attributes:
        frames: The frames in order, all of one size: images in any form that :func:`open_image`
            takes, or an array of four axes with the frames first. Frames that are arrays have one
            range of values: that of the whole video.
        fps: Frames per second of the video that ``indices`` count; None if not known.
        indices: Index of each frame in the video it was taken from; 0, 1, 2, ... if not given.
        timestamps: Time of each frame, s; ``indices / fps`` if not given. For a video of variable
            frame rate, pass timestamps and no ``fps``.
        original_size: Width and height of the original frames, px, if these are resized; boxes of
            tokens are in pixels of the original.

    Raises:
        InputError: ``frames`` is not an iterable of images, such as the path of a video file or an
            array of one image, ``fps`` is not a positive number, indices or timestamps are not one
            rising number per frame, or contradict each other.
    """

    frames: Sequence[ImageLike] | Array
    fps: float | None = None
    indices: Sequence[int] | Array | None = None
    timestamps: Sequence[float] | Array | None = None
    original_size: Sequence[int] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.frames, (str, PathLike)):
            raise InputError(_NOT_FRAMES.format(repr(str(self.frames))))
        if is_array(self.frames) and self.frames.ndim != 4:
            raise InputError(
                "An array of frames must have the axes [frame, row, col, channel] or [frame, "
                f"channel, row, col]; got the shape {tuple(self.frames.shape)}."
            )
        if not isinstance(self.frames, Iterable):
            raise InputError(
                f"The frames of a video must be a list of images; got {quoted(self.frames)}."
            )
        object.__setattr__(self, "frames", tuple(self.frames))
        for frame in self.frames:
            if is_array(frame) and frame.ndim == 4:
                raise InputError(
                    f"A frame must be one image; got an array of the shape {tuple(frame.shape)}. "
                    "Pass this array itself as the frames: xi.Video(array, ...)."
                )
        if self.fps is not None and real_number(self.fps, "fps", 0) in (0, math.inf):
            raise InputError(
                f"fps must be a finite number above 0; got {self.fps}. Leave it out if it is not "
                "known."
            )
        self._check_places_in_time()
        if self.original_size is not None:
            object.__setattr__(self, "original_size", checked_size(self.original_size))

    def _check_places_in_time(self) -> None:
        """Convert indices and timestamps to tuples of plain numbers, and compare them."""
        for name, kind in (("indices", int), ("timestamps", float)):
            given = getattr(self, name)
            if given is not None:
                object.__setattr__(self, name, _rising(given, name, kind, len(self.frames)))
        if self.timestamps is None or self.fps is None or self.indices is None:
            return
        off = max(abs(i / self.fps - t) for i, t in zip(self.indices, self.timestamps, strict=True))
        if off > 1 / self.fps:
            raise InputError(
                f"The timestamps differ from indices / fps by up to {off:.3g} s. Leave out fps for "
                "a video of variable frame rate."
            )

    def opened(self) -> Video:
        """Return the video with its frames opened as RGB images.

        Raises:
            InputError: There are no frames, they differ in size, or one cannot be read.
        """
        arrays = [frame for frame in self.frames if is_array(frame)]
        white = white_of(arrays, frames=True) if arrays else None
        frames = tuple(open_image(frame, white=white) for frame in self.frames)
        sizes = {frame.size for frame in frames}
        if len(sizes) != 1:
            raise InputError(
                f"A video must have frames of one size; got {len(frames)} frames of "
                f"{', '.join(f'{w} x {h}' for w, h in sorted(sizes)) or 'no size'}."
            )
        return replace(self, frames=frames)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the frames, px; the frames must be opened."""
        first = self.frames[0]
        if not isinstance(first, Image.Image):
            raise InputError(
                "The size of a video is unknown until its frames are opened. Call opened() first."
            )
        return first.size

    def pixels(self) -> np.ndarray:
        """Return the frames as ``uint8``, ``[frame, row, col, 3]``."""
        return np.stack([np.asarray(open_image(frame)) for frame in self.frames])

    @property
    def frame_indices(self) -> Sequence[int]:
        """Index of each frame in the video it was taken from."""
        if self.indices is None:
            return range(len(self))
        return [int(index) for index in self.indices]

    @property
    def seconds(self) -> list[float]:
        """Time of each frame, s; NaN if not known."""
        if self.timestamps is not None:
            return [float(time) for time in self.timestamps]
        pace = math.nan if self.fps is None else 1 / self.fps
        return [index * pace for index in self.frame_indices]

    def metadata(self) -> dict[str, Any]:
        """Return the metadata that video processors take.

        Processors divide indices by frames per second to get times, and derive the rate of the
        given frames from the length of the video. Timestamps are passed as indices at 1 fps.
        """
        width, height = self.size
        fps = self.fps
        indices: list[float] = list(self.frame_indices)
        if self.timestamps is not None:
            fps, indices = 1.0, list(self.seconds)
        steps = max(len(self) - 1, 1)
        total = len(self) * (indices[-1] - indices[0]) / steps if len(self) > 1 else 1
        known = {} if fps is None else {"fps": fps, "duration": total / fps}
        return {
            "total_num_frames": int(total) if float(total).is_integer() else total,
            "frames_indices": indices,
            "width": width,
            "height": height,
            **known,
        }

    def __len__(self) -> int:
        """Number of frames."""
        return len(self.frames)


def _rising(given: Any, name: str, kind: type, n: int) -> tuple[Any, ...]:
    """Return one rising number of 0 or more per frame."""
    numbers = as_list(given, name)
    if len(numbers) != n:
        raise InputError(
            f"{name} must have one entry per frame; got {len(numbers)} for {n} frames."
        )
    found: list[Any] = []
    for number in numbers:
        low = found[-1] if found else 0
        found.append(
            whole_number(number, f"An entry of {name}", low)
            if kind is int
            else real_number(number, f"An entry of {name}", low)
        )
    return tuple(found)


def checked_size(size: Any) -> tuple[int, int]:
    """Return width and height as integers.

    Raises:
        InputError: The size is not two integers above 0.
    """
    sides = as_list(size, "original_size")
    if len(sides) != 2:
        raise InputError(f"original_size must be (width, height) in px; got {quoted(size)}.")
    width, height = (whole_number(side, "A side of original_size", 1) for side in sides)
    return width, height


def open_video(video: Any) -> Video:
    """Return a video with its frames opened.

    Raises:
        InputError: ``video`` is not a :class:`Video`, or a frame cannot be read.
    """
    if not isinstance(video, Video):
        is_path = isinstance(video, (str, PathLike))
        got = repr(str(video)) if is_path else f"an object of {type(video).__name__}"
        raise InputError(_NOT_FRAMES.format(got))
    return video.opened()


def flat(nested: Sequence[Sequence[Any]]) -> list[Any]:
    """Return the entries of the lists of all samples as one list."""
    return [each for of_sample in nested for each in of_sample]


def open_image(
    image: ImageLike, composite: Composite | None = None, *, white: float | None = None
) -> Image.Image:
    """Return an RGB image from what a user passes, rotated by its EXIF orientation.

    Transparent pixels become white, as in the processors of transformers. Colours of a palette,
    CMYK, Lab, HSV and YCbCr are converted by Pillow, without colour profiles. Of an animation, the
    current frame is used; that is the first one of a file. Grey values of 16 bits are scaled to 8
    bits with a warning: 65535 becomes white, whereas transformers turns every value above 255
    white. Pillow itself reads colours of 16 bits as 8 bits.

    Args:
        image: A path; a ``file://``, ``data:``, ``http://`` or ``https://`` URL; a PIL image; the
            bytes of a file, or an open one; a dict with ``bytes`` or ``path``; or an array whose
            axes and range are unambiguous (see :mod:`.pixel_arrays`).
        composite: Puts a transparent image on a background, for processors with another one than
            white.
        white: The value of white in an array; by default derived from its values.

    Raises:
        InputError: ``image`` is none of these, cannot be read or is not an image, or the range of
            its values is not known.
    """
    source = resolved(image)
    if is_array(source):
        source = image_of(source, white)
    if isinstance(source, Image.Image) and not (source.width and source.height):
        raise InputError(
            f"An image must have at least one pixel; got {source.width} x {source.height} px."
        )
    try:
        if isinstance(source, Image.Image):
            source.load()
            return _rgb(_upright(source), composite)
        file = BytesIO(source) if isinstance(source, bytes) else user_path(source)
        with Image.open(file) as opened:
            return _rgb(_upright(opened), composite).copy()
    except FileNotFoundError:
        raise InputError(
            f"There is no image file {str(user_path(source))!r}. Pass the path of an existing "
            "file, or a PIL image."
        ) from None
    except InputError:
        raise
    except _UNREADABLE as error:
        raise InputError(f"Pillow cannot read {named(image)}: {error}.") from error


_UNREADABLE = (
    *(UnidentifiedImageError, OSError, SyntaxError, ValueError),  # ValueError: a closed image
    Image.DecompressionBombError,
)
"""Errors that Pillow raises for files that are damaged, closed, too large or not images."""


def _upright(image: Image.Image) -> Image.Image:
    """Return the image rotated by its EXIF orientation; pixels of an upright image are not read."""
    if image.getexif().get(ExifTags.Base.Orientation, 1) == 1:
        return image
    return ImageOps.exif_transpose(image)


_PREMULTIPLIED = {"RGBa": "RGBA", "La": "LA"}
"""Modes whose colours are multiplied by alpha, and the modes that are converted to RGB."""


def _rgb(image: Image.Image, composite: Composite | None) -> Image.Image:
    """Return the image in RGB. Grey values of 16 bits are scaled; Pillow alone would clip them."""
    if image.mode in _PREMULTIPLIED:
        image = image.convert(_PREMULTIPLIED[image.mode])
    transparent = "A" in image.getbands() or image.info.get("transparency") is not None
    if image.mode == "RGB" and not transparent:
        return image
    widened = image.mode == "I" and image.format == "PPM"  # Pillow opens 16-bit PPM in mode I
    if image.mode.startswith("I;16") or widened:
        values = np.asarray(image).astype(np.float64)
        warn_of_scale(values)
        return Image.fromarray(np.rint(values / 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise InputError(
            f"The range of grey values of an image of mode {image.mode!r} is not known. Convert it "
            "first: Image.fromarray(array) of an array of np.uint8 [row, col], 0 to 255, or of "
            "np.uint16, 0 to 65535."
        )
    if transparent and composite is not None:
        return composite(image.convert("RGBA"))
    from transformers.image_transforms import convert_to_rgb

    return Image.fromarray(np.asarray(convert_to_rgb(image, return_numpy=True)))
