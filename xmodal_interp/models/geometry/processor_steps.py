"""The steps of image processors, reproduced from their settings.

Resizing, centre cropping and padding result in a box: the part of the original image that the
processed pixels show. Cutting into tiles results in a :class:`Tiling`: one such box per tile.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from transformers.image_utils import ChannelDimension

from xmodal_interp.errors import GeometryError
from xmodal_interp.models.geometry.grid import Box
from xmodal_interp.models.media import Video

ImageOrVideo = Image.Image | Video
"""An image, or a video whose frames are processed one by one."""


def setting(processor: Any, name: str, default: Any = None, part: str = "image") -> Any:
    """Return a setting that the processor uses for images, or for videos (``part="video"``).

    Defaults of the processor override the settings of its image or video processor.
    """
    registered = getattr(getattr(processor, "valid_processor_kwargs", None), "_defaults", {})
    written = getattr(processor, f"{part}s_kwargs", None)
    for defaults in (registered.get(f"{part}s_kwargs"), written):
        if isinstance(defaults, Mapping) and name in defaults:
            return defaults[name]
    value = getattr(getattr(processor, f"{part}_processor"), name, None)
    return default if value is None else value


def part_for(picture: ImageOrVideo) -> str:
    """Return the part of the processor that reads a picture: ``"image"`` or ``"video"``."""
    return "video" if isinstance(picture, Video) else "image"


def settings_for(processor: Any, picture: ImageOrVideo) -> Any:
    """Return the image processor, or the video processor for a video."""
    return getattr(processor, f"{part_for(picture)}_processor")


def shown(processor: Any, picture: ImageOrVideo, width: int, height: int) -> Box:
    """Return the part of a picture that its processed pixels (``width`` x ``height``) show.

    The box extends beyond the picture if the processor pads. Sizes are rounded as in the processor,
    so the box is exact up to the resampling filter.

    Raises:
        GeometryError: The settings do not lead to these pixels.
    """
    return _shown_by(settings_for(processor, picture), picture.size, width, height)


def _shown_by(settings: Any, size: tuple[int, int], width: int, height: int) -> Box:
    """Return the box for a picture of ``size``, by the settings of one part of the processor."""
    w, h = map(float, size)
    x0, y0 = 0.0, 0.0
    if getattr(settings, "do_pad", False) and hasattr(settings, "pad_to_square"):
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
    larger = setting(processor, "high_res_size")
    if larger is not None:  # the image is fitted into a larger square, which is then resized
        width = height = larger["height"]
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
    return _shown_by(processor.video_processor, image.size, width, height)


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


@dataclass(frozen=True)
class Tiling:
    """Tiles side by side.

    Attributes:
        rows: Number of rows of tiles.
        cols: Number of columns of tiles.
        boxes: The box of each tile, row by row, in pixels of the original image.
    """

    rows: int
    cols: int
    boxes: tuple[Box, ...]


Layout = Callable[[Any, Image.Image], Tiling | None]
"""``(processor, image) -> tiling``; None if the image is not tiled."""


def whole(picture: ImageOrVideo) -> Box:
    """Return the box of a whole image, or of a whole frame of a video, px."""
    width, height = picture.size
    return 0.0, 0.0, float(width), float(height)


def check_count(name: str, returned: int, images: Sequence[Image.Image]) -> None:
    """Compare the number of entries of an input with the number of images.

    Raises:
        GeometryError: They differ.
    """
    if returned != len(images):
        raise GeometryError(
            f"The processor returned {returned} {name} for {len(images)} images; it must return "
            "one per image."
        )


def even(rows: int, cols: int, box: Box) -> Tiling:
    """Return tiles of equal size that fill a box."""
    x0, y0, x1, y1 = box
    width, height = (x1 - x0) / cols, (y1 - y0) / rows
    boxes = tuple(
        (x0 + c * width, y0 + r * height, x0 + (c + 1) * width, y0 + (r + 1) * height)
        for r in range(rows)
        for c in range(cols)
    )
    return Tiling(rows, cols, boxes)


def own_function(processor: Any, name: str) -> Callable[..., Any]:
    """Return a function from the module of the image processor's class or of a parent class.

    Raises:
        GeometryError: There is no such function.
    """
    settings = type(processor.image_processor)
    for class_ in settings.__mro__:
        found = getattr(sys.modules[class_.__module__], name, None)
        if found is not None:
            function: Callable[..., Any] = found
            return function
    raise GeometryError(
        f"The module of {settings.__name__} has no function {name}, which computes the tiles of "
        "this family. Pass the image processor of this model type."
    )


def best_canvas(processor: Any, image: Image.Image) -> Tiling | None:
    """Return tiles of an image stretched to the best fitting canvas (InternVL)."""
    if not setting(processor, "crop_to_patches", default=False):
        return None
    size = setting(processor, "size")
    cols, rows = own_function(processor, "get_optimal_tiled_canvas")(
        (image.height, image.width),
        (size["height"], size["width"]),
        setting(processor, "min_patches", 1),
        setting(processor, "max_patches"),
    )
    return even(int(rows), int(cols), whole(image))


def covering_canvas(processor: Any, image: Image.Image) -> Tiling | None:
    """Return tiles of an image stretched to the fewest tiles that cover it (Ovis2).

    If ``use_covering_area_grid`` is off, the canvas is that of :func:`best_canvas`.
    """
    if not setting(processor, "use_covering_area_grid", default=False):
        return best_canvas(processor, image)
    largest = setting(processor, "max_patches")
    if not setting(processor, "crop_to_patches", default=False) or largest <= 1:
        return None
    cols, rows = own_function(processor, "get_min_tile_covering_grid")(
        (image.height, image.width),
        target_patch_size=setting(processor, "size")["height"],
        max_image_tiles=largest,
    )
    return even(int(rows), int(cols), whole(image))


def page_canvas(processor: Any, image: Image.Image) -> Tiling:
    """Return tiles as :func:`best_canvas` does, with more tiles for a wide page (Docling)."""
    names = ("size", "crop_to_patches", "min_patches", "max_patches")
    spread = ("dense_max_patches", "dense_max_scale", "dense_min_aspect", "dense_max_aspect")
    settings = {name: setting(processor, name) for name in (*names, *spread)}
    rows, cols = processor.image_processor.get_tile_grid(image.height, image.width, settings)
    return even(rows, cols, whole(image))


def longest_edge(processor: Any, image: Image.Image) -> Tiling | None:
    """Return tiles of an image resized to a longest edge (Idefics3, SmolVLM).

    Both sides are then rounded up to whole tiles.
    """
    if not setting(processor, "do_image_splitting", default=False):
        return None
    tile = setting(processor, "max_image_size")["longest_edge"]
    width, height = image.size
    if setting(processor, "do_resize", default=False):
        blank = torch.empty(3, height, width, dtype=torch.float32, device="meta")
        height, width = own_function(processor, "get_resize_output_image_size")(
            blank, setting(processor, "size")["longest_edge"]
        )
    aspect = width / height
    if width >= height:
        width = math.ceil(width / tile) * tile
        height = math.ceil(int(width / aspect) / tile) * tile
    else:
        height = math.ceil(height / tile) * tile
        width = math.ceil(int(height * aspect) / tile) * tile
    if height <= tile and width <= tile:
        return None
    return even(height // tile, width // tile, whole(image))


def padded_canvas(processor: Any, image: Image.Image) -> Tiling:
    """Return tiles of an image at the top left of a canvas; its aspect ratio is kept (Llama 4)."""
    size = setting(processor, "size")
    tile = size["height"]
    largest = setting(processor, "max_patches")
    to_largest = setting(processor, "resize_to_max_canvas", default=False)
    possible = own_function(processor, "find_supported_resolutions")(largest, patch_size=size)
    canvas_h, canvas_w = (
        own_function(processor, "get_best_fit")(
            (image.height, image.width), torch.tensor(possible), resize_to_max_canvas=to_largest
        )
    ).tolist()
    target_h, target_w = canvas_h, canvas_w
    if not to_largest:
        target_h, target_w = (
            min(max(image.height, tile), canvas_h),
            min(max(image.width, tile), canvas_w),
        )
    new_h, new_w = own_function(processor, "get_max_res_without_distortion")(
        (image.height, image.width), (target_h, target_w)
    )
    per_x, per_y = image.width / max(new_w, 1), image.height / max(new_h, 1)
    return even(canvas_h // tile, canvas_w // tile, (0.0, 0.0, canvas_w * per_x, canvas_h * per_y))


def crops(processor: Any, image: Image.Image) -> Tiling | None:
    """Return the nearly square crops of a long image: pan and scan (Gemma 3)."""
    if not setting(processor, "do_pan_and_scan", default=False):
        return None
    width, height = image.size
    smallest = setting(processor, "pan_and_scan_min_crop_size")
    longer, shorter = max(width, height), min(width, height)
    if longer / shorter < setting(processor, "pan_and_scan_min_ratio_to_activate"):
        return None
    n = max(2, min(longer // smallest, math.floor(longer / shorter + 0.5)))
    n = min(setting(processor, "pan_and_scan_max_num_crops"), n)
    step = math.ceil(longer / n)
    if min(step, shorter) < smallest:
        return None
    starts = [step * i for i in range(n)]
    ends = [min(start + step, longer) for start in starts]
    if width >= height:
        boxes = [
            (float(a), 0.0, float(b), float(height)) for a, b in zip(starts, ends, strict=True)
        ]
        return Tiling(1, n, tuple(boxes))
    boxes = [(0.0, float(a), float(width), float(b)) for a, b in zip(starts, ends, strict=True)]
    return Tiling(n, 1, tuple(boxes))


def split_canvas(processor: Any, image: Image.Image) -> Tiling | None:
    """Return tiles of an image in the centre of a canvas; its aspect ratio is kept (Aria).

    The last tiles of a row or column are smaller if the canvas is not a whole number of tiles.
    """
    if not setting(processor, "split_image", default=False):
        return None
    tile = setting(processor, "max_image_size")
    size = (image.height, image.width)
    canvas_h, canvas_w = own_function(processor, "select_best_resolution")(
        size, setting(processor, "split_resolutions")
    )
    new_h, new_w = own_function(processor, "get_patch_output_size")(
        torch.empty(1, *size, dtype=torch.float32, device="meta"),
        (canvas_h, canvas_w),
        ChannelDimension.FIRST,
    )
    left, top = (canvas_w - new_w) // 2, (canvas_h - new_h) // 2
    xs = [(x - left) * image.width / new_w for x in (*range(0, canvas_w, tile), canvas_w)]
    ys = [(y - top) * image.height / new_h for y in (*range(0, canvas_h, tile), canvas_h)]
    boxes = tuple(
        (x0, y0, x1, y1) for y0, y1 in itertools.pairwise(ys) for x0, x1 in itertools.pairwise(xs)
    )
    return Tiling(len(ys) - 1, len(xs) - 1, boxes)


def largest_canvas(processor: Any, image: Image.Image) -> Tiling | None:
    """Return tiles of an image stretched to the canvas chosen by the processor (PerceptionLM)."""
    settings = processor.image_processor
    if setting(processor, "vision_input_type") != "thumb+tile":
        return None
    blank = torch.empty(1, 3, image.height, image.width, dtype=torch.float32)
    _, (cols, rows) = settings.resize(blank, settings.tile_size, settings.max_num_tiles)
    return even(int(rows), int(cols), whole(image))
