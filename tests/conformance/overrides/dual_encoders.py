"""Dual encoders of image and text, which do not generate and are not in the mapping."""

from tests.conformance.overrides.record import Record

MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
CAPTION = {"prompt": "caption"}

DUAL_ENCODERS: dict[str, Record] = {
    "clip": Record(model_class="CLIPModel", **CAPTION),
    "siglip": Record(model_class="SiglipModel", **CAPTION),
    "siglip2": Record(model_class="Siglip2Model", pixels="padded_patches", **CAPTION),
    "align": Record(
        {
            "vision_config": {
                "image_size": 32,
                "width_coefficient": 0.1,
                "depth_coefficient": 0.1,
                "hidden_dim": 128,
            }
        },
        model_class="AlignModel",
        side=32,
        **CAPTION,
    ),
    "altclip": Record(model_class="AltCLIPModel", **CAPTION),
    "chinese_clip": Record(model_class="ChineseCLIPModel", **CAPTION),
    "metaclip_2": Record(model_class="MetaClip2Model", **CAPTION),
    "clipseg": Record(
        {"extract_layers": [0, 1], "reduce_dim": 16},
        model_class="CLIPSegForImageSegmentation",
        **CAPTION,
    ),
    "owlvit": Record(model_class="OwlViTForObjectDetection", **CAPTION),
    "owlv2": Record(model_class="Owlv2ForObjectDetection", **CAPTION),
    "groupvit": Record(
        {
            "vision_config": {
                "depths": [1, 1, 1],
                "num_group_tokens": [4, 2, 0],
                "num_output_groups": [4, 2, 0],
            },
            "projection_intermediate_dim": 32,
        },
        model_class="GroupViTModel",
        **CAPTION,
    ),
    "flava": Record(model_class="FlavaModel", **CAPTION),
    "bridgetower": Record(
        {
            "vision_config": {"hidden_size": 128},
            "hidden_size": 128,
            "text_config": {"hidden_size": 128},
        },
        model_class="BridgeTowerModel",
        **CAPTION,
    ),
    "vilt": Record(model_class="ViltModel", **CAPTION),
    "x_clip": Record(
        {"vision_config": {"num_frames": 2}},
        model_type="xclip",
        model_class="XCLIPModel",
        pixels="clips",
        even=("vision_model.encoder.layers.0.message_attn",),
        **CAPTION,
    ),
    "aimv2": Record(model_class="Aimv2Model", **CAPTION),
    "tipsv2": Record(model_class="Tipsv2Model", **CAPTION),
    "blip_itm": Record(model_type="blip", model_class="BlipForImageTextRetrieval", **CAPTION),
    "blip2_itm": Record(
        {"image_token_index": 8, "qformer_config": {"use_qformer_text_input": True}},
        model_type="blip-2",
        model_class="Blip2ForImageTextRetrieval",
        extras=("matching_head",),
        **CAPTION,
    ),
    "colpali": Record(model_class="ColPaliForRetrieval", image_token=8, tokens_per_image=16),
    "colqwen2": Record(
        {"vlm_config": {"text_config": {"rope_parameters": MROPE}}},
        model_class="ColQwen2ForRetrieval",
        pixels="packed_padded",
        image_token=8,
        tokens_per_image=(4, 8),
        extras=("image_types",),
    ),
    "modernvbert": Record(
        model_class="ModernVBertModel",
        pixels="nested",
        tokens_per_image=1,
        idle=("vision_model.head.attention",),
    ),
    "lxmert": Record(
        {"l_layers": 1, "x_layers": 1, "r_layers": 1, "visual_feat_dim": 12},
        model_class="LxmertModel",
        prompt="words_only",
        extras=("regions_and_places",),
    ),
    "visual_bert": Record(
        {"visual_embedding_dim": 12},
        model_class="VisualBertModel",
        prompt="words_only",
        extras=("regions",),
    ),
    "grounding_dino": Record(
        {
            "num_queries": 6,
            "backbone_config": {
                "image_size": 64,
                "embed_dim": 8,
                "depths": [1, 1, 1, 1],
                "num_heads": [2, 2, 4, 4],
                "window_size": 4,
            },
        },
        model_type="grounding-dino",
        model_class="GroundingDinoForObjectDetection",
        side=64,
        extras=("phrases",),
        **CAPTION,
    ),
    "vision_text_dual_encoder": Record(
        {"text_config": {"model_type": "bert"}, "vision_config": {"model_type": "vit"}},
        model_type="vision-text-dual-encoder",
        model_class="VisionTextDualEncoderModel",
        **CAPTION,
    ),
}
