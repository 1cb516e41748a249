"""Types like Qwen-VL: images are resized to whole patches, and blocks of them are merged."""

from tests.helpers.families.qwen_like import (
    MROPE,
    PATCHES,
    QWEN3_VISION,
    QWEN_IDS,
    QWEN_IMAGE,
    QWEN_TOKENS,
    VISION,
)
from tests.helpers.families.record import Record, Token

_HYBRID_TEXT = {
    "head_dim": 16,
    "rope_parameters": {
        "rope_type": "default",
        "partial_rotary_factor": 0.5,
        "mrope_section": [2, 1, 1],
    },
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"],
}
_EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
_INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 16,
    "indexer_compress_ratio": 4,
    "hc_lowrank": 8,
}
_OMNI_NAMED = {
    "image_token": "<|IMAGE|>",
    "audio_token": "<|AUDIO|>",
    "video_token": "<|VIDEO|>",
    "vision_bos_token": "<|vision_bos|>",
    "vision_eos_token": "<|vision_eos|>",
    "audio_bos_token": "<|audio_bos|>",
    "audio_eos_token": "<|audio_eos|>",
}
_AUDIO = {"d_model": 32, "output_dim": 32, "num_mel_bins": 16, "max_source_positions": 100}
_QWEN_NOTE = (
    "Resized to multiples of patch_size * merge_size between size.shortest_edge and "
    "size.longest_edge, which are areas in px; image_grid_thw counts patches."
)

RECORDS: tuple[Record, ...] = (
    Record(
        "qwen2_vl",
        note=_QWEN_NOTE,
        image=QWEN_IMAGE,
        tokens=QWEN_TOKENS,
        images=PATCHES,
        videos=PATCHES,
        config={
            **QWEN_IDS,
            "vision_config": {
                "patch_size": 8,
                "spatial_merge_size": 2,
                "embed_dim": 32,
                "hidden_size": 32,
            },
            "text_config": MROPE,
        },
        begins=False,
    ),
    Record(
        "qwen2_5_vl",
        note=_QWEN_NOTE,
        image=QWEN_IMAGE,
        tokens=QWEN_TOKENS,
        images=PATCHES,
        videos=PATCHES,
        config={
            **QWEN_IDS,
            "vision_config": {**VISION, "window_size": 32, "fullatt_block_indexes": [1]},
            "text_config": MROPE,
        },
        begins=False,
    ),
    Record(
        "qwen3_vl",
        note=_QWEN_NOTE,
        image=QWEN_IMAGE,
        tokens=QWEN_TOKENS,
        images=PATCHES,
        videos=PATCHES,
        config={
            **QWEN_IDS,
            "vision_config": {
                **VISION,
                "num_position_embeddings": 64,
                "deepstack_visual_indexes": [0],
            },
            "text_config": MROPE,
        },
        begins=False,
    ),
    Record(
        "qwen3_vl_moe",
        note=_QWEN_NOTE,
        image=QWEN_IMAGE,
        tokens=QWEN_TOKENS,
        images={"@": "Qwen2VLImageProcessor", **PATCHES},
        videos=PATCHES,
        config={
            **QWEN_IDS,
            "vision_config": {**QWEN3_VISION, "deepstack_visual_indexes": [0]},
            "text_config": {**MROPE, **_EXPERTS},
        },
        begins=False,
    ),
    *(
        Record(
            model_type,
            note=_QWEN_NOTE,
            image=QWEN_IMAGE,
            tokens=QWEN_TOKENS,
            images=PATCHES,
            videos=PATCHES,
            config={**QWEN_IDS, "vision_config": QWEN3_VISION, "text_config": text},
            begins=False,
        )
        for model_type, text in (
            ("qwen3_5", _HYBRID_TEXT),
            ("qwen3_5_moe", {**_HYBRID_TEXT, **_EXPERTS}),
            ("qwen4_exp", {**_HYBRID_TEXT, **_EXPERTS, **_INDEXER}),
        )
    ),
    Record(
        "qwen2_5_omni_thinker",
        note=_QWEN_NOTE,
        image="<|vision_bos|><|IMAGE|><|vision_eos|>",
        named=_OMNI_NAMED,
        processor_class="Qwen2_5OmniProcessor",
        images={"@": "Qwen2VLImageProcessor", **PATCHES},
        videos={"@": "Qwen2VLVideoProcessor", **PATCHES},
        audio={"@": "WhisperFeatureExtractor", "feature_size": 16},
        config={
            "vision_config": {**VISION, "window_size": 32, "fullatt_block_indexes": [1]},
            "text_config": MROPE,
            "audio_config": _AUDIO,
            "image_token_index": Token("<|IMAGE|>"),
            "video_token_index": Token("<|VIDEO|>"),
            "audio_token_index": Token("<|AUDIO|>"),
            "vision_start_token_id": Token("<|vision_bos|>"),
        },
        begins=False,
    ),
    Record(
        "qwen3_omni_moe_thinker",
        note=_QWEN_NOTE,
        image="<|vision_bos|><|IMAGE|><|vision_eos|>",
        named=_OMNI_NAMED,
        processor_class="Qwen3OmniMoeProcessor",
        images={"@": "Qwen2VLImageProcessor", **PATCHES},
        videos={"@": "Qwen2VLVideoProcessor", **PATCHES},
        audio={"@": "WhisperFeatureExtractor", "feature_size": 16},
        config={
            "vision_config": {**QWEN3_VISION, "deepstack_visual_indexes": [0]},
            "text_config": {**MROPE, **_EXPERTS},
            "audio_config": {**_AUDIO, "downsample_hidden_size": 16},
            "image_token_id": Token("<|IMAGE|>"),
            "video_token_id": Token("<|VIDEO|>"),
            "audio_token_id": Token("<|AUDIO|>"),
            "vision_start_token_id": Token("<|vision_bos|>"),
        },
        begins=False,
    ),
    Record(
        "exaone4_5",
        note=_QWEN_NOTE,
        image=QWEN_IMAGE,
        tokens=QWEN_TOKENS,
        images=PATCHES,
        videos=PATCHES,
        config={
            **QWEN_IDS,
            "vision_config": {**VISION, "window_size": 32, "fullatt_block_indexes": [1]},
            "text_config": {"sliding_window": 64, "sliding_window_pattern": 2},
        },
    ),
    Record(
        "hyperclovax_vision_v2",
        note=_QWEN_NOTE,
        image=QWEN_IMAGE,
        tokens=QWEN_TOKENS,
        images=PATCHES,
        videos=PATCHES,
        config={
            **QWEN_IDS,
            "vision_config": {**VISION, "window_size": 32, "fullatt_block_indexes": [1]},
        },
        begins=False,
    ),
    Record(
        "cosmos3_omni",
        note=_QWEN_NOTE,
        image=QWEN_IMAGE,
        tokens=QWEN_TOKENS,
        processor_class="Qwen3VLProcessor",
        images=PATCHES,
        videos=PATCHES,
        config={
            **QWEN_IDS,
            "vision_config": {**QWEN3_VISION, "deepstack_visual_indexes": [0]},
            "text_config": MROPE,
        },
        begins=False,
    ),
    Record(
        "cosmos3_edge",
        note=_QWEN_NOTE,
        image=QWEN_IMAGE,
        tokens=QWEN_TOKENS,
        images={**PATCHES, "temporal_patch_size": 1},
        videos={**PATCHES, "temporal_patch_size": 1},
        config={
            **QWEN_IDS,
            "vision_config": {"patch_size": 8, "spatial_merge_size": 2, "num_patches": 64},
            "text_config": MROPE,
            "projector_hidden_size": 32,
        },
        call={"return_mm_token_type_ids": True},
    ),
)
