"""Reproduce the steps of an image processor from its settings.

Resizing, centre cropping and padding to a square are expressed as a box: the part of the original
image that the resulting pixels show.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from PIL import Image

from xmodal_interp.errors import GeometryError
from xmodal_interp.models.geometry.cells import Box


def setting(processor: Any, name: str, default: Any = None) -> Any:
    """Return a setting that the processor uses for images.

    Defaults of the processor override the settings of its image processor.
    """
    return _setting(processor, "image", name, default)


def video_setting(processor: Any, name: str, default: Any = None) -> Any:
    """Return a setting that the processor uses for videos."""
    return _setting(processor, "video", name, default)


def _setting(processor: Any, part: str, name: str, default: Any) -> Any:
    registered = getattr(getattr(processor, "valid_processor_kwargs", None), "_defaults", {})
    written = getattr(processor, f"{part}s_kwargs", None)
    for defaults in (registered.get(f"{part}s_kwargs"), written):
        if isinstance(defaults, Mapping) and name in defaults:
            return defaults[name]
    value = getattr(getattr(processor, f"{part}_processor"), name, None)
    return default if value is None else value


def shown(processor: Any, image: Image.Image, width: int, height: int) -> Box:
    """Return the part of an image that its processed pixels (``width`` x ``height``) show.

    The box extends beyond the image if the processor pads. Sizes are rounded as in the processor,
    so the box is exact up to the resampling filter.

    Raises:
        GeometryError: The settings do not lead to these pixels.
    """
    return shown_by(processor.image_processor, image.size, width, height)


def shown_by(settings: Any, size: tuple[int, int], width: int, height: int) -> Box:
    """Like :func:`shown`, for a picture of ``size`` (width, height) and the settings as an object.

    Raises:
        GeometryError: The settings do not lead to these pixels.
    """
    w, h = map(float, size)
    x0, y0 = 0.0, 0.0
    if getattr(settings, "do_pad", False) and _pads_to_square(settings):
        side = max(w, h)
        x0, y0 = -((side - w) // 2), -((side - h) // 2)
        w = h = side
    scale_x = scale_y = 1.0
    new_w, new_h = int(w), int(h)
    if getattr(settings, "do_resize", False):
        new_w, new_h = _resized(settings, int(w), int(h))
        scale_x, scale_y = new_w / w, new_h / h
    left, top = 0.0, 0.0
    if getattr(settings, "do_center_crop", False):
        left, top = _crop_start(new_w, width), _crop_start(new_h, height)
    else:
        check_replayed((new_w, new_h), (width, height))
    x0, y0 = x0 + left / scale_x, y0 + top / scale_y
    return x0, y0, x0 + width / scale_x, y0 + height / scale_y


def fitted(processor: Any, image: Image.Image, width: int, height: int) -> Box:
    """Return the box of an image that is resized by its longer side and padded at both ends.

    Raises:
        GeometryError: The processor does not pad.
    """
    if not setting(processor, "do_pad", default=True):
        raise GeometryError(
            f"{type(processor.image_processor).__name__} has do_pad=False, so images are not "
            "padded to a square. Set do_pad=True."
        )
    smallest = setting(processor, "min_size", 1)
    scale = width / max(image.size)
    new_w, new_h = (max(round(length * scale), smallest) for length in image.size)
    per_x, per_y = image.width / new_w, image.height / new_h
    x0, y0 = -((width - new_w) // 2) * per_x, -((height - new_h) // 2) * per_y
    return x0, y0, x0 + width * per_x, y0 + height * per_y


def at_the_top(processor: Any, image: Image.Image, width: int, height: int) -> Box:
    """Return the box of an image that is resized into a square, padded at the right and bottom.

    Raises:
        GeometryError: The size of the processor has no ``max_height`` and ``max_width``.
    """
    from transformers.image_utils import get_image_size_for_max_height_width

    size = setting(processor, "size")
    if not (size.get("max_height") and size.get("max_width")):
        raise GeometryError(
            f"{type(processor.image_processor).__name__} has the size {dict(size)}. Set a size "
            "with max_height and max_width."
        )
    new_h, new_w = get_image_size_for_max_height_width(
        (image.height, image.width), size["max_height"], size["max_width"]
    )
    return 0.0, 0.0, image.width * width / new_w, image.height * height / new_h


def shown_in_frames(processor: Any, image: Image.Image, width: int, height: int) -> Box:
    """Return the box of an image that is passed to a video processor as a frame."""
    return shown_by(processor.video_processor, image.size, width, height)


def check_replayed(replayed: tuple[int, int], returned: tuple[int, int]) -> None:
    """Compare the size that the settings lead to with the size that the processor returned.

    Raises:
        GeometryError: They differ.
    """
    if replayed != returned:
        raise GeometryError(
            f"The processor returned {returned[0]} x {returned[1]} pixels, but its settings lead "
            f"to {replayed[0]} x {replayed[1]}. Use the checkpoint's own processor settings."
        )


def _pads_to_square(settings: Any) -> bool:
    return hasattr(settings, "pad_to_square")


def _resized(settings: Any, width: int, height: int) -> tuple[int, int]:
    """Return width and height after the resize."""
    size = settings.size
    shortest = size.get("shortest_edge")
    if shortest is not None:
        if width <= height:
            return shortest, int(shortest * height / width)
        return int(shortest * width / height), shortest
    if size.get("height") is not None and size.get("width") is not None:
        return size["width"], size["height"]
    raise GeometryError(
        f"{type(settings).__name__} has the size {dict(size)}. Set a size with shortest_edge, or "
        "with height and width."
    )


def _crop_start(length: int, wanted: int) -> float:
    """Return the start of a centre crop; negative if the image is padded to the crop."""
    return (length - wanted) // 2 if length >= wanted else -((wanted - length) // 2)
