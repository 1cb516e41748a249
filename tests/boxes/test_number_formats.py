"""Formats of boxes, against numbers worked out by eye and the libraries that print them."""

import numpy as np
import pandas as pd
import pycocotools.mask
import pytest
import torch
from transformers.models.kosmos2.processing_kosmos2 import (
    coordinate_to_patch_index,
    patch_index_to_coordinate,
)

import xmodal_interp as xi
from xmodal_interp.boxes import FORMATS, iou, pixel_boxes, read, write
from xmodal_interp.errors import InputError

SIZE, RESIZED = (640, 480), (320, 120)
BOX = [160, 120, 480, 360]
"""The middle of the image: a quarter of each side is free around it."""

FORMS = {
    "xyxy px": [160, 120, 480, 360],
    "yxyx px": [120, 160, 360, 480],
    "xywh px": [160, 120, 320, 240],
    "cxcywh px": [320, 240, 320, 240],
    "xyxy resized px": [80, 30, 240, 90],
    "xywh resized px": [80, 30, 160, 60],
    "xyxy 0..1": [0.25, 0.25, 0.75, 0.75],
    "cxcywh 0..1": [0.5, 0.5, 0.5, 0.5],
    "xyxy 0..100": [25, 25, 75, 75],
    "xyxy 0..999": [249.75, 249.75, 749.25, 749.25],
    "yxyx 0..1000": [250, 250, 750, 750],
    "paligemma": [256, 256, 768, 768],
    "kosmos2": [8 * 32 + 8, 23 * 32 + 23],
}


@pytest.mark.parametrize("name", FORMS)
def test_a_box_in_each_format(name: str) -> None:
    read_back = read(FORMS[name], name, size=SIZE, resized=RESIZED)
    assert read_back.tolist() == [BOX]
    assert write(BOX, name, size=SIZE, resized=RESIZED).tolist() == [FORMS[name]]


def test_y_comes_first_where_the_format_says_so() -> None:
    assert read([0, 512, 512, 1023], "paligemma", size=SIZE).tolist() == [
        [320, 0, 1023 / 1024 * 640, 240]
    ]
    assert read([7, 3], "yx px").tolist() == [[3, 7]]
    assert write([[3, 7]], "yx px").tolist() == [[7, 3]]


@pytest.mark.parametrize("name", FORMATS)
def test_numbers_are_written_back_exactly(name: str) -> None:
    rng = np.random.default_rng(0)
    size, resized = (1371, 911), (644, 476)
    far = {"px": size, "resized px": resized, "0..1": (1, 1), "0..100": (100, 100)}
    far |= {"0..999": (999, 999), "0..1000": (1000, 1000)}
    if name in ("paligemma", "florence2"):
        low = rng.integers(0, 500, (300, 2))
        rows = np.concatenate([low, low + rng.integers(0, 500, (300, 2))], 1)
    elif name.startswith("kosmos2"):
        low = rng.integers(0, 16, (300, 2))
        high = low + rng.integers(0, 16, (300, 2))
        rows = np.stack([low[:, 1] * 32 + low[:, 0], high[:, 1] * 32 + high[:, 0]], 1)
    else:
        order, unit = name.split(" ", 1)
        edges = np.array(far[unit])
        edges = edges[::-1] if order in ("yxyx", "yx") else edges
        low, extent = rng.uniform(0.1, 0.5, (2, 300, 2)) * edges
        second = low + extent if order in ("xyxy", "yxyx") else extent
        low = low + extent / 2 if order == "cxcywh" else low
        rows = low if order in ("xy", "yx") else np.concatenate([low, second], 1)
        rows = (rows * 0.9 + (0 if unit == "0..1" else 2)).round(6)
    pixels = read(rows, name, size=size, resized=resized)
    np.testing.assert_array_equal(write(pixels, name, size=size, resized=resized), rows)


def test_florence_2_bins_are_read_as_their_centres() -> None:
    """transformers cuts these numbers to integers: [0, 0, 639, 479]."""
    whole = read([0, 0, 999, 999], "florence2", size=SIZE)
    np.testing.assert_allclose(whole, [[0.32, 0.24, 639.68, 479.76]])
    assert write([0, 0, 640, 480], "florence2", size=SIZE).tolist() == [[0, 0, 999, 999]]


def test_patches_of_kosmos_2_are_those_of_its_processor() -> None:
    rng = np.random.default_rng(1)
    for _ in range(100):
        x0, y0 = rng.uniform(0, 0.6, 2)
        box = (x0, y0, x0 + rng.uniform(0.05, 0.4), y0 + rng.uniform(0.05, 0.4))
        pair = coordinate_to_patch_index(box, 32)
        pixels = np.array(box) * np.tile(SIZE, 2)
        assert write(pixels, "kosmos2", size=SIZE).tolist() == [list(pair)]
        cells = read(pair, "kosmos2", size=SIZE)[0]
        assert (cells[:2] <= pixels[:2]).all()
        assert (cells[2:] >= pixels[2:]).all()
        centres = np.array(patch_index_to_coordinate(*pair, 32)) * np.tile(SIZE, 2)
        np.testing.assert_allclose(read(pair, "kosmos2 centres", size=SIZE)[0], centres)
    flat = [16 * 32 + 8, 16 * 32 + 23]  # one row: whole patches by both readings
    for name in ("kosmos2", "kosmos2 centres"):
        assert read(flat, name, size=SIZE).tolist() == [[160, 240, 480, 255]]


def test_a_region_other_than_the_whole_image() -> None:
    """OWLv2 and LLaVA 1.5 read a square; a crop is a part of the image."""
    square = read([0.5, 0.25, 1, 0.5], "cxcywh 0..1", size=SIZE, region=(0, 0, 640, 640))
    assert square.tolist() == [[0, 0, 640, 320]]
    padded = (0, -80, 640, 560)
    both_sides = read([0, 0.125, 0.5, 0.875], "xyxy 0..1", size=SIZE, region=padded)
    assert both_sides.tolist() == [[0, 0, 320, 480]]
    assert write(both_sides, "xyxy 0..1", size=SIZE, region=padded).tolist() == [
        [0, 0.125, 0.5, 0.875]
    ]
    crop = read([0, 0, 999, 999], "xyxy 0..999", size=SIZE, region=(80, 0, 560, 480))
    assert crop.tolist() == [[80, 0, 560, 480]]
    whole = ([0.5, 0.5, 1, 1], "cxcywh 0..1")
    with pytest.raises(InputError) as refusal:
        read(*whole, size=SIZE, region=(0, 0, 640, 640))
    assert str(refusal.value) == (
        "[0.5, 0.5, 1, 1] in the format 'cxcywh 0..1' is [0, 0, 640, 640] px, beyond the edges "
        "[0, 0, 640, 480]. Name the format of the numbers, or pass clip=True to cut boxes that "
        "exceed the image."
    )
    cut = read(*whole, size=SIZE, region=(0, 0, 640, 640), clip=True)
    assert cut.tolist() == [[0, 0, 640, 480]]


def test_boxes_in_every_form() -> None:
    expected = [[1, 2, 30, 40], [5, 6, 70, 80]]
    keys = ["xmin", "ymin", "xmax", "ymax"]
    frame = pd.DataFrame(expected, columns=["x0", "y0", "x1", "y1"]).assign(phrase="cat")
    forms = {
        "list": expected,
        "tuples": [tuple(box) for box in expected],
        "array": np.array(expected),
        "tensor": torch.tensor(expected),
        "tensors": [torch.tensor(box) for box in expected],
        "rows of numbers": pd.DataFrame(expected),
        "table": frame,
        "named rows": [row for _, row in frame.iterrows()],
        "dicts": [dict(zip(keys, box, strict=True)) for box in expected],
        "detections": [
            {"score": 0.5, "label": "cat", "box": dict(zip(keys, box, strict=True))}
            for box in expected
        ],
        "iterator": iter(expected),
    }
    for name, form in forms.items():
        found = pixel_boxes(form)
        assert (found.tolist(), found.dtype) == (expected, np.float64), name
    for names in (("x1", "y1", "x2", "y2"), ("left", "top", "right", "bottom")):
        assert pixel_boxes(dict(zip(names, expected[0], strict=True))).tolist() == expected[:1]
    assert pixel_boxes(expected[0]).tolist() == expected[:1]


UNIT = (
    " lies within 1.5 units of 'px', as fractions of an image do. Read fractions with "
    "xi.boxes.read(box, 'xyxy 0..1', size=(width, height))."
)


def test_iou_is_that_of_coco() -> None:
    """One worked case, and pycocotools' on random boxes."""
    assert iou([0, 0, 10, 10], [[5, 0, 15, 10], [10, 0, 20, 10], [0, 0, 10, 10]]).tolist() == [
        [pytest.approx(50 / 150), 0, 1]
    ]
    rng = np.random.default_rng(0)
    low = rng.uniform(0, 50, (2, 9, 2))
    mine, theirs = np.concatenate([low, low + rng.uniform(1, 40, (2, 9, 2))], 2)
    expected = pycocotools.mask.iou(
        write(mine, "xywh px"), write(theirs, "xywh px"), np.zeros(9, dtype=np.uint8)
    )
    np.testing.assert_allclose(iou(mine, theirs), expected, atol=1e-8)
    assert (expected > 0.1).any()


REFUSALS = {
    "fractions beyond the edge": (
        lambda: iou([0.25, 0.5, 1.03, 0.75], [0, 0, 10, 10]),
        "The box [0.25, 0.5, 1.03, 0.75] lies within 1.5 units of 'px', as fractions of an image "
        "do. Read fractions with xi.boxes.read(box, 'xyxy 0..1', size=(width, height)).",
    ),
    "fractions as pixels": (
        lambda: read([0.1, 0.2, 0.5, 0.75], "xyxy px", size=SIZE),
        f"The box [0.1, 0.2, 0.5, 0.75]{UNIT}",
    ),
    "the whole image in fractions, as pixels": (
        lambda: pixel_boxes([[10, 10, 20, 20], [0, 0, 1, 1]]),
        f"The box [0, 0, 1, 1]{UNIT}",
    ),
    "fractions as thousandths": (
        lambda: read([0.1, 0.2, 0.5, 0.75], "xyxy 0..1000", size=SIZE),
        "The box [0.1, 0.2, 0.5, 0.75] lies within 1.5 units of '0..1000', as fractions of an "
        "image do. Read fractions with xi.boxes.read(box, 'xyxy 0..1', size=(width, height)).",
    ),
    "a point in fractions": (
        lambda: read([0.1, 1], "xy px"),
        "The point [0.1, 1] lies within 1.5 units of 'px', as fractions of an image do. Read "
        "fractions with xi.boxes.read(point, 'xy 0..1', size=(width, height)).",
    ),
    "pixels as fractions": (
        lambda: read([10, 20, 100, 200], "xyxy 0..1", size=SIZE),
        "[10, 20, 100, 200] in the format 'xyxy 0..1' is [6400, 9600, 64000, 96000] px, beyond the "
        "edges [0, 0, 640, 480]. Name the format of the numbers, or pass clip=True to cut boxes "
        "that exceed the image.",
    ),
    "pixels as fractions, cut": (
        lambda: read([0, 0, 100, 200], "xyxy 0..1", size=SIZE, clip=True),
        "[0, 0, 100, 200] in the format 'xyxy 0..1' is [0, 0, 64000, 96000] px, beyond the edges "
        "[0, 0, 640, 480]. Name the format of the numbers, or pass clip=True to cut boxes that "
        "exceed the image.",
    ),
    "thousandths as pixels": (
        lambda: read([100, 200, 900, 950], "xyxy px", size=SIZE),
        "[100, 200, 900, 950] in the format 'xyxy px' is [100, 200, 900, 950] px, beyond the edges "
        "[0, 0, 640, 480]. Name the format of the numbers, or pass clip=True to cut boxes that "
        "exceed the image.",
    ),
    "corners as a size": (
        lambda: read([400, 300, 600, 400], "xywh px", size=SIZE),
        "[400, 300, 600, 400] in the format 'xywh px' is [400, 300, 1000, 700] px, beyond the "
        "edges [0, 0, 640, 480]. Name the format of the numbers, or pass clip=True to cut boxes "
        "that exceed the image.",
    ),
    "a size as corners": (
        lambda: read([400, 300, 20, 10], "xyxy px", size=SIZE),
        "A box must not end before it starts; [400, 300, 20, 10] does in the format 'xyxy px'.",
    ),
    "no size": (
        lambda: read([1, 2, 3, 4], "xyxy 0..1000"),
        "The format 'xyxy 0..1000' requires size=(width, height) of the image.",
    ),
    "no resized": (
        lambda: read([1, 2, 3, 4], "xyxy resized px", size=SIZE),
        "The format 'xyxy resized px' requires resized=(width, height) of the picture that the "
        "model read.",
    ),
    "a region of pixels": (
        lambda: read([1, 2, 3, 4], "xyxy px", size=SIZE, region=(0, 0, 9, 9)),
        "Pixels of the original image have no region; omit region=.",
    ),
    "no such format": (
        lambda: read([1, 2, 3, 4], "xyxy"),
        "There is no box format 'xyxy'. The formats are an order (xyxy, yxyx, xywh, cxcywh, xy, "
        "yx) with a unit (px, resized px, 0..1, 0..100, 0..999, 0..1000), such as 'xyxy px', and "
        "paligemma, florence2, kosmos2, kosmos2 centres.",
    ),
    "a bin that does not exist": (
        lambda: read([0, 0, 500, 1000], "florence2", size=SIZE),
        "The format 'florence2' has whole numbers from 0 to 999; got [0, 0, 500, 1000].",
    ),
    "three numbers": (
        lambda: read([[1, 2, 3]], "xyxy px"),
        "The format 'xyxy px' has 4 numbers for each box or point; got [[1, 2, 3]].",
    ),
    "NaN": (
        lambda: pixel_boxes([1, 2, float("nan"), 4]),
        "A box must be x0, y0, x1, y1 with x0 < x1 and y0 < y1; got [1, 2, nan, 4].",
    ),
    "COCO's dict": (
        lambda: pixel_boxes({"bbox": [1, 2, 3, 4], "id": 7}),
        "A box with names must have x0, y0, x1, y1; got bbox, id. Read other numbers with "
        "xi.boxes.read(numbers, format).",
    ),
    "x, y, width, height by name": (
        lambda: pixel_boxes(pd.DataFrame({"x": [1], "y": [2], "w": [3], "h": [4]})),
        "A box with names must have x0, y0, x1, y1; got x, y, w, h. Read other numbers with "
        "xi.boxes.read(numbers, format).",
    ),
    "no box": (
        lambda: pixel_boxes([]),
        "A box must be x0, y0, x1, y1 with x0 < x1 and y0 < y1; got [].",
    ),
    "a size of zero": (
        lambda: read([1, 2, 3, 4], "xyxy px", size=(0, 4)),
        "size must have sides above 0; got (0, 4).",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name: str) -> None:
    ask, message = REFUSALS[name]
    with pytest.raises(InputError) as refusal:
        ask()
    assert str(refusal.value) == message


def test_labels_may_exceed_the_image_by_a_rounded_pixel() -> None:
    assert xi.boxes.read([600, 400, 40.6, 80], "xywh px", size=SIZE).tolist() == [
        [600, 400, 640.6, 480]
    ]
    assert read([0, 0], "xy px", size=SIZE).tolist() == [[0, 0]]


def test_columns_that_name_corners_are_read_by_their_names():
    table = pd.DataFrame({"phrase": ["cat"], "y0": [2], "x0": [1], "y1": [40], "x1": [30]})
    assert read(table, "xyxy px").tolist() == [[1, 2, 30, 40]]
    with pytest.raises(InputError) as refusal:
        read(table, "yxyx px")
    assert str(refusal.value) == (
        "The columns x0, y0, x1, y1 of the table are an xyxy order, and the format is 'yxyx px'. "
        "Name an xyxy format, or pass the numbers without names: table.to_numpy()."
    )
    without_names = pd.DataFrame([[2, 1, 40, 30]])
    assert read(without_names, "yxyx px").tolist() == [[1, 2, 30, 40]]


def test_numbers_of_a_tensor_with_gradients():
    numbers = torch.tensor([[1.0, 2.0, 30.0, 40.0]], requires_grad=True)
    assert read(numbers, "xyxy px").tolist() == [[1, 2, 30, 40]]
    assert read(numbers[0], "xyxy px").tolist() == [[1, 2, 30, 40]]
