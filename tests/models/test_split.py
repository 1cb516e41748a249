"""Types that split an image into views of different shapes: towers, several images, refusals.

test_painting tests their tokens, this file the positions of the vision tower: painting the box of a
position changes the input of the tower's first layer most at that position.
"""

import re

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from tests.helpers.pixel_changes import (
    QUESTION,
    changes,
    embeddings,
    fits,
    language_inputs,
    middle_of,
    painted,
    textured,
    vlm_of,
)
from xmodal_interp.errors import GeometryError
from xmodal_interp.models import FAMILIES, VLM, ImageGrid

pytestmark = pytest.mark.filterwarnings(  # raised inside the processors
    "ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning"
)
WIDE, TALL = (170, 96), (70, 150)
SPLIT = (
    *("lfm2_vl", "granite_docling", "molmo2", "minicpmv4_6", "minicpmv4_7", "minicpm_ocr"),
    *("step3p7", "unlimited_ocr", "deepseek_ocr2"),
)
QUERIES = {"deepseek_ocr2"}
N_POSITIONS = 4  # of each view


def first_layer(model: nn.Module) -> nn.Module:
    """Return the first layer of the last part of a vision tower."""
    layers = dict(model.named_modules())
    return layers[[name for name in layers if re.search(r"vision.*layers\.0$", name)][-1]]


def tower_inputs(vlm: VLM, image: Image.Image) -> tuple[np.ndarray, ImageGrid]:
    """Return the inputs of the tower's first layer, ``[position, d]``, and the grid."""
    inputs, (prompt,) = vlm.prepare([[image]], [QUESTION])
    seen: list[torch.Tensor] = []
    handle = first_layer(vlm.model).register_forward_pre_hook(
        lambda _module, given: seen.append(given[0].detach().flatten(0, -2))
    )
    try:
        language_inputs(vlm, inputs)
    finally:
        handle.remove()
    return torch.cat(seen).float().numpy(), prompt.grids[0]


@pytest.mark.parametrize("model_type", SPLIT)
def test_positions_of_the_tower_match_the_grid(model_type: str) -> None:
    vlm, image = vlm_of(model_type), textured(*WIDE)
    plain, grid = tower_inputs(vlm, image)
    assert grid.patch_boxes is not None
    assert grid.thumbnail is not None
    assert len(plain) == len(grid.patch_places)
    for places in (grid.patch_places, grid.thumbnail.patch_places):
        of_view = np.flatnonzero(places[:, 0] >= 0)
        inside = [i for i in of_view if fits(grid.patch_boxes[i], image.size)]
        for position in inside[:: max(1, len(inside) // N_POSITIONS)]:
            box = middle_of(model_type, grid.patch_boxes[position])
            other, _ = tower_inputs(vlm, painted(image, box))
            change = np.linalg.norm(other - plain, axis=1)
            assert of_view[change[of_view].argmax()] == position


@pytest.mark.parametrize("model_type", SPLIT)
def test_several_images_have_the_same_places_as_single_images(model_type: str) -> None:
    vlm, images = vlm_of(model_type), [textured(*WIDE), textured(*TALL)]
    plain, prompt = embeddings(vlm, images)
    for number, image in enumerate(images):
        alone = vlm.prepare([[image]], [QUESTION])[1][0].grids[0]
        grid = prompt.grids[number]
        for name in ("places", "boxes", "patch_places", "patch_boxes", "tiles"):
            np.testing.assert_array_equal(getattr(grid, name), getattr(alone, name), name)
    if model_type in QUERIES:
        return
    tokens = prompt.tokens
    boxes = tokens[["x0", "y0", "x1", "y1"]].to_numpy()
    number = tokens["image"].fillna(-1).to_numpy()
    of_second = np.flatnonzero((number == 1) & tokens["view"].eq("image").fillna(value=False))
    token = next(i for i in of_second[len(of_second) // 2 :] if fits(boxes[i], TALL))
    change = changes(vlm, images[1], boxes[token], plain, before=images[:1])
    assert of_second[change[of_second].argmax()] == token
    assert (change[number == 0] == 0).all()


@pytest.mark.parametrize("size", [(140, 30), (90, 40), (260, 60)])
def test_narrow_images_are_padded_or_cut_by_their_shorter_side(size: tuple[int, int]) -> None:
    vlm, image = vlm_of("step3p7"), textured(*size)
    plain, prompt = embeddings(vlm, [image])
    tokens = prompt.tokens
    assert tokens["view"].eq("thumbnail").any()
    boxes = tokens[["x0", "y0", "x1", "y1"]].to_numpy()
    of_tiles = np.flatnonzero(tokens["view"].eq("image").fillna(value=False))
    inside = [i for i in of_tiles if fits(boxes[i], size)]
    for token in inside[:: max(1, len(inside) // 4)]:
        change = changes(vlm, image, boxes[token], plain)
        assert of_tiles[change[of_tiles].argmax()] == token
    on_padding = tokens["row"].notna() & tokens["x0"].isna()
    assert on_padding.any() == (size == (140, 30))


def test_queries_are_outside_the_grid_and_cells_are_on_it() -> None:
    vlm = vlm_of("deepseek_ocr2")
    (prompt,) = vlm.prepare([[textured(*WIDE)]], [QUESTION])[1]
    (grid,) = prompt.grids
    image = prompt.tokens[prompt.tokens["kind"].eq("image")]
    assert len(image) == grid.n_tokens == 2 * 12**2 + 16**2 + 1
    assert image[["row", "col", "x0", "view", "tile"]].isna().all(axis=None)
    cells = np.arange(len(grid.patch_places), dtype=float)
    assert grid.arranged(cells).shape == (12, 24)
    assert grid.arranged(cells)[0, 0] == 2 * 16**2  # after the whole image and its queries
    assert grid.arranged(cells, view="thumbnail").shape == (16, 16)
    with pytest.raises(GeometryError, match=r"^Image 0 has no grid. Its image tokens are learned"):
        grid.arranged(np.arange(len(image), dtype=float))


def test_patches_of_an_overlap_are_read_once() -> None:
    (prompt,) = vlm_of("molmo2").prepare([[textured(*WIDE)]], [QUESTION])[1]
    (grid,) = prompt.grids
    placed = grid.patch_places[grid.patch_places[:, 0] >= 0]
    assert len(placed) == len(np.unique(placed, axis=0)) == grid.patch_rows * grid.patch_cols
    unread = np.isnan(grid.patch_boxes[:, 0])
    assert unread.sum() == 3 * 13  # of two crops that share three columns
    image = prompt.tokens[prompt.tokens["view"].eq("image")]
    areas = (image["x1"] - image["x0"]) * (image["y1"] - image["y0"])
    assert areas.sum() == pytest.approx(WIDE[0] * WIDE[1])
    assert image.groupby("col")["tile"].nunique(dropna=False).eq(1).all()


def test_a_page_with_fine_features_has_four_times_the_tokens() -> None:
    coarse = vlm_of("granite_docling")
    processor = type(coarse.processor)(
        type(coarse.processor.image_processor)(
            **{**coarse.processor.image_processor.to_dict(), "fine_route": True}
        ),
        coarse.tokenizer,
        image_seq_len=coarse.processor.image_seq_len,
        chat_template=coarse.processor.chat_template,
    )
    grids = [
        VLM(coarse.model, made).prepare([[textured(*WIDE)]], [QUESTION])[1][0].grids[0]
        for made in (coarse.processor, processor)
    ]
    assert [grid.n_tokens for grid in grids] == [27, 108]
    assert [(grid.rows, grid.cols) for grid in grids] == [(3, 6), (6, 12)]
    assert grids[0].patch_places.tolist() == grids[1].patch_places.tolist()


def test_slices_of_different_shapes_are_refused() -> None:
    vlm = vlm_of("minicpm_ocr")
    inputs = {"target_sizes": torch.tensor([[16, 28], [24, 24], [12, 12]])}
    with pytest.raises(GeometryError) as refusal:
        FAMILIES["minicpm_ocr"].geometry(
            vlm.processor, vlm.model.config, inputs, [Image.new("RGB", WIDE)]
        )
    assert str(refusal.value) == (
        "The tiles of an image differ in rows and columns (target_sizes: 12 x 12, 24 x 24). Set "
        "the image processor to resize all tiles to one size."
    )


def test_tiles_that_do_not_match_the_settings_are_refused() -> None:
    image = Image.new("RGB", WIDE)
    for model_type, name, less, message in (
        (
            "lfm2_vl",
            "spatial_shapes",
            lambda sizes: sizes[:-1],
            "The processor returned 2 spatial_shapes, but its settings lead to 3 tiles and "
            "thumbnails. Use the checkpoint's own processor settings.",
        ),
        (
            "step3p7",
            "num_local_patches",
            lambda counts: [count - 1 for count in counts],
            "The processor returned [7] tiles for the images, but its settings lead to [8]. Use "
            "the checkpoint's own processor settings.",
        ),
        (
            "molmo2",
            "image_num_crops",
            lambda counts: counts + 1,
            "The processor returned 4 crops, but its settings lead to 3, the whole image included. "
            "Use the checkpoint's own processor settings.",
        ),
    ):
        vlm = vlm_of(model_type)
        inputs, _ = vlm.prepare([[image]], [QUESTION])
        with pytest.raises(GeometryError) as refusal:
            FAMILIES[model_type].geometry(
                vlm.processor, vlm.model.config, {**inputs, name: less(inputs[name])}, [image]
            )
        assert str(refusal.value) == message
