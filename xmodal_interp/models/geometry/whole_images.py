"""Rules for images that are resized whole, not cut into separate tiles and a thumbnail.

* :class:`FixedGrid`: images of one size, cut into squares with one token each (LLaVA);
  :func:`framed` places pages that are cropped to their content and resized into a frame (Donut).
* :class:`PatchTokens`: the same for a vision encoder, whose class tokens and registers have names;
  :func:`spatial_patches` places patches whose rows and columns the processor reports (SigLIP 2).
* :class:`FlattenedPatches`: patches as vectors that start with their row and column (Pix2Struct).
* :class:`PaddedSquares`: squares cut from the top left; the last of a row or column may hold
  padding (Fuyu, Inkling).
* :func:`aspect_ratio_tiles`: images on a canvas of tiles, whose tokens are keys of cross-attention
  outside the sequence (Mllama).
* :class:`Chosen`: one of several rules, selected by the configuration.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.image_utils import SizeDict

from xmodal_interp.errors import GeometryError
from xmodal_interp.models.geometry.cells import (
    Cells,
    image_grid,
    in_blocks,
    joined,
    nowhere,
    patch_side,
    rectangle,
    shifted,
    vision_of,
)
from xmodal_interp.models.geometry.grid import (
    PADDING,
    Box,
    ImageGrid,
    ImageRule,
    raster,
    unplaced,
)
from xmodal_interp.models.geometry.processor_steps import (
    check_count,
    check_replayed,
    own_function,
    setting,
    shown,
    whole,
)

Show = Callable[[Any, Image.Image, int, int], Box]
"""``(processor, image, width, height) -> box``: the part of the image that the pixels show."""

Count = Callable[[Any, Any], int]
"""``(config, processor) -> number``."""


def kept_class_token(config: Any, processor: Any) -> int:
    """Return 1 if the image features include a class token of the tower (LLaVA), else 0.

    With the strategy ``"full"`` all positions of the tower are features. A SigLIP tower has no
    class token among them.
    """
    strategy = getattr(config, "vision_feature_select_strategy", "default")
    return counted_class_token(config, processor) if strategy == "full" else 0


def counted_class_token(_config: Any, processor: Any) -> int:
    """Return 1 if the processor counts a class token besides the patches, else 0."""
    return int(bool(getattr(processor, "num_additional_image_tokens", 0)))


@dataclass(frozen=True)
class FixedGrid:
    """Images resized, and cropped or padded, to one size, then cut into squares.

    Attributes:
        cell: Function that returns the side of a token's square, px of the resized image.
        show: Function that returns the part of the image that the resized pixels show.
        before: Number of tokens before those of the grid (class tokens), or a function for it.
        shift: How far up and left of its square a token's receptive field is centred, in squares.
        tower_before: Number of vision-tower positions before the patches (class tokens), or a
            function for it. None if the tower reads windows, so that a position has no single
            patch.
    """

    cell: Count = patch_side
    show: Show = shown
    before: int | Count = 0
    shift: float = 0.0
    tower_before: int | Count | None = 0

    def __call__(
        self, processor: Any, config: Any, inputs: Mapping[str, Any], images: Sequence[Image.Image]
    ) -> list[ImageGrid]:
        """Return one grid per image."""
        pixels = inputs.get("pixel_values_images", inputs.get("pixel_values"))
        height, width = pixels.shape[-2:]
        side = self.cell(config, processor)
        grids = []
        for image in images:
            cells = squares(self.show(processor, image, width, height), width, height, side)
            cells = shifted(cells, self.shift)
            tokens = [nowhere(_number(self.before, config, processor)), cells]
            if self.tower_before is None:
                grids.append(image_grid(image.size, tokens, []))
                continue
            classes = _names({"class": _number(self.tower_before, config, processor)}, config)
            placed = image_grid(image.size, tokens, [nowhere(len(classes)), cells])
            names = np.array([*classes, *[""] * len(cells)])
            grids.append(replace(placed, patch_names=names))
        return grids


@dataclass(frozen=True)
class PatchTokens:
    """Positions of a vision encoder: the patches of images of one size, and tokens with names.

    For a Vision Transformer with a class token: ``PatchTokens(before={"class": 1})``.

    Attributes:
        before: Names of the positions before the patches, each with their number or with the
            configuration attribute that holds it, in order.
        after: The same for the positions after the patches.
        show: Function that returns the part of the image that the resized pixels show.
    """

    before: Mapping[str, int | str] = field(default_factory=dict)
    after: Mapping[str, int | str] = field(default_factory=dict)
    show: Show = shown

    def __call__(
        self, processor: Any, config: Any, inputs: Mapping[str, Any], images: Sequence[Image.Image]
    ) -> list[ImageGrid]:
        """Return one grid per image; its tokens are the positions of the encoder."""
        height, width = inputs["pixel_values"].shape[-2:]
        before, after = (_names(each, vision_of(config)) for each in (self.before, self.after))
        side, grids = patch_side(config), []
        for image in images:
            patches = squares(self.show(processor, image, width, height), width, height, side)
            cells = [nowhere(len(before)), patches, nowhere(len(after))]
            names = np.array([*before, *[""] * len(patches), *after])
            grids.append(replace(image_grid(image.size, cells, cells), patch_names=names))
        return grids


def _names(numbers: Mapping[str, int | str], config: Any) -> list[str]:
    """Return a name for each position; several positions of one name are numbered."""
    names = []
    for name, value in numbers.items():
        n = value if isinstance(value, int) else int(getattr(config, value))
        names += [name] if n == 1 else [f"{name} {i}" for i in range(n)]
    return names


def spatial_patches(
    _processor: Any, _config: Any, inputs: Mapping[str, Any], images: Sequence[Image.Image]
) -> list[ImageGrid]:
    """Place patches by ``spatial_shapes``, each image followed by padding (SigLIP 2).

    Each side is rounded to whole patches independently, so the boxes fill the image exactly.
    """
    shapes = np.asarray(inputs["spatial_shapes"]).reshape(-1, 2).tolist()
    check_count("rows of spatial_shapes", len(shapes), images)
    grids = []
    for image, (rows, cols) in zip(images, shapes, strict=True):
        n_padding = inputs["pixel_values"].shape[1] - rows * cols
        cells = [rectangle(rows, cols, whole(image)), nowhere(n_padding)]
        names = np.array([""] * (rows * cols) + [PADDING] * n_padding)
        grids.append(replace(image_grid(image.size, cells, cells), patch_names=names))
    return grids


def _number(value: int | Count, config: Any, processor: Any) -> int:
    return value if isinstance(value, int) else value(config, processor)


fixed_grid = FixedGrid(before=kept_class_token, tower_before=counted_class_token)
"""One token per patch; features and tower may have a class token, by configuration (LLaVA)."""


def squares(box: Box, width: int, height: int, side: int) -> Cells:
    """Cut pixels that show a box into whole squares, from the top left."""
    rows, cols = height // side, width // side
    x0, y0, x1, y1 = box
    right, bottom = x0 + (x1 - x0) * cols * side / width, y0 + (y1 - y0) * rows * side / height
    return rectangle(rows, cols, (x0, y0, right, bottom))


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


@dataclass(frozen=True)
class FlattenedPatches:
    """As many patches as fit at the image's aspect ratio, followed by padding (Pix2Struct).

    Each side is rounded down to whole patches independently, so the boxes fill the image exactly.
    If the processor draws the question above the image, rows and columns include it, and boxes are
    not known.

    Attributes:
        queries: Configuration attribute with the number of learned queries per image, if image
            tokens are learned queries.
    """

    queries: str | None = None

    def __call__(
        self, processor: Any, config: Any, inputs: Mapping[str, Any], images: Sequence[Image.Image]
    ) -> list[ImageGrid]:
        """Return one grid per image."""
        has_header = bool(setting(processor, "is_vqa", default=False))
        grids = []
        for image, patches in zip(images, np.asarray(inputs["flattened_patches"]), strict=True):
            rows, cols = patches[:, :2].max(0).astype(int).tolist()  # counted from 1, 0 on padding
            cells = rectangle(rows, cols, whole(image))
            if has_header:
                cells.boxes[:] = np.nan
            tower = [cells, nowhere(len(patches) - rows * cols)]
            tokens = tower
            if self.queries is not None:
                tokens = [nowhere(attrgetter(self.queries)(config))]
            grids.append(image_grid(image.size, tokens, tower))
        return grids


Resized = Callable[[Any, Image.Image], tuple[int, int]]
"""``(processor, image) -> width, height``: the size of the image when it is cut."""


def as_it_is(_processor: Any, image: Image.Image) -> tuple[int, int]:
    """Return the size of an image that is not resized (Inkling 2)."""
    return image.size


def shrunk(processor: Any, image: Image.Image) -> tuple[int, int]:
    """Return the size of an image shrunk, aspect ratio kept, to a maximal size (Fuyu)."""
    if not setting(processor, "do_resize", default=False):
        return image.size
    size = setting(processor, "size")
    largest = SizeDict(height=size["height"], width=size["width"])
    blank = torch.empty(1, image.height, image.width, dtype=torch.float32)
    height, width = processor.image_processor.resize(blank, largest).shape[-2:]
    return width, height


def scaled(processor: Any, image: Image.Image) -> tuple[int, int]:
    """Return the size of an image scaled by a factor, up to a maximal longest edge (Inkling)."""
    fraction = setting(processor, "rescale_image_frac")
    if fraction is None:
        return image.size
    longest = max(image.size)
    wanted = longest * fraction
    largest = setting(processor, "rescale_image_max_upscaled_long_edge")
    if largest is not None:
        wanted = min(wanted, max(largest, longest))
    ratio = wanted / longest
    width, height = (math.floor(length * ratio + 0.5) for length in image.size)
    return width, height


@dataclass(frozen=True)
class PaddedSquares:
    """Squares of pixels with one token each, row by row; the aspect ratio is kept.

    Attributes:
        square: Setting of the image processor that holds the height and width of a square.
        resized: Function that returns the size of the image when it is cut.
        spare_column: Whether a column of padding is added even if the squares fill the width.
        merged: Whether a vision tower reads each square as a block of patches, after a class token.
            If not, there is no tower: each square is projected to a token.
    """

    square: str = "size"
    resized: Resized = as_it_is
    spare_column: bool = False
    merged: bool = False

    def __call__(
        self, processor: Any, config: Any, _inputs: Mapping[str, Any], images: Sequence[Image.Image]
    ) -> list[ImageGrid]:
        """Return one grid per image."""
        square = setting(processor, self.square)
        grids = []
        for image in images:
            width, height = self.resized(processor, image)
            rows = math.ceil(height / square["height"])
            cols = math.ceil(width / square["width"])
            if self.spare_column:
                cols = width // square["width"] + 1
            right = cols * square["width"] * image.width / width
            bottom = rows * square["height"] * image.height / height
            tower = []
            if self.merged:
                merge = vision_of(config).spatial_merge_size
                patches = rectangle(rows * merge, cols * merge, (0.0, 0.0, right, bottom))
                tower = [nowhere(1), in_blocks(patches, cols * merge, merge)]
            tokens = rectangle(rows, cols, (0.0, 0.0, right, bottom))
            grids.append(image_grid(image.size, [tokens], tower))
        return grids


_TOWER_MULTIPLE = 8  # the tower pads each tile to a multiple of it; it is a constant of the code


def aspect_ratio_tiles(
    processor: Any, config: Any, inputs: Mapping[str, Any], images: Sequence[Image.Image]
) -> list[ImageGrid]:
    """Place images at the top left of a canvas of square tiles (Mllama).

    The keys of an image are ``max_num_tiles`` tiles, each a class token and its patches. Class
    tokens and unused tiles are outside the grid. Cells on the padding of the canvas have a row and
    column but no box. In the tower, each tile is followed by padding.
    """
    vision = config.vision_config
    tile, patch, max_tiles = vision.image_size, vision.patch_size, vision.max_num_tiles
    supported = [tuple(pair) for pair in vision.supported_aspect_ratios]
    ratio_ids = np.asarray(inputs["aspect_ratio_ids"]).reshape(-1)
    ratio_ids = ratio_ids[ratio_ids > 0]
    check_count("aspect_ratio_ids", len(ratio_ids), images)
    side = tile // patch
    grids = []
    for image, ratio_id in zip(images, ratio_ids.tolist(), strict=True):
        tile_rows, tile_cols = supported[ratio_id - 1]
        new_h, new_w = own_function(processor, "get_image_size_fit_to_canvas")(
            image.height, image.width, tile_rows * tile, tile_cols * tile, tile
        )
        width, height = image.width * tile / int(new_w), image.height * tile / int(new_h)
        tiles = []
        for number, (row, col) in enumerate(raster(tile_rows, tile_cols).tolist()):
            box = (col * width, row * height, (col + 1) * width, (row + 1) * height)
            at = (row * side, col * side)
            tiles.append(joined([nowhere(1), rectangle(side, side, box, at=at, tile=number)]))
        tiles += [nowhere(side * side + 1)] * (max_tiles - len(tiles))
        padding = nowhere(-len(tiles[0]) % _TOWER_MULTIPLE)
        tower = [part for tile in tiles for part in (tile, padding)]
        grids.append(image_grid(image.size, tiles, tower))
    return grids


@dataclass(frozen=True)
class Chosen:
    """One of several rules, selected by the configuration.

    If there is no rule for a configuration, the tokens have no rows and columns.

    Attributes:
        by: Function of the configuration that returns a key of ``rules``, such as the type of the
            encoder.
        rules: The rules by key.
        reason: The reason given if no rule has the key; ``{}`` is replaced by the key.
    """

    by: Callable[[Any], Any]
    rules: Mapping[Any, ImageRule]
    reason: str = "There is no geometry rule for {!r}."

    def __call__(
        self, processor: Any, config: Any, inputs: Mapping[str, Any], images: Sequence[Image.Image]
    ) -> list[ImageGrid]:
        """Return one grid per image."""
        key = self.by(config)
        if key in self.rules:
            return self.rules[key](processor, config, inputs, images)
        return [unplaced(image.size, 0, self.reason.format(key)) for image in images]
