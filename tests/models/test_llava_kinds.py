"""Checkpoints of ``model_type: llava`` whose vision tower is not CLIP."""

import numpy as np
import pytest
import torch
from transformers import (
    CLIPImageProcessor,
    LlavaProcessor,
    PixtralImageProcessor,
    PixtralProcessor,
    SiglipImageProcessor,
)

from tests.helpers.families.family_record import Record, Token
from tests.helpers.real import build_model, chat_template
from tests.helpers.tiny import picture
from tests.helpers.tiny_tokenizer import tokenizer
from xmodal_interp.capturing.run import capture, capture_batch
from xmodal_interp.models import VLM
from xmodal_interp.verification.doctor import doctor

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")

SQUARE = {"height": 64, "width": 64}
TOWERS = {
    "siglip": {"model_type": "siglip_vision_model", "image_size": 64, "patch_size": 8},
    "clip": {"model_type": "clip_vision_model", "image_size": 64, "patch_size": 8},
    "pixtral": {"model_type": "pixtral", "image_size": 96, "patch_size": 8},
}


def llava(tower: str) -> VLM:
    """Return a tiny LLaVA whose features are all positions of its tower."""
    mark = "[IMG]" if tower == "pixtral" else "<image>"
    record = Record(
        "llava",
        image=mark,
        tokens=(mark, "[IMG_BREAK]", "[IMG_END]"),
        config={
            "vision_config": TOWERS[tower],
            "image_token_index": Token(mark),
            "vision_feature_select_strategy": "full",
            "vision_feature_layer": -1,
        },
    )
    text, template = tokenizer(record), chat_template(record)
    if tower == "pixtral":
        images = PixtralImageProcessor(size={"longest_edge": 96}, patch_size=8)
        processor = PixtralProcessor(images, text, patch_size=8, chat_template=template)
    else:
        images = (
            SiglipImageProcessor(size=SQUARE)
            if tower == "siglip"
            else CLIPImageProcessor(size={"shortest_edge": 64}, crop_size=SQUARE)
        )
        processor = LlavaProcessor(
            images,
            text,
            patch_size=8,
            vision_feature_select_strategy="full",
            num_additional_image_tokens=int(tower == "clip"),
            chat_template=template,
        )
    return VLM(build_model(record, text), processor)


@pytest.mark.parametrize(("tower", "n_before"), [("siglip", 0), ("clip", 1)])
def test_all_features_of_a_square_tower(tower: str, n_before: int) -> None:
    """SigLIP has no class token, so all of its features are patches; those of CLIP have one more.

    LLaVA in transformers 5.23 with ``vision_feature_select_strategy="full"`` keeps them all.
    """
    vlm = llava(tower)
    sample = capture(vlm, picture(128, 64), "where is it?", max_new_tokens=2)
    images = sample.tokens[sample.tokens["kind"].eq("image")]
    assert len(images) == 64 + n_before
    assert images["row"].isna().sum() == n_before
    placed = images[n_before:]
    assert placed["row"].tolist() == np.repeat(np.arange(8), 8).tolist()
    assert placed["col"].tolist() == np.tile(np.arange(8), 8).tolist()
    whole = (0, 0, 128, 64) if tower == "siglip" else (32, 0, 96, 64)  # CLIP crops the centre
    corners = (placed["x0"].min(), placed["y0"].min(), placed["x1"].max(), placed["y1"].max())
    assert corners == whole
    assert sample.call(0, tower="vision").n_queries == 64 + n_before


@pytest.mark.parametrize("tower", TOWERS)
def test_doctor_confirms_each_tower(tower: str) -> None:
    """Places are compared with painted patches."""
    checkup = doctor(llava(tower), picture(96, 64), "where is it?")
    assert checkup.ok, checkup.summary


def test_a_pixtral_tower_has_a_row_for_each_row_of_patches() -> None:
    vlm = llava("pixtral")
    sample = capture(vlm, picture(96, 48), "where is it?", max_new_tokens=2)
    images = sample.tokens[sample.tokens["kind"].eq("image")]
    assert len(images) == 12 * 6
    assert images["row"].tolist() == np.repeat(np.arange(6), 12).tolist()
    assert images[["x0", "y0", "x1", "y1"]].iloc[13].tolist() == [8, 8, 16, 16]
    assert images[["x0", "y0", "x1", "y1"]].iloc[-1].tolist() == [88, 40, 96, 48]
    assert sample.tokens["token"].eq("[IMG_BREAK]").sum() == 5
    assert sample.tokens["token"].eq("[IMG_END]").sum() == 1
    assert sample.call(0, tower="vision").n_queries == 72


def test_a_batch_of_a_pixtral_tower() -> None:
    """Its processor pads the pixels of a batch, and the tower reads all patches as one row."""
    vlm = llava("pixtral")
    pictures = [[picture(96, 48)], [picture(48, 96, seed=1), picture(64, 64, seed=2)]]
    questions = ["where is it?", "which one?"]
    together = capture_batch(vlm, pictures, questions, max_new_tokens=2)
    for sample, of_sample, question in zip(together, pictures, questions, strict=True):
        alone = capture(vlm, of_sample, question, max_new_tokens=2)
        assert sample.answer == alone.answer
        for number in range(len(of_sample)):
            ours, theirs = (one.probs(0, tower="vision", call=number) for one in (sample, alone))
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
