"""Types whose image tokens are learned queries without rows and columns."""

from tests.helpers.families.family_record import Record, Token

_SQUARE = {"height": 64, "width": 64}
_VIT = {"image_size": 64, "patch_size": 8}
_QFORMER = {"encoder_hidden_size": 32, "cross_attention_frequency": 2}
_OPT = {"word_embed_proj_dim": 32}
_NOTE = "Resized to image_processor.size ignoring its aspect ratio; "

RECORDS: tuple[Record, ...] = (
    Record(
        "blip-2",
        note=_NOTE + "the Q-Former's queries are the image tokens, before the text.",
        image="",
        images={"size": _SQUARE},
        processor={"num_query_tokens": 8},
        config={
            "vision_config": _VIT,
            "qformer_config": _QFORMER,
            "text_config": _OPT,
            "num_query_tokens": 8,
            "image_token_index": Token("<image>"),
        },
        template=False,
        several=False,
    ),
    Record(
        "instructblip",
        note=_NOTE + "the Q-Former, which reads the question too, gives the image tokens.",
        image="",
        images={"size": _SQUARE},
        processor={"num_query_tokens": 8},
        config={
            "vision_config": _VIT,
            "qformer_config": _QFORMER,
            "text_config": _OPT,
            "num_query_tokens": 8,
            "image_token_index": Token("<image>"),
        },
        template=False,
        several=False,
    ),
    Record(
        "idefics2",
        note="Resized into size.shortest_edge..longest_edge with its aspect ratio kept, padded to "
        "the largest of the batch (pixel_attention_mask); a perceiver gives image_seq_len tokens. "
        "With do_image_splitting also its four quarters.",
        named={"image_token": "<image>", "image_boundary_token": "<fake_token_around_image>"},
        images={"size": {"shortest_edge": 48, "longest_edge": 96}},
        processor={"image_seq_len": 8},
        config={
            "vision_config": {"image_size": 96, "patch_size": 8},
            "perceiver_config": {
                "resampler_n_latents": 8,
                "resampler_depth": 2,
                "resampler_n_heads": 4,
                "resampler_head_dim": 8,
                "hidden_size": 32,
            },
            "image_token_id": Token("<image>"),
        },
    ),
    Record(
        "kosmos-2",
        note="Shorter side resized to size.shortest_edge, centre crop of crop_size; latent queries "
        "attend to the patches.",
        image="<image>",
        images={"size": {"shortest_edge": 64}, "crop_size": _SQUARE},
        processor={"num_patch_index_tokens": 16},
        call={"num_image_tokens": 8},
        processor_class="Kosmos2Processor",
        config={
            "vision_config": _VIT,
            "text_config": {"embed_dim": 32, "layers": 2},
            "latent_query_num": 8,
        },
        template=False,
        several=False,
    ),
    Record(
        "aria",
        note="Longer side resized to max_image_size, padded right and below (pixel_mask); with "
        "split_image also tiles. Queries attend to the patches, their number by "
        "processor.size_conversion.",
        named={"image_token": "<image>"},
        images={"max_image_size": 490},
        processor={"size_conversion": {490: 8}},
        call={"max_image_size": 490},
        config={
            "vision_config": {"image_size": 490, "patch_size": 70},
            "text_config": {"moe_num_experts": 4},
            "projector_patch_to_query_dict": {49: 8},
            "max_value_projector_patch_to_query_dict": 8,
            "image_token_index": Token("<image>"),
        },
    ),
    Record(
        "instructblipvideo",
        note=_NOTE + "frames of a video (video_processor), each with its own queries.",
        image="",
        videos={"size": _SQUARE},
        n_frames=4,
        processor={"num_query_tokens": 8},
        config={
            "vision_config": _VIT,
            "qformer_config": _QFORMER,
            "text_config": _OPT,
            "num_query_tokens": 8,
            "video_token_index": Token("<video>"),
        },
        template=False,
        several=False,
    ),
)
