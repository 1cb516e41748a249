"""Boxes are where the pixels are, for every family with a rule: paint a token's box, and of all
image tokens it is this one whose input to the language model changes most.

The vision towers are tiny and random, with their attention switched off, so that each token hears
of its own pixels only.
"""

import numpy as np
import pytest
from PIL import Image

from tests.models.painting import changes, embeddings, painted, vlm_of

pytestmark = pytest.mark.filterwarnings(  # of the processors, about themselves
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
    *("llava_next", "llava_onevision", "llava_next_video"),
    *("idefics3", "smolvlm", "internvl", "aya_vision", "cohere2_vision", "ovis2", "llama4"),
    *("got_ocr2", "florence2", "granite4_vision", "perception_lm"),
)
N_TOKENS = 4  # of each view


def fits(box: np.ndarray, size: tuple[int, int]) -> bool:
    """Whether a box shows no padding, and at least a pixel."""
    within = (box[:2] >= -1).all() and box[2] <= size[0] + 1 and box[3] <= size[1] + 1
    return bool(within) and painted(Image.new("RGB", size), box) is not None


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize("model_type", PAINTED)
def test_a_painted_box_is_heard_of_by_its_own_token(model_type: str, size: tuple[int, int]) -> None:
    vlm = vlm_of(model_type)
    image = Image.new("RGB", size, (40, 40, 40))
    plain, prompt = embeddings(vlm, [image])
    tokens = prompt.tokens
    assert len(tokens) == len(plain)
    boxes = tokens[["x0", "y0", "x1", "y1"]].to_numpy()
    n_painted = 0
    for view in tokens["view"].dropna().unique():
        of_view = np.flatnonzero(tokens["view"].eq(view).fillna(value=False))
        inside = [token for token in of_view if fits(boxes[token], size)]
        for token in inside[:: max(1, len(inside) // N_TOKENS)]:
            change = changes(vlm, image, boxes[token], plain)
            assert of_view[change[of_view].argmax()] == token, (view, token)
            n_painted += 1
    assert n_painted >= 2
    assert prompt.grids[0].n_tokens == tokens["kind"].eq("image").sum()
