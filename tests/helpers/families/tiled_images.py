"""Types whose processor cuts an image into tiles."""

from tests.helpers.families.family_record import Record, Token
from tests.helpers.families.fixed_grids import LAST_LAYER, POOLING_HEAD
from tests.helpers.families.other_calls import merged_in_tower

_ANYRES = [[32, 64], [64, 32], [64, 64], [96, 32], [32, 96]]  # height, width; px
_GRID_TAGS = tuple(f"<row_{row}_col_{col}>" for row in range(1, 7) for col in range(1, 7))
_CLIP = {"image_size": 32, "patch_size": 8}
_LFM_TAGS = tuple(f"<|img_row_{row}_col_{col}|>" for row in range(1, 5) for col in range(1, 5))
_MINICPM_NAMED = {
    "image_token": "<image>",
    "video_token": "<video>",
    "image_start_token": "<image_start>",
    "image_end_token": "<image_end>",
    "slice_start_token": "<slice>",
    "slice_end_token": "</slice>",
    "image_id_start_token": "<image_id>",
    "image_id_end_token": "</image_id>",
}

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
        idle=(LAST_LAYER,),
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
        alike=("videos",),
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
        nested=True,
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
        alike=("videos",),
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
        idle=(POOLING_HEAD,),
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
        idle=(LAST_LAYER,),
        alike=("videos",),
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
            "vision_feature_select_strategy": "default",
            "num_additional_image_tokens": 1,
            "downsample_rate": "2/4",
        },
        config={
            "vision_config": {**_CLIP, "hidden_size": 64},  # its Q-Formers have heads of 64
            "image_token_index": Token("<image>"),
            "image_grid_pinpoints": _ANYRES,
            "text_config": {"num_hidden_layers": 5},
            "downsample_rate": "2/4",
            "deepstack_layer_map": [[1, 0]],
            "spatial_target_layers": [1, 2, 3, 4],
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
            "text_config": {"attention_multiplier": 0.35},
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
    Record(
        "llama4",
        note="Resized with its aspect ratio kept, padded right and below onto the best grid of "
        "image_processor.size tiles (max_patches), cut; where there are several, a thumbnail "
        "resized ignoring its aspect ratio comes last.",
        image="<|image|>",
        tokens=(
            "<|image|>",
            "<|image_start|>",
            "<|image_end|>",
            "<|patch|>",
            "<|tile_x_separator|>",
            "<|tile_y_separator|>",
        ),
        images={"size": {"height": 32, "width": 32}, "max_patches": 4},
        processor={"patch_size": 8, "pixel_shuffle_ratio": 0.5},
        config={
            "vision_config": {
                **_CLIP,
                "pixel_shuffle_ratio": 0.5,
                "vision_output_dim": 32,
                "projector_input_dim": 32,
                "projector_output_dim": 32,
                "intermediate_size": 128,
            },
            "text_config": {
                "intermediate_size_mlp": 48,
                "num_local_experts": 2,
                "attention_chunk_size": 16,
            },
            "image_token_index": Token("<|patch|>"),
            "boi_token_index": Token("<|image_start|>"),
            "eoi_token_index": Token("<|image_end|>"),
        },
    ),
    Record(
        "lfm2_vl",
        note="A small image is resized to multiples of encoder_patch_size * downsample_factor "
        "(min_image_tokens..max_image_tokens); a large one (max_pixels_tolerance) onto a grid of "
        "tile_size tiles (min_tiles..max_tiles), cut, with a thumbnail resized so last.",
        tokens=("<|image_start|>", "<|image_end|>", "<|img_thumbnail|>", *_LFM_TAGS),
        named={"image_token": "<image>"},
        images={
            "min_image_tokens": 4,
            "max_image_tokens": 16,
            "encoder_patch_size": 8,
            "tile_size": 48,
            "max_tiles": 4,
            "max_pixels_tolerance": 2.3,
        },
        config={
            "vision_config": {"patch_size": 8, "num_patches": 16},
            "text_config": {
                "full_attn_idxs": [0],
                "layer_types": ["full_attention", "conv"],
                "block_multiple_of": 8,
            },
            "image_token_id": Token("<image>"),
            "projector_hidden_size": 32,
        },
        idle=(POOLING_HEAD,),
        nested=True,
    ),
    Record(
        "perception_lm",
        needs=("timm",),
        note="Resized, ignoring its aspect ratio, onto the best grid of tile_size tiles "
        "(max_num_tiles), cut; a thumbnail, resized likewise, comes first (vision_input_type).",
        named={"image_token": "<|image|>", "video_token": "<|video|>"},
        image="<|image|>",
        images={"tile_size": 32, "max_num_tiles": 4},
        videos={"size": {"height": 32, "width": 32}},
        processor={"patch_size": 8, "pooling_ratio": 2},
        config={
            "vision_config": {
                "architecture": "vit_pe_core_large_patch14_336",
                "do_pooling": True,
                "num_features": 32,
                "model_args": {
                    "embed_dim": 32,
                    "img_size": (32, 32),
                    "patch_size": 8,
                    "num_heads": 4,
                    "depth": 2,
                    "global_pool": "",
                    "use_post_transformer_norm": False,
                    "init_values": 0.1,
                    "ref_feat_shape": (4, 4),
                },
            },
            "projector_pooling_ratio": 2,
            "image_token_id": Token("<|image|>"),
            "video_token_id": Token("<|video|>"),
        },
        alike=("images", "videos"),
    ),
    Record(
        "deepseek_ocr2",
        note="Where larger than tile_size: resized, ignoring its aspect ratio, onto the grid "
        "of such tiles (min_patches..max_patches) of nearest aspect ratio, cut. The whole, padded "
        "to a square of size, comes after the tiles, then one separator token.",
        tokens=("<image>",),
        images={"size": {"height": 128, "width": 128}, "tile_size": 96},
        processor={"patch_size": 2, "downsample_ratio": 4},
        config={
            "vision_config": {
                "sam_config": {
                    "image_size": 128,
                    "patch_size": 2,
                    "output_channels": 16,
                    "window_size": 8,
                    "global_attn_indexes": [],  # 4,096 patches: a global layer takes seconds
                    "downsample_channels": [16, 32],
                },
            },
            "text_config": {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2},
            "image_token_id": Token("<image>"),
        },
    ),
    Record(
        "unlimited_ocr",
        note="As deepseek_ocr2, but the tiles are joined to one grid, and a newline token ends "
        "each of its rows and each row of the whole.",
        tokens=("<image>",),
        images={"size": {"height": 128, "width": 128}, "tile_size": 96, "max_patches": 4},
        processor={"patch_size": 8, "downsample_ratio": 4},
        config={
            "vision_config": {
                "sam_config": {
                    "image_size": 128,
                    "patch_size": 8,
                    "output_channels": 64,
                    "window_size": 4,
                    "global_attn_indexes": [1],
                    "downsample_channels": [64, 32],
                },
                "encoder_config": {"image_size": 16, "patch_size": 4},
            },
            "text_config": {
                "mlp_layer_types": ["dense", "sparse"],
                "layer_types": ["reference_sliding_attention", "reference_sliding_attention"],
            },
            "image_token_id": Token("<image>"),
        },
    ),
    *(
        Record(
            model_type,
            note="A small image is resized to about scale_resolution squared px; a larger one also "
            "cut into slices (max_slice_nums) after it, each resized, aspect ratio kept; tokens "
            "are four or sixteen patches (downsample_mode).",
            named=_MINICPM_NAMED,
            images={"scale_resolution": 96, "patch_size": 8, "max_slice_nums": 4},
            videos={"scale_resolution": 64, "patch_size": 8, "max_slice_nums": 1},
            config={
                "vision_config": {"image_size": 64, "patch_size": 8, "insert_layer_id": 0},
                "text_config": {
                    "linear_key_head_dim": 8,
                    "linear_value_head_dim": 8,
                    "linear_num_key_heads": 2,
                    "linear_num_value_heads": 4,
                    "head_dim": 16,
                    "layer_types": ["linear_attention", "full_attention"],
                },
                "insert_layer_id": 0,
                "image_size": 64,
                "patch_size": 8,
                "image_token_id": Token("<image>"),
                "video_token_id": Token("<video>"),
            },
            begins=False,
            others=others,
        )
        for model_type, others in (
            ("minicpm_ocr", (merged_in_tower,)),
            ("minicpmv4_6", ()),
            ("minicpmv4_7", ()),
        )
    ),
    Record(
        "molmo2",
        note="Overlapping crops of size with overlap_margins (max_crops) on a resized image, "
        "joined to one grid; the whole, resized ignoring its aspect ratio, comes first. Tokens "
        "pool pooling_size patches (image_token_pooling); <im_col> ends each row.",
        image="<|image|>",
        tokens=(
            *("<im_patch>", "<im_col>", "<im_start>", "<low_res_im_start>", "<im_end>", "<im_low>"),
            *("<frame_start>", "<frame_end>", "<|image|>", "<|video|>"),
        ),
        images={
            "size": {"height": 104, "width": 104},
            "patch_size": 8,
            "overlap_margins": [2, 1],
            "max_crops": 4,
        },
        videos={"size": {"height": 104, "width": 104}, "patch_size": 8},
        config={
            "vision_config": {
                "image_size": [104, 104],
                "patch_size": 8,
                "num_position_embeddings": 169,
            },
            "adapter_config": {"vision_feature_layer": [-1, -2], "text_hidden_size": 32},
            "text_config": {"rope_scaling_layers": None, "additional_vocab_size": 8},
            "image_start_token_id": Token("<im_start>"),
            "low_res_image_start_token_id": Token("<low_res_im_start>"),
            "image_end_token_id": Token("<im_end>"),
            "image_patch_id": Token("<im_patch>"),
            "image_col_id": Token("<im_col>"),
            "frame_start_token_id": Token("<frame_start>"),
            "frame_end_token_id": Token("<frame_end>"),
        },
    ),
    Record(
        "step3p7",
        note="Windows of patch_size px (or, of a small long image, of its shorter side) over an "
        "image snapped to their multiples, each resized; the whole, resized to size ignoring its "
        "aspect ratio, comes last.",
        image="<im_patch>",
        tokens=(
            "<im_patch>",
            "<im_start>",
            "<im_end>",
            "<patch_start>",
            "<patch_end>",
            "<patch_newline>",
        ),
        images={"size": {"height": 96, "width": 96}, "patch_size": 48, "vision_patch_size": 4},
        config={
            "vision_config": {"image_size": 96, "patch_size": 4},
            "text_config": {
                "mlp_layer_types": ["dense", "sparse"],
                "layer_types": ["sliding_attention", "full_attention"],
                "sliding_window": 6,
                "num_sliding_attention_heads": 4,
                "share_expert_dim": 16,
            },
            "image_token_id": Token("<im_patch>"),
        },
    ),
)
