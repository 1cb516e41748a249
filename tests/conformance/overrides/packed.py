"""Types with packed images: patches of all images in one sequence, with a grid for each."""

from tests.conformance.overrides.record import Record

MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
MULTIMODAL_ROPE = {"text_config": {"rope_parameters": MROPE}}
WINDOWS = {"window_size": 16, "fullatt_block_indexes": [1], "depth": 2}
# Windows of patches of MiniCPM-V attend to each other after this layer of the tower.
MERGED_IN_TOWER = {"image_token_id": 8, "video_token_id": 9, "insert_layer_id": 0}

PACKED: dict[str, Record] = {
    "cohere_compass": Record({"text_config": {"rope_parameters": {"full_attention": MROPE}}}),
    "cosmos3_edge": Record(MULTIMODAL_ROPE),
    "cosmos3_omni": Record(MULTIMODAL_ROPE),
    "dots3_note": Record(
        {
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
                "adapter_input_size": 32,
                "adapter_out_dim": 32,
                "downsample_hidden_size": 8,
            },
        },
        extras=("sounds_in_samples",),
    ),
    "ernie4_5_vl_moe": Record(
        {
            "text_config": {
                "rope_parameters": MROPE | {"mrope_section": [1, 1, 2]},
                "moe_intermediate_size": [16, 16],
                "moe_k": 2,
            }
        }
    ),
    "exaone4_5": Record({"vision_config": WINDOWS}),
    "fuyu": Record(pixels="unpacked", tokens_per_image=6),
    "glm46v": Record(MULTIMODAL_ROPE),
    "glm4v": Record(MULTIMODAL_ROPE),
    "glm4v_moe": Record({"text_config": {"head_dim": 16, "rope_parameters": MROPE}}),
    "glm5_next": Record({"text_config": {"index_kpool": 2, "rope_parameters": MROPE}}),
    "glm_ocr": Record({"text_config": {"head_dim": 8, "rope_parameters": MROPE}}),
    "glmga": Record({"text_config": {"head_dim": 8, "rope_parameters": MROPE}}),
    "hunyuan_vl": Record(
        {
            "text_config": {"head_dim": 8, "rope_parameters": MROPE},
            "vision_config": {"max_image_size": 32},
        }
    ),
    "hyperclovax_vision_v2": Record({"vision_config": WINDOWS}),
    "inkling2": Record(pixels="packed_merged"),
    "kimi_k25": Record(pixels="packed_images"),
    "minicpm_ocr": Record(MERGED_IN_TOWER, pixels="packed_rows_to_merge"),
    "minicpmv4_6": Record(MERGED_IN_TOWER, pixels="packed_rows"),
    "minicpmv4_7": Record(MERGED_IN_TOWER, pixels="packed_rows"),
    "minimax_m3_vl": Record(
        {"merged_hidden_size": 128, "text_config": {"index_block_size": 4, "index_topk_blocks": 2}}
    ),
    "muse_glimmer": Record({"out_hidden_size": 128}),
    "muse_spark": Record(
        {
            "out_hidden_size": 128,
            "audio_config": {"hidden_sizes": (8, 8, 16, 32), "depths": (1, 1, 1, 1)},
        }
    ),
    "nemotron_h_omni": Record(
        {
            "image_token_id": 8,
            "audio_token_id": 9,
            "vision_config": {"max_img_size": 32},
            "text_config": {"n_groups": 1, "expand": 1},
            "audio_config": {
                "model_type": "parakeet_encoder",
                "num_mel_bins": 16,
                "subsampling_conv_channels": 8,
                "projection_hidden_size": 48,
                "projection_bias": False,
            },
        },
        pixels="packed_flat",
        extras=("sounds",),
    ),
    "paddleocr_vl": Record(MULTIMODAL_ROPE, pixels="packed_images"),
    "qwen2_5_omni_thinker": Record(
        {
            "text_config": {"rope_parameters": MROPE},
            "vision_start_token_id": 20,
            "vision_config": WINDOWS,
            "audio_config": {"num_mel_bins": 16, "n_window": 8},
        },
        extras=("sounds_by_frequency",),
    ),
    "qwen2_5_vl": Record(MULTIMODAL_ROPE | {"vision_config": WINDOWS}),
    "qwen2_vl": Record(MULTIMODAL_ROPE),
    "qwen3_5": Record(MULTIMODAL_ROPE),
    "qwen3_5_moe": Record(MULTIMODAL_ROPE),
    "qwen3_omni_moe_thinker": Record(
        {
            "text_config": {"rope_parameters": MROPE},
            "vision_start_token_id": 20,
            "audio_config": {"num_mel_bins": 16, "downsample_hidden_size": 8},
        },
        extras=("sounds_by_frequency",),
    ),
    "qwen3_vl": Record(MULTIMODAL_ROPE),
    "qwen3_vl_moe": Record(
        {"text_config": {"rope_parameters": MROPE, "num_experts": 4, "num_experts_per_tok": 2}}
    ),
    "qwen4_exp": Record(
        {
            "text_config": {
                "rope_parameters": MROPE,
                "hc_lowrank": 8,
                "indexer_n_heads": 2,
                "indexer_kv_heads": 1,
                "indexer_head_dim": 8,
                "indexer_budget": 8,
                "indexer_compress_ratio": 2,
            }
        }
    ),
    "video_llama_3": Record(pixels="packed_with_merges"),
}
