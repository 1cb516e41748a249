"""Vision encoders: the rule that places the positions of each type, or why a type has none.

The rules are those of models without a language model (:func:`encoder_of`) and of the encoders of
encoder-decoder models. A type has a rule if its self-attention layers all read one position per
patch of the image, besides tokens with names. To add a type, add its rule to ``ENCODERS``; most are
a :class:`~xmodal_interp.models.geometry.PatchTokens`, such as ``PatchTokens(before={"class": 1})``.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from xmodal_interp.models import geometry
from xmodal_interp.models.geometry import ImageRule, PatchTokens

_PATCHES_ONLY = PatchTokens()
_CLASS = PatchTokens(before={"class": 1})
_REGISTERS = PatchTokens(before={"class": 1, "register": "num_register_tokens"})

ENCODERS: dict[str, ImageRule] = {
    **dict.fromkeys(
        (
            *("altclip_vision_model", "beit", "chinese_clip_vision_model", "clip_vision_model"),
            *("clipseg_vision_model", "data2vec-vision", "dinov2", "dpt", "flava_image_model"),
            *("internvl_vision", "metaclip_2_vision_model", "mgp-str", "mlcd"),
            *("mlcd_vision_model", "owlv2_vision_model", "owlvit_vision_model"),
            *("qianfan_ocr_vision", "vit", "vit_msn"),
        ),
        _CLASS,
    ),
    **dict.fromkeys(
        ("aimv2_vision_model", "ijepa", "siglip_vision_model", "vitdet", "vitpose_backbone"),
        _PATCHES_ONLY,
    ),
    **dict.fromkeys(
        ("dinov2_with_registers", "dinov3_vit", "sapiens2", "tipsv2_vision_model"), _REGISTERS
    ),
    "deit": PatchTokens(before={"class": 1, "distillation": 1}),
    "pixio": PatchTokens(before={"class": "n_cls_tokens"}),
    "radio": PatchTokens(before={"class": "num_cls_tokens", "register": "num_registers"}),
    "yolos": PatchTokens(before={"class": 1}, after={"detection": "num_detection_tokens"}),
    "siglip2_vision_model": geometry.spatial_patches,
    "pixtral": geometry.sized_patches,
}
"""The rule of each model type whose vision encoder has one position per patch."""

_CONVOLUTIONS = "it has no softmax attention over patches, only convolutions"
_STAGES = "its layers read windows or stages of different sizes, not one position per patch"
_FEATURES = "its attention reads features of a convolutional backbone, not patches of the image"
_VIDEOS = "it reads videos"
_WITH_TEXT = "it reads image and text in one sequence"
_PAIRS = "it reads pairs of images, or keypoints"

REFUSED: dict[str, str] = {
    **dict.fromkeys(
        (
            *("bit", "convnext", "convnextv2", "dinov3_convnext", "edgetam", "efficientnet"),
            *("focalnet", "mobilenet_v1", "mobilenet_v2", "mobilevitv2", "poolformer"),
            *("pp_lcnet", "pp_ocrv5_mobile_det", "pp_ocrv5_server_det", "pp_ocrv6_medium_det"),
            *("pp_ocrv6_small_det", "regnet", "resnet", "superpoint", "swiftformer", "textnet"),
            *("align", "uvdoc"),
        ),
        _CONVOLUTIONS,
    ),
    **dict.fromkeys(
        (
            *("cvt", "depth_pro", "dinat", "donut-swin", "glpn", "groupvit", "hiera", "levit"),
            *("lw_detr", "mask2former", "maskformer", "mobilevit", "nougat", "oneformer"),
            *("pvt", "pvt_v2", "rf_detr", "sam", "sam2", "sam2_video", "sam3", "sam3_lite_text"),
            *("sam3_tracker", "sam3_tracker_video", "sam3_video", "sam_hq", "segformer"),
            *("slanext", "swin", "swin2sr", "swinv2"),
        ),
        _STAGES,
    ),
    **dict.fromkeys(
        (
            *("conditional_detr", "d_fine", "dab-detr", "deformable_detr", "deimv2", "detr"),
            *("pp_doclayout_v2", "pp_doclayout_v3", "pp_doclayout_v4", "pp_ocrv5_mobile_rec"),
            *("pp_ocrv5_server_rec", "pp_ocrv6_small_rec", "pp_ocrv6_tiny_rec", "rt_detr"),
            *("rt_detr_v2", "slanet", "table-transformer"),
        ),
        _FEATURES,
    ),
    **dict.fromkeys(("timesformer", "tvp", "videomae", "vivit", "xclip"), _VIDEOS),
    **dict.fromkeys(
        (
            *("bridgetower", "grounding-dino", "layoutlmv2", "layoutlmv3", "layoutxlm"),
            *("mm-grounding-dino", "omdet-turbo", "vilt"),
        ),
        _WITH_TEXT,
    ),
    **dict.fromkeys(("efficientloftr", "lightglue", "superglue"), _PAIRS),
    **dict.fromkeys(("eomt", "eomt_dinov3"), "its last layers read query tokens besides patches"),
    "imagegpt": "it reads colours of single pixels as text tokens",
    "perceiver": "learned queries read the image; there is no self-attention over patches",
    "seggpt": "it reads an example and its mask besides the image",
    "timm_wrapper": "the patches of a timm model are not in its configuration",
    "trocr": "it is a text decoder",
    "vit_mae": "it drops and shuffles random patches",
    "vitpose": "its processor crops the image to boxes of persons",
}
"""Why a type with an image processor has no rule. All of them can be recorded."""


DUAL_ENCODERS: tuple[str, ...] = (
    *("aimv2", "altclip", "chinese_clip", "clip", "clipseg", "flava", "metaclip_2", "owlv2"),
    *("owlvit", "siglip", "siglip2", "tipsv2", "vision-text-dual-encoder"),
)
"""Types with a text tower and a vision tower, which do not attend to each other."""


def encoder_of(config: Any) -> Any:
    """Return the configuration of a vision encoder with a rule, or None.

    It is the configuration itself, that of the backbone, or that of the vision tower of a dual
    encoder.
    """
    model_type = getattr(config, "model_type", None)
    if model_type in REFUSED:
        return None
    names = ["backbone_config"]
    if model_type in DUAL_ENCODERS:
        names = ["vision_config", "image_config"]
    parts = (config, *(getattr(config, name, None) for name in names))
    return next((part for part in parts if getattr(part, "model_type", None) in ENCODERS), None)


def encoder_in(model: Any) -> Any:
    """Return the vision tower of a dual encoder, which reads images without text.

    Any other model is returned unchanged.
    """
    if model.config.model_type not in DUAL_ENCODERS:
        return model
    wanted = encoder_of(model.config).model_type
    return next((each for each in model.modules() if _is_encoder(each, wanted)), model)


def _is_encoder(module: nn.Module, model_type: str) -> bool:
    return isinstance(module, PreTrainedModel) and module.config.model_type == model_type
