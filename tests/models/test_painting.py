"""Token boxes match the pixels, for every family with a rule.

Each test paints the box of a token and finds the image token whose input to the language model
changes most. The vision towers are tiny and random. Attention in residual streams is disabled, and
overlapping convolution kernels are concentrated on their centre, so that a token depends only on
its own pixels.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers.pixel_changes import (
    QUERYING,
    QUESTION,
    changes,
    embeddings,
    fits,
    painted,
    places_of,
    textured,
    vlm_of,
    with_options,
)
from xmodal_interp.models import FAMILIES, VLM, ImageGrid
from xmodal_interp.models.geometry import ProbedTokens

pytestmark = pytest.mark.filterwarnings(  # raised inside the processors
    "ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning"
)
SIZES = [(96, 96), (170, 96), (70, 150)]
PAINTED = (
    *(
        "llava",
        "vipllava",
        "video_llava",
        "paligemma",
        "gemma3",
        "t5gemma2",
        "deepseek_vl",
        "deepseek_vl_hybrid",
        "janus",
    ),
    *("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"),
    *("qwen2_5_omni_thinker", "qwen3_omni_moe_thinker"),
    *("glm4v", "glm46v", "ernie4_5_vl_moe", "paddleocr_vl", "video_llama_3"),
    *("mistral3", "lighton_ocr"),
    *("glm4v_moe", "glm_ocr", "glmga", "glm5_next", "cohere_compass", "cosmos3_edge"),
    *("cosmos3_omni", "dots3_note", "exaone4_5", "hyperclovax_vision_v2", "kimi_k25", "lfm3_vl"),
    *("minimax_m3_vl", "muse_glimmer", "muse_spark", "qwen4_exp", "mistral_large4"),
    *("gemma4", "gemma4_unified", "diffusion_gemma", "qianfan_ocr"),
    *("llava_next", "llava_onevision", "llava_next_video"),
    *("idefics3", "smolvlm", "internvl", "aya_vision", "cohere2_vision", "ovis2", "llama4"),
    *("got_ocr2", "florence2", "granite4_vision", "perception_lm"),
    *("blip", "git", "idefics", "pix2struct", "pp_formulanet", "vision-encoder-decoder"),
    *("lfm2_vl", "granite_docling", "hunyuan_vl", "minicpmv4_6", "minicpmv4_7", "minicpm_ocr"),
    *("molmo2", "step3p7", "unlimited_ocr"),
    *("fuyu", "inkling2", "inkling_mm_model", "nemotron_h_omni", "pi0", "pp_chart2table"),
    *("chameleon", "emu3", "fast_vlm", "gemma3n", "shieldgemma2"),
)
PAN_AND_SCAN = {
    "do_pan_and_scan": True,
    "pan_and_scan_min_crop_size": 24,
    "pan_and_scan_min_ratio_to_activate": 1.2,
    "pan_and_scan_max_num_crops": 3,
}
OPTIONS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("gemma3", PAN_AND_SCAN),
    ("t5gemma2", PAN_AND_SCAN),
    ("got_ocr2", {"crop_to_patches": True, "min_patches": 2, "max_patches": 6}),
    *((name, {"do_image_splitting": False}) for name in ("idefics3", "smolvlm")),
    *((name, {"crop_to_patches": False}) for name in ("internvl", "aya_vision", "ovis2")),
    ("cohere2_vision", {"crop_to_patches": False}),
    ("ovis2", {"crop_to_patches": True, "use_covering_area_grid": False}),
    ("llama4", {"resize_to_max_canvas": True}),
    ("perception_lm", {"vision_input_type": "vanilla"}),
    ("inkling_mm_model", {"rescale_image_frac": 0.8}),
    ("inkling_mm_model", {"rescale_image_frac": 2.0, "rescale_image_max_upscaled_long_edge": 240}),
    ("fuyu", {"size": {"height": 64, "width": 64}}),
    ("llava", {"do_pad": True}),
    ("deepseek_vl", {"min_size": 40}),
    *(("lfm2_vl", {name: False}) for name in ("do_image_splitting", "use_thumbnail")),
    ("granite_docling", {"crop_to_patches": False}),
    ("granite_docling", {"fine_route": True}),
    ("unlimited_ocr", {"crop_to_patches": False}),
    *(("minicpmv4_6", {name: False}) for name in ("slice_mode", "use_image_id")),
    ("qianfan_ocr", {"crop_to_patches": False}),
)
"""Other settings than those of the records, which users may choose."""
N_TOKENS = 4  # of each view


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize("model_type", PAINTED)
def test_a_painted_box_changes_its_own_token(model_type: str, size: tuple[int, int]) -> None:
    assert painted_boxes(vlm_of(model_type), size) >= 2


@pytest.mark.parametrize("size", SIZES[1:], ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize(
    ("model_type", "options"), OPTIONS, ids=[f"{name}-{'-'.join(to)}" for name, to in OPTIONS]
)
def test_a_painted_box_changes_its_own_token_with_other_options(
    model_type: str, options: dict[str, Any], size: tuple[int, int]
) -> None:
    assert painted_boxes(with_options(vlm_of(model_type), options), size) >= 2


@pytest.mark.parametrize(
    "model_type",
    [
        *("llava", "qwen2_vl", "nemotron_h_omni", "paddleocr_vl", "mistral3", "gemma4"),
        *("inkling2", "deepseek_vl_hybrid", "idefics3", "ovis2", "llama4", "lfm2_vl"),
    ],
)
def test_a_painted_box_changes_its_own_token_without_a_rule(model_type: str) -> None:
    known = vlm_of(model_type)
    token = known.family.image_token
    assert token is not None
    family = dataclasses.replace(known.family, geometry=ProbedTokens(token))
    assert painted_boxes(dataclasses.replace(known, family=family), (170, 96)) >= 2


@pytest.mark.parametrize(
    "model_type",
    [
        *("chameleon", "emu3", "fast_vlm", "gemma3n", "inkling2", "inkling_mm_model", "llava"),
        *("nemotron_h_omni", "pi0", "pp_chart2table", "qwen2_vl", "mistral3", "internvl"),
    ],
)
def test_a_painted_box_in_the_second_image_changes_its_token(model_type: str) -> None:
    assert painted_boxes(vlm_of(model_type), (70, 150), before=[textured(96, 64)]) >= 2


def painted_boxes(vlm: VLM, size: tuple[int, int], before: Sequence[Image.Image] = ()) -> int:
    """Check that each painted box changes its own token most; return the number of boxes.

    Args:
        vlm: A VLM whose tower does not mix positions.
        size: Width and height of the image.
        before: Images before it in the prompt.
    """
    image, number = textured(*size), len(before)
    plain, prompt = embeddings(vlm, [*before, image])
    tokens = places_of(prompt)
    assert len(tokens) == len(plain)
    for index, grid in enumerate(prompt.grids):
        assert grid.n_tokens == (tokens["kind"].eq("image") & tokens["image"].eq(index)).sum()
    boxes = tokens[["x0", "y0", "x1", "y1"]].to_numpy()
    n_painted = 0
    for view in tokens["view"].dropna().unique():
        of_view = np.flatnonzero(tokens["view"].eq(view).fillna(value=False))
        own = of_view[tokens["image"].iloc[of_view].eq(number)]
        inside = [token for token in own if fits(boxes[token], size)]
        for token in inside[:: max(1, len(inside) // N_TOKENS)]:
            change = changes(vlm, image, boxes[token], plain, before)
            assert of_view[change[of_view].argmax()] == token, (view, token)
            n_painted += 1
    return n_painted


BY_PATCH = sorted(
    name
    for name, family in FAMILIES.items()
    if family.rule in ("MergedPatches", "PositionedPatches", "FlattenedPatches")
)


@pytest.mark.parametrize("model_type", BY_PATCH)
def test_patches_are_in_the_order_of_the_tower(model_type: str) -> None:
    vlm, image = vlm_of(model_type), textured(70, 150)
    plain, grid = patches_of(vlm, image)
    assert len(plain) == len(grid.patch_places)
    assert grid.patch_boxes is not None
    inside = [i for i, box in enumerate(grid.patch_boxes) if fits(box, image.size)]
    for patch in inside[:: max(1, len(inside) // 8)]:
        other, _ = patches_of(vlm, painted(image, grid.patch_boxes[patch]))
        assert (other - plain).abs().flatten(1).mean(1).argmax() == patch


def patches_of(vlm: VLM, image: Image.Image) -> tuple[torch.Tensor, ImageGrid]:
    """Return the pixels of each patch, ``[patch, value]``, and the grid."""
    inputs, (prompt,) = vlm.prepare([[image]], [QUESTION])
    if "flattened_patches" in inputs:
        return inputs["flattened_patches"][0, :, 2:], prompt.grids[0]
    pixels = inputs["pixel_values"]
    return (pixels[0] if pixels.ndim == 3 else pixels), prompt.grids[0]


def test_every_rule_is_painted() -> None:
    """Queries have no boxes; test_towers and test_split paint patches, test_geometry Mllama."""
    ruled = {name for name, family in FAMILIES.items() if family.geometry is not None}
    assert ruled - set(PAINTED) == {*QUERYING, "deepseek_ocr2", "mllama"}
    assert set(PAINTED) <= ruled
