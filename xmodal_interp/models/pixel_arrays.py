"""Images from arrays of pixels.

An array does not state the range of its values or the order of its axes. Both are derived if only
one reading is possible; an array with two possible readings is refused.

* Axes: ``[row, col]``, or three axes, of which the first or the last is the channels (1, 3 or 4).
* Bytes are 0 to 255. Values of ``uint16`` are 0 to 65535 (white), with a warning. True is white.
* Other integers and floats are 0 to 255 if one value is larger than 2. Floats of at most 1 are 0 to
  1. Values between these limits, negative values and NaN are refused. The frames of a video have
  one range, that of the whole video. Frames of floats that hold only the values 0 and 1 are
  refused: they may be a dark clip of 0 to 255, as qwen-vl-utils returns it.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, TypeGuard

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from xmodal_interp.errors import InputError

Array = np.ndarray | Tensor

_CHANNELS = (1, 3, 4)
_OVERSHOOT = 2.0
"""Upper limit of values from 0 to 1 after resampling: bicubic weights overshoot by less than 1."""


def is_array(value: Any) -> TypeGuard[Array]:
    """Return whether a value is a NumPy array or a tensor."""
    return isinstance(value, (np.ndarray, Tensor))


def as_numpy(array: Array) -> np.ndarray:
    """Return the values as a NumPy array; bfloat16, which NumPy does not have, as float32.

    Raises:
        InputError: A tensor is sparse, has no data, or has another dtype that NumPy does not have.
    """
    if isinstance(array, np.ndarray):
        return array
    try:
        plain = array.detach().cpu()
        return (plain.float() if plain.dtype == torch.bfloat16 else plain).numpy()
    except (RuntimeError, TypeError) as error:  # NotImplementedError is a RuntimeError
        raise InputError(
            f"A tensor of {array.dtype} on {array.device} ({array.layout}) cannot be read as an "
            "image. Convert it to bytes, 0 to 255: a dense tensor of torch.uint8 on the CPU."
        ) from error


def white_of(arrays: Sequence[Array], *, frames: bool = False) -> float:
    """Return the value of white in arrays that belong together: 1, 255 or 65535.

    Args:
        arrays: The arrays.
        frames: Whether they are the frames of a video.

    Raises:
        InputError: The range of the values is not known.
    """
    values = [as_numpy(array) for array in arrays]
    kinds = {str(each.dtype) for each in values}
    if len(kinds) != 1 or values[0].dtype.kind not in "buif":
        raise InputError(
            f"An array of pixels must hold numbers of one dtype; got {', '.join(sorted(kinds))}. "
            "Convert it to bytes, 0 to 255: array.astype(np.uint8)."
        )
    dtype = values[0].dtype
    if dtype in (np.bool_, np.uint8):
        return 1.0 if dtype == np.bool_ else 255.0
    low = min(float(each.min()) for each in values)  # NaN fails each comparison below
    high = max(float(each.max()) for each in values)
    problem = ""
    if dtype == np.uint16 and (high > 255 or high == 0):
        return 65535.0
    if not (np.isfinite(low) and np.isfinite(high)):
        problem = "not all of which are finite"
    elif low < 0:
        problem = "as after normalization"
    elif high > 255:
        problem = "which are neither bytes nor from 0 to 1"
    elif high == 0 or (dtype.kind == "f" and high <= 1 and not (frames and _are_whole(values))):
        return 1.0
    elif high <= _OVERSHOOT or dtype == np.uint16:
        problem = "whose white may be " + ("255 or 65535" if dtype == np.uint16 else "1 or 255")
    if problem:
        raise InputError(
            f"The range of an array of {dtype} is not known: it has the values {low:g} to "
            f"{high:g}, {problem}. Convert it to bytes, 0 to 255 (np.uint8)."
        )
    return 255.0


def _are_whole(values: Sequence[np.ndarray]) -> bool:
    return all(bool((each == np.rint(each)).all()) for each in values)


def image_of(array: Array, white: float | None = None) -> Image.Image:
    """Return the image of an array: grey, RGB or RGBA, in bytes.

    Args:
        array: ``[row, col]``, ``[row, col, channel]`` or ``[channel, row, col]``.
        white: The value of white; by default derived from the values.

    Raises:
        InputError: The array has no pixels or other axes, the place of its channels is ambiguous,
            or its range is not known.
    """
    values = _channels_last(as_numpy(array))
    white = white_of([values]) if white is None else white
    if values.dtype == np.uint16 and values.any():
        warn_of_scale(values)
    if values.dtype != np.uint8:
        scaled = values.astype(np.float64) * (255 / white)
        values = np.rint(scaled).astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(values))


def _channels_last(values: np.ndarray) -> np.ndarray:
    """Return the values as ``[row, col]`` or ``[row, col, channel]`` with 3 or 4 channels."""
    shape = tuple(values.shape)
    if values.ndim not in (2, 3) or 0 in shape:
        raise InputError(
            "An array must be one image [row, col], [row, col, channel] or [channel, row, col]; "
            f"got the shape {shape}."
        )
    if values.ndim == 2:
        return values
    first, last = shape[0] in _CHANNELS, shape[-1] in _CHANNELS
    if first == last:
        problem = "has no channels"
        if first:
            problem = "may be [channel, row, col] or [row, col, channel]"
        raise InputError(
            f"An array of the shape {shape} {problem}. Pass a PIL image, such as "
            "Image.fromarray(array) of bytes [row, col, channel] with 3 channels."
        )
    ordered = np.moveaxis(values, 0, -1) if first else values
    return ordered[..., 0] if ordered.shape[-1] == 1 else ordered


def warn_of_scale(values: np.ndarray) -> None:
    """Warn that values of 16 bits are scaled, and how to scale them differently."""
    warnings.warn(
        f"Grey values of 16 bits are scaled so that 65535 is white; this image has the values "
        f"{int(values.min())} to {int(values.max())}. Pass image.convert('RGB') if values above "
        "255 should be white, as in transformers, or scaled bytes: for values of 12 bits, "
        "Image.fromarray((array >> 4).astype(np.uint8)).",
        UserWarning,
        stacklevel=5,
    )
