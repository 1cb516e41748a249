"""Token boxes match the pixels: painting a token's box changes the input of that token most."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers.pixel_changes import vlm_of
from tests.helpers.real import real, settled
from tests.helpers.tiny import QUESTION, tiny_vlm
from xmodal_interp.errors import GeometryError
from xmodal_interp.models import VLM
from xmodal_interp.models.geometry import (
    ImageRule,
    at_the_top,
    code_rows,
    counted_patches,
    fused_stages,
    query_crops,
)
from xmodal_interp.models.geometry.cells import at_top_left, rectangle
from xmodal_interp.shapes.tiny_models import build_processor, untrained

SIZES = [(96, 96), (160, 96), (96, 144), (384, 192), (192, 192)]


def changed_patches(vlm: VLM, one: Image.Image, other: Image.Image) -> np.ndarray:
    """Return for each vision-tower patch how much the pixels of two images differ."""
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
def test_a_painted_box_changes_its_own_token(family: str, size: tuple[int, int]) -> None:
    vlm = tiny_vlm(family)
    plain = Image.new("RGB", size, (40, 40, 40))
    prompt = vlm.prepare([[plain]], [QUESTION])[1][0]
    grid = prompt.grids[0]
    tokens = np.flatnonzero(~np.isnan(grid.boxes[:, 0]))
    boxes = np.round(grid.boxes[tokens]).astype(int)
    # a box that extends beyond the image also contains padding
    inside = (boxes[:, :2] >= 0).all(1) & (boxes[:, 2:] <= size).all(1)
    assert inside.mean() > 0.8
    for token in tokens[inside][:: max(1, len(tokens) // 12)]:
        x0, y0, x1, y1 = np.round(grid.boxes[token]).astype(int)
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


def test_without_a_crop_the_image_is_covered_exactly_once() -> None:
    grid = tiny_vlm("qwen2_vl").prepare([[Image.new("RGB", (128, 72))]], [QUESTION])[1][0].grids[0]
    widths, heights = grid.boxes[:, 2] - grid.boxes[:, 0], grid.boxes[:, 3] - grid.boxes[:, 1]
    assert (grid.rows, grid.cols) == (9, 16)
    assert (widths * heights).sum() == pytest.approx(128 * 72)


def test_a_centre_crop_leaves_the_sides_out() -> None:
    grid = tiny_vlm("llava").prepare([[Image.new("RGB", (160, 96))]], [QUESTION])[1][0].grids[0]
    assert (grid.boxes[:, 0].min(), grid.boxes[:, 2].max()) == (32, 128)
    assert (grid.boxes[:, 1].min(), grid.boxes[:, 3].max()) == (0, 96)


def test_a_class_token_is_outside_the_grid() -> None:
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
        "By the family's geometry rule, image 0 has 144 tokens (12 x 12), but the sequence has "
        "145. Check that processor, family record and model belong together."
    )


def test_cells_at_the_top_left_of_a_larger_grid() -> None:
    cells = at_top_left(rectangle(2, 2, (0.0, 0.0, 4.0, 2.0)), 2, 3, 3)
    nowhere = [-1, -1]
    assert cells.places.tolist() == [[0, 0], [0, 1], nowhere, [1, 0], [1, 1], *[nowhere] * 4]
    assert cells.boxes[4].tolist() == [2.0, 1.0, 4.0, 2.0]
    assert np.isnan(cells.boxes[2]).all()


def test_an_image_has_the_size_on_its_canvas_that_the_processor_gives_it() -> None:
    """Mllama rounds 47 * (48 / 47) down: the image has one column less than its canvas of 48."""
    vlm = tiny_vlm("mllama")
    inputs, (prompt,) = vlm.prepare([[Image.new("RGB", (47, 47), "white")]], [QUESTION])
    tile = inputs["pixel_values"][0, 0, 0, 0]
    n_rows, n_cols = int((tile[:, 0] == tile[0, 0]).sum()), int((tile[0] == tile[0, 0]).sum())
    assert (n_rows, n_cols) == (48, 47)
    np.testing.assert_allclose(np.nanmax(prompt.grids[0].boxes, 0)[2:], [47 * 48 / n_cols, 47])


def test_queries_of_an_unknown_number_of_patches_are_refused() -> None:
    vlm = vlm_of("aria")
    config = SimpleNamespace(
        vision_config=vlm.model.config.vision_config, projector_patch_to_query_dict={4: 1, 9: 2}
    )
    inputs = {"pixel_mask": torch.ones(1, 490, 490)}
    with pytest.raises(GeometryError) as error:
        query_crops(vlm.processor, config, inputs, [Image.new("RGB", (96, 96))])
    assert str(error.value) == (
        "projector_patch_to_query_dict of the configuration has no number of queries for 49 "
        "patches. Resize images to one of 4, 9 patches."
    )


def test_a_size_without_maximal_sides_is_refused() -> None:
    processor = copy.copy(vlm_of("pi0").processor)
    processor.image_processor = copy.copy(processor.image_processor)
    processor.image_processor.size = {"height": 64, "width": 64}
    with pytest.raises(GeometryError) as error:
        at_the_top(processor, Image.new("RGB", (96, 96)), 64, 64)
    assert str(error.value) == (
        "PI0ImageProcessor has the size {'height': 64, 'width': 64}. Set a size with max_height "
        "and max_width."
    )


def test_a_mobilenet_pools_as_configured_or_by_default() -> None:
    processor = vlm_of("gemma3n").processor
    inputs = {"pixel_values": torch.empty(1, 3, 64, 64)}
    for stated, side in (({"msfa_output_resolution": 4}, 4), (None, 16)):
        config = SimpleNamespace(vision_config=SimpleNamespace(model_args=stated))
        (grid,) = fused_stages(processor, config, inputs, [Image.new("RGB", (96, 48))])
        assert (grid.rows, grid.cols, grid.n_tokens) == (side, side, side * side)


@pytest.mark.parametrize(
    ("rule", "name"), [(code_rows, "image_sizes"), (counted_patches, "image_grid_hw")]
)
def test_as_many_grids_as_images(rule: ImageRule, name: str) -> None:
    images = [Image.new("RGB", (96, 96))] * 2
    inputs = {name: torch.tensor([[8, 8]]), "pixel_values": torch.empty(1, 3, 8, 8)}
    with pytest.raises(GeometryError, match=rf"returned 1 (rows of )?{name} for 2 images"):
        rule(None, None, inputs, images)


def test_an_image_that_is_fitted_twice() -> None:
    """DeepSeek-VL's hybrid resizes 640 x 427 px to 128 x 85, pads 21 rows above, then halves it."""
    vlm = VLM(real("deepseek_vl_hybrid")[0], settled("deepseek_vl_hybrid"))
    (prompt,) = vlm.prepare([[Image.new("RGB", (640, 427))]], [QUESTION])[1]
    top = -21 * 427 / 85
    np.testing.assert_allclose(prompt.grids[0].boxes[8][[0, 2]], [0, 80])
    np.testing.assert_allclose(prompt.grids[0].boxes[8, 3], top + 32 * 427 / 85)
