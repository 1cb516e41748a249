"""Types like GLM-V: merged patches, with size limits that include the number of frames."""

from tests.helpers.families.record import Record, Token

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

RECORDS: tuple[Record, ...] = (
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
                "text_config": {"head_dim": 8},
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
            "vision_config": {**_VISION, "image_size": 96},
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
            "vision_config": {**_VISION, "image_size": 96, "projection_intermediate_size": 48},
            "text_config": {
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
)
