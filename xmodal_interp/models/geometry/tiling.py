"""How processors cut an image into tiles, reproduced from their settings."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from transformers.image_utils import ChannelDimension

from xmodal_interp.errors import GeometryError
from xmodal_interp.models.geometry.cells import Box
from xmodal_interp.models.geometry.replaying import setting


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


def whole(image: Image.Image) -> Box:
    """Return the box of the whole image."""
    return 0.0, 0.0, float(image.width), float(image.height)


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
    for kind in settings.__mro__:
        found = getattr(sys.modules[kind.__module__], name, None)
        if found is not None:
            function: Callable[..., Any] = found
            return function
    raise GeometryError(
        f"The module of {settings.__name__} has no function {name}, which computes the tiles of "
        "this family. Pass the image processor of this model type."
    )


def best_canvas(processor: Any, image: Image.Image) -> Tiling | None:
    """Resize to the best fitting canvas of tiles; aspect ratio not kept (InternVL)."""
    if not setting(processor, "crop_to_patches", default=False):
        return None
    size = _size(processor)
    cols, rows = own_function(processor, "get_optimal_tiled_canvas")(
        (image.height, image.width),
        (size["height"], size["width"]),
        setting(processor, "min_patches", 1),
        setting(processor, "max_patches"),
    )
    return even(int(rows), int(cols), whole(image))


def covering_canvas(processor: Any, image: Image.Image) -> Tiling | None:
    """Like :func:`best_canvas`, by default with the fewest tiles that cover the image (Ovis2)."""
    if not setting(processor, "use_covering_area_grid", default=False):
        return best_canvas(processor, image)
    largest = setting(processor, "max_patches")
    if not setting(processor, "crop_to_patches", default=False) or largest <= 1:
        return None
    cols, rows = own_function(processor, "get_min_tile_covering_grid")(
        (image.height, image.width),
        target_patch_size=_size(processor)["height"],
        max_image_tiles=largest,
    )
    return even(int(rows), int(cols), whole(image))


def page_canvas(processor: Any, image: Image.Image) -> Tiling:
    """Like :func:`best_canvas`, with more tiles for a wide page (Docling)."""
    names = ("size", "crop_to_patches", "min_patches", "max_patches")
    spread = ("dense_max_patches", "dense_max_scale", "dense_min_aspect", "dense_max_aspect")
    settings = {name: setting(processor, name) for name in (*names, *spread)}
    rows, cols = processor.image_processor.get_tile_grid(image.height, image.width, settings)
    return even(rows, cols, whole(image))


def longest_edge(processor: Any, image: Image.Image) -> Tiling | None:
    """Resize to a longest edge, then round both sides up to whole tiles (Idefics3, SmolVLM)."""
    if not setting(processor, "do_image_splitting", default=False):
        return None
    tile = setting(processor, "max_image_size")["longest_edge"]
    width, height = image.size
    if setting(processor, "do_resize", default=False):
        width, height = _to_longest_edge(width, height, _size(processor)["longest_edge"])
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


def _to_longest_edge(width: int, height: int, longest: int) -> tuple[int, int]:
    """Return width and height with the aspect ratio kept, the shorter side even, and bounded."""
    aspect = width / height
    if width >= height:
        width, height = longest, int(longest / aspect)
        height += height % 2
    else:
        height, width = longest, int(longest * aspect)
        width += width % 2
    width, height = max(width, 1), max(height, 1)
    bound = 4096  # MAX_IMAGE_SIZE of these processors, a constant of their code
    aspect = width / height
    if width >= height and width > bound:
        width, height = bound, int(bound / aspect)
    elif height > width and height > bound:
        height, width = bound, int(bound * aspect)
    return max(width, 1), max(height, 1)


def padded_canvas(processor: Any, image: Image.Image) -> Tiling:
    """Resize to the top left of the best fitting canvas; aspect ratio kept (Llama 4)."""
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
    """Pan and scan: cut a long image into nearly square crops (Gemma 3)."""
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
    """Resize to the centre of the best fitting canvas; aspect ratio kept (Aria).

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
    """Resize to the canvas that the processor chooses; aspect ratio not kept (PerceptionLM)."""
    settings = processor.image_processor
    if setting(processor, "vision_input_type") != "thumb+tile":
        return None
    blank = torch.empty(1, 3, image.height, image.width, dtype=torch.float32)
    _, (cols, rows) = settings.resize(blank, settings.tile_size, settings.max_num_tiles)
    return even(int(rows), int(cols), whole(image))


def _size(processor: Any) -> Any:
    return setting(processor, "size")
