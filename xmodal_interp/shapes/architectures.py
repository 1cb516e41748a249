"""The two shipped architectures, before training. Real Hugging Face classes, a million weights each."""

from __future__ import annotations

import torch
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from xmodal_interp.shapes.processors import IMAGE_TOKEN, MERGE, PATCH, SIDE, VIDEO_TOKEN, VISION_END, VISION_START, vocabulary

FAMILIES: tuple[str, ...] = ("llava", "qwen2_vl")
_INIT = 0.06  # a width of 128 needs larger first weights than the 0.02 of billion-weight models
_TEXT = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "initializer_range": _INIT,
    "tie_word_embeddings": False,
}


def untrained(family: str, seed: int = 0) -> PreTrainedModel:
    """The model as it was before training: the same seed gives the same first weights.

    Args:
        family: ``"llava"`` (CLIP vision tower, MLP projector, Llama) or ``"qwen2_vl"``.
        seed: Seed of the first weights; the shipped checkpoints grew from 0.
    """
    ids = vocabulary(family)
    special = {"bos_token_id": ids["<bos>"], "eos_token_id": ids["<eos>"], "pad_token_id": ids["<pad>"]}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = {"llava": _llava, "qwen2_vl": _qwen2_vl}[family](ids, special)
    model.generation_config = GenerationConfig(**special, max_new_tokens=20, do_sample=False)
    return model.eval()


def _llava(ids: dict[str, int], special: dict[str, int]) -> PreTrainedModel:
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=PATCH["llava"],
        projection_dim=128,
        hidden_act="gelu",
        initializer_range=0.05,
    )
    text = LlamaConfig(vocab_size=len(ids), head_dim=16, rope_theta=10000.0, **_TEXT, **special)
    return LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision,
            text_config=text,
            image_token_id=ids[IMAGE_TOKEN["llava"]],
            image_seq_length=(SIDE // PATCH["llava"]) ** 2,
            vision_feature_layer=-1,
            vision_feature_select_strategy="default",
            tie_word_embeddings=False,
        )
    )


def _qwen2_vl(ids: dict[str, int], special: dict[str, int]) -> PreTrainedModel:
    vision = {
        "depth": 2,
        "embed_dim": 64,
        "hidden_size": _TEXT["hidden_size"],
        "num_heads": 4,
        "mlp_ratio": 4,
        "patch_size": PATCH["qwen2_vl"],
        "spatial_merge_size": MERGE,
        "temporal_patch_size": 2,
        "hidden_act": "gelu",
        "initializer_range": _INIT,
    }
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    return Qwen2VLForConditionalGeneration(
        Qwen2VLConfig(
            text_config={"vocab_size": len(ids), "rope_parameters": rope, **_TEXT, **special},
            vision_config=vision,
            image_token_id=ids[IMAGE_TOKEN["qwen2_vl"]],
            video_token_id=ids[VIDEO_TOKEN],
            vision_start_token_id=ids[VISION_START],
            vision_end_token_id=ids[VISION_END],
            tie_word_embeddings=False,
        )
    )
