"""Types that keep the aspect ratio of the image, each with a different grid."""

from tests.helpers.families.family_record import Record, Token
from tests.helpers.families.fixed_grids import CHUNKED
from tests.helpers.families.merged_patches import PATCHES

_GEMMA4_NAMED = {
    "image_token": "<|image|>",
    "boi_token": "<|image_start|>",
    "eoi_token": "<|image_end|>",
    "audio_token": "<|audio|>",
    "boa_token": "<|audio_start|>",
    "eoa_token": "<|audio_end|>",
}
_GEMMA4_PATCHES = {"patch_size": 4, "max_soft_tokens": 70, "pooling_kernel_size": 2}
_GEMMA4_VISION = {
    "model_type": "gemma4_vision",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "patch_size": 4,
    "pooling_kernel_size": 2,
    "position_embedding_size": 64,
}
_PIXTRAL_NOTE = (
    "Longest side at most size.longest_edge, both rounded up to multiples of patch_size * "
    "spatial_merge_size; a break token ends each row, an end token the last."
)

RECORDS: tuple[Record, ...] = (
    Record(
        "mistral3",
        note=_PIXTRAL_NOTE,
        image="[IMG]",
        tokens=("[IMG]", "[IMG_BREAK]", "[IMG_END]"),
        images={"size": {"longest_edge": 96}, "patch_size": 8},
        processor={"patch_size": 8, "spatial_merge_size": 2},
        config={
            "vision_config": {"image_size": 96, "patch_size": 8},
            "image_token_index": Token("[IMG]"),
            "spatial_merge_size": 2,
        },
    ),
    Record(
        "video_llama_3",
        note="As qwen2_vl, but merge_size comes from the processor and may differ by input "
        "(image_merge_sizes).",
        image="<|image_pad|>",
        tokens=("<|image_pad|>", "<|video_pad|>"),
        images={**PATCHES, "temporal_patch_size": 1, "merge_size": 1},
        videos={**PATCHES, "temporal_patch_size": 1},
        config={
            "vision_config": {"patch_size": 8},
            "image_token_id": Token("<|image_pad|>"),
            "video_token_id": Token("<|video_pad|>"),
        },
        begins=False,
    ),
    Record(
        "lighton_ocr",
        note=_PIXTRAL_NOTE,
        image="<|image_pad|>",
        named={
            "image_token": "<|image_pad|>",
            "image_break_token": "<|vision_pad|>",
            "image_end_token": "<|vision_end|>",
        },
        images={"size": {"longest_edge": 96}, "patch_size": 8},
        processor={"patch_size": 8, "spatial_merge_size": 2},
        config={
            "vision_config": {"image_size": 96, "patch_size": 8},
            "image_token_id": Token("<|image_pad|>"),
            "spatial_merge_size": 2,
        },
        begins=False,
    ),
    Record(
        "hunyuan_vl",
        note="As qwen2_vl; a newline token ends each row of merged patches, and one token is "
        "before and after all (cat_extra_token).",
        image="<img_start><img><img_end>",
        named={
            "image_token": "<img>",
            "image_start_token": "<img_start>",
            "image_end_token": "<img_end>",
            "image_newline_token": "<img_newline>",
        },
        images={**PATCHES, "temporal_patch_size": 1},
        config={
            "vision_config": {
                "patch_size": 8,
                "spatial_merge_size": 2,
                "img_max_token_num": 64,
                "max_image_size": 96,
                "min_image_size": 32,
            },
            "text_config": {
                "head_dim": 8,
                "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 1, 1]},
            },
            "image_token_id": Token("<img>"),
            "im_start_id": Token("<img_start>"),
            "im_end_id": Token("<img_end>"),
            "im_newline_id": Token("<img_newline>"),
        },
    ),
    Record(
        "mistral_large4",
        note=_PIXTRAL_NOTE,
        image="[IMG]",
        tokens=("[IMG]", "[IMG_BREAK]", "[IMG_END]"),
        images={"size": {"longest_edge": 96}, "patch_size": 8},
        processor={"patch_size": 8, "spatial_merge_size": 2},
        config={
            "vision_config": {"image_size": 96, "patch_size": 8},
            "image_token_index": Token("[IMG]"),
            "spatial_merge_size": 2,
        },
    ),
    Record(
        "inkling2",
        note="Padded right and below to multiples of image_processor.size (a cell of two by two "
        "patches), not resized; a token for each cell.",
        image="<|unused_200054|>",
        tokens=("<|unused_200054|>",),
        images={"size": {"height": 16, "width": 16}},
        config={
            "vision_config": {
                "patch_size": 8,
                "spatial_merge_size": 2,
                "posemb_grid_size": 12,
                "projection_hidden_dim": 32,
            },
            "text_config": {
                "layer_types": ["hybrid_sliding", "hybrid"],
                "swa_num_attention_heads": 4,
                "swa_num_key_value_heads": 2,
                "swa_head_dim": 8,
                "rel_extent": 256,
            },
            "image_token_id": Token("<|unused_200054|>"),
        },
        begins=False,
    ),
    Record(
        "inkling_mm_model",
        note="Scaled by rescale_image_frac where given, cut into cells of image_processor.size, "
        "cells at the right and below padded; a token for each cell.",
        image="<|content_image|><|unused_200054|>",
        tokens=(
            "<|unused_200054|>",
            "<|unused_200053|>",
            "<|content_image|>",
            "<|content_audio_input|>",
        ),
        images={"size": {"height": 16, "width": 16}},
        config={
            # with fewer layers than factors of a cell, the model requires scipy
            "vision_config": {"patch_size": 16, "n_layers": 6},
            "text_config": {
                "layer_types": ["hybrid_sliding", "hybrid"],
                "mlp_layer_types": ["dense", "sparse"],
                "swa_num_attention_heads": 4,
                "swa_num_key_value_heads": 2,
                "swa_head_dim": 8,
                "rel_extent": 256,
            },
            "audio_config": {"n_mel_bins": 4, "mel_vocab_size": 8},
            "image_token_id": Token("<|unused_200054|>"),
            "audio_token_id": Token("<|unused_200053|>"),
            "image_bos_token_id": Token("<|content_image|>"),
            "audio_bos_token_id": Token("<|content_audio_input|>"),
        },
    ),
    Record(
        "nemotron_h_omni",
        note="Resized, aspect ratio kept, to multiples of patch_size / downsample_ratio between "
        "min_num_patches and max_num_patches; image_grid_hw counts patches.",
        sound="<so_embedding>",
        no_video="'list' object has no attribute 'fps'",
        tokens=(
            "<image>",
            "<video>",
            "<img>",
            "</img>",
            "<so_start>",
            "<so_end>",
            "<so_embedding>",
        ),
        images={"patch_size": 8, "min_num_patches": 16, "max_num_patches": 144},
        videos={
            "norm_mean": [0.5] * 3,
            "norm_std": [0.5] * 3,
            "patch_size": 8,
            "video_target_num_patches": 36,
        },
        audio={"@": "ParakeetFeatureExtractor", "feature_size": 16},
        config={
            "vision_config": {
                "patch_size": 8,
                "image_size": 96,
                "max_img_size": 96,
                "num_cls_tokens": 1,
                "num_registers": 1,
                "patch_dim": 192,
                "video_patch_dim": 384,
                "summary_idxs": [0],
            },
            "text_config": {
                "layers_block_type": ["linear_attention", "full_attention"],
                "expand": 1,
                "ssm_state_size": 8,
                "mamba_num_heads": 4,
                "mamba_head_dim": 16,
                "n_groups": 1,
                "chunk_size": 16,
            },
            "audio_config": {
                "model_type": "parakeet_encoder",
                "num_mel_bins": 16,
                "subsampling_conv_channels": 8,
                "projection_hidden_size": 48,
                "projection_bias": False,
            },
            "vision_hidden_size": 32,
            "image_token_id": Token("<image>"),
            "audio_token_id": Token("<so_embedding>"),
            "img_context_token_id": Token("<image>"),
        },
    ),
    *(
        Record(
            model_type,
            note="Scaled up or down, aspect ratio kept, to patch_size * patch_size * "
            "max_soft_tokens * pooling_kernel_size ** 2 px at most, sides multiples of patch_size "
            "* pooling_kernel_size; patches carry their position (image_position_ids).",
            image="<|image|>",
            sound=sound,
            named=_GEMMA4_NAMED,
            images={"@": f"{name}ImageProcessor", **_GEMMA4_PATCHES},
            videos={"@": f"{name}VideoProcessor", **_GEMMA4_PATCHES},
            audio={"@": f"{name}AudioFeatureExtractor"},
            processor={"image_seq_length": 70},
            config={
                "text_config": {
                    "layer_types": ["sliding_attention", "full_attention"],
                    "global_head_dim": 16,
                    "hidden_size_per_layer_input": 8,
                },
                **config,
                "image_token_id": Token("<|image|>"),
                "boi_token_id": Token("<|image_start|>"),
                "eoi_token_id": Token("<|image_end|>"),
                "audio_token_id": Token("<|audio|>"),
                "video_token_id": Token("<|video|>"),
            },
            nested=True,
            not_square=not_square,
        )
        for model_type, name, sound, config, not_square in (
            (
                "gemma4",
                "Gemma4",
                "<|audio|>",
                {
                    "vision_config": _GEMMA4_VISION,
                    "audio_config": {
                        "model_type": "gemma4_audio",
                        "attention_chunk_size": 4,
                        "attention_context_left": 5,
                        "output_proj_dims": 32,
                    },
                },
                {"model.audio_tower.*.self_attn": CHUNKED},
            ),
            (
                "gemma4_unified",
                "Gemma4Unified",
                "",
                {
                    "vision_config": {
                        "patch_size": 4,
                        "pooling_kernel_size": 2,
                        "mm_embed_dim": 32,
                        "output_proj_dims": 32,
                        "mm_posemb_size": 64,
                    }
                },
                {},
            ),
        )
    ),
    Record(
        "diffusion_gemma",
        note="As gemma4; the answer is a canvas of tokens that is refined as a whole.",
        image="<|image|>",
        named=_GEMMA4_NAMED,
        images={"@": "Gemma4ImageProcessor", **_GEMMA4_PATCHES},
        videos={"@": "Gemma4VideoProcessor", **_GEMMA4_PATCHES},
        audio={"@": "Gemma4AudioFeatureExtractor"},
        processor={"image_seq_length": 70},
        config={
            "text_config": {
                "layer_types": ["sliding_attention", "full_attention"],
                "global_head_dim": 16,
                "num_experts": 4,
                "top_k_experts": 2,
                "moe_intermediate_size": 16,
            },
            "vision_config": _GEMMA4_VISION,
            "canvas_length": 4,
            "image_token_id": Token("<|image|>"),
            "boi_token_id": Token("<|image_start|>"),
            "eoi_token_id": Token("<|image_end|>"),
        },
        beside={"decoder_input_ids": [[4, 5, 6, 7]]},
        generate={"max_denoising_steps": 3, "disable_compile": True},
        nested=True,
        not_square={"*.self_attn": "keys of the prompt's cache precede the canvas"},
    ),
)
