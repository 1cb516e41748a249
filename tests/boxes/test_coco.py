"""COCO files, polygons and run-length encodings."""

import json
import sys

import numpy as np
import pytest

from xmodal_interp.boxes import mask, mask_box, pixel_boxes, read_coco, rle, write_coco
from xmodal_interp.errors import InputError

SQUARE = [[10, 10, 20, 10, 20, 20, 10, 20]]


def content() -> dict:
    return {
        "images": [
            {"id": 7, "width": 64, "height": 48, "file_name": "000000000007.jpg"},
            {"id": 9, "width": 32, "height": 32, "file_name": "000000000009.jpg"},
        ],
        "categories": [{"id": 18, "name": "dog"}, {"id": 17, "name": "cat"}],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 17, "bbox": [10.5, 20.25, 30.1, 0.0]},
            {"id": 2, "image_id": 9, "category_id": 18, "segmentation": SQUARE, "iscrowd": 1},
            {"id": 3, "image_id": 7, "category_id": 17, "bbox": [1, 2, 3, 4], "iscrowd": 0},
        ],
    }


def test_a_file_is_read_and_written_back(tmp_path) -> None:
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(content()), encoding="utf-8-sig")
    table = read_coco(path)
    assert table["phrase"].tolist() == ["cat", "dog", "cat"]
    assert table["file_name"].tolist() == [f"00000000000{n}.jpg" for n in (7, 9, 7)]
    assert table[["x0", "y0", "x1", "y1"]].to_numpy().tolist() == [
        [10.5, 20.25, 40.6, 20.25],
        [10, 10, 20, 20],
        [1, 2, 4, 6],
    ]
    assert table["is_crowd"].tolist() == [False, True, False]
    assert pixel_boxes(table[1:]).tolist() == [[10, 10, 20, 20], [1, 2, 4, 6]]
    written = write_coco(table)
    assert [each["bbox"] for each in written["annotations"]] == [
        [10.5, 20.25, 30.1, 0.0],
        [10, 10, 10, 10],
        [1, 2, 3, 4],
    ]
    assert written["categories"] == [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    again = read_coco(json.loads(json.dumps(written)))
    assert again.to_dict("list") == table.to_dict("list")


def test_masks_cover_the_pixels_of_coco() -> None:
    """The square covers 100 pixels, where Pillow and OpenCV draw 121."""
    covered = mask(SQUARE, (32, 32))
    expected = np.zeros((32, 32), bool)
    expected[10:20, 10:20] = True
    np.testing.assert_array_equal(covered, expected)
    assert mask_box(covered).tolist() == [10, 10, 20, 20]


def test_a_mask_is_written_as_rle_and_read_back() -> None:
    covered = np.random.default_rng(0).uniform(size=(5, 7)) < 0.5
    encoded = rle(covered)
    assert encoded["size"] == [5, 7]
    assert json.loads(json.dumps(encoded)) == encoded
    np.testing.assert_array_equal(mask(encoded, (7, 5)), covered)
    as_bytes = {**encoded, "counts": encoded["counts"].encode()}
    np.testing.assert_array_equal(mask(as_bytes, (7, 5)), covered)
    by_column = covered.T.ravel()
    changes = np.flatnonzero(np.diff(by_column, prepend=False))
    counts = np.diff([0, *changes, by_column.size]).tolist()
    np.testing.assert_array_equal(mask({"size": [5, 7], "counts": counts}, (7, 5)), covered)


def changed(section: str, index: int, **fields: object) -> dict:
    made = content()
    made[section][index] = {**made[section][index], **fields}
    return made


REFUSALS = {
    "an unknown image": (
        lambda: read_coco(changed("annotations", 2, image_id=8)),
        "COCO annotation 3 is of the image 8, which the file does not have.",
    ),
    "an unknown category": (
        lambda: read_coco(changed("annotations", 2, category_id=1)),
        "COCO annotation 3 is of the category 1, which the file does not have.",
    ),
    "fractions": (
        lambda: read_coco(changed("annotations", 2, bbox=[0.1, 0.1, 0.5, 0.5])),
        "COCO annotation 3: The box [0.1, 0.1, 0.6, 0.6] lies within 1.5 units of 'px', as "
        "fractions of an image do. Read fractions with xi.boxes.read(box, 'xyxy 0..1', "
        "size=(width, height)).",
    ),
    "neither box nor mask": (
        lambda: read_coco(changed("annotations", 2, bbox=[])),
        "COCO annotation 3: It has neither bbox nor segmentation.",
    ),
    "two images": (
        lambda: read_coco(changed("images", 1, id=7)),
        "Two entries of 'images' have the id 7.",
    ),
    "no width": (
        lambda: read_coco({"images": [{"id": 1}], "annotations": [], "categories": []}),
        "An entry of 'images' lacks width, height: {'id': 1}.",
    ),
    "captions": (
        lambda: read_coco({"images": [], "annotations": []}),
        "A COCO file must have a list 'categories'; got images, annotations.",
    ),
    "another size": (
        lambda: mask({"size": [7, 5], "counts": [35]}, (7, 5)),
        "The RLE is of height and width [7, 5], but the image has [5, 7].",
    ),
    "no polygon": (
        lambda: mask([[1, 2, 3, 4]], (7, 5)),
        "A segmentation must be a list of polygons, each of three or more points x, y, or a dict "
        "of size and counts; got [[1, 2, 3, 4]].",
    ),
    "an empty mask": (
        lambda: mask_box(np.zeros((2, 2), bool)),
        "The mask covers no pixel, so it has no box.",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name: str) -> None:
    ask, message = REFUSALS[name]
    with pytest.raises(InputError) as refusal:
        ask()
    assert str(refusal.value) == message


def test_masks_without_pycocotools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    with pytest.raises(ImportError) as refusal:
        mask(SQUARE, (32, 32))
    assert str(refusal.value) == ('Masks require pycocotools: pip install "xmodal-interp[coco]".')
