"""Types whose image is resized to whole patches, a square of patches merged into one token."""

from tests.models.records.record import Record, Token

_QWEN_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
_QWEN_IDS = {
    "image_token_id": Token("<|image_pad|>"),
    "video_token_id": Token("<|video_pad|>"),
    "vision_start_token_id": Token("<|vision_start|>"),
    "vision_end_token_id": Token("<|vision_end|>"),
}
_QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
_PATCHES = {
    "patch_size": 8,
    "merge_size": 2,
    "temporal_patch_size": 2,
    "size": {"shortest_edge": 32 * 32, "longest_edge": 96 * 96},
}
_VISION = {
    "patch_size": 8,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 32,
}
_MROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1]}}
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
_GLM_PATCHES = {**_PATCHES, "size": {"shortest_edge": 2 * 32 * 32, "longest_edge": 2 * 96 * 96}}
_QWEN3_VISION = {**_VISION, "num_position_embeddings": 64}
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
_GLM_NOTE = (
    "Resized to multiples of patch_size * merge_size; size.shortest_edge and size.longest_edge are "
    "areas times the frames of a temporal patch (2 for an image)."
)
_PIXTRAL_NOTE = (
    "Longest side at most size.longest_edge, both rounded up to multiples of patch_size * "
    "spatial_merge_size; a break token ends each row, an end token the last."
)
_QWEN_NOTE = (
    "Resized to multiples of patch_size * merge_size between size.shortest_edge and "
    "size.longest_edge, which are areas in px; image_grid_thw counts patches."
)

RECORDS: tuple[Record, ...] = (
    Record(
        "qwen2_vl",
        note=_QWEN_NOTE,
        image=_QWEN_IMAGE,
        tokens=_QWEN_TOKENS,
        images=_PATCHES,
        videos=_PATCHES,
        config={
            **_QWEN_IDS,
            "vision_config": {
                "patch_size": 8,
                "spatial_merge_size": 2,
                "embed_dim": 32,
                "hidden_size": 32,
            },
            "text_config": _MROPE,
        },
        begins=False,
    ),
    Record(
        "qwen2_5_vl",
        note=_QWEN_NOTE,
        image=_QWEN_IMAGE,
        tokens=_QWEN_TOKENS,
        images=_PATCHES,
        videos=_PATCHES,
        config={
            **_QWEN_IDS,
            "vision_config": {**_VISION, "window_size": 32, "fullatt_block_indexes": [1]},
            "text_config": _MROPE,
        },
        begins=False,
    ),
    Record(
        "qwen3_vl",
        note=_QWEN_NOTE,
        image=_QWEN_IMAGE,
        tokens=_QWEN_TOKENS,
        images=_PATCHES,
        videos=_PATCHES,
        config={
            **_QWEN_IDS,
            "vision_config": {
                **_VISION,
                "num_position_embeddings": 64,
                "deepstack_visual_indexes": [0],
            },
            "text_config": _MROPE,
        },
        begins=False,
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
                "vision_config": {**_VISION, "image_size": 96},
                "text_config": _MROPE,
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
        "qwen3_vl_moe",
        note=_QWEN_NOTE,
        image=_QWEN_IMAGE,
        tokens=_QWEN_TOKENS,
        images={"@": "Qwen2VLImageProcessor", **_PATCHES},
        videos=_PATCHES,
        config={
            **_QWEN_IDS,
            "vision_config": {**_QWEN3_VISION, "deepstack_visual_indexes": [0]},
            "text_config": {**_MROPE, **_EXPERTS},
        },
        begins=False,
    ),
    *(
        Record(
            model_type,
            note=_QWEN_NOTE,
            image=_QWEN_IMAGE,
            tokens=_QWEN_TOKENS,
            images=_PATCHES,
            videos=_PATCHES,
            config={**_QWEN_IDS, "vision_config": _QWEN3_VISION, "text_config": text},
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
        images={"@": "Qwen2VLImageProcessor", **_PATCHES},
        videos={"@": "Qwen2VLVideoProcessor", **_PATCHES},
        audio={"@": "WhisperFeatureExtractor", "feature_size": 16},
        config={
            "vision_config": {**_VISION, "window_size": 32, "fullatt_block_indexes": [1]},
            "text_config": _MROPE,
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
        images={"@": "Qwen2VLImageProcessor", **_PATCHES},
        videos={"@": "Qwen2VLVideoProcessor", **_PATCHES},
        audio={"@": "WhisperFeatureExtractor", "feature_size": 16},
        config={
            "vision_config": {**_QWEN3_VISION, "deepstack_visual_indexes": [0]},
            "text_config": {**_MROPE, **_EXPERTS},
            "audio_config": {**_AUDIO, "downsample_hidden_size": 16},
            "image_token_id": Token("<|IMAGE|>"),
            "video_token_id": Token("<|VIDEO|>"),
            "audio_token_id": Token("<|AUDIO|>"),
            "vision_start_token_id": Token("<|vision_bos|>"),
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
        images={**_PATCHES, "temporal_patch_size": 1},
        videos={**_PATCHES, "draw_on_frames": False},
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
        images={**_PATCHES, "temporal_patch_size": 1},
        config={
            "vision_config": {"patch_size": 8, "spatial_merge_size": 2, "image_size": 96},
            "text_config": _MROPE,
            "image_token_id": Token("<|IMAGE_PLACEHOLDER|>"),
            "vision_start_token_id": Token("<|IMAGE_START|>"),
            "vision_end_token_id": Token("<|IMAGE_END|>"),
        },
    ),
    Record(
        "video_llama_3",
        note="As qwen2_vl, but merge_size comes from the processor and may differ by input "
        "(image_merge_sizes).",
        image="<|image_pad|>",
        tokens=("<|image_pad|>", "<|video_pad|>"),
        images={**_PATCHES, "temporal_patch_size": 1, "merge_size": 1},
        videos={**_PATCHES, "temporal_patch_size": 1},
        config={
            "vision_config": {"patch_size": 8},
            "image_token_id": Token("<|image_pad|>"),
            "video_token_id": Token("<|video_pad|>"),
        },
        begins=False,
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
            "vision_config": {**_VISION, "image_size": 96},
            "text_config": {
                "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 0]},
                "n_routed_experts": 4,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 16,
            },
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
            "vision_config": {**_VISION, "image_size": 96},
            "text_config": _MROPE,
        },
        begins=False,
    ),
    Record(
        "exaone4_5",
        note=_QWEN_NOTE,
        image=_QWEN_IMAGE,
        tokens=_QWEN_TOKENS,
        images=_PATCHES,
        videos=_PATCHES,
        config={
            **_QWEN_IDS,
            "vision_config": {**_VISION, "window_size": 32, "fullatt_block_indexes": [1]},
            "text_config": {"sliding_window": 64, "sliding_window_pattern": 2},
        },
    ),
    Record(
        "hyperclovax_vision_v2",
        note=_QWEN_NOTE,
        image=_QWEN_IMAGE,
        tokens=_QWEN_TOKENS,
        images=_PATCHES,
        videos=_PATCHES,
        config={
            **_QWEN_IDS,
            "vision_config": {**_VISION, "window_size": 32, "fullatt_block_indexes": [1]},
        },
        begins=False,
    ),
    Record(
        "cosmos3_omni",
        note=_QWEN_NOTE,
        image=_QWEN_IMAGE,
        tokens=_QWEN_TOKENS,
        processor_class="Qwen3VLProcessor",
        images=_PATCHES,
        videos=_PATCHES,
        config={
            **_QWEN_IDS,
            "vision_config": {**_QWEN3_VISION, "deepstack_visual_indexes": [0]},
            "text_config": _MROPE,
        },
        begins=False,
    ),
    Record(
        "cosmos3_edge",
        note=_QWEN_NOTE,
        image=_QWEN_IMAGE,
        tokens=_QWEN_TOKENS,
        images={**_PATCHES, "temporal_patch_size": 1},
        videos={**_PATCHES, "temporal_patch_size": 1},
        config={
            **_QWEN_IDS,
            "vision_config": {"patch_size": 8, "spatial_merge_size": 2, "num_patches": 64},
            "text_config": _MROPE,
            "projector_hidden_size": 32,
        },
        call={"return_mm_token_type_ids": True},
    ),
    Record(
        "cohere_compass",
        note=_QWEN_NOTE,
        image="<|VISION_START|><|IMAGE_PAD|><|VISION_END|>",
        tokens=("<|VISION_START|>", "<|VISION_END|>", "<|IMAGE_PAD|>", "<|VIDEO_PAD|>"),
        images=_PATCHES,
        videos=_PATCHES,
        config={
            "vision_config": {**_QWEN3_VISION, "deepstack_visual_indexes": [0]},
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
)
