"""Types whose images all have one grid of a fixed size."""

from tests.helpers.families.family_record import Record, Token
from tests.helpers.families.other_calls import codes_to_images, images_to_codes, words_to_images

_SQUARE = {"height": 64, "width": 64}
_VIT = {"image_size": 64, "patch_size": 8}
_CLIP_CROP = {"size": {"shortest_edge": 64}, "crop_size": _SQUARE}
# The number of a code is written in letters, A for 0 to J for 9, and ends with Z.
_CHAMELEON_CODES = tuple(
    f"IMGIMG{''.join(chr(ord('A') + int(digit)) for digit in str(code))}Z" for code in range(64)
)
_EMU3_CODES = tuple(f"<|visual token {code:06d}|>" for code in range(64))
_JANUS_VQ = {
    "base_channels": 32,
    "latent_channels": 32,
    "num_patches": 8,
    "projection_dim": 32,
    "image_token_embed_dim": 32,
    "num_embeddings": 64,
    "channel_multiplier": [1, 1],
    "num_res_blocks": 1,
}

LAST_LAYER = "_tower.encoder.layers.1.self_attn"
"""The last layer of an image tower whose features are taken from the layer before."""
POOLING_HEAD = "head.attention"
"""The pooling head of SigLIP, whose output is not used."""

CHUNKED = "audio is split into chunks, each with the keys around it"

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
        idle=(POOLING_HEAD,),
        nested=True,
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
        idle=(POOLING_HEAD,),
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
        idle=(POOLING_HEAD,),
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
        idle=(LAST_LAYER,),
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
        idle=(LAST_LAYER,),
        alike=("videos",),
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
        idle=(POOLING_HEAD,),
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
        idle=(POOLING_HEAD,),
        nested=True,
        not_square={"*decoder.layers.*.self_attn": "the encoder's keys follow the decoder's"},
    ),
    Record(
        "janus",
        note="As deepseek_vl.",
        image="<image_placeholder>",
        named={
            "image_token": "<image_placeholder>",
            "boi_token": "<begin_of_image>",
            "eoi_token": "<end_of_image>",
        },
        images={"size": _SQUARE},
        processor={"num_image_tokens": 64},
        config={
            "vision_config": {**_VIT, "num_image_tokens": 64, "projection_dim": 32},
            "vq_config": _JANUS_VQ,
            "image_token_id": Token("<image_placeholder>"),
        },
        others=(images_to_codes, codes_to_images),
    ),
    Record(
        "chameleon",
        note="Shorter side resized to size.shortest_edge, centre crop of crop_size; a VQ-VAE turns "
        "each crop into image_seq_length codes, replaced in input_ids by the model.",
        tokens=("<racm3:break>", "<eoss>", *_CHAMELEON_CODES),
        named={"image_token": "<image>", "sep_token": "<sep>"},
        images=_CLIP_CROP,
        processor={"image_seq_length": 64},
        config={
            "vocabulary_map": {token: Token(token) for token in ("<image>", *_CHAMELEON_CODES)},
            "vq_config": {
                "resolution": 64,
                "base_channels": 32,
                "latent_channels": 32,
                "num_embeddings": len(_CHAMELEON_CODES),
                "channel_multiplier": [1, 1, 1, 1],
                "num_res_blocks": 1,
            },
        },
        template=False,
    ),
    Record(
        "florence2",
        note="Resized to image_processor.size ignoring its aspect ratio ; DaViT: a square "
        "of 32 px is a token, and the mean of all comes first.",
        named={"image_token": "<image>"},
        images={
            "size": {"height": 128, "width": 128},
            "do_center_crop": False,
            "image_seq_length": 17,
        },
        config={
            "vision_config": {
                "depths": [1, 1, 1, 1],
                "patch_size": [7, 3, 3, 3],
                "patch_stride": [4, 2, 2, 2],
                "patch_padding": [3, 1, 1, 1],
                "patch_prenorm": [False, True, True, True],
                "embed_dim": [16, 16, 16, 16],
                "num_heads": [2, 2, 2, 2],
                "num_groups": [2, 2, 2, 2],
                "window_size": 4,
                "projection_dim": 32,
            },
            "image_token_id": Token("<image>"),
        },
        template=False,
        image="",
        several=False,
    ),
    Record(
        "got_ocr2",
        note="Resized to image_processor.size ignoring its aspect ratio; with crop_to_patches "
        "tiled as internvl.",
        image="<img><imgpad></img>",
        tokens=("<|im_start|>", "<|im_end|>", "<img>", "</img>", "<imgpad>"),
        images={"size": _SQUARE},
        call={"num_image_tokens": 16},
        config={
            "vision_config": {
                "image_size": 64,
                "patch_size": 4,
                "output_channels": 16,
                "mlp_dim": 48,
                "window_size": 4,
                "global_attn_indexes": [1],
            },
            "image_token_index": Token("<imgpad>"),
            "image_seq_length": 16,
        },
        begins=False,
        template=False,
        several=False,
    ),
    Record(
        "fast_vlm",
        needs=("timm",),
        note="Longer side resized, padded to a square with the mean colour (llava's processor with "
        "do_pad); a FastViT of timm makes a grid of 1 / 64 of the side.",
        tokens=("<image>",),
        processor_class="LlavaProcessor",
        images={
            "@": "CLIPImageProcessor",
            "size": {"shortest_edge": 256},
            "crop_size": {"height": 256, "width": 256},
        },
        processor={
            "patch_size": 64,
            "vision_feature_select_strategy": "full",
            "num_additional_image_tokens": 0,
        },
        config={
            "vision_config": {
                "hidden_size": 64,
                "model_args": {
                    "inference_mode": True,
                    "layers": (1, 1, 1, 1, 1),
                    "embed_dims": (16, 16, 16, 32, 32),
                },
            },
            "image_token_index": Token("<image>"),
        },
        begins=False,
    ),
    Record(
        "gemma3n",
        needs=("timm",),
        note="Resized to image_processor.size ignoring its aspect ratio; a MobileNet of timm "
        "makes image_seq_length features of any size.",
        named={
            "image_token": "<image_soft_token>",
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
            "audio_token": "<audio_soft_token>",
            "boa_token": "<start_of_audio>",
            "eoa_token": "<end_of_audio>",
        },
        image="<image_soft_token>",
        sound="<audio_soft_token>",
        images={"size": _SQUARE},
        audio={"feature_size": 16},
        processor={"image_seq_length": 16, "audio_seq_length": 12},
        config={
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
                "vocab_size": 6,  # the named tokens, the first of which is that of images
                "vocab_offset": Token("<image_soft_token>"),
                "conf_attention_chunk_size": 4,
                "conf_attention_context_left": 5,
                "conf_reduction_factor": 1,
                "sscp_conv_channel_size": (8, 4),
            },
            "image_token_id": Token("<image_soft_token>"),
            "boi_token_id": Token("<start_of_image>"),
            "eoi_token_id": Token("<end_of_image>"),
            "audio_token_id": Token("<audio_soft_token>"),
            "boa_token_id": Token("<start_of_audio>"),
            "eoa_token_id": Token("<end_of_audio>"),
        },
        not_square={
            "model.vision_tower.*.attn": "a convolution makes fewer keys than queries",
            "model.audio_tower.*.attn": CHUNKED,
        },
    ),
    Record(
        "pp_chart2table",
        note="Resized to image_processor.size ignoring its aspect ratio; the chat template "
        "writes every image token itself.",
        image="<img>" + "<imgpad>" * 16 + "</img>",
        tokens=("<img>", "</img>", "<imgpad>"),
        images={"size": _SQUARE},
        config={
            "vision_config": {
                "image_size": 64,
                "patch_size": 4,
                "output_channels": 16,
                "window_size": 4,
                "global_attn_indexes": [1],
            },
            "image_token_index": Token("<imgpad>"),
            "image_seq_length": 16,
        },
        begins=False,
    ),
    Record(
        "emu3",
        note="Resized to multiples of spatial_factor between min_pixels and max_pixels, padded to "
        "the largest of the batch; codes of 8 by 8 px, a newline code ends each row. The size is "
        "written before them.",
        named={
            "image_token": "<image>",
            "boi_token": "<|image start|>",
            "eoi_token": "<|image end|>",
            "image_wrapper_token": "<|image token|>",
            "eof_token": "<|extra_201|>",
        },
        tokens=("<|extra_200|>", *_EMU3_CODES),
        images={"@": "Emu3ImageProcessor", "min_pixels": 48 * 48, "max_pixels": 64 * 64},
        config={
            "vocabulary_map": {
                token: Token(token) for token in ("<image>", "<|extra_200|>", *_EMU3_CODES)
            },
            "vq_config": {
                "base_channels": 32,
                "channel_multiplier": [1, 1, 1, 1],
                "num_res_blocks": 1,
                "attn_resolutions": [3],
                "codebook_size": len(_EMU3_CODES),
                "temporal_downsample_factor": 1,
                "num_attention_heads": 1,
            },
        },
        others=(words_to_images,),
    ),
    Record(
        "pi0",
        note="Each camera's image is resized, aspect ratio kept, into size.max_height and "
        "max_width and padded to pad_size; the image tokens precede the text.",
        image="",
        images={
            "size": {"max_height": 64, "max_width": 64},
            "pad_size": _SQUARE,
            "image_seq_length": 64,
        },
        processor={"state_mean": [0.0] * 32, "state_std": [1.0] * 32},
        config={
            "vlm_config": {
                "vision_config": {**_VIT, "projection_dim": 32},
                "text_config": {"num_image_tokens": 64},
                "image_token_id": Token("<image>"),
                "projection_dim": 32,
            },
            "chunk_size": 4,
            "max_state_dim": 32,
            "max_action_dim": 32,
        },
        beside={"state": [[0.5] * 32], "noise": [[[0.5] * 32] * 4], "timestep": [0.5]},
        template=False,
        begins=False,
        idle=("vlm.language_model.layers.1.self_attn",),
        nested=True,
        not_square={"*.self_attn": "actions attend to the cache of image and text"},
    ),
)
