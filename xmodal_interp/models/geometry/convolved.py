"""Tokens that convolutions make: codes of a codebook, and the fused features of a pyramid.

What a token hears of is no square cut out of the image. It has its middle where the strides say,
and reaches over the neighbours: the box is the square around that middle.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from xmodal_interp.models.geometry.cells import (
    at_top_left,
    image_grid,
    rectangle,
    shifted,
    with_breaks,
)
from xmodal_interp.models.geometry.fixed import squares
from xmodal_interp.models.geometry.grid import ImageGrid
from xmodal_interp.models.geometry.patches import vision_of
from xmodal_interp.models.geometry.replaying import shown
from xmodal_interp.models.geometry.sized import told_sizes
from xmodal_interp.models.geometry.tiling import whole

_FUSED_AT = 16
"""The stride at which a MobileNet-V5 fuses its last two stages."""


def code_grid(
    processor: Any, config: Any, inputs: Mapping[str, Any], images: Sequence[Image.Image]
) -> list[ImageGrid]:
    """Every image is resized and cropped to one size, of which a VQ-VAE makes codes (Chameleon).

    Its attention stands at the coarsest level: its positions are the codes'.
    """
    height, width = inputs["pixel_values"].shape[-2:]
    side = _code_side(config)
    grids = []
    for image in images:
        codes = squares(shown(processor, image, width, height), width, height, side)
        codes = shifted(codes, _down_right(side, side))
        grids.append(image_grid(image.size, [codes], [codes]))
    return grids


def code_rows(
    _processor: Any, config: Any, inputs: Mapping[str, Any], images: Sequence[Image.Image]
) -> list[ImageGrid]:
    """Every image keeps its aspect; a VQ-VAE makes rows of codes, a line break behind each (Emu3).

    The sides are rounded to whole codes, each for itself. The VQ-VAE reads all images of a batch at
    the size of the largest; what is padding has no place.
    """
    sizes = told_sizes(inputs, images)
    side = _code_side(config)
    all_rows, all_cols = (length // side for length in inputs["pixel_values"].shape[-2:])
    grids = []
    for image, (height, width) in zip(images, sizes, strict=True):
        rows, cols = height // side, width // side
        codes = rectangle(rows, cols, whole(image))
        codes = shifted(codes, _down_right(side, side))
        tower = at_top_left(codes, cols, all_rows, all_cols)
        grids.append(image_grid(image.size, [with_breaks(codes, rows)], [tower]))
    return grids


def fused_stages(
    processor: Any, config: Any, inputs: Mapping[str, Any], images: Sequence[Image.Image]
) -> list[ImageGrid]:
    """The last stages of a MobileNet, fused and pooled to so many rows and columns (Gemma 3n).

    The tower's attention has other grids, one for each stage, and keys that are fewer than its
    queries: its positions are not placed.
    """
    height, width = inputs["pixel_values"].shape[-2:]
    side = _pooled_to(config)
    grids = []
    for image in images:
        cells = rectangle(side, side, shown(processor, image, width, height))
        cells = shifted(cells, _down_right(_FUSED_AT, width / side))
        grids.append(image_grid(image.size, [cells], []))
    return grids


def _down_right(stride: int, cell: float) -> float:
    """How far up and left of its square a token looks, in squares: less than nothing.

    Strides of two that pad at the right and below look around the second of their two inputs.

    Args:
        stride: The product of these strides, px.
        cell: The side of a square, px.
    """
    return -(stride - 1) / 2 / cell


def _code_side(config: Any) -> int:
    """The side of the square that a code stands for, px: all levels but one halve the sides."""
    return int(2 ** (len(config.vq_config.channel_multiplier) - 1))


def _pooled_to(config: Any) -> int:
    """Rows, and columns, of the features of a MobileNet-V5: as configured, or its own default."""
    stated = (vision_of(config).model_args or {}).get("msfa_output_resolution")
    if stated is None:
        from timm.models.mobilenetv5 import MobileNetV5Encoder  # only where its models are

        known = inspect.signature(MobileNetV5Encoder.__init__).parameters
        stated = known["msfa_output_resolution"].default
    return int(stated)
