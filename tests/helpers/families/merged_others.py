"""Types that merge patches like Qwen-VL, with other tokens and size limits."""

from tests.helpers.families.qwen_like import (
    MROPE,
    PATCHES,
    QWEN3_VISION,
    QWEN_IDS,
    QWEN_IMAGE,
    QWEN_TOKENS,
)
from tests.helpers.families.record import Record, Token

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
_QWEN_NOTE = (
    "Resized to multiples of patch_size * merge_size between size.shortest_edge and "
    "size.longest_edge, which are areas in px; image_grid_thw counts patches."
)

RECORDS: tuple[Record, ...] = (
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
                "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]},
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
                "sliding_window": 64,
                "rope_parameters": {
                    kind: {
                        "rope_type": "default",
                        "rope_theta": 1e4,
                        "mrope_section": [2, 1, 1],
                    }
                    for kind in ("sliding_attention", "full_attention")
                },
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
        tokens=("<|media_pad|>", "<|kimi_k25_video_placeholder|>"),
        images={
            "size": {"max_height": 96, "max_width": 96},
            "max_patches": 144,
            "patch_size": 8,
            "merge_size": 2,
        },
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
        tokens=("<|imgpad|>", "<|video_pad|>", "<|audio_comp_pad|>"),
        images={**PATCHES, "temporal_patch_size": 1},
        videos={**PATCHES, "temporal_patch_size": 1},
        config={
            "vision_config": {"patch_size": 8},
            "audio_config": {
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
                    "sliding_window": 64,
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
