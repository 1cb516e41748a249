import dataclasses

import numpy as np
import pytest
from matplotlib.figure import Figure

from tests.helpers import synthetic
from tests.helpers.figure_samples import fake, sample_of
from xmodal_interp.errors import GeometryError, InputError
from xmodal_interp.figures import overlay_panels
from xmodal_interp.figures.placement import extent, placed_image, uncovered, with_patches
from xmodal_interp.figures.scales import scale_of


@pytest.mark.parametrize(
    ("family", "expected"), [("llava", (32, 128, 96, 0)), ("qwen2_vl", (0, 128, 72, 0))]
)
def test_the_map_covers_the_token_boxes(family: str, expected: tuple[float, ...]) -> None:
    place = placed_image(sample_of(family))
    boxes = place.grid.boxes
    assert extent(place.grid) == pytest.approx(expected)
    left, top, right, bottom = boxes[:, 0].min(), boxes[:, 1].min(), *boxes[:, 2:].max(0)
    assert extent(place.grid) == pytest.approx((left, right, bottom, top))


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "mllama"])
def test_every_token_is_drawn_inside_its_box(family: str) -> None:
    """The drawn array has a token's value at the centre of the token's box."""
    place = placed_image(sample_of(family))
    values = np.arange(len(place.keys), dtype=float)
    axes = Figure().add_subplot()
    overlay_panels.draw_image(axes, place)
    scale = scale_of("probability", [values])
    drawn = overlay_panels.draw_map(axes, place, place.on_grid(values), scale, smooth=False)
    left, right, bottom, top = drawn.get_extent()
    cells = drawn.get_array()
    assert cells is not None
    seen = 0
    for value, (x0, y0, x1, y1) in zip(values, place.grid.boxes, strict=True):
        if np.isnan(x0):
            continue
        col = ((x0 + x1) / 2 - left) / (right - left) * cells.shape[1]
        row = ((y0 + y1) / 2 - top) / (bottom - top) * cells.shape[0]
        assert cells[int(row), int(col)] == value
        seen += 1
    assert seen > 50
    assert axes.get_xlim() == (0, place.grid.width)
    assert axes.get_ylim() == (place.grid.height, 0)


def test_cropped_borders_and_empty_cells_are_uncovered() -> None:
    assert uncovered(placed_image(sample_of("llava"))) == [(0, 0, 32, 96), (128, 0, 160, 96)]
    assert uncovered(placed_image(sample_of("qwen2_vl"))) == []
    grid = synthetic.grid(1, 3)
    hole = dataclasses.replace(grid, places=grid.places[:2], boxes=grid.boxes[:2])
    place = dataclasses.replace(placed_image(fake()), grid=hole)
    assert uncovered(place) == [(20, 0, 30, 10)]


def test_patches_are_finer_than_merged_tokens() -> None:
    token, patch = (
        placed_image(sample_of("qwen2_vl")),
        with_patches(placed_image(sample_of("qwen2_vl"))),
    )
    assert patch.grid.rows == 2 * token.grid.rows
    assert extent(patch.grid) == extent(token.grid)
    merged = patch.grid.boxes.reshape(-1, 4, 4)  # four consecutive patches are one token
    corners = np.concatenate([merged[..., :2].min(1), merged[..., 2:].max(1)], axis=1)
    np.testing.assert_allclose(corners, token.grid.boxes)


def test_names_of_boxes_stay_inside_the_image_and_do_not_overlap() -> None:
    place = placed_image(sample_of("qwen2_vl"))
    axes = Figure(figsize=(3, 2)).add_axes((0, 0, 1, 1))
    overlay_panels.draw_image(axes, place)
    boxes = {"yellow circle": (90.0, 2, 110, 20), "yellow square": (95.0, 24, 115, 40)}
    overlay_panels.draw_boxes(axes, place, [*boxes.items()], inches=3.0)
    axes.figure.draw_without_rendering()
    first, second = (text.get_window_extent() for text in axes.texts)
    assert not first.overlaps(second)
    frame = axes.get_window_extent()
    for name in (first, second):
        assert frame.x0 <= name.x0 <= name.x1 <= frame.x1
        assert frame.y0 <= name.y0 <= name.y1 <= frame.y1


def test_errors() -> None:
    text_only = synthetic.sample_of("btto", [synthetic.random_call(4)])
    with pytest.raises(InputError) as none:
        placed_image(text_only)
    assert str(none.value) == "Sample 'fake' has no image to draw on. Capture it with an image."
    with pytest.raises(InputError) as number:
        placed_image(fake(), 2)
    assert str(number.value) == "image must be between 0 and 0; got 2."
    with pytest.raises(InputError) as pixels:
        placed_image(dataclasses.replace(fake(), images=()))
    assert str(pixels.value) == (
        "Sample 'fake' has the grids of 1 images, but the pixels of 0. Add the images with "
        "dataclasses.replace(sample, images=...)."
    )
    grid = synthetic.grid(1, 2)
    skewed = dataclasses.replace(grid, boxes=grid.boxes + np.array([[0, 0, 0, 0], [3, 0, 3, 0]]))
    with pytest.raises(GeometryError) as uneven:
        extent(skewed)
    assert str(uneven.value) == (
        "The token boxes of this image do not form a regular 1 x 2 grid: a box is 1.50 px off. "
        "Overlays require a regular grid."
    )
