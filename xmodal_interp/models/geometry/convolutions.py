"""Rules for tokens computed by convolutions: codes of a codebook, and fused features of a pyramid.

The receptive field of such a token overlaps its neighbours, and the strides determine its centre.
The box is the square of one cell around that centre.
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
    vision_of,
    with_breaks,
)
from xmodal_interp.models.geometry.grid import ImageGrid
from xmodal_interp.models.geometry.processor_steps import shown, whole
from xmodal_interp.models.geometry.resized_images import reported_sizes
from xmodal_interp.models.geometry.whole_images import squares

_FUSED_AT = 16
"""The stride at which MobileNet-V5 fuses its last two stages."""


def code_grid(
    processor: Any, config: Any, inputs: Mapping[str, Any], images: Sequence[Image.Image]
) -> list[ImageGrid]:
    """Place the codes of a VQ-VAE, for images resized and cropped to one size (Chameleon).

    The attention of the VQ-VAE is at the coarsest level, so its positions are those of the codes.
    """
    height, width = inputs["pixel_values"].shape[-2:]
    side = _code_side(config)
    grids = []
    for image in images:
        codes = squares(shown(processor, image, width, height), width, height, side)
        codes = shifted(codes, _shift(side, side))
        grids.append(image_grid(image.size, [codes], [codes]))
    return grids


def code_rows(
    _processor: Any, config: Any, inputs: Mapping[str, Any], images: Sequence[Image.Image]
) -> list[ImageGrid]:
    """Place rows of VQ-VAE codes, each with a line break, for images of any aspect ratio (Emu3).

    Each side is rounded to whole codes independently. The VQ-VAE pads all images of a batch to the
    size of the largest; codes of padding are outside the grid.
    """
    sizes = reported_sizes(inputs, images)
    side = _code_side(config)
    all_rows, all_cols = (length // side for length in inputs["pixel_values"].shape[-2:])
    grids = []
    for image, (height, width) in zip(images, sizes, strict=True):
        rows, cols = height // side, width // side
        codes = rectangle(rows, cols, whole(image))
        codes = shifted(codes, _shift(side, side))
        tower = at_top_left(codes, cols, all_rows, all_cols)
        grids.append(image_grid(image.size, [with_breaks(codes, rows)], [tower]))
    return grids


def fused_stages(
    processor: Any, config: Any, inputs: Mapping[str, Any], images: Sequence[Image.Image]
) -> list[ImageGrid]:
    """Place the last stages of a MobileNet, fused and pooled to a fixed grid (Gemma 3n).

    Positions of the tower's attention are not placed: each stage has another grid, and there are
    fewer keys than queries.
    """
    height, width = inputs["pixel_values"].shape[-2:]
    side = _pooled_side(config)
    grids = []
    for image in images:
        cells = rectangle(side, side, shown(processor, image, width, height))
        cells = shifted(cells, _shift(_FUSED_AT, width / side))
        grids.append(image_grid(image.size, [cells], []))
    return grids


def _shift(stride: int, cell: float) -> float:
    """Return the fraction for :func:`shifted`; it is negative, so boxes move down and right.

    A stride of two with padding at the right and bottom is centred on the second of its two inputs.

    Args:
        stride: The product of these strides, px.
        cell: The side of a cell, px.
    """
    return -(stride - 1) / 2 / cell


def _code_side(config: Any) -> int:
    """Return the side of the square of one code, px: each level except the first halves it."""
    return int(2 ** (len(config.vq_config.channel_multiplier) - 1))


def _pooled_side(config: Any) -> int:
    """Return the rows (and columns) of MobileNet-V5's features, as configured or by default."""
    stated = (vision_of(config).model_args or {}).get("msfa_output_resolution")
    if stated is None:
        from timm.models.mobilenetv5 import MobileNetV5Encoder  # timm is optional

        known = inspect.signature(MobileNetV5Encoder.__init__).parameters
        stated = known["msfa_output_resolution"].default
    return int(stated)
