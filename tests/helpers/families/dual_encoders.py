"""Dual encoders of image and text, which do not generate and are not in transformers' mapping."""

from typing import Any

from tests.helpers.families.family_record import Record

MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
_SHORT, _LONG = list(range(70, 75)), list(range(81, 89))
PROMPTS: dict[str, Any] = {  # padded on the left, for decoders
    "input_ids": [[0] * 3 + _SHORT, _LONG],
    "attention_mask": [[0] * 3 + [1] * 5, [1] * 8],
}
CAPTIONS: dict[str, Any] = {  # padded on the right, for text encoders
    "input_ids": [_SHORT + [0] * 3, _LONG],
    "attention_mask": [[1] * 5 + [0] * 3, [1] * 8],
}
PIXELS: dict[str, Any] = {"pixel_values": (2, 3, 16, 16)}


def _with_images(*n_tokens: int) -> dict[str, Any]:
    """Return two prompts that contain 8, the id of image tokens, so many times."""
    rows = [
        [*_SHORT[:2], *[8] * n, *words]
        for n, words in zip(n_tokens, (_SHORT[2:3], _LONG[:5]), strict=True)
    ]
    gaps = [max(map(len, rows)) - len(row) for row in rows]
    return {
        "input_ids": [[0] * gap + row for gap, row in zip(gaps, rows, strict=True)],
        "attention_mask": [[0] * gap + [1] * len(row) for gap, row in zip(gaps, rows, strict=True)],
    }


RECORDS: tuple[Record, ...] = (
    *(
        Record(name, model_class=model_class, given=CAPTIONS | PIXELS)
        for name, model_class in (
            ("clip", "CLIPModel"),
            ("siglip", "SiglipModel"),
            ("altclip", "AltCLIPModel"),
            ("chinese_clip", "ChineseCLIPModel"),
            ("metaclip_2", "MetaClip2Model"),
            ("owlvit", "OwlViTForObjectDetection"),
            ("owlv2", "Owlv2ForObjectDetection"),
            ("flava", "FlavaModel"),
            ("vilt", "ViltModel"),
            ("aimv2", "Aimv2Model"),
            ("tipsv2", "Tipsv2Model"),
        )
    ),
    Record(
        "siglip2",
        model_class="Siglip2Model",
        given={
            **CAPTIONS,
            "pixel_values": (2, 16, 48),
            "pixel_attention_mask": [[1] * 16, [1] * 8 + [0] * 8],
            "spatial_shapes": [[4, 4], [2, 4]],
        },
    ),
    Record(
        "align",
        model_class="AlignModel",
        config={
            "vision_config": {
                "image_size": 32,
                "width_coefficient": 0.1,
                "depth_coefficient": 0.1,
                "hidden_dim": 128,
            }
        },
        given={**CAPTIONS, "pixel_values": (2, 3, 32, 32)},
    ),
    Record(
        "clipseg",
        model_class="CLIPSegForImageSegmentation",
        config={"extract_layers": [0, 1], "reduce_dim": 16},
        given=CAPTIONS | PIXELS,
    ),
    Record(
        "groupvit",
        model_class="GroupViTModel",
        config={
            "vision_config": {
                "depths": [1, 1, 1],
                "num_group_tokens": [4, 2, 0],
                "num_output_groups": [4, 2, 0],
            },
            "projection_intermediate_dim": 32,
        },
        given=CAPTIONS | PIXELS,
    ),
    Record(
        "bridgetower",
        model_class="BridgeTowerModel",
        config={
            "vision_config": {"hidden_size": 128},
            "hidden_size": 128,
            "text_config": {"hidden_size": 128},
        },
        given=CAPTIONS | PIXELS,
    ),
    Record(
        "x_clip",
        config_type="xclip",
        model_class="XCLIPModel",
        config={"vision_config": {"num_frames": 2}},
        given={**CAPTIONS, "pixel_values": (2, 2, 3, 16, 16)},
        even=("vision_model.encoder.layers.0.message_attn",),
    ),
    Record(
        "blip_itm",
        config_type="blip",
        model_class="BlipForImageTextRetrieval",
        given=CAPTIONS | PIXELS,
    ),
    Record(
        "blip2_itm",
        config_type="blip-2",
        model_class="Blip2ForImageTextRetrieval",
        config={"image_token_index": 8, "qformer_config": {"use_qformer_text_input": True}},
        given={**CAPTIONS, **PIXELS, "use_image_text_matching_head": True},
    ),
    Record("colpali", model_class="ColPaliForRetrieval", given=_with_images(16, 16) | PIXELS),
    Record(
        "colqwen2",
        model_class="ColQwen2ForRetrieval",
        config={"vlm_config": {"text_config": {"rope_parameters": MROPE}}},
        given={
            **_with_images(4, 8),
            "mm_token_type_ids": [
                [int(token == 8) for token in row] for row in _with_images(4, 8)["input_ids"]
            ],
            "pixel_values": (2, 32, 96),
            "image_grid_thw": [[1, 4, 4], [1, 4, 8]],
        },
    ),
    Record(
        "modernvbert",
        model_class="ModernVBertModel",
        given={**_with_images(1, 1), "pixel_values": (2, 1, 3, 16, 16)},
        idle=("vision_model.head.attention",),
    ),
    Record(
        "lxmert",
        model_class="LxmertModel",
        config={"l_layers": 1, "x_layers": 1, "r_layers": 1, "visual_feat_dim": 12},
        given={**PROMPTS, "visual_feats": (2, 5, 12), "visual_pos": (2, 5, 4)},
    ),
    Record(
        "visual_bert",
        model_class="VisualBertModel",
        config={"visual_embedding_dim": 12},
        given={**PROMPTS, "visual_embeds": (2, 5, 12)},
    ),
    Record(
        "grounding_dino",
        config_type="grounding-dino",
        model_class="GroundingDinoForObjectDetection",
        config={
            "num_queries": 6,
            "backbone_config": {
                "image_size": 64,
                "embed_dim": 8,
                "depths": [1, 1, 1, 1],
                "num_heads": [2, 2, 4, 4],
                "window_size": 4,
            },
        },
        given={
            "input_ids": [[101, *_SHORT[:3], 102, 0, 0, 0], [101, *_LONG[:3], 102, *_LONG[3:6]]],
            "attention_mask": CAPTIONS["attention_mask"],
            "pixel_values": (2, 3, 64, 64),
        },
        not_square={"*.fusion_layer.attn": "image and text attend to each other in one module"},
    ),
    Record(
        "vision_text_dual_encoder",
        config_type="vision-text-dual-encoder",
        model_class="VisionTextDualEncoderModel",
        config={"text_config": {"model_type": "bert"}, "vision_config": {"model_type": "vit"}},
        given=CAPTIONS | PIXELS,
    ),
)
