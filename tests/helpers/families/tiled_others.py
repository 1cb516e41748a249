"""Types whose processor cuts an image into tiles, each in a different way."""

from tests.helpers.families.record import Record, Token

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
_CLIP = {"image_size": 32, "patch_size": 8}

RECORDS: tuple[Record, ...] = (
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
                "attention_chunk_size": 64,
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
        )
        for model_type in ("minicpm_ocr", "minicpmv4_6", "minicpmv4_7")
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
                "sliding_window": 128,
                "num_sliding_attention_heads": 4,
                "share_expert_dim": 16,
            },
            "image_token_id": Token("<im_patch>"),
        },
    ),
)
