"""Pages that are cropped to their content and resized into a fixed frame (Donut)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image

from xmodal_interp.errors import GeometryError
from xmodal_interp.models.geometry.cells import Box
from xmodal_interp.models.geometry.replaying import check_replayed, setting, shown
from xmodal_interp.models.geometry.tiling import whole


def framed(processor: Any, image: Image.Image, width: int, height: int) -> Box:
    """Return the box of an image that is resized into a frame and padded at both ends.

    Processors without ``align_long_axis`` resize and crop as in :func:`shown`.

    Raises:
        GeometryError: The processor rotates the image to fit the frame, or its settings do not lead
            to these pixels.
    """
    if not hasattr(processor.image_processor, "align_long_axis"):
        return shown(processor, image, width, height)
    x0, y0, x1, y1 = whole(image)
    if setting(processor, "do_crop_margin", default=False):
        x0, y0, x1, y1 = _without_margins(processor.image_processor, image)
    w, h = int(x1 - x0), int(y1 - y0)
    size = setting(processor, "size")
    if setting(processor, "do_align_long_axis", default=False) and (
        (size["width"] - size["height"]) * (w - h) < 0
    ):
        raise GeometryError(
            f"{type(processor.image_processor).__name__} rotates an image of {w} x {h} by 90 "
            f"degrees to fit {size['width']} x {size['height']}, so its tokens have no boxes. "
            "Set do_align_long_axis=False."
        )
    new_w, new_h = _shrunk(processor, w, h, size)
    if not setting(processor, "do_pad", default=False):
        check_replayed((new_w, new_h), (width, height))
    per_x, per_y = w / new_w, h / new_h
    x0, y0 = x0 - (width - new_w) // 2 * per_x, y0 - (height - new_h) // 2 * per_y
    return x0, y0, x0 + width * per_x, y0 + height * per_y


def _shrunk(processor: Any, width: int, height: int, size: Any) -> tuple[int, int]:
    """Return width and height after resizing the shorter side and shrinking the longer one."""
    if setting(processor, "do_resize", default=False):
        shorter = min(size["height"], size["width"])
        if width <= height:
            width, height = shorter, int(shorter * height / width)
        else:
            width, height = int(shorter * width / height), shorter
    if not setting(processor, "do_thumbnail", default=False):
        return width, height
    new_w, new_h = min(width, size["width"]), min(height, size["height"])
    if (new_w, new_h) == (width, height):
        return width, height
    if height > width:
        return int(width * new_h / height), new_h
    return (new_w, int(height * new_w / width)) if width > height else (new_w, new_h)


def _without_margins(settings: Any, image: Image.Image) -> Box:
    """Return the box that the processor keeps; its function returns a view of the pixels."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
    kept = settings.crop_margin(pixels)
    y0, x0 = divmod(int(kept.storage_offset()), image.width)
    return float(x0), float(y0), float(x0 + kept.shape[2]), float(y0 + kept.shape[1])
