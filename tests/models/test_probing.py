"""Boxes of patches are measured with test images, without a rule."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    CLIPImageProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

import xmodal_interp as xi
from tests.helpers.pixel_changes import QUESTION
from tests.helpers.real import prompt as written
from tests.helpers.real import real, settled
from tests.helpers.tiny import picture, tiny_vlm
from xmodal_interp.errors import GeometryError
from xmodal_interp.models import VLM
from xmodal_interp.models.geometry import ProbedTokens
from xmodal_interp.models.geometry.probed_tokens import MEASURED
from xmodal_interp.models.geometry.probing import patches_of, probed

pytestmark = pytest.mark.filterwarnings(  # raised inside the processors
    "ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning"
)
SIZE = (170, 96)
SIDES = {
    **dict.fromkeys(("paligemma", "git", "blip", "blip-2", "janus", "pi0", "gemma3"), 8),
    **dict.fromkeys(("deepseek_vl", "deepseek_vl_hybrid", "mistral3", "llava_next"), 8),
    **dict.fromkeys(("llava_onevision", "granite4_vision", "idefics3", "internvl"), 8),
    **dict.fromkeys(("aya_vision", "cohere2_vision", "ovis2", "llama4", "mllama"), 8),
    **dict.fromkeys(("perception_lm", "minicpmv4_6", "idefics2"), 8),
    **{"got_ocr2": 4, "granite_docling": 12, "step3p7": 4, "aria": 70},
    **dict.fromkeys(
        ("kimi_k25", "paddleocr_vl", "inkling2"), 8
    ),  # the processor returns patches as tiles
    **dict.fromkeys(("qwen2_vl", "ernie4_5_vl_moe", "glm5_next", "gemma4", "lfm2_vl")),
    **dict.fromkeys(("nemotron_h_omni", "muse_spark", "gemma4_unified")),
}
"""A third of the types with a record: the side of the patches of tiles, px; None for patches."""


def resized(side: int) -> Callable[[Image.Image], Mapping[str, Any]]:
    made = CLIPImageProcessor(size={"height": side, "width": side}, do_center_crop=False)
    return lambda image: made(image, return_tensors="pt")


def test_patches_of_a_resized_image() -> None:
    (pixels,) = probed(resized(32), (64, 128))
    patches = patches_of(pixels, 16)
    expected = [[0, 0, 32, 64], [32, 0, 64, 64], [0, 64, 32, 128], [32, 64, 64, 128]]
    np.testing.assert_allclose(patches.boxes, expected, atol=0.1)
    assert patches.places.tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert patches.views.tolist() == [0] * 4


def test_padding_has_no_box_and_a_thumbnail_is_another_view() -> None:
    def process(image: Image.Image) -> Mapping[str, Any]:
        """Return the image at the left of a tile of black padding, and a thumbnail."""
        tile, small = Image.new("RGB", (64, 64)), image.resize((32, 64))
        tile.paste(image, (0, 0))
        thumbnail = Image.new("RGB", (64, 64))
        thumbnail.paste(small, (32, 0))
        levels = np.stack([np.array(tile), np.array(thumbnail)])
        return {"pixels": torch.from_numpy(levels).float().permute(0, 3, 1, 2)}

    (pixels,) = probed(process, (32, 128))
    patches = patches_of(pixels, 32)
    nothing = [np.nan] * 4
    expected = [[0, 0, 32, 32], nothing, [0, 32, 32, 64], nothing]
    expected += [nothing, [0, 0, 32, 64], nothing, [0, 64, 32, 128]]
    np.testing.assert_allclose(patches.boxes, expected, atol=0.2)
    assert patches.views.tolist() == [0, -1, 0, -1, -1, 1, -1, 1]
    assert patches.tiles.tolist() == [0] * 4 + [1] * 4


@pytest.mark.parametrize("model_type", SIDES)
def test_patches_are_where_the_rule_places_them(model_type: str) -> None:
    vlm = VLM(real(model_type)[0], settled(model_type))
    templated = vlm.processor.chat_template is not None or vlm.family.in_front
    question = QUESTION if templated else written(model_type, 1, QUESTION)
    _, (prompt,) = vlm.prepare([[picture(*SIZE)]], [question])
    found = probed(lambda image: vlm.prepare([[image]], [question])[0], SIZE)
    if model_type == "deepseek_vl_hybrid":
        found = [each for each in found if each.name == "pixel_values"]
    boxes = np.concatenate([patches_of(each, SIDES[model_type]).boxes for each in found])
    expected = np.asarray(prompt.grids[0].patch_boxes)
    boxes, expected = (each[np.isfinite(each).all(1)] for each in (boxes, expected))
    np.testing.assert_allclose(boxes, expected, atol=0.4)


def test_a_processor_that_crops_to_the_content_is_refused() -> None:
    def process(image: Image.Image) -> Mapping[str, Any]:
        """Crop the dark margins, as processors of documents do."""
        bright = image.convert("L").point(lambda level: 255 * (level > 128)).getbbox()
        return resized(32)(image.crop(bright))

    with pytest.raises(
        GeometryError, match=r"^The processor is not linear: pixel_values of"
    ) as error:
        probed(process, (64, 128))
    assert str(error.value).endswith(
        "It crops images to their content, or normalises each by its own mean, so its geometry "
        "cannot be measured."
    )


def test_a_size_that_depends_on_the_content_is_refused() -> None:
    def process(image: Image.Image) -> Mapping[str, Any]:
        return resized(32 if image.getpixel((0, 0)) == (0, 0, 0) else 16)(image)

    with pytest.raises(GeometryError) as error:
        probed(process, (64, 128))
    assert str(error.value) == (
        "The processor returns pixel_values of different shapes for images of one size, so its "
        "geometry depends on the content of the image. Turn off its cropping."
    )


def test_pixels_that_are_normalised_image_by_image_are_refused() -> None:
    vlm = VLM(real("pix2struct")[0], settled("pix2struct"))
    with pytest.raises(GeometryError) as error:
        probed(lambda image: vlm.prepare([[image]], [QUESTION])[0], (170, 96))
    assert str(error.value) == (
        "The processor returns the same pixels for a black and a white image, because it "
        "normalises each image by its own mean. Its geometry cannot be measured."
    )


class UnknownConfig(LlavaConfig):
    model_type = "unknown_vlm"


class UnknownVLM(LlavaForConditionalGeneration):
    config_class = UnknownConfig


class UnknownMergedConfig(Qwen2VLConfig):
    model_type = "unknown_merged"


class UnknownMerged(Qwen2VLForConditionalGeneration):
    config_class = UnknownMergedConfig


class UnknownTilesConfig(LlavaNextConfig):
    model_type = "unknown_tiles"


class UnknownTiles(LlavaNextForConditionalGeneration):
    config_class = UnknownTilesConfig


def without_record(vlm: VLM, kind: Any) -> VLM:
    """Return the same VLM as a type without a family record."""
    config = kind.config_class.from_dict(
        {**vlm.model.config.to_dict(), "model_type": kind.config_class.model_type}
    )
    model = kind(config).eval()
    model.load_state_dict(vlm.model.state_dict())
    return VLM(model, vlm.processor)


@pytest.mark.parametrize(("family", "kind"), [("llava", UnknownVLM), ("qwen2_vl", UnknownMerged)])
def test_a_type_without_a_record_gets_measured_boxes(family: str, kind: Any) -> None:
    known = tiny_vlm(family)
    unknown = without_record(known, kind)
    images = [picture(170, 96), picture(64, 150)]
    (expected,) = known.prepare([images], [QUESTION])[1]
    (prompt,) = unknown.prepare([images], [QUESTION])[1]
    for ours, theirs in zip(prompt.grids, expected.grids, strict=True):
        np.testing.assert_allclose(ours.boxes, theirs.boxes, atol=0.3)
        np.testing.assert_array_equal(ours.places, theirs.places)
        assert ours.reason == MEASURED
    sample = xi.capture(unknown, images[0], QUESTION)
    probs = sample.probs(layer=0).mean(0)[-1]
    tokens = sample.tokens["kind"].eq("image").to_numpy()
    grid = sample.grid(probs.numpy()[tokens])
    assert np.asarray(grid).shape == (prompt.grids[0].rows, prompt.grids[0].cols)


def test_a_correspondence_at_one_size_only_is_none() -> None:
    """16 tokens of the small image happen to be the number of squares of its tiles."""
    vlm = VLM(real("granite4_vision")[0], settled("granite4_vision"))
    rule = ProbedTokens("image_token_id")
    image = picture(70, 150)
    inputs, _ = vlm.prepare([[image]], [QUESTION])
    (grid,) = rule(vlm.processor, vlm.model.config, inputs, [image])
    assert grid.n_tokens == 16
    assert np.isnan(grid.boxes).all()


def test_tokens_that_are_no_blocks_of_patches_have_no_boxes() -> None:
    known = VLM(real("llava_next")[0], settled("llava_next"))
    unknown = without_record(known, UnknownTiles)
    (prompt,) = unknown.prepare([[picture(170, 96)]], [QUESTION])[1]
    (grid,) = prompt.grids
    assert np.isnan(grid.boxes).all()
    assert grid.reason.startswith("Its model type has no family record with a geometry rule. The ")
    assert grid.reason.endswith(
        "image tokens do not correspond to equal blocks of pixel_values of shape [1, 5, 3, 32, 32]."
    )
    sample = xi.capture(unknown, picture(170, 96), QUESTION)
    assert sample.tokens["kind"].eq("image").sum() == 52


def test_a_square_of_pixels_without_order_has_no_box() -> None:
    """Its columns all show the same pixels, so that a step has no logarithm."""

    def process(image: Image.Image) -> Mapping[str, Any]:
        pixels = torch.from_numpy(np.array(image)).float().permute(2, 0, 1)
        return {"pixels": pixels[None].mean((2, 3), keepdim=True).expand(1, 3, 8, 8)}

    (pixels,) = probed(process, (64, 128))
    patches = patches_of(pixels, 8)
    assert patches.views.tolist() == [-1]
    assert np.isnan(patches.boxes).all()
