"""Video tokens match the pixels: painting a token's box in its frames changes that token most."""

import copy
import dataclasses

import numpy as np
import pytest
from PIL import Image

from tests.helpers.pixel_changes import language_inputs, painted, textured, vlm_of
from tests.helpers.tiny import QUESTION, tiny_vlm
from xmodal_interp.errors import GeometryError, InputError
from xmodal_interp.models import FAMILIES, VLM, Video
from xmodal_interp.models.labels import Prompt

pytestmark = pytest.mark.filterwarnings(  # raised inside the processors
    "ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning"
)
SIZE, N_FRAMES, FPS = (120, 70), 4, 2.0
MERGED = {  # how many frames are merged into a frame of tokens
    **dict.fromkeys(("gemma4", "gemma4_unified", "smolvlm"), 1),
    "glm5_next": 2,
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "ernie4_5_vl_moe"), 2),
    **dict.fromkeys(("glm4v", "glm46v", "qwen2_5_omni_thinker"), 2),
    **dict.fromkeys(("qwen3_vl_moe", "qwen3_5_moe", "qwen4_exp", "qwen3_omni_moe_thinker"), 2),
    **dict.fromkeys(("glm4v_moe", "glm_ocr", "glmga", "cohere_compass", "cosmos3_omni"), 2),
    **dict.fromkeys(("exaone4_5", "hyperclovax_vision_v2", "lfm3_vl"), 2),
    **dict.fromkeys(("muse_glimmer", "muse_spark"), 2),
    **dict.fromkeys(("cosmos3_edge", "dots3_note"), 1),
    **dict.fromkeys(("video_llama_3", "internvl", "llava_onevision", "llava_next_video"), 1),
    **dict.fromkeys(("video_llava", "perception_lm", "molmo2"), 1),
    **dict.fromkeys(("minicpmv4_6", "minicpmv4_7", "minicpm_ocr"), 1),
}
TEXTURED = {"gemma4_unified"}
"""Types that normalise the pixels of each patch: on an even image, all changes look alike."""


def read(vlm: VLM, frames: list[Image.Image]) -> tuple[np.ndarray, Prompt]:
    inputs, (prompt,) = vlm.prepare([[]], [QUESTION], videos=[[Video(frames, fps=FPS)]])
    return language_inputs(vlm, inputs), prompt


@pytest.mark.parametrize("model_type", MERGED)
def test_a_painted_box_changes_its_token_in_its_frame(model_type: str) -> None:
    vlm = vlm_of(model_type)
    frames = [Image.new("RGB", SIZE, (40 + i, 40, 40)) for i in range(N_FRAMES)]
    if model_type in TEXTURED:
        frames = [textured(*SIZE) for _ in frames]
    plain, prompt = read(vlm, frames)
    (grid,), tokens, merged = prompt.video_grids, prompt.tokens, MERGED[model_type]
    assert grid.frames == N_FRAMES // merged
    assert grid.times.tolist() == [i * merged / FPS for i in range(grid.frames)]
    of_video = np.flatnonzero(tokens["kind"].eq("video"))
    assert len(of_video) == grid.n_tokens
    assert tokens["video"].iloc[of_video].eq(0).all()
    assert tokens["image"].isna().all()
    placed = of_video[tokens["frame"].iloc[of_video].notna()]
    assert len(placed) == grid.frames * grid.rows * grid.cols
    n_painted = 0
    for token in placed[:: max(1, len(placed) // 8)]:
        frame, box = int(tokens["frame"][token]), tokens.loc[token, ["x0", "y0", "x1", "y1"]]
        x0, y0, x1, y1 = box
        if not (x0 >= -1 and y0 >= -1 and x1 <= SIZE[0] + 1 and y1 <= SIZE[1] + 1):
            continue
        other = [
            painted(each, box.to_numpy(float)) if i // merged == frame else each
            for i, each in enumerate(frames)
        ]
        change = np.linalg.norm(read(vlm, other)[0] - plain, axis=1)
        assert placed[change[placed].argmax()] == token
        n_painted += 1
    assert n_painted > 3


def test_refusals() -> None:
    vlm = tiny_vlm("llava")
    with pytest.raises(InputError) as refusal:
        vlm.prepare([[]], ["what ?"], videos=[[Video(())]])
    assert str(refusal.value) == ("A video must have frames of one size; got 0 frames of no size.")
    with pytest.raises(InputError, match="got 2 frames of 8 x 8, 8 x 9"):
        Video((Image.new("RGB", (8, 8)), Image.new("RGB", (8, 9)))).opened()


def test_a_family_without_a_rule_for_videos_refuses_them() -> None:
    vlm = vlm_of("diffusion_gemma")  # its processor takes videos, its model ignores them
    video = Video((Image.new("RGB", (32, 32)),) * 2, fps=1.0)
    with pytest.raises(GeometryError) as refusal:
        vlm.prepare([[]], [f"{vlm.processor.video_token} {QUESTION}"], videos=[[video]])
    assert str(refusal.value) == (
        "The model type 'diffusion_gemma' has no rule that places video tokens. Pass a family "
        "record with one, or record the attention with xi.record(model)."
    )


def test_frames_dropped_by_a_processor_are_refused() -> None:
    vlm = vlm_of("gemma4")
    video = Video((Image.new("RGB", SIZE),) * 3)
    inputs = {"num_frames_per_video": [2], "video_position_ids": np.zeros((2, 630, 2), int)}
    with pytest.raises(GeometryError) as refusal:
        FAMILIES["gemma4"].video(vlm.processor, vlm.model.config, inputs, [video])
    assert str(refusal.value) == (
        "The processor returned 2 frames for videos of 3. Set it to return each frame once."
    )


def test_frames_of_another_size_than_the_settings_give_are_refused() -> None:
    """Without resizing, SmolVLM pads frames to the largest of the videos."""
    vlm = vlm_of("smolvlm")
    processor = copy.copy(vlm.processor)
    processor.video_processor = copy.copy(processor.video_processor)
    processor.video_processor.do_resize = False
    videos = [[Video((Image.new("RGB", size),) * 2, fps=1.0) for size in ((32, 32), (32, 16))]]
    with pytest.raises(GeometryError) as refusal:
        VLM(vlm.model, processor).prepare([[]], [QUESTION], videos=videos)
    assert str(refusal.value) == (
        "The processor returned 32 x 32 pixels, but its settings lead to 32 x 16. Use the "
        "checkpoint's own processor settings."
    )


def test_a_rule_of_another_type_is_refused() -> None:
    own = vlm_of("llava_onevision")
    vlm = dataclasses.replace(
        own, family=dataclasses.replace(own.family, video=FAMILIES["gemma4"].video)
    )
    with pytest.raises(GeometryError) as refusal:
        read(vlm, [Image.new("RGB", SIZE)] * 2)
    assert str(refusal.value) == (
        "The geometry rule PositionedFrames does not fit a 'llava_onevision' model with "
        "LlavaOnevisionProcessor (KeyError: 'num_frames_per_video'). Pass VLM(model, processor, "
        "family=...) a family record with a rule for this model."
    )
