"""What an image processor does to every image alike, replayed from its settings.

Resizing, centred cropping and padding to a square, as a box: which part of the original image the
resulting pixels show.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from PIL import Image
from transformers.image_utils import get_image_size_for_max_height_width

from xmodal_interp.errors import GeometryError
from xmodal_interp.models.geometry.cells import Box


def setting(processor: Any, name: str, default: Any = None) -> Any:
    """A setting of the image processor, as the processor that owns it would call it.

    A processor's own defaults for images go before those of its image processor.
    """
    return _setting(processor, "image", name, default)


def video_setting(processor: Any, name: str, default: Any = None) -> Any:
    """A setting of the video processor, likewise."""
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
    """Which part of an image is seen in its pixels of ``width`` x ``height``.

    It reaches over the edge of the image where this was padded. Rounding of the resized size is
    part of the replay, so the box is exact up to the resampling filter.

    Raises:
        GeometryError: The settings do not lead to these pixels.
    """
    return shown_by(processor.image_processor, image.size, width, height)


def shown_by(settings: Any, size: tuple[int, int], width: int, height: int) -> Box:
    """The same for a picture of ``size`` (width, height) by the settings of its processor.

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
    """What is shown where the longer side is resized, and the shorter one padded on both ends.

    Raises:
        GeometryError: The processor does not pad to these pixels.
    """
    if not setting(processor, "do_pad", default=True):
        raise GeometryError(
            "An image that is fitted into a square must be padded to it. "
            f"{type(processor.image_processor).__name__} has do_pad=False."
        )
    smallest = setting(processor, "min_size", 1)
    scale = width / max(image.size)
    new_w, new_h = (max(round(length * scale), smallest) for length in image.size)
    per_x, per_y = image.width / new_w, image.height / new_h
    x0, y0 = -((width - new_w) // 2) * per_x, -((height - new_h) // 2) * per_y
    return x0, y0, x0 + width * per_x, y0 + height * per_y


def at_the_top(processor: Any, image: Image.Image, width: int, height: int) -> Box:
    """What is shown where an image is resized into a square, and padded right and below.

    Raises:
        GeometryError: The processor is told another way of resizing.
    """
    size = setting(processor, "size")
    if not (size.get("max_height") and size.get("max_width")):
        raise GeometryError(
            "An image that is resized into a square needs a size with max_height and max_width. "
            f"{type(processor.image_processor).__name__} has {dict(size)}."
        )
    new_h, new_w = get_image_size_for_max_height_width(
        (image.height, image.width), size["max_height"], size["max_width"]
    )
    return 0.0, 0.0, image.width * width / new_w, image.height * height / new_h


def shown_in_frames(processor: Any, image: Image.Image, width: int, height: int) -> Box:
    """What is shown where a processor of videos is given the images, as frames."""
    return shown_by(processor.video_processor, image.size, width, height)


def check_replayed(replayed: tuple[int, int], returned: tuple[int, int]) -> None:
    """Refuse pixels of another width and height than the settings lead to.

    Raises:
        GeometryError: They differ.
    """
    if replayed != returned:
        raise GeometryError(
            "The processor's settings must lead to the pixels it returned. Replayed were "
            f"{replayed[0]} x {replayed[1]}, returned {returned[0]} x {returned[1]}."
        )


def _pads_to_square(settings: Any) -> bool:
    return hasattr(settings, "pad_to_square")


def _resized(settings: Any, width: int, height: int) -> tuple[int, int]:
    """Width and height after the resize."""
    size = settings.size
    shortest = size.get("shortest_edge")
    if shortest is not None:
        if width <= height:
            return shortest, int(shortest * height / width)
        return int(shortest * width / height), shortest
    if size.get("height") is not None and size.get("width") is not None:
        return size["width"], size["height"]
    raise GeometryError(
        "A fixed grid needs a size with a shortest_edge, or with height and width. "
        f"{type(settings).__name__} has {dict(size)}."
    )


def _crop_start(length: int, wanted: int) -> float:
    """Where a centred crop starts; negative where the image was padded to it."""
    return (length - wanted) // 2 if length >= wanted else -((wanted - length) // 2)
