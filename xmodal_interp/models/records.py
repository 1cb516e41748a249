"""One record per model type: where its image tokens are, and the rule that places them.

To add a family, write a record: its model type, where its configuration keeps the id of the image
tokens, and the geometry rule that they follow, or the reason why they have no place. Nothing else
in the package knows a model by name.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from xmodal_interp.errors import UnsupportedModelError
from xmodal_interp.models import geometry
from xmodal_interp.models.family import Family

_VIDEO = "video_token_id"


_MERGED = (
    *("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe", "qwen4_exp"),
    *("qwen2_5_omni_thinker", "qwen3_omni_moe_thinker"),
    *("glm4v", "glm4v_moe", "glm46v", "glm5_next", "glm_ocr", "glmga"),
    *("ernie4_5_vl_moe", "paddleocr_vl", "video_llama_3", "cohere_compass", "cosmos3_edge"),
    *("cosmos3_omni", "dots3_note", "exaone4_5", "hyperclovax_vision_v2", "kimi_k25", "lfm3_vl"),
    *("minimax_m3_vl", "muse_glimmer", "muse_spark"),
)

_RECORDS: tuple[Family, ...] = (
    *(Family(name, geometry=geometry.merged_patches, video_token=_VIDEO) for name in _MERGED),
    Family("llava", geometry=geometry.fixed_grid),
    Family("vipllava", geometry=geometry.fixed_grid),
    Family("llava_next", geometry=geometry.anyres_tiles),
    Family("llava_onevision", geometry=geometry.anyres_tiles, video_token=_VIDEO),
    Family("llava_next_video", geometry=geometry.anyres_tiles, video_token=_VIDEO),
    *(
        Family(
            name,
            geometry=partial(
                geometry.split_tiles, layout=geometry.longest_edge, merge="scale_factor"
            ),
        )
        for name in ("idefics3", "smolvlm")
    ),
    *(
        Family(
            name,
            geometry=partial(
                geometry.split_tiles,
                layout=geometry.best_canvas,
                merge="downsample_ratio",
                class_token="first",
            ),
            video_token=video,
        )
        for name, video in (("internvl", "image_token_id"), ("qianfan_ocr", None))
    ),
    *(
        Family(
            name,
            geometry=partial(
                geometry.split_tiles, layout=geometry.best_canvas, merge="downsample_factor"
            ),
        )
        for name in ("aya_vision", "cohere2_vision")
    ),
    Family(
        "ovis2",
        geometry=partial(
            geometry.split_tiles,
            layout=geometry.covering_canvas,
            merge="vision_config.hidden_stride",
            thumbnail="first",
        ),
    ),
    Family(
        "llama4",
        geometry=partial(
            geometry.split_tiles,
            layout=geometry.padded_canvas,
            merge="vision_config.pixel_shuffle_ratio",
            class_token="last",
        ),
    ),
    Family(
        "got_ocr2", geometry=partial(geometry.split_tiles, layout=geometry.best_canvas, merge=4)
    ),
    *(
        Family(
            name,
            geometry=partial(
                geometry.split_tiles,
                layout=geometry.crops,
                merge="mm_tokens_per_image",
                thumbnail="first",
            ),
        )
        for name in ("gemma3", "shieldgemma2")
    ),
    Family(
        "perception_lm",
        geometry=partial(
            geometry.split_tiles,
            layout=geometry.largest_canvas,
            merge="projector_pooling_ratio",
            thumbnail="first",
            thumbnail_of_one=True,
        ),
    ),
    Family("paligemma", geometry=geometry.fixed_grid, in_front=True),
    Family("mllama", "image_token_index", geometry.aspect_ratio_tiles, in_sequence=False),
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
    known = ", ".join(sorted(FAMILIES))
    if getattr(config, "vision_config", None) is None:
        raise UnsupportedModelError(
            f"A vision-language model has a vision_config. The model type {model_type!r} has none: "
            "it reads text only. "
            f"Record its attention with xi.record(model), or load one of: {known}."
        )
    raise UnsupportedModelError(
        f"Labelling tokens needs a family record. There is none for the model type {model_type!r}; "
        f"known are {known}. "
        "Write one (xmodal_interp.models.Family) and pass it as VLM(model, processor, family=...), "
        "or record the bare "
        "attention with xi.record(model)."
    )
