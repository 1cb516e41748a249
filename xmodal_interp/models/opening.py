"""Pictures and videos as users give them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from transformers.image_transforms import convert_to_rgb

from xmodal_interp.arguments import real_number
from xmodal_interp.errors import InputError, quoted
from xmodal_interp.paths import user_path

ImageLike = Image.Image | str | PathLike[str]
Composite = Callable[[Image.Image], Image.Image]

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
        if not isinstance(self.frames, Iterable):
            raise InputError(f"A video's frames are a list of images; got {quoted(self.frames)}.")
        object.__setattr__(self, "frames", tuple(self.frames))
        if self.fps is not None:
            real_number(self.fps, "fps", 0)

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


def open_image(image: ImageLike, composite: Composite | None = None) -> Image.Image:
    """An RGB image from a path or a PIL image, turned as its camera says (EXIF).

    What is transparent is put on white, as processors of transformers do. Grey values of 16 bits
    become bytes, with a warning: 65535 is white, where transformers makes all above 255 white.

    Args:
        image: The image.
        composite: Puts a transparent image on another background, where the processor has one.

    Raises:
        InputError: Something else, no such file, a file that is no image, or grey values whose
            range is not known.
    """
    if isinstance(image, Image.Image):
        if not (image.width and image.height):
            raise InputError(
                f"An image needs at least one pixel; got {image.width} x {image.height} px."
            )
        return _rgb(_turned(image), composite)
    if not isinstance(image, (str, PathLike)):
        raise InputError(
            "An image must be a path or a PIL image, such as PIL.Image.fromarray makes of an array "
            f"of bytes [row, col, 3]; got an object of {type(image).__name__}."
        )
    path = user_path(image)
    try:
        with Image.open(path) as opened:
            return _rgb(_turned(opened), composite).copy()
    except FileNotFoundError:
        raise InputError(
            f"An image must be a file that exists, or a PIL image; there is no {str(path)!r}."
        ) from None
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise InputError(
            f"An image file must be readable by Pillow; {str(path)!r} is not: {error}."
        ) from error


def _turned(image: Image.Image) -> Image.Image:
    """The image upright; itself where it is, so that pixels that are not needed are not read."""
    if image.getexif().get(ExifTags.Base.Orientation, 1) == 1:
        return image
    return ImageOps.exif_transpose(image)


def _rgb(image: Image.Image, composite: Composite | None) -> Image.Image:
    """The image in three bytes per pixel. Pillow alone would cut off all above 255."""
    transparent = "A" in image.getbands() or image.info.get("transparency") is not None
    if image.mode == "RGB" and not transparent:
        return image
    widened = image.mode == "I" and image.format == "PPM"  # how Pillow opens those of 16 bits
    if image.mode.startswith("I;16") or widened:
        values = np.asarray(image).astype(np.float64)
        _warn_of_scale(values)
        return Image.fromarray(np.rint(values / 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise InputError(
            "Grey values must be of 8 or of 16 bits, for then it is known what is black and white. "
            f"Got an image of mode {image.mode!r}. Make bytes of it first: Image.fromarray(array) "
            "of an array of np.uint8 [row, col], 0 to 255, or of np.uint16, 0 to 65535."
        )
    if transparent and composite is not None:
        return composite(image.convert("RGBA"))
    return Image.fromarray(np.asarray(convert_to_rgb(image, return_numpy=True)))


def _warn_of_scale(values: np.ndarray) -> None:
    """Say that grey values of 16 bits are scaled, and how to show them otherwise."""
    warnings.warn(
        f"Grey values of 16 bits are scaled so that 65535 is white; those of this image are "
        f"{int(values.min())} to {int(values.max())}. Pass image.convert('RGB') for what "
        "transformers does (all above 255 is white), or bytes that you have scaled yourself, "
        "Image.fromarray((array >> 4).astype(np.uint8)) for values of 12 bits.",
        UserWarning,
        stacklevel=4,
    )
