"""Tiny untrained models of Hugging Face classes, with about a million weights each."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MllamaConfig,
    MllamaForConditionalGeneration,
    PreTrainedModel,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from xmodal_interp.shapes.processors import (
    IMAGE_TOKEN,
    MAX_TILES,
    MERGE,
    PATCH,
    SIDE,
    TILE,
    VIDEO_TOKEN,
    VISION_END,
    VISION_START,
    vocabulary,
)

FAMILIES: tuple[str, ...] = ("llava", "qwen2_vl", "mllama")
_INIT = 0.06  # a width of 128 requires larger initial weights than the 0.02 of large models
_TEXT: dict[str, Any] = {
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
    """Return a model with random weights; the same seed gives the same weights.

    Args:
        family: ``"llava"`` (CLIP vision tower, MLP projector, Llama), ``"qwen2_vl"``, or
            ``"mllama"`` (cross-attention; its gates are set to 1, because the default 0 would
            remove the image's effect).
        seed: Seed of the weights; training of the shipped checkpoints started from seed 0.
    """
    ids = vocabulary(family)
    special: dict[str, Any] = {
        "bos_token_id": ids["<bos>"],
        "eos_token_id": ids["<eos>"],
        "pad_token_id": ids["<pad>"],
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        build = {"llava": _llava, "qwen2_vl": _qwen2_vl, "mllama": _mllama}[family]
        model = build(ids, special)
    model.eval()
    model.generation_config = GenerationConfig(**special, max_new_tokens=20, do_sample=False)
    return model


def _llava(ids: dict[str, int], special: dict[str, Any]) -> PreTrainedModel:
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
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    text = LlamaConfig(vocab_size=len(ids), head_dim=16, rope_parameters=rope, **_TEXT, **special)
    return LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision,
            text_config=text,
            image_token_index=ids[IMAGE_TOKEN["llava"]],
            image_seq_length=(SIDE // PATCH["llava"]) ** 2,
            vision_feature_layer=-1,
            vision_feature_select_strategy="default",
            tie_word_embeddings=False,
        )
    )


def _qwen2_vl(ids: dict[str, int], special: dict[str, Any]) -> PreTrainedModel:
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


def _mllama(ids: dict[str, int], special: dict[str, Any]) -> PreTrainedModel:
    vision = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_global_layers": 1,
        "attention_heads": 4,
        "image_size": TILE,
        "patch_size": PATCH["mllama"],
        "max_num_tiles": MAX_TILES,
        "intermediate_layers_indices": [0, 2],
        "vision_output_dim": 3 * 64,
        "supported_aspect_ratios": [
            [rows, cols]
            for rows in range(1, MAX_TILES + 1)
            for cols in range(1, MAX_TILES + 1)
            if rows * cols <= MAX_TILES
        ],
        "initializer_range": _INIT,
    }
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    text = {"vocab_size": len(ids), "rope_parameters": rope, "cross_attention_layers": [1, 3]}
    model = MllamaForConditionalGeneration(
        MllamaConfig(
            vision_config=vision,
            text_config={**text, **_TEXT, **special},
            image_token_index=ids[IMAGE_TOKEN["mllama"]],
        )
    )
    for name, weight in model.named_parameters():
        if "cross_attn_attn_gate" in name or "cross_attn_mlp_gate" in name:
            torch.nn.init.constant_(weight, 1.0)
    return model
