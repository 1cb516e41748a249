"""How each type reads videos, for the types whose forward takes them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Clip:
    """How one model type reads videos.

    Attributes:
        pixels: Name of the layout of its frames in ``tests.conformance.videos``.
        frames_apart: Whether its prompts have text between the frames of a video.
        token: Configuration attribute of the placeholder, if it is that of images.
        tokens_per_video: Number of placeholders per video, if it cannot be computed by the model.
    """

    pixels: str = "packed"
    frames_apart: bool = False
    token: str | None = None
    tokens_per_video: int | None = None


_WHOLE = (
    *("qwen2_vl", "qwen2_5_vl", "exaone4_5", "ernie4_5_vl_moe", "hyperclovax_vision_v2"),
    *("minimax_m3_vl", "dots3_note", "lfm3_vl", "muse_glimmer", "muse_spark"),
)
_APART = (
    *("qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe", "qwen4_exp"),
    *("cosmos3_edge", "cosmos3_omni", "cohere_compass"),
)
_AS_IMAGES = ("glm4v", "glm4v_moe", "glm46v", "glm_ocr", "glmga", "glm5_next")

CLIPS: dict[str, Clip] = {
    **{name: Clip() for name in _WHOLE},
    **{name: Clip(frames_apart=True) for name in _APART},
    **{name: Clip(frames_apart=True, token="image_token_id") for name in _AS_IMAGES},
    "qwen2_5_omni_thinker": Clip("packed_timed"),
    "qwen3_omni_moe_thinker": Clip("packed_timed"),
    "kimi_k25": Clip("packed_pairs"),
    "video_llama_3": Clip("packed_with_merges"),
    **{name: Clip("packed_rows") for name in ("minicpm_ocr", "minicpmv4_6", "minicpmv4_7")},
    **{name: Clip("frames") for name in ("llava_onevision", "llava_next_video", "video_llava")},
    "perception_lm": Clip("timm_frames", tokens_per_video=32),
    "gemma4": Clip("placed_frames"),
    "gemma4_unified": Clip("placed_frames"),
    "nemotron_h_omni": Clip("loose_frames", token="image_token_id"),
    "molmo2": Clip("pooled_frames"),
}
