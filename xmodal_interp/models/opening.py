"""Pictures and videos as users give them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from xmodal_interp.errors import InputError

ImageLike = Image.Image | str | PathLike[str]


_NOT_FRAMES = (
    "A video is given as its frames, xi.Video([frame, ...], fps=...), each a path or a PIL image: "
    "no file is decoded here. Got {}. Decode it first, and choose the frames that the model is to "
    "see."
)


@dataclass(frozen=True, eq=False)
class Video:
    """Frames that a model is to see, all of them: none are left out, and none are sampled.

    Attributes:
        frames: The frames in order, all of one size: paths or PIL images.
        fps: How many of them there are per second; None if that is not known.

    Raises:
        InputError: A video file in the place of frames.
    """

    frames: Sequence[ImageLike]
    fps: float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.frames, (str, PathLike)):
            raise InputError(_NOT_FRAMES.format(repr(str(self.frames))))
        object.__setattr__(self, "frames", tuple(self.frames))

    def opened(self) -> Video:
        """The same with the frames read.

        Raises:
            InputError: There are no frames, they differ in size, or one cannot be read.
        """
        frames = tuple(open_image(frame) for frame in self.frames)
        sizes = {frame.size for frame in frames}
        if len(sizes) != 1:
            raise InputError(
                f"A video must have frames, all of one size. Got {len(frames)} frames of "
                f"{', '.join(f'{w} x {h}' for w, h in sorted(sizes)) or 'no size'}."
            )
        return Video(frames, self.fps)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the frames, px; they must be open."""
        first = self.frames[0]
        if not isinstance(first, Image.Image):
            raise InputError("A video's size is known when its frames are open; call opened().")
        return first.size

    def pixels(self) -> np.ndarray:
        """``[frame, row, col, 3]``, bytes."""
        return np.stack([np.asarray(open_image(frame)) for frame in self.frames])

    def metadata(self) -> dict[str, Any]:
        """What processors want to be told of it."""
        width, height = self.size
        known = {} if self.fps is None else {"fps": self.fps, "duration": len(self) / self.fps}
        return {
            "total_num_frames": len(self),
            "frames_indices": list(range(len(self))),
            "width": width,
            "height": height,
            **known,
        }

    def __len__(self) -> int:
        """How many frames."""
        return len(self.frames)


def open_video(video: Any) -> Video:
    """A video with its frames read.

    Raises:
        InputError: It is no :class:`Video`, or has frames that cannot be read.
    """
    if not isinstance(video, Video):
        is_path = isinstance(video, (str, PathLike))
        got = repr(str(video)) if is_path else f"an object of {type(video).__name__}"
        raise InputError(_NOT_FRAMES.format(got))
    return video.opened()


def flat(nested: Sequence[Sequence[Any]]) -> list[Any]:
    """What is in the lists of all samples, in order."""
    return [each for of_sample in nested for each in of_sample]


def open_image(image: ImageLike) -> Image.Image:
    """An RGB image from a path or a PIL image; a file is turned as its camera says (EXIF).

    Raises:
        InputError: Something else, no such file, or a file that is no image.
    """
    if isinstance(image, Image.Image):
        return image if image.mode == "RGB" else image.convert("RGB")
    if not isinstance(image, (str, PathLike)):
        raise InputError(
            "An image must be a path or a PIL image, such as PIL.Image.fromarray makes of an array "
            f"of bytes [row, col, 3]; got an object of {type(image).__name__}."
        )
    path = Path(image)
    try:
        with Image.open(path) as opened:
            return ImageOps.exif_transpose(opened).convert("RGB")
    except FileNotFoundError:
        raise InputError(
            f"An image must be a file that exists, or a PIL image; there is no {str(path)!r}."
        ) from None
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise InputError(
            f"An image file must be readable by Pillow; {str(path)!r} is not: {error}."
        ) from error
