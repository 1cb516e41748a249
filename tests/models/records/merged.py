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
_QWEN_NOTE = (
    "Resized to multiples of patch_size * merge_size between size.shortest_edge and "
    "size.longest_edge, which are areas in px; image_grid_thw counts patches."
)

RECORDS: tuple[Record, ...] = (
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
            note="Resized to multiples of patch_size * merge_size; size.shortest_edge and "
            "size.longest_edge are areas times the frames of a temporal patch (2 for an image).",
            image=_GLM_IMAGE,
            tokens=_GLM_TOKENS,
            images=_GLM_PATCHES,
            videos=_GLM_PATCHES,
            config={
                **_GLM_IDS,
                "vision_config": {**_VISION, "image_size": 96},
                "text_config": _MROPE,
            },
            begins=False,
        )
        for model_type in ("glm4v", "glm46v")
    ),
    Record(
        "mistral3",
        note="Longest side at most size.longest_edge, both rounded up to multiples of patch_size * "
        "spatial_merge_size; [IMG_BREAK] ends each row, [IMG_END] the last.",
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
)
