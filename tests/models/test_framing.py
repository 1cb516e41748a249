"""Pages resized into a frame: painting the box of a cell changes the pixels of that cell most."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch.nn.functional import avg_pool2d
from transformers import DonutImageProcessor, NougatImageProcessor, PPFormulaNetImageProcessor

from tests.helpers.pixel_changes import painted, textured
from xmodal_interp.errors import GeometryError
from xmodal_interp.models import ImageGrid
from xmodal_interp.models.geometry import FixedGrid, framed

SIDE = 8
FRAME = {"height": 96, "width": 64}
GRID = FixedGrid(cell=lambda *_: SIDE, show=framed)
KINDS = {
    "donut": (DonutImageProcessor, {}),
    "donut that does not resize": (DonutImageProcessor, {"do_resize": False}),
    "nougat": (NougatImageProcessor, {}),
    "pp_formulanet": (PPFormulaNetImageProcessor, {}),
    "margins are kept": (PPFormulaNetImageProcessor, {"do_crop_margin": False}),
}
SIZES = [(120, 100), (60, 150), (200, 70)]


def on_white(width: int, height: int) -> Image.Image:
    """Return a textured picture with white margins of different widths."""
    image = Image.new("RGB", (width, height), "white")
    image.paste(textured(width - 32, height - 24), (20, 8))
    return image


def grid_of(processor: Any, image: Image.Image) -> tuple[np.ndarray, ImageGrid]:
    """Return the mean pixel of each cell, ``[cell]``, and the grid."""
    pixels = processor(images=[image], return_tensors="pt")["pixel_values"]
    holder = SimpleNamespace(image_processor=processor)
    (grid,) = GRID(holder, None, {"pixel_values": pixels}, [image])
    return avg_pool2d(pixels.mean(1), SIDE).flatten().numpy(), grid


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize("kind", KINDS)
def test_a_painted_box_changes_its_own_cell(kind: str, size: tuple[int, int]) -> None:
    made, settings = KINDS[kind]
    processor, image = made(size=FRAME, **settings), on_white(*size)
    plain, grid = grid_of(processor, image)
    inside = np.array([20, 8, size[0] - 12, size[1] - 16])
    within = (grid.boxes[:, :2] >= inside[:2]).all(1) & (grid.boxes[:, 2:] <= inside[2:]).all(1)
    cells = np.flatnonzero(within)
    assert len(cells) >= 4
    for cell in cells[:: max(1, len(cells) // 6)]:
        other, _ = grid_of(processor, painted(image, grid.boxes[cell]))
        assert np.abs(other - plain).argmax() == cell


def test_a_page_that_is_rotated_is_refused() -> None:
    processor = DonutImageProcessor(size=FRAME, do_align_long_axis=True)
    assert grid_of(processor, on_white(60, 90))[1].rows == 12
    with pytest.raises(GeometryError) as error:
        grid_of(processor, on_white(120, 90))
    assert str(error.value) == (
        "DonutImageProcessor rotates an image of 120 x 90 by 90 degrees to fit 64 x 96, so its "
        "tokens have no boxes. Set do_align_long_axis=False."
    )
