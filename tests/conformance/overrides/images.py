"""Types that take images (of one size, of several sizes or as tiles), with placeholders."""

from tests.conformance.overrides.record import Record

# Modules whose output is not used: the pooling head of SigLIP, and the last layer of an image tower
# whose features are taken from the layer before.
POOLING_HEAD = "head.attention"
LAST_LAYER = "_tower.encoder.layers.1.self_attn"
ANYRES = {"image_grid_pinpoints": [[16, 32], [32, 16]]}
# Image tokens of a vector-quantising encoder are tokens of the vocabulary.
CODES = 16

IMAGES: dict[str, Record] = {
    "video_llava": Record(idle=(LAST_LAYER,)),
    "llava": Record(idle=(LAST_LAYER,)),
    "deepseek_vl": Record(idle=(POOLING_HEAD,)),
    "cohere2_vision": Record(idle=(POOLING_HEAD,)),
    "aria": Record(
        {"projector_patch_to_query_dict": {16: 5}, "max_value_projector_patch_to_query_dict": 5}
    ),
    "blip-2": Record({"image_token_index": 8}, tokens_per_image=5),
    "chameleon": Record(
        {
            "vq_config": {
                "num_embeddings": CODES,
                "embed_dim": 8,
                "latent_channels": 8,
                "resolution": 16,
                "base_channels": 32,
                "channel_multiplier": (1, 1),
                "num_res_blocks": 1,
            },
            "vocabulary_map": {"<image>": 8}
            | {f"IMGIMG{chr(65 + i // 10)}{chr(65 + i % 10)}Z": 40 + i for i in range(CODES)},
        },
    ),
    "deepseek_ocr2": Record(
        {
            "vision_config": {"sam_config": {"image_size": 32, "downsample_channels": [16, 32]}},
            "text_config": {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2},
        },
        pixels="with_local_views",
        side=32,
    ),
    "deepseek_vl_hybrid": Record(
        {
            "vision_config": {"image_size": 16},
            "high_res_vision_config": {
                "output_channels": 8,
                "global_attn_indexes": [1],
                "window_size": 2,
            },
        },
        pixels="two_resolutions",
        idle=(POOLING_HEAD,),
    ),
    "diffusion_gemma": Record(
        {
            "canvas_length": 8,
            "text_config": {
                "global_head_dim": 16,
                "num_experts": 4,
                "top_k_experts": 2,
                "moe_intermediate_size": 16,
            },
            "vision_config": {"position_embedding_size": 64},
        },
        pixels="placed",
        tokens_per_image=6,
        generate={"max_denoising_steps": 3, "disable_compile": True},
    ),
    "emu3": Record(
        {
            "vq_config": {
                "codebook_size": CODES,
                "base_channels": 32,
                "channel_multiplier": (1, 1),
                "num_res_blocks": 1,
                "attn_resolutions": (1,),
                "hidden_size": 32,
                "num_attention_heads": 1,
                "temporal_downsample_factor": 1,
            },
            "vocabulary_map": {"<image>": 8, "<|extra_200|>": 9}
            | {f"<|visual token {i:06d}|>": 40 + i for i in range(CODES)},
        },
        pixels="sized",
        methods=("words_to_images",),
    ),
    "fast_vlm": Record(
        {
            "vision_config": {
                "hidden_size": 64,
                "model_args": {
                    "inference_mode": True,
                    "layers": (1, 1, 1, 1, 1),
                    "embed_dims": (8, 8, 16, 32, 32),
                },
            }
        },
        side=128,
    ),
    "gemma3": Record({"mm_tokens_per_image": 4}, idle=(POOLING_HEAD,)),
    "gemma3n": Record(
        {
            "vision_soft_tokens_per_image": 16,
            "vision_config": {
                "hidden_size": 2048,
                "model_args": {"channel_multiplier": 0.05, "msfa_output_resolution": 4},
            },
            "text_config": {
                "num_hidden_layers": 4,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
                "num_kv_shared_layers": 2,
                "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
                "intermediate_size": 48,
            },
            "audio_soft_tokens_per_image": 12,
            "audio_config": {
                "input_feat_size": 16,
                "vocab_size": 8,
                "vocab_offset": 120,
                "conf_attention_chunk_size": 4,
                "conf_attention_context_left": 5,
                "conf_reduction_factor": 1,
                "sscp_conv_channel_size": (8, 4),
            },
        },
        side=64,
        extras=("sounds",),
    ),
    "gemma4": Record(
        {
            "text_config": {"global_head_dim": 16},
            "vision_config": {"position_embedding_size": 64},
            "audio_config": {
                "model_type": "gemma4_audio",
                "attention_chunk_size": 4,
                "attention_context_left": 5,
                "output_proj_dims": 32,
            },
        },
        pixels="placed",
        extras=("sounds",),
    ),
    "gemma4_unified": Record(
        {
            "text_config": {"global_head_dim": 16},
            "vision_config": {"mm_posemb_size": 64, "mm_embed_dim": 32, "output_proj_dims": 32},
        },
        pixels="placed",
    ),
    "granite4_vision": Record(
        ANYRES
        | {
            "downsample_rate": "2/4",
            "deepstack_layer_map": [[1, 0]],
            "spatial_target_layers": [1, 2, 3, 4],
            "text_config": {"num_hidden_layers": 5},
            "vision_config": {"hidden_size": 128},
        },
        pixels="tiled",
        tokens_per_image=(14, 16),
    ),
    "granite_docling": Record({"text_config": {"attention_multiplier": 0.35}}, pixels="real_tiles"),
    "idefics2": Record(pixels="nested"),
    "idefics3": Record(pixels="nested"),
    "inkling_mm_model": Record(
        {"vision_config": {"n_layers": 4}, "audio_config": {"n_mel_bins": 4, "mel_vocab_size": 8}},
        pixels="patch_clips",
    ),
    "internvl": Record({"vision_config": {"image_size": [16, 16], "patch_size": [4, 4]}}),
    "janus": Record(
        {
            "vq_config": {
                "num_embeddings": CODES,
                "latent_channels": 8,
                "base_channels": 32,
                "channel_multiplier": (1, 1),
                "num_res_blocks": 1,
                "projection_dim": 32,
                "image_token_embed_dim": 32,
            }
        },
        methods=("images_to_codes", "codes_to_images"),
    ),
    "lfm2_vl": Record(pixels="padded_patches", idle=(POOLING_HEAD,)),
    "lighton_ocr": Record(pixels="sized"),
    "llama4": Record(
        {"vision_config": {"intermediate_size": 128, "vision_output_dim": 32}}, tokens_per_image=4
    ),
    "llava_next": Record(ANYRES, pixels="tiled", idle=(LAST_LAYER,)),
    "llava_next_video": Record(ANYRES, pixels="tiled", idle=(LAST_LAYER,)),
    "llava_onevision": Record(ANYRES, pixels="tiled"),
    "mistral3": Record(pixels="sized"),
    "mistral_large4": Record(pixels="sized"),
    "molmo2": Record(
        {
            "image_patch_id": 8,
            "vision_config": {"image_size": [16, 16]},
            "adapter_config": {"vision_feature_layer": [1, 0]},
            "text_config": {"additional_vocab_size": 8},
        },
        pixels="pooled",
    ),
    "perception_lm": Record(
        {
            "vision_config": {
                "architecture": "vit_pe_core_large_patch14_336",
                "model_args": {
                    "embed_dim": 32,
                    "num_heads": 4,
                    "depth": 2,
                    "img_size": 56,
                    "global_pool": "",
                    "use_post_transformer_norm": False,
                    "init_values": 0.1,
                    "ref_feat_shape": (4, 4),
                },
            }
        },
        pixels="nested",
        side=56,
    ),
    "qianfan_ocr": Record({"vision_config": {"image_size": [16, 16], "patch_size": [4, 4]}}),
    "shieldgemma2": Record({"mm_tokens_per_image": 4}, idle=(POOLING_HEAD,)),
    "smolvlm": Record(pixels="nested"),
    "step3p7": Record(
        {
            "text_config": {
                "sliding_window": 6,
                "layer_types": ["full_attention", "sliding_attention"],
                "mlp_layer_types": ["dense", "sparse"],
            }
        },
        pixels="with_local_views",
    ),
    "unlimited_ocr": Record(
        {"vision_config": {"sam_config": {"image_size": 32, "downsample_channels": [16, 32]}}},
        pixels="with_gridded_views",
        side=32,
    ),
    "vipllava": Record({"vision_feature_layers": [-1, -2]}),
}
