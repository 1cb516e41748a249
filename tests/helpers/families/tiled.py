"""Types whose processor cuts an image into tiles: AnyRes, and grids with a thumbnail."""

from tests.helpers.families.record import Record, Token

_ANYRES = [[32, 64], [64, 32], [64, 64], [96, 32], [32, 96]]  # height, width; px
_GRID_TAGS = tuple(f"<row_{row}_col_{col}>" for row in range(1, 7) for col in range(1, 7))
_CLIP = {"image_size": 32, "patch_size": 8}

RECORDS: tuple[Record, ...] = (
    Record(
        "llava_next",
        note="AnyRes: fitted into the best of image_processor.image_grid_pinpoints and padded, cut "
        "into tiles of crop_size; a thumbnail of size and crop_size comes first. Padding is cut "
        "from the features, a newline token ends each row.",
        tokens=("<image>",),
        images={
            "size": {"shortest_edge": 32},
            "crop_size": {"height": 32, "width": 32},
            "image_grid_pinpoints": _ANYRES,
        },
        processor={
            "patch_size": 8,
            "vision_feature_select_strategy": "default",
            "num_additional_image_tokens": 1,
        },
        config={
            "vision_config": _CLIP,
            "image_token_index": Token("<image>"),
            "image_grid_pinpoints": _ANYRES,
        },
    ),
    Record(
        "llava_onevision",
        note="AnyRes as llava_next with image_processor.size for tile and thumbnail; features are "
        "shrunk beyond anyres_max_N tiles (processor.vision_aspect_ratio). Of several images in a "
        "prompt each is one tile, resized ignoring its aspect ratio.",
        tokens=("<image>", "<video>"),
        images={"size": {"height": 32, "width": 32}, "image_grid_pinpoints": _ANYRES},
        videos={"size": {"height": 32, "width": 32}},
        processor={
            "num_image_tokens": 16,
            "vision_feature_select_strategy": "full",
            "vision_aspect_ratio": "anyres_max_4",
        },
        config={
            "vision_config": _CLIP,
            "image_token_index": Token("<image>"),
            "video_token_index": Token("<video>"),
            "image_grid_pinpoints": _ANYRES,
            "vision_aspect_ratio": "anyres_max_4",
        },
    ),
    Record(
        "idefics3",
        note="Resized to size.longest_edge and up to multiples of max_image_size.longest_edge, cut "
        "into tiles of that size (written <row_i_col_j>), then a thumbnail of one tile.",
        tokens=("<image>", "<fake_token_around_image>", "<global-img>", *_GRID_TAGS),
        images={"size": {"longest_edge": 96}, "max_image_size": {"longest_edge": 32}},
        processor={"image_seq_len": 4},
        config={"vision_config": _CLIP, "image_token_id": Token("<image>"), "scale_factor": 2},
    ),
    Record(
        "smolvlm",
        needs=("num2words",),
        note="As idefics3.",
        tokens=("<image>", "<fake_token_around_image>", "<global-img>", *_GRID_TAGS),
        named={
            "fake_image_token": "<fake_token_around_image>",
            "image_token": "<image>",
            "end_of_utterance_token": "<end_of_utterance>",
            "global_image_token": "<global-img>",
        },
        images={"size": {"longest_edge": 96}, "max_image_size": {"longest_edge": 32}},
        videos={"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 32}},
        processor={"image_seq_len": 4},
        config={"vision_config": _CLIP, "image_token_id": Token("<image>"), "scale_factor": 2},
    ),
    Record(
        "internvl",
        note="Resized, ignoring its aspect ratio, onto the grid of image_processor.size tiles "
        "whose aspect ratio is nearest (min_patches..max_patches), cut; a thumbnail comes last. "
        "Then pixel shuffle by config.downsample_ratio.",
        image="<IMG_CONTEXT>",
        video="<video>",
        named={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
        images={"size": {"height": 32, "width": 32}, "max_patches": 6},
        videos={"size": {"height": 32, "width": 32}},
        processor={"image_seq_length": 4},
        config={
            "vision_config": {"image_size": [32, 32], "patch_size": [8, 8]},
            "image_token_id": Token("<IMG_CONTEXT>"),
            "image_seq_length": 4,
            "downsample_ratio": 0.5,
        },
        begins=False,
    ),
    Record(
        "aya_vision",
        note="As internvl (got_ocr2's image processor), thumbnail last; a grid of img_size // "
        "(patch_size * downsample_factor) per tile.",
        tokens=(
            "<image>",
            "<|START_OF_IMG|>",
            "<|END_OF_IMG|>",
            "<|IMG_PATCH|>",
            "<|IMG_LINE_BREAK|>",
            "TILE",
            "TILE_GLOBAL",
        ),
        images={"size": {"height": 32, "width": 32}, "max_patches": 6},
        processor={"patch_size": 8, "img_size": 32, "downsample_factor": 2},
        config={
            "vision_config": _CLIP,
            "image_token_index": Token("<|IMG_PATCH|>"),
            "downsample_factor": 2,
            "alignment_intermediate_size": 32,
        },
    ),
    Record(
        "cohere2_vision",
        note="Resized, ignoring its aspect ratio, onto the grid of image_processor.size tiles "
        "that has to be scaled up least (or down least); cut. A thumbnail comes last where there "
        "is more than one tile. image_processor.patch_size is the side of a tile's grid of tokens, "
        "not px.",
        named={
            "image_token": "<|IMG_PATCH|>",
            "boi_token": "<|START_OF_IMG|>",
            "eoi_token": "<|END_OF_IMG|>",
            "img_line_break_token": "<|IMG_LINE_BREAK|>",
        },
        image="<|IMG_PATCH|>",
        images={"size": {"height": 32, "width": 32}, "max_patches": 6, "patch_size": 2},
        config={
            "vision_config": _CLIP,
            "image_token_id": Token("<|IMG_PATCH|>"),
            "downsample_factor": 2,
            "alignment_intermediate_size": 32,
        },
    ),
    Record(
        "ovis2",
        note="As internvl with crop_to_patches, but the grid by use_covering_area_grid, and the "
        "thumbnail comes first.",
        tokens=(
            "<image>",
            "<IMG_START>",
            "<IMG_ATOM>",
            "<IMG_GRID>",
            "<IMG_COL>",
            "<IMG_ROW>",
            "<IMG_END>",
        ),
        images={
            "size": {"height": 32, "width": 32},
            "crop_to_patches": True,
            "max_patches": 6,
        },
        processor={"image_seq_length": 16},
        config={
            "vision_config": _CLIP,
            "image_token_id": Token("<IMG_ATOM>"),
            "visual_indicator_token_ids": [
                Token(f"<IMG_{name}>") for name in ("START", "GRID", "COL", "ROW", "END")
            ],
        },
        begins=False,
    ),
    Record(
        "llava_next_video",
        note="Images as llava_next; frames of a video resized and cropped, pooled by "
        "config.spatial_pool_stride.",
        tokens=("<image>", "<video>"),
        images={
            "size": {"shortest_edge": 32},
            "crop_size": {"height": 32, "width": 32},
            "image_grid_pinpoints": _ANYRES,
        },
        videos={"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}},
        processor={
            "patch_size": 8,
            "vision_feature_select_strategy": "default",
            "num_additional_image_tokens": 1,
        },
        config={
            "vision_config": _CLIP,
            "image_token_index": Token("<image>"),
            "video_token_index": Token("<video>"),
            "image_grid_pinpoints": _ANYRES,
        },
    ),
    Record(
        "granite4_vision",
        note="As llava_next, each grid shrunk by processor.downsample_rate through window "
        "Q-Formers; several vision layers are injected.",
        tokens=("<image>",),
        images={
            "size": {"height": 32, "width": 32},
            "crop_size": {"height": 32, "width": 32},
            "image_grid_pinpoints": _ANYRES,
        },
        processor={
            "patch_size": 8,
            "vision_feature_select_strategy": "full",
            "downsample_rate": "1/2",
        },
        config={
            "vision_config": {**_CLIP, "hidden_size": 64},  # its Q-Formers have heads of 64
            "image_token_index": Token("<image>"),
            "image_grid_pinpoints": _ANYRES,
            "downsample_rate": "1/2",
            "deepstack_layer_map": [[0, 0]],
            "spatial_target_layers": [0, 0, 1, 1],
        },
    ),
    Record(
        "granite_docling",
        note="Resized, ignoring its aspect ratio, onto the grid of image_processor.size tiles "
        "(min_patches..max_patches) of nearest aspect ratio, cut; written as idefics3, a thumbnail "
        "last.",
        tokens=("<image>", "<fake_token_around_image>", "<global-img>", *_GRID_TAGS),
        images={"size": {"height": 72, "width": 72}, "max_patches": 6},
        processor={"image_seq_len": 9},
        config={
            "vision_config": {
                "image_size": 72,
                "patch_size": 12,
                "scale_factor": 2,
                "deepstack_visual_indexes": [0],
                "out_hidden_size": 32,
            },
            "image_token_id": Token("<image>"),
        },
    ),
    Record(
        "qianfan_ocr",
        note="As internvl; users write <image>, which the processor turns into its own tokens.",
        named={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
        },
        images={"size": {"height": 32, "width": 32}, "max_patches": 6},
        processor={"image_seq_length": 4},
        config={
            "vision_config": {"image_size": [32, 32], "patch_size": [8, 8]},
            "image_token_id": Token("<IMG_CONTEXT>"),
            "image_seq_length": 4,
        },
        begins=False,
    ),
)
