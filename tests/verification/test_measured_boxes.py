"""Boxes of a rule are compared with boxes that test images measure in the processor."""

import dataclasses

import numpy as np
import pytest

import xmodal_interp as xi
from tests.helpers.real import prompt, real, settled
from tests.helpers.tiny import QUESTION, tiny_vlm
from xmodal_interp.errors import GeometryError
from xmodal_interp.models.geometry import FixedGrid, fixed_grid
from xmodal_interp.models.geometry.processor_steps import whole
from xmodal_interp.verification import measured_boxes
from xmodal_interp.verification.measured_boxes import BoxGap, MeasuredBoxes, compared_boxes

pytestmark = pytest.mark.filterwarnings(  # raised inside the processors
    "ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning"
)
SIZE = (170, 96)


def compared(vlm: xi.VLM, rule=None, question: str = QUESTION) -> MeasuredBoxes:
    if rule is not None:
        vlm = dataclasses.replace(vlm, family=dataclasses.replace(vlm.family, geometry=rule))
    return compared_boxes(vlm, question, [SIZE])


def worst(found: MeasuredBoxes, what: str) -> BoxGap:
    return max((gap for gap in found.gaps if gap.what == what), key=lambda gap: gap.ratio)


@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_boxes_of_the_shipped_models_agree(name: str) -> None:
    found = compared(tiny_vlm(name))
    assert found.reasons == {}
    assert {(gap.what, gap.size) for gap in found.gaps} == {
        (what, size) for what in ("patch", "token") for size in (SIZE, (140, 300))
    }
    assert max(gap.distance for gap in found.gaps) < 0.4
    assert all(gap.agrees for gap in found.gaps)


def test_an_image_that_is_cropped_and_not_squeezed_is_found() -> None:
    """LLaVA's processor crops the middle; the rule shows the whole image."""
    squeezed = FixedGrid(show=lambda _processor, image, *_: whole(image), tower_before=1)
    gap = worst(compared(tiny_vlm("llava"), squeezed), "patch")
    assert not gap.agrees
    assert gap.distance == pytest.approx(80, abs=1)  # (300 - 140) / 2 px are cropped at each end


@pytest.mark.parametrize("shift", [0.45, 0.6])
def test_overlapping_convolutions_shift_boxes_by_up_to_half_a_token(shift: float) -> None:
    vlm = xi.VLM(real("fast_vlm")[0], settled("fast_vlm"))
    found = compared(vlm, FixedGrid(shift=shift))
    assert worst(found, "token").agrees == (shift < 0.5)


@pytest.mark.parametrize(
    ("model_type", "overlap"),
    [("llava", False), ("fast_vlm", True), ("qwen3_omni_moe_thinker", False)],
)
def test_convolutions_of_images_that_overlap(model_type: str, overlap: bool) -> None:
    """The audio tower of an omni model has overlapping convolutions too."""
    assert measured_boxes._overlapping_convolutions(real(model_type)[0]) == overlap


def test_a_missing_box_is_found() -> None:
    def without_the_first(*given) -> list:
        (grid,) = fixed_grid(*given)
        boxes = grid.boxes.copy()
        boxes[0] = np.nan
        return [dataclasses.replace(grid, boxes=boxes)]

    found = compared(tiny_vlm("llava"), without_the_first)
    assert worst(found, "patch").agrees
    gap = worst(found, "token")
    assert (gap.index, gap.distance, gap.agrees) == (0, float("inf"), False)
    assert np.isnan(gap.box).all()
    assert np.isfinite(gap.measured).all()


def test_a_box_on_padding_is_found() -> None:
    vlm = xi.VLM(real("mistral3")[0], settled("mistral3"))
    right, padded = vlm.family.geometry, xi.VLM(real("llava_next")[0], settled("llava_next"))
    assert right is not None
    rule = padded.family.geometry
    assert rule is not None

    def on_padding(*given) -> list:
        (grid,) = rule(*given)
        boxes = grid.patch_boxes.copy()
        off = np.isnan(boxes).any(1) & (grid.patch_places[:, 0] >= 0)
        boxes[off] = [0.0, 0.0, 30.0, 30.0]
        return [dataclasses.replace(grid, patch_boxes=boxes)]

    gap = worst(compared(padded, on_padding), "patch")
    assert (gap.distance, gap.agrees) == (float("inf"), False)
    assert np.isnan(gap.measured).all()


def test_boxes_that_depend_on_the_pixels_are_not_compared() -> None:
    def by_brightness(processor, config, inputs, images) -> list:
        shift = images[0].getpixel((0, 0))[0] / 255
        rule = FixedGrid(shift=shift, tower_before=1)
        return rule(processor, config, inputs, images)

    found = compared(tiny_vlm("llava"), by_brightness)
    why = "the boxes depend on what the image shows"
    assert (found.gaps, found.reasons) == ((), {"patch": why, "token": why})


def test_tokens_that_are_no_blocks_of_patches_are_not_compared() -> None:
    vlm = xi.VLM(real("llava_next")[0], settled("llava_next"))
    found = compared(vlm, question=QUESTION)
    assert worst(found, "patch").agrees
    assert found.reasons == {
        "token": "the 48 tokens do not correspond to equal blocks of pixel_values of shape "
        "[1, 5, 3, 32, 32]"
    }


def test_learned_queries_are_not_compared() -> None:
    vlm = xi.VLM(real("idefics2")[0], settled("idefics2"))
    found = compared(vlm, question=prompt("idefics2", 1, QUESTION))
    assert worst(found, "patch").agrees
    assert found.reasons == {"token": "the rule gives tokens no rows and columns"}


def test_a_rule_that_does_not_fit_another_size_is_refused() -> None:
    right = tiny_vlm("llava").family.geometry

    def of_landscapes(processor, config, inputs, images) -> list:
        if images[0].height > images[0].width:
            raise GeometryError("144 tokens, 196 predicted.")
        return right(processor, config, inputs, images)

    with pytest.raises(GeometryError, match="196 predicted"):
        compared(tiny_vlm("llava"), of_landscapes)


def test_large_images_are_shrunk() -> None:
    assert measured_boxes._shrunk((640, 480)) == (640, 480)
    assert measured_boxes._shrunk((4000, 1000)) == (2048, 512)
