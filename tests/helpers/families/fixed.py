"""Types whose images all have one grid of a fixed size."""

from tests.helpers.families.record import Record, Token

_SQUARE = {"height": 64, "width": 64}
_VIT = {"image_size": 64, "patch_size": 8}
_CLIP_CROP = {"size": {"shortest_edge": 64}, "crop_size": _SQUARE}

RECORDS: tuple[Record, ...] = (
    Record(
        "gemma3",
        note="Resized to image_processor.size ignoring its aspect ratio; features pooled to "
        "mm_tokens_per_image. With do_pan_and_scan also crops along the longer side, each resized "
        "to size (pan_and_scan_min_crop_size, _max_num_crops, _min_ratio_to_activate).",
        image="<start_of_image>",
        named={
            "image_token": "<image_soft_token>",
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
        },
        images={"size": _SQUARE},
        processor={"image_seq_length": 16},
        config={
            "vision_config": _VIT,
            "mm_tokens_per_image": 16,
            "boi_token_index": Token("<start_of_image>"),
            "eoi_token_index": Token("<end_of_image>"),
            "image_token_index": Token("<image_soft_token>"),
        },
    ),
    Record(
        "paligemma",
        note="Resized to image_processor.size ignoring its aspect ratio; the image tokens "
        "precede the beginning-of-sequence token, and a line break ends the prompt.",
        named={"image_token": "<image>"},
        images={"size": _SQUARE, "image_seq_length": 64},
        config={
            "vision_config": {**_VIT, "projection_dim": 32},
            "text_config": {"num_image_tokens": 64},
            "image_token_index": Token("<image>"),
            "projection_dim": 32,
        },
        template=False,
    ),
    Record(
        "deepseek_vl",
        note="Longer side resized to image_processor.size, the shorter padded with the mean colour "
        "on both sides (do_pad).",
        named={"image_token": "<image_placeholder>"},
        image="<image_placeholder>",
        images={"size": _SQUARE},
        processor={"num_image_tokens": 64},
        config={"vision_config": _VIT, "image_token_id": Token("<image_placeholder>")},
    ),
    Record(
        "deepseek_vl_hybrid",
        note="As deepseek_vl, twice: image_processor.size and high_res_size; both towers give the "
        "same grid.",
        named={"image_token": "<image_placeholder>"},
        image="<image_placeholder>",
        images={"size": _SQUARE, "high_res_size": {"height": 128, "width": 128}},
        processor={"num_image_tokens": 64},
        config={
            "vision_config": _VIT,
            "high_res_vision_config": {
                "image_size": 128,
                "patch_size": 8,
                "output_channels": 32,
                "mlp_dim": 48,
                "window_size": 4,
                "global_attn_indexes": [1],
            },
            "image_token_id": Token("<image_placeholder>"),
        },
    ),
    Record(
        "vipllava",
        note="Shorter side resized to size.shortest_edge, centre crop of crop_size (CLIP).",
        tokens=("<image>",),
        images=_CLIP_CROP,
        processor={
            "patch_size": 8,
            "vision_feature_select_strategy": "default",
            "num_additional_image_tokens": 1,
        },
        config={
            "vision_config": _VIT,
            "vision_feature_layers": [-2, -1],
            "image_token_index": Token("<image>"),
        },
    ),
    Record(
        "llava",
        note="Shorter side resized to size.shortest_edge, centre crop of crop_size (CLIP).",
        tokens=("<image>",),
        images=_CLIP_CROP,
        processor={
            "patch_size": 8,
            "vision_feature_select_strategy": "default",
            "num_additional_image_tokens": 1,
        },
        config={"vision_config": _VIT, "image_token_index": Token("<image>")},
    ),
    Record(
        "video_llava",
        note="Images as llava; a video is eight frames of such a grid, each with its CLS token.",
        tokens=("<image>", "<video>"),
        images={"@": "VideoLlavaImageProcessor", **_CLIP_CROP},
        videos=_CLIP_CROP,
        processor={
            "patch_size": 8,
            "vision_feature_select_strategy": "default",
            "num_additional_image_tokens": 1,
        },
        config={
            "vision_config": _VIT,
            "image_token_index": Token("<image>"),
            "video_token_index": Token("<video>"),
        },
    ),
    Record(
        "shieldgemma2",
        note="As gemma3 without pan-and-scan; the processor writes the prompt itself, one per "
        "policy.",
        named={
            "image_token": "<image_soft_token>",
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
        },
        image="<start_of_image>",
        images={"size": _SQUARE},
        processor={"image_seq_length": 16},
        config={
            "vision_config": _VIT,
            "mm_tokens_per_image": 16,
            "boi_token_index": Token("<start_of_image>"),
            "eoi_token_index": Token("<end_of_image>"),
            "image_token_index": Token("<image_soft_token>"),
        },
        several=False,
    ),
    Record(
        "t5gemma2",
        note="As gemma3, in the encoder.",
        named={
            "image_token": "<image_soft_token>",
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
        },
        image="<start_of_image>",
        images={"size": _SQUARE},
        processor={"image_seq_length": 16},
        config={
            "encoder": {
                "vision_config": _VIT,
                "mm_tokens_per_image": 16,
                "boi_token_index": Token("<start_of_image>"),
                "eoi_token_index": Token("<end_of_image>"),
                "image_token_index": Token("<image_soft_token>"),
            },
            "eoi_token_index": Token("<end_of_image>"),
            "image_token_index": Token("<image_soft_token>"),
        },
        template=False,
    ),
)
