"""Tiny random vision models of transformers, and their image processors."""

from __future__ import annotations

from typing import Any

from transformers import (
    CONFIG_MAPPING,
    MODEL_MAPPING,
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    PixtralImageProcessor,
    Siglip2ImageProcessor,
    ViTImageProcessor,
)

from tests.helpers.random_weights import randomize
from tests.helpers.tiny_configs import PATCH, SIDE, tiny_config
from xmodal_interp.models import VLM
from xmodal_interp.models.encoders import DUAL_ENCODERS, ENCODERS

SQUARE = [SIDE, SIDE]
OVERRIDES: dict[str, dict[str, Any]] = {
    "internvl_vision": {"image_size": SQUARE, "patch_size": [4, 4]},
    "qianfan_ocr_vision": {"image_size": SQUARE, "patch_size": [4, 4]},
    "yolos": {"image_size": SQUARE, "num_detection_tokens": 3},
    "mgp-str": {"image_size": SQUARE},
    "dinov3_vit": {"num_register_tokens": 2},
    "sapiens2": {"num_key_value_heads_per_layer": [4, 2]},
    "siglip2_vision_model": {"num_patches": 16},
    "siglip2": {"vision_config": {"num_patches": 16}},
}
BUILT = [name for name in (*ENCODERS, *DUAL_ENCODERS) if CONFIG_MAPPING[name] in MODEL_MAPPING]
"""The types that transformers builds by themselves or as the vision tower of a dual encoder."""
IN_DUAL_ENCODERS = {
    *("altclip_vision_model", "clipseg_vision_model", "flava_image_model"),
    *("metaclip_2_vision_model", "owlv2_vision_model", "owlvit_vision_model"),
}


def square_processor(side: int = SIDE) -> ViTImageProcessor:
    """Return an image processor that resizes every image to a square."""
    return ViTImageProcessor(size={"height": side, "width": side})


def vision_vlm(name: str) -> VLM:
    """Return a tiny random model of a type, with an image processor."""
    if name == "depth_anything":
        return _depth_anything()
    model: Any = MODEL_MAPPING[CONFIG_MAPPING[name]]
    model = model(tiny_config(CONFIG_MAPPING[name], OVERRIDES.get(name))).eval()
    randomize(model, 0)
    processor: Any = square_processor()
    if name in ("siglip2", "siglip2_vision_model"):
        processor = Siglip2ImageProcessor(patch_size=PATCH, max_num_patches=16)
    if name == "pixtral":
        processor = PixtralImageProcessor(patch_size=PATCH, size={"longest_edge": SIDE})
    return VLM(model, processor)


def registers_vlm(n_layers: int = 3, n_registers: int = 2) -> VLM:
    """Return a tiny DINOv2 with a class token, registers and 4 x 4 patches."""
    config = Dinov2WithRegistersConfig(
        hidden_size=32,
        num_hidden_layers=n_layers,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=PATCH,
        num_register_tokens=n_registers,
    )
    model = Dinov2WithRegistersModel(config).eval()
    randomize(model, 0)
    return VLM(model, square_processor())


def _depth_anything() -> VLM:
    """Return a depth model, whose backbone is a DINOv2."""
    backbone = Dinov2Config(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=PATCH,
        out_indices=[1, 2, 3, 4],
        reshape_hidden_states=False,
    )
    config = DepthAnythingConfig(
        backbone_config=backbone,
        patch_size=PATCH,
        reassemble_hidden_size=32,
        neck_hidden_sizes=[8] * 4,
        fusion_hidden_size=8,
        head_hidden_size=8,
    )
    model = DepthAnythingForDepthEstimation(config).eval()
    randomize(model, 0)
    return VLM(model, square_processor())
