"""One record per model type: where its image tokens are, and the rule that places them.

To add a family, write a record: its model type, where its configuration keeps the id of the image
tokens, and the geometry rule that they follow, or the reason why they have no place. Nothing else
in the package knows a model by name.
"""

from __future__ import annotations

from math import prod
from typing import Any

from xmodal_interp.errors import UnsupportedModelError
from xmodal_interp.models import geometry
from xmodal_interp.models.family import Family

_VIDEO = "video_token_id"
_QUERIES = (
    "Its image tokens are learned queries, each of which looks at all of the image: they have no "
    "row and column of their own."
)
_NO_RULE = "No rule has been written yet for what its image tokens are: {}."


_MERGED = (
    *("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe", "qwen4_exp"),
    *("qwen2_5_omni_thinker", "qwen3_omni_moe_thinker"),
    *("glm4v", "glm4v_moe", "glm46v", "glm_ocr", "glmga"),
    *("ernie4_5_vl_moe", "video_llama_3", "cohere_compass", "cosmos3_edge"),
    *("cosmos3_omni", "dots3_note", "exaone4_5", "hyperclovax_vision_v2", "lfm3_vl"),
    "minimax_m3_vl",
)

_SPLIT_SQUARES = geometry.SplitTiles(geometry.longest_edge, merge="scale_factor")
_BEST_CANVAS = geometry.SplitTiles(
    geometry.best_canvas, merge="downsample_ratio", class_token="first"
)
_SHUFFLED = geometry.SplitTiles(geometry.best_canvas, merge="downsample_factor")
_CROPS = geometry.SplitTiles(geometry.crops, merge="mm_tokens_per_image", thumbnail="first")
_FITTED = geometry.FixedGrid(show=geometry.fitted)

_RECORDS: tuple[Family, ...] = (
    # patches merged into blocks, the image's aspect kept
    *(
        Family(
            name,
            geometry=geometry.merged_patches,
            video=geometry.MergedFrames(in_model=name == "ernie4_5_vl_moe"),
            token_types=name == "cosmos3_edge",
            video_token=_VIDEO,
        )
        for name in _MERGED
    ),
    Family("glm5_next", geometry=geometry.MergedPatches(geometry.within_tokens)),
    Family("kimi_k25", geometry=geometry.MergedPatches(geometry.within_patches, by_rows=True)),
    *(
        Family(
            name,
            geometry=geometry.MergedPatches(by_rows=True),
            video=geometry.MergedFrames(by_rows=True),
            video_token=_VIDEO,
        )
        for name in ("muse_glimmer", "muse_spark")
    ),
    Family("paddleocr_vl", geometry=geometry.MergedPatches(by_rows=True)),
    Family("mistral3", geometry=geometry.sized_patches),
    Family("mistral_large4", geometry=geometry.sized_patches),
    Family("lighton_ocr", geometry=geometry.sized_patches),
    Family("gemma4", geometry=geometry.PositionedPatches()),
    Family("gemma4_unified", geometry=geometry.PositionedPatches(merged=True)),
    Family("diffusion_gemma", geometry=geometry.PositionedPatches()),
    # one grid for every image
    Family("llava", geometry=geometry.fixed_grid),
    Family("vipllava", geometry=geometry.fixed_grid),
    Family(
        "video_llava",
        geometry=geometry.fixed_grid,
        video=geometry.SingleFrames(before=1),
        video_token=_VIDEO,
        video_tower="video_tower",
    ),
    Family("paligemma", geometry=geometry.fixed_grid, in_front=True),
    Family("deepseek_vl", geometry=_FITTED),
    Family("deepseek_vl_hybrid", geometry=_FITTED),
    Family("janus", geometry=_FITTED),
    Family(
        "florence2",
        geometry=geometry.FixedGrid(
            cell=lambda config: prod(config.vision_config.patch_stride), before=1, shift=15.5 / 32
        ),
        in_front=True,
        flat_images=True,
    ),
    # tiles with a thumbnail
    Family("llava_next", geometry=geometry.anyres_tiles),
    Family(
        "llava_onevision",
        geometry=geometry.anyres_tiles,
        video=geometry.SingleFrames(merge=2, behind=1),
        video_token=_VIDEO,
    ),
    Family(
        "llava_next_video",
        geometry=geometry.anyres_tiles,
        video=geometry.SingleFrames(merge="spatial_pool_stride"),
        video_token=_VIDEO,
    ),
    Family("granite4_vision", geometry=geometry.anyres_tiles),
    Family("idefics3", geometry=_SPLIT_SQUARES),
    Family("smolvlm", geometry=_SPLIT_SQUARES),
    Family(
        "internvl",
        geometry=_BEST_CANVAS,
        video=geometry.SingleFrames(merge="downsample_ratio", class_token=True),
        in_order=True,
    ),
    Family("qianfan_ocr", geometry=_BEST_CANVAS, placeholder="image_placeholder_token"),
    Family("aya_vision", geometry=_SHUFFLED),
    Family("cohere2_vision", geometry=_SHUFFLED),
    Family(
        "got_ocr2",
        geometry=geometry.SplitTiles(geometry.best_canvas, merge=4, shift=1.5 / 4),
        flat_images=True,
    ),
    Family("gemma3", geometry=_CROPS),
    Family("t5gemma2", geometry=_CROPS),
    Family(
        "ovis2",
        geometry=geometry.SplitTiles(
            geometry.covering_canvas, merge="vision_config.hidden_stride", thumbnail="first"
        ),
    ),
    Family(
        "llama4",
        geometry=geometry.SplitTiles(
            geometry.padded_canvas, merge="vision_config.pixel_shuffle_ratio", class_token="last"
        ),
    ),
    Family(
        "perception_lm",
        geometry=geometry.SplitTiles(
            geometry.largest_canvas,
            merge="projector_pooling_ratio",
            thumbnail="first",
            class_token="first",
            class_token_if="vision_use_cls_token",
            thumbnail_of_one=True,
        ),
        video=geometry.SingleFrames(
            merge="projector_pooling_ratio", class_token="vision_use_cls_token"
        ),
        video_token=_VIDEO,
    ),
    # learned queries between tower and text
    *(
        Family(
            name,
            geometry=geometry.QueryTokens("num_query_tokens", class_token=True),
            in_front=True,
            reason=_QUERIES,
        )
        for name in ("blip-2", "instructblip")
    ),
    Family("idefics2", geometry=geometry.resampled_patches, reason=_QUERIES),
    # keys of a cross-attention
    Family("mllama", "image_token_index", geometry.aspect_ratio_tiles, in_sequence=False),
)

# What has no rule, and why.
_REASONS: dict[str, str] = {
    "aria": _QUERIES,
    "shieldgemma2": "Its processor writes the prompt itself, one for each policy.",
    "deepseek_ocr2": _QUERIES,
    "instructblipvideo": _QUERIES,
    "minicpm_ocr": _NO_RULE.format("slices of an image, each with an aspect of its own"),
    "minicpmv4_6": _NO_RULE.format("slices of an image, each with an aspect of its own"),
    "minicpmv4_7": _NO_RULE.format("slices of an image, each with an aspect of its own"),
    "molmo2": _NO_RULE.format("crops of an image that overlap"),
    "step3p7": _NO_RULE.format("windows of an image that are cut into crops"),
    "granite_docling": _NO_RULE.format("tiles of an image with fine and coarse features"),
    "unlimited_ocr": _NO_RULE.format("tiles of an image whose rows are interleaved"),
    "lfm2_vl": _NO_RULE.format("tiles of an image with a thumbnail of another shape"),
    "nemotron_h_omni": _NO_RULE.format("patches with a grid of its own"),
    "hunyuan_vl": _NO_RULE.format("rows of patches with begin, break and end tokens among them"),
    "inkling2": _NO_RULE.format("patches that a convolution joins"),
    "inkling_mm_model": _NO_RULE.format("patches that several layers join"),
    "gemma3n": _NO_RULE.format("features of a convolutional tower, whose grid no setting tells"),
    "fast_vlm": _NO_RULE.format("features of a convolutional tower"),
    "chameleon": _NO_RULE.format("codes of a VQ-VAE, which stand in the vocabulary"),
    "emu3": _NO_RULE.format("codes of a VQ-VAE, which stand in the vocabulary"),
    "fuyu": _NO_RULE.format("patches that are projected without a vision tower"),
    "pi0": _NO_RULE.format("images of several cameras, read beside the robot's state"),
    "pp_chart2table": _NO_RULE.format("a page that is padded by the processor"),
}

# Images are not among the tokens of the prompt.
_NOT_PLACEHOLDERS: dict[str, str] = {
    "blip": "Its text decoder reaches the patches by cross-attention; prompts have no image token.",
    "evolla": "It reads proteins, and reaches them by cross-attention: there is no image.",
    "git": "The model puts the patches before the text in its forward pass: its positions are more "
    "than the ids that it is given.",
    "idefics": "Its text reaches the images by cross-attention; a prompt has a mark for each only.",
    "kosmos-2": _QUERIES + " Their ids are those of ordinary words; a mask tells where they stand.",
    "kosmos-2.5": _QUERIES + " A mask tells where they stand in the sequence.",
    "mistral4": "It reads text only.",
    "pix2struct": "Its text decoder reaches the patches by cross-attention; any question is "
    "drawn into the picture.",
    "pp_formulanet": "Its text decoder reaches the features of the picture by cross-attention.",
    "udop": "It joins the patches to the words that a reader found on the page, by their boxes.",
    "vision-encoder-decoder": "Its decoder reaches by cross-attention what the encoder makes of "
    "the picture, and that may be any model.",
}

_RECORDS = (
    *_RECORDS,
    *(Family(name, reason=reason) for name, reason in _REASONS.items()),
    *(
        Family(name, image_token=None, in_front=True, reason=reason)
        for name, reason in _NOT_PLACEHOLDERS.items()
    ),
)

FAMILIES: dict[str, Family] = {family.model_type: family for family in _RECORDS}


def family_of(config: Any) -> Family:
    """The record of a model's type.

    Raises:
        UnsupportedModelError: There is none, or the model reads text only.
    """
    model_type = getattr(config, "model_type", None)
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    if getattr(config, "vision_config", None) is None:
        raise UnsupportedModelError(
            f"A vision-language model has a vision_config. The model type {model_type!r} has none: "
            "it reads text only. "
            "Record its attention with xi.record(model), or load one of the "
            f"{len(FAMILIES)} types in xmodal_interp.models.FAMILIES."
        )
    raise UnsupportedModelError(
        f"Labelling tokens needs a family record. There is none for the model type {model_type!r}; "
        f"the {len(FAMILIES)} that are known are in xmodal_interp.models.FAMILIES. "
        "Write one (xmodal_interp.models.Family) and pass it as VLM(model, processor, family=...), "
        "or record the bare "
        "attention with xi.record(model)."
    )
