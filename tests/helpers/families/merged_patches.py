"""Types like Qwen-VL: images are resized to whole patches, and blocks of them are merged."""

from tests.helpers.families.family_record import Record, Token

QWEN_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
QWEN_IDS = {
    "image_token_id": Token("<|image_pad|>"),
    "video_token_id": Token("<|video_pad|>"),
    "vision_start_token_id": Token("<|vision_start|>"),
    "vision_end_token_id": Token("<|vision_end|>"),
}
QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
PATCHES = {
    "patch_size": 8,
    "merge_size": 2,
    "temporal_patch_size": 2,
    "size": {"shortest_edge": 32 * 32, "longest_edge": 96 * 96},
}
VISION = {
    "patch_size": 8,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 32,
}
_ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
MROPE = {"rope_parameters": _ROPE}
QWEN3_VISION = {**VISION, "num_position_embeddings": 64}
_HYBRID_TEXT = {
    "head_dim": 16,
    "rope_parameters": {**_ROPE, "partial_rotary_factor": 0.5},
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
_GLM_TOKENS = (
    "<|begin_of_image|>",
    "<|end_of_image|>",
    "<|begin_of_video|>",
    "<|end_of_video|>",
    "<|image|>",
    "<|video|>",
)
_GLM_IMAGE = "<|begin_of_image|><|image|><|end_of_image|>"
_GLM_IDS = {
    "image_token_id": Token("<|image|>"),
    "video_token_id": Token("<|video|>"),
    "image_start_token_id": Token("<|begin_of_image|>"),
    "image_end_token_id": Token("<|end_of_image|>"),
    "video_start_token_id": Token("<|begin_of_video|>"),
    "video_end_token_id": Token("<|end_of_video|>"),
}
_GLM_PATCHES = {**PATCHES, "size": {"shortest_edge": 2 * 32 * 32, "longest_edge": 2 * 96 * 96}}
_GLM5_PATCHES = {
    "patch_size": 8,
    "merge_size": 2,
    "temporal_patch_size": 2,
    "min_image_tokens": 4,
    "max_image_tokens": 36,
}
_GLM_NOTE = (
    "Resized to multiples of patch_size * merge_size; size.shortest_edge and size.longest_edge are "
    "areas times the frames of a temporal patch (2 for an image)."
)
_MUSE_TOKENS = (
    "<|patch|>",
    "<|image_start|>",
    "<|image_end|>",
    "<|video|>",
    "<|vid_frame_separator|>",
    "<|vid_start|>",
    "<|vid_end|>",
    "<|audio|>",
    "<|soft_audio_start|>",
    "<|soft_audio_end|>",
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
        sound="<|audio_bos|><|AUDIO|><|audio_eos|>",
        named=_OMNI_NAMED,
        processor_class="Qwen2_5OmniProcessor",
        images={"@": "Qwen2VLImageProcessor", **PATCHES},
        videos={"@": "Qwen2VLVideoProcessor", **PATCHES},
        audio={"@": "WhisperFeatureExtractor", "feature_size": 16, "chunk_length": 1},
        config={
            "vision_config": {**VISION, "window_size": 32, "fullatt_block_indexes": [1]},
            "text_config": MROPE,
            "audio_config": {**_AUDIO, "n_window": 8},
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
        sound="<|audio_bos|><|AUDIO|><|audio_eos|>",
        named=_OMNI_NAMED,
        processor_class="Qwen3OmniMoeProcessor",
        images={"@": "Qwen2VLImageProcessor", **PATCHES},
        videos={"@": "Qwen2VLVideoProcessor", **PATCHES},
        audio={"@": "WhisperFeatureExtractor", "feature_size": 16, "chunk_length": 1},
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
            "text_config": {"sliding_window_pattern": 2},
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
    *(
        Record(
            model_type,
            note=_GLM_NOTE,
            image=_GLM_IMAGE,
            tokens=_GLM_TOKENS,
            processor_class=processor_class,
            images=_GLM_PATCHES,
            videos=_GLM_PATCHES,
            config={
                **_GLM_IDS,
                "vision_config": {**VISION, "image_size": 96},
                "text_config": {**MROPE, "head_dim": 8},
            },
            begins=False,
        )
        for model_type, processor_class in (
            ("glm4v", None),
            ("glm46v", None),
            ("glmga", "Glm46VProcessor"),
        )
    ),
    Record(
        "glm4v_moe",
        note=_GLM_NOTE,
        image=_GLM_IMAGE,
        tokens=_GLM_TOKENS,
        images={"@": "Glm4vImageProcessor", **_GLM_PATCHES},
        videos={"@": "Glm4vVideoProcessor", **_GLM_PATCHES},
        config={
            **_GLM_IDS,
            "vision_config": {**VISION, "image_size": 96},
            "text_config": {**MROPE, "head_dim": 16},
        },
        begins=False,
    ),
    Record(
        "glm_ocr",
        note=_GLM_NOTE,
        image=_GLM_IMAGE,
        tokens=_GLM_TOKENS,
        processor_class="Glm46VProcessor",
        images={"@": "Glm46VImageProcessor", **_GLM_PATCHES},
        videos={"@": "Glm46VVideoProcessor", **_GLM_PATCHES},
        config={
            **_GLM_IDS,
            "vision_config": {**VISION, "image_size": 96},
            "text_config": {**MROPE, "head_dim": 8},
        },
        begins=False,
    ),
    Record(
        "glm5_next",
        note="As glm4v, but the bounds are min_image_tokens and max_image_tokens.",
        image=_GLM_IMAGE,
        tokens=_GLM_TOKENS,
        images=_GLM5_PATCHES,
        videos={**_GLM5_PATCHES, "max_image_tokens": 72},
        config={
            **_GLM_IDS,
            "vision_config": {**VISION, "image_size": 96, "projection_intermediate_size": 48},
            "text_config": {
                **MROPE,
                "mlp_layer_types": ["dense", "sparse"],
                "layer_types": ["linear_attention", "indexed_attention"],
                "indexer_types": ["full", "full"],
                "num_key_value_heads": 4,
                "linear_head_dim": 8,
                "linear_num_heads": 4,
                "index_topk": 16,
                "index_n_heads": 16,  # with few heads, scores tie at 0 and the choice is arbitrary
                "index_kpool": 4,
                "qk_rope_head_dim": 0,
                "head_dim": 0,
            },
        },
        begins=False,
    ),
    Record(
        "ernie4_5_vl_moe",
        note=_QWEN_NOTE,
        image="<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>",
        named={
            "image_token": "<|IMAGE_PLACEHOLDER|>",
            "image_start_token": "<|IMAGE_START|>",
            "image_end_token": "<|IMAGE_END|>",
            "video_token": "<|VIDEO_PLACEHOLDER|>",
            "video_start_token": "<|VIDEO_START|>",
            "video_end_token": "<|VIDEO_END|>",
        },
        images={**PATCHES, "temporal_patch_size": 1},
        videos={**PATCHES, "draw_on_frames": False},
        config={
            "vision_config": {"patch_size": 8, "spatial_merge_size": 2},
            "text_config": {
                "rope_parameters": {**_ROPE, "mrope_section": [1, 1, 2]},
                "moe_intermediate_size": [16, 16],
                "moe_k": 2,
                "moe_num_experts": 4,
                "mlp_layer_types": ["dense", "sparse"],
            },
            "image_token_id": Token("<|IMAGE_PLACEHOLDER|>"),
            "image_start_token_id": Token("<|IMAGE_START|>"),
            "image_end_token_id": Token("<|IMAGE_END|>"),
            "video_token_id": Token("<|VIDEO_PLACEHOLDER|>"),
            "video_start_token_id": Token("<|VIDEO_START|>"),
            "video_end_token_id": Token("<|VIDEO_END|>"),
        },
        begins=False,
    ),
    Record(
        "paddleocr_vl",
        note=_QWEN_NOTE,
        image="<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>",
        named={"image_token": "<|IMAGE_PLACEHOLDER|>"},
        tokens=("<|IMAGE_START|>", "<|IMAGE_END|>"),
        images={**PATCHES, "temporal_patch_size": 1},
        config={
            "vision_config": {"patch_size": 8, "spatial_merge_size": 2, "image_size": 96},
            "text_config": MROPE,
            "image_token_id": Token("<|IMAGE_PLACEHOLDER|>"),
            "vision_start_token_id": Token("<|IMAGE_START|>"),
            "vision_end_token_id": Token("<|IMAGE_END|>"),
        },
    ),
    Record(
        "cohere_compass",
        note=_QWEN_NOTE,
        image="<|VISION_START|><|IMAGE_PAD|><|VISION_END|>",
        tokens=("<|VISION_START|>", "<|VISION_END|>", "<|IMAGE_PAD|>", "<|VIDEO_PAD|>"),
        images=PATCHES,
        videos=PATCHES,
        config={
            "vision_config": {**QWEN3_VISION, "deepstack_visual_indexes": [0]},
            "text_config": {
                "layer_types": ["sliding_attention", "full_attention"],
                "rope_parameters": dict.fromkeys(("sliding_attention", "full_attention"), _ROPE),
            },
            "image_token_id": Token("<|IMAGE_PAD|>"),
            "video_token_id": Token("<|VIDEO_PAD|>"),
            "vision_start_token_id": Token("<|VISION_START|>"),
            "vision_end_token_id": Token("<|VISION_END|>"),
        },
    ),
    Record(
        "kimi_k25",
        note="Resized, aspect ratio kept, within max_patches and size.max_height and max_width, "
        "then padded right and below to multiples of patch_size * merge_size.",
        image="<|media_pad|>",
        video="<|kimi_k25_video_placeholder|>",
        tokens=("<|media_pad|>", "<|kimi_k25_video_placeholder|>"),
        images={
            "size": {"max_height": 96, "max_width": 96},
            "max_patches": 144,
            "patch_size": 8,
            "merge_size": 2,
        },
        videos={"patch_size": 8, "merge_size": 2},
        config={
            "vision_config": {"patch_size": 8, "pos_emb_height": 12, "pos_emb_width": 12},
            "text_config": {
                "mlp_layer_types": ["dense", "sparse"],
                "first_k_dense_replace": 1,
                "n_group": 1,
                "topk_group": 1,
                "num_key_value_heads": 4,
            },
            "image_token_id": Token("<|media_pad|>"),
            "video_token_id": Token("<|kimi_k25_video_placeholder|>"),
        },
        begins=False,
        no_video="split_with_sizes expects split_sizes to sum exactly to",
    ),
    Record(
        "minimax_m3_vl",
        note=_QWEN_NOTE,
        image="]<]image[>[",
        tokens=(
            "]<]image[>[",
            "]<]video[>[",
            "]<]start of image[>[",
            "]<]end of image[>[",
        ),
        images=PATCHES,
        videos=PATCHES,
        config={
            "vision_config": {"patch_size": 8, "image_size": 96},
            "text_config": {
                "index_n_heads": 2,
                "index_block_size": 16,
                "index_topk_blocks": 2,
                "shared_intermediate_size": 16,
                "rotary_dim": 4,
                "mlp_layer_types": ["dense", "sparse"],
                "layer_types": ["full_attention", "full_attention"],
            },
            "merged_hidden_size": 128,
            "image_token_index": Token("]<]image[>["),
            "video_token_index": Token("]<]video[>["),
        },
    ),
    Record(
        "dots3_note",
        note=_QWEN_NOTE,
        image="<|imgpad|>",
        video="<|video_pad|>",
        sound="<|audio_comp_pad|>",
        audio={"feature_size": 16},
        tokens=("<|imgpad|>", "<|video_pad|>", "<|audio_comp_pad|>"),
        images={**PATCHES, "temporal_patch_size": 1},
        videos={**PATCHES, "temporal_patch_size": 1},
        config={
            "vision_config": {"patch_size": 8},
            "text_config": {
                "swa_num_attention_heads": 4,
                "swa_num_key_value_heads": 4,
                "swa_q_lora_rank": 16,
                "swa_kv_lora_rank": 16,
                "swa_head_dim": 16,
                "swa_qk_nope_head_dim": 8,
                "swa_v_head_dim": 8,
            },
            "audio_config": {
                "feature_size": 16,
                "num_key_value_heads": 4,
                "adapter_input_size": 32,
                "downsample_hidden_size": 16,
            },
            "image_token_id": Token("<|imgpad|>"),
            "video_token_id": Token("<|video_pad|>"),
            "audio_token_id": Token("<|audio_comp_pad|>"),
        },
        begins=False,
    ),
    Record(
        "lfm3_vl",
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
            },
        },
    ),
    *(
        Record(
            model_type,
            note="Resized to multiples of patch_size * merge_size, at most max_image_tokens.",
            image="<|patch|>",
            video="<|video|>",
            tokens=_MUSE_TOKENS,
            images={
                "patch_size": 8,
                "merge_size": 2,
                "temporal_patch_size": 2,
                "max_image_tokens": 36,
            },
            videos={"patch_size": 8, "merge_size": 2, "temporal_patch_size": 2},
            audio=audio,
            config={
                "vision_config": {
                    "patch_size": 8,
                    "pos_emb_height": 12,
                    "pos_emb_width": 12,
                    "layer_types": ["window_attention", "full_attention"],
                },
                "text_config": {
                    "layer_types": ["sliding_attention", "full_attention"],
                    "layer_rope_theta": [10000.0, 0],
                    **text,
                },
                "out_hidden_size": 128,
                "image_token_id": Token("<|patch|>"),
                "video_token_id": Token("<|video|>"),
                **more,
            },
        )
        for model_type, audio, text, more in (
            ("muse_glimmer", {}, {}, {}),
            (
                "muse_spark",
                {},
                {"mlp_layer_types": ["sparse", "sparse"], "moe_hidden_size": 16},
                {
                    "audio_config": {
                        "hidden_sizes": [8, 8, 8, 8],
                        "depths": [1, 1, 1, 1],
                        "num_hidden_layers": 4,
                        "out_hidden_size": 32,
                    },
                    "audio_token_id": Token("<|audio|>"),
                },
            ),
        )
    ),
)
