"""Labels agree with the model and the processor.

A painted patch changes its own key, and nothing but image tokens. Boxes are those that test images
measure in the processor.

The picture is wider than the windows of the tiny towers that sort patches by windows.
"""

from __future__ import annotations

import pytest

import xmodal_interp as xi
from tests.helpers.families import RECORDS
from tests.helpers.real import prompt as written
from tests.helpers.real import real, settled
from xmodal_interp.models.geometry import patch_order
from xmodal_interp.verification.measured_boxes import compared_boxes
from xmodal_interp.verification.painting import painted_patches

pytestmark = pytest.mark.filterwarnings(  # raised inside the processors
    "ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning"
)
SIZES = [(644, 252), (224, 224)]
WINDOWED = ["qwen2_5_vl", "exaone4_5", "muse_glimmer", "muse_spark", "minicpmv4_6"]
OTHERS = ["llava_next", "idefics2", "pix2struct", "internvl"]
QUESTION = "where is the red circle?"
OTHER_INPUTS = {"pi0", "instructblipvideo"}  # require the state of a robot; clips of four frames
NO_KEYS = {
    **dict.fromkeys(("blip", "kosmos-2.5", "got_ocr2", "pp_chart2table"), "probabilities only"),
    **dict.fromkeys(("fuyu", "inkling_mm_model", "gemma4_unified"), "no vision tower"),
    **dict.fromkeys(("florence2", "fast_vlm", "gemma3n", "pp_formulanet"), "stages or SAM"),
    **dict.fromkeys(("deepseek_ocr2", "unlimited_ocr", "step3p7"), "several views of an image"),
    "chameleon": "no vision tower",
    "lfm3_vl": "a block without attention before the first with it",
}
NOT_LINEAR = dict.fromkeys(("pix2struct", "kosmos-2.5"), ("patch", "token"))  # own mean and range
NO_PLACE = {
    **dict.fromkeys(
        ("blip-2", "instructblip", "kosmos-2", "idefics2", "aria", "deepseek_ocr2"), ("token",)
    ),
    **dict.fromkeys(("gemma3n", "pp_formulanet", "fuyu", "inkling_mm_model"), ("patch",)),
}
"""Learned queries; stages of a tower, or no tower."""
NO_BLOCKS = dict.fromkeys(
    (
        *("llava_next", "llava_onevision", "llava_next_video", "granite4_vision"),  # no padding
        *("lighton_ocr", "molmo2"),  # the last row or column is left out, or smaller
        "kimi_k25",  # patches of padding are not in the raster that is measured
        *("minicpm_ocr", "minicpmv4_6", "minicpmv4_7"),  # patches side by side, not a raster
        *("step3p7", "unlimited_ocr"),  # tokens of two tensors
    ),
    ("token",),
)
"""Types whose tokens are not equal blocks of measured patches."""
NOT_COMPARED = {**NOT_LINEAR, **NO_PLACE, **NO_BLOCKS}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "model_type" in metafunc.fixturenames:
        able = [name for name, r in RECORDS.items() if not r.obstacle and name not in OTHER_INPUTS]
        if not metafunc.config.getoption("all_types"):
            able = [name for name in able if name in (*WINDOWED, *OTHERS)]
        metafunc.parametrize("model_type", able)


def asked(vlm: xi.VLM) -> str:
    question = QUESTION if vlm.family.reads_text else ""
    if vlm.processor.chat_template is None and not vlm.family.in_front and question:
        question = written(vlm.family.model_type, 1, QUESTION)
    return question


def painted(vlm: xi.VLM):
    return painted_patches(vlm, asked(vlm))


def test_boxes_are_the_measured_ones(model_type: str) -> None:
    vlm = xi.VLM(real(model_type)[0], settled(model_type))
    found = compared_boxes(vlm, asked(vlm), SIZES)
    assert [gap for gap in found.gaps if not gap.agrees] == []
    assert tuple(sorted(found.reasons)) == NOT_COMPARED.get(model_type, ()), found.reasons


def test_keys_and_tokens_change_at_their_labels(model_type: str) -> None:
    found = painted(xi.VLM(real(model_type)[0], settled(model_type)))
    assert [patch for patch in found.patches if not patch.at_its_place] == []
    assert found.unlabelled in ((), None)
    assert (found.unlabelled is None) == (found.unlabelled_reason != "")
    assert found.misfit == ""
    assert (found.patches == ()) == (model_type in NO_KEYS), found.reason


@pytest.mark.parametrize("windowed", ["qwen2_5_vl", "muse_glimmer", "muse_spark"])
def test_an_order_that_is_not_undone_is_detected(windowed: str, monkeypatch) -> None:
    """An example is Muse, whose tower sorts patches in its forward without a method for it."""
    monkeypatch.setattr(patch_order, "_sorts_by_windows", lambda _module: False)
    found = painted(xi.VLM(real(windowed)[0], settled(windowed)))
    assert [patch for patch in found.patches if not patch.at_its_place] != []
