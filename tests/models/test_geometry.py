"""Boxes are where the pixels are: paint a token's box, and only that token's input changes."""

import numpy as np
import pytest
import torch
from PIL import Image

from tests.tiny import QUESTION, tiny_vlm
from xmodal_interp.errors import GeometryError
from xmodal_interp.models import VLM
from xmodal_interp.shapes.architectures import untrained
from xmodal_interp.shapes.processors import build_processor

SIZES = [(96, 96), (160, 96), (96, 144), (384, 192), (192, 192)]


def changed_patches(vlm: VLM, one: Image.Image, other: Image.Image) -> np.ndarray:
    """For each vision-tower patch, how much the model's pixels differ between two images."""
    a, b = (vlm.prepare([[image]], [QUESTION])[0]["pixel_values"] for image in (one, other))
    difference = (a - b).abs()
    if vlm.family.model_type == "qwen2_vl":
        return difference.mean(-1).numpy()
    side = vlm.model.config.vision_config.patch_size
    cells = torch.nn.functional.avg_pool2d(difference.reshape(-1, *difference.shape[-3:]), side)
    cells = cells.mean(1).flatten(1)
    return cells.numpy().ravel()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "mllama"])
def test_a_painted_box_is_seen_by_its_own_token(family: str, size: tuple[int, int]) -> None:
    vlm = tiny_vlm(family)
    plain = Image.new("RGB", size, (40, 40, 40))
    prompt = vlm.prepare([[plain]], [QUESTION])[1][0]
    grid = prompt.grids[0]
    tokens = np.flatnonzero(~np.isnan(grid.boxes[:, 0]))
    for token in tokens[:: max(1, len(tokens) // 12)]:
        x0, y0, x1, y1 = np.round(grid.boxes[token]).astype(int)
        if x0 < 0 or y0 < 0 or x1 > size[0] or y1 > size[1]:
            continue  # a box that reaches over the edge holds padding too
        pixels = np.array(plain)
        pixels[y0:y1, x0:x1] = 255
        change = changed_patches(vlm, plain, Image.fromarray(pixels))
        places = (
            grid.patch_places[grid.patch_places[:, 0] >= 0]
            if family == "llava"
            else grid.patch_places
        )
        if family == "mllama":
            places = places.reshape(-1, 40, 2)[:, 1:37].reshape(-1, 2)  # class token, padding
        merge = grid.patch_rows // grid.rows
        row, col = places[change.argmax()] // merge
        assert (row, col) == tuple(grid.places[token])


def test_all_of_the_image_is_covered_once_without_a_crop() -> None:
    grid = tiny_vlm("qwen2_vl").prepare([[Image.new("RGB", (128, 72))]], [QUESTION])[1][0].grids[0]
    widths, heights = grid.boxes[:, 2] - grid.boxes[:, 0], grid.boxes[:, 3] - grid.boxes[:, 1]
    assert (grid.rows, grid.cols) == (9, 16)
    assert (widths * heights).sum() == pytest.approx(128 * 72)


def test_a_centre_crop_leaves_the_sides_out() -> None:
    grid = tiny_vlm("llava").prepare([[Image.new("RGB", (160, 96))]], [QUESTION])[1][0].grids[0]
    assert (grid.boxes[:, 0].min(), grid.boxes[:, 2].max()) == (32, 128)
    assert (grid.boxes[:, 1].min(), grid.boxes[:, 3].max()) == (0, 96)


def test_a_class_token_has_no_place() -> None:
    processor = build_processor("llava")
    processor.vision_feature_select_strategy = "full"
    model = untrained("llava")
    model.config.vision_feature_select_strategy = "full"
    prompt = VLM(model, processor).prepare([[Image.new("RGB", (96, 96))]], [QUESTION])[1][0]
    first = prompt.tokens[prompt.tokens["kind"] == "image"].iloc[0]
    assert first[["row", "col"]].isna().all()
    assert (prompt.tokens["kind"] == "image").sum() == 145


def test_counts_that_do_not_agree_are_refused() -> None:
    processor = build_processor("llava")
    processor.num_additional_image_tokens = 2
    with pytest.raises(GeometryError) as error:
        VLM(untrained("llava"), processor).prepare([[Image.new("RGB", (96, 96))]], ["how many ?"])
    assert str(error.value) == (
        "A rule must give each image as many tokens as it has in the sequence. For image 0 it "
        "gives 144 (12 x 12); the sequence has 145."
    )
