"""One record per model type: its image tokens, and the geometry rule that places them.

To add a family, write a record: the model type, the configuration attribute that holds the id of
the image tokens, and their geometry rule, or the reason why they are on no grid. No code outside
``models/`` and ``shapes/`` branches on a model type.

Records of the types whose image tokens are not identified by an id in the prompt.

Either text attends to images by cross-attention, or the model inserts image features at positions
that no token id marks.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from typing import Any

from transformers import MODEL_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from xmodal_interp.errors import UnsupportedModelError
from xmodal_interp.models import geometry
from xmodal_interp.models.family import Family

QUERIES = (
    "Its image tokens are learned queries, each of which attends to the whole image, so they have "
    "no row and column; xi.on_patches maps their values to the patches that they attend to."
)
"""The reason given for families whose image tokens are learned queries."""

_HEADED = geometry.FixedGrid(before=1, tower_before=1)  # a class token before the patches
_ENCODERS: dict[str, geometry.Rule] = {
    **dict.fromkeys(("vit", "beit", "dinov2"), _HEADED),
    "deit": geometry.FixedGrid(before=2, tower_before=2),  # class and distillation tokens
    **dict.fromkeys(
        ("swin", "donut-swin"),
        geometry.FixedGrid(
            cell=lambda config, *_: (
                config.encoder.patch_size * 2 ** (len(config.encoder.depths) - 1)
            ),
            show=geometry.framed,
            tower_before=None,
        ),
    ),
}

BESIDE: tuple[Family, ...] = (
    # keys of a cross-attention
    Family("mllama", "image_token_index", geometry.aspect_ratio_tiles, in_sequence=False),
    Family("blip", None, _HEADED, in_sequence=False, in_front=True, rewritten=True),
    Family(
        "idefics",
        None,
        geometry.Chosen(
            lambda config: config.use_resampler,
            {
                False: _HEADED,
                True: geometry.QueryTokens(
                    "perceiver_config.resampler_n_latents", class_token=True, reason=QUERIES
                ),
            },
        ),
        in_sequence=False,
        placeholder=None,
        image_mark="<image>",
        in_front=True,
    ),
    Family("pix2struct", None, geometry.FlattenedPatches(), in_sequence=False, in_front=True),
    Family(
        "pp_formulanet",
        None,
        geometry.FixedGrid(
            cell=lambda config, *_: config.vision_config.patch_size * 4,
            show=geometry.framed,
            shift=1.5 / 4,
            tower_before=None,
        ),
        in_sequence=False,
        reads_text=False,
    ),
    Family(
        "vision-encoder-decoder",
        None,
        geometry.Chosen(
            lambda config: config.encoder.model_type,
            _ENCODERS,
            "There is no geometry rule for an encoder of the type {!r}.",
        ),
        in_sequence=False,
        reads_text=False,
    ),
    # image tokens that no id marks
    Family("git", None, _HEADED, prepended=True, in_front=True),
    Family(
        "kosmos-2",
        None,
        geometry.QueryTokens("latent_query_num", class_token=True),
        placeholder=None,
        image_mask="image_embeds_position_mask",
        in_front=True,
        reason=QUERIES,
    ),
    Family(
        "kosmos-2.5",
        None,
        geometry.FlattenedPatches("latent_query_num"),
        placeholder=None,
        image_mask="image_embeds_position_mask",
        in_front=True,
        reason=QUERIES,
    ),
)


_VIDEO = "video_token_id"

_MERGED = (
    *("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe", "qwen4_exp"),
    *("qwen2_5_omni_thinker", "qwen3_omni_moe_thinker"),
    *("glm4v", "glm4v_moe", "glm46v", "glm_ocr", "glmga"),
    *("ernie4_5_vl_moe", "video_llama_3", "cohere_compass", "cosmos3_edge"),
    *("cosmos3_omni", "dots3_note", "exaone4_5", "hyperclovax_vision_v2", "lfm3_vl"),
    "minimax_m3_vl",
)

_SPLIT_SQUARES = geometry.SplitTiles(geometry.longest_edge, merge="scale_factor")
_SQUEEZED = geometry.SingleFrames(merge="scale_factor", show=geometry.squeezed)
_BEST_CANVAS = geometry.SplitTiles(
    geometry.best_canvas, merge="downsample_ratio", class_token="first"
)
_SHUFFLED = geometry.SplitTiles(geometry.best_canvas, merge="downsample_factor")
_CROPS = geometry.SplitTiles(geometry.crops, merge="mm_tokens_per_image", thumbnail="first")
_SLICES = geometry.SizedTiles(
    geometry.slices, sizes="target_sizes", block=geometry.slice_block, thumbnail="first"
)
_PLACED = geometry.PositionedPatches()
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
    Family(
        "glm5_next",
        geometry=geometry.MergedPatches(geometry.within_tokens),
        video=geometry.MergedFrames(content=geometry.within_video_tokens),
        video_token=_VIDEO,
    ),
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
    Family("hunyuan_vl", geometry=geometry.MergedPatches(by_rows=True, framed=True)),
    Family("nemotron_h_omni", geometry=geometry.counted_patches),
    Family("paddleocr_vl", geometry=geometry.MergedPatches(by_rows=True)),
    Family("mistral3", geometry=geometry.sized_patches),
    Family("mistral_large4", geometry=geometry.sized_patches),
    Family("lighton_ocr", geometry=geometry.sized_patches),
    Family("gemma4", geometry=_PLACED, video=geometry.PositionedFrames(), video_token=_VIDEO),
    Family(
        "gemma4_unified",
        geometry=geometry.PositionedPatches(merged=True),
        video=geometry.PositionedFrames(merged=True),
        video_token=_VIDEO,
    ),
    Family("diffusion_gemma", geometry=_PLACED),
    # squares of pixels, the last of them padded
    Family("fuyu", geometry=geometry.PaddedSquares("patch_size", geometry.shrunk), in_front=True),
    Family("inkling2", geometry=geometry.PaddedSquares(merged=True)),
    Family(
        "inkling_mm_model",
        geometry=geometry.PaddedSquares(resized=geometry.scaled, spare_column=True),
    ),
    # features or codes computed by convolutions
    Family("chameleon", "vocabulary_map.<image>", geometry=geometry.code_grid),
    Family("emu3", "vocabulary_map.<image>", geometry=geometry.code_rows),
    Family("gemma3n", geometry=geometry.fused_stages),
    Family("fast_vlm", geometry=geometry.FixedGrid(shift=31.5 / 64)),
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
    Family(
        "pi0",
        "vlm_config.image_token_id",
        geometry=geometry.FixedGrid(show=geometry.at_the_top),
        in_front=True,
    ),
    Family("deepseek_vl", geometry=_FITTED),
    Family("deepseek_vl_hybrid", geometry=_FITTED),
    Family("janus", geometry=_FITTED),
    Family(
        "florence2",
        geometry=geometry.FixedGrid(
            cell=lambda config, _processor: prod(config.vision_config.patch_stride),
            before=1,
            shift=15.5 / 32,
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
    Family("smolvlm", geometry=_SPLIT_SQUARES, video=_SQUEEZED),
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
    Family(
        "pp_chart2table",
        geometry=geometry.SplitTiles(geometry.best_canvas, merge=4, shift=1.5 / 4),
    ),
    Family("gemma3", geometry=_CROPS),
    Family("t5gemma2", geometry=_CROPS),
    Family("shieldgemma2", geometry=_CROPS, writes_prompt=True),
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
    Family(
        "granite_docling",
        geometry=geometry.SplitTiles(
            geometry.page_canvas, merge="vision_config.scale_factor", halved_with="tile_fine_mask"
        ),
    ),
    Family(
        "lfm2_vl",
        geometry=geometry.SizedTiles(
            geometry.large_on_canvas,
            sizes="spatial_shapes",
            block=lambda _, config: config.downsample_factor,
            thumbnail="last",
            padded=True,
        ),
    ),
    *(
        Family(name, geometry=_SLICES, video=geometry.sliced_frames, video_token=_VIDEO)
        for name in ("minicpmv4_6", "minicpmv4_7", "minicpm_ocr")
    ),
    Family(
        "molmo2",
        geometry=geometry.overlapping_crops,
        video=geometry.pooled_frames,
        video_token=_VIDEO,
    ),
    Family("step3p7", geometry=geometry.SeparateTiles(geometry.windows, geometry.squared)),
    Family(
        "unlimited_ocr",
        geometry=geometry.SeparateTiles(
            geometry.large_pages,
            geometry.fitted_or_squeezed,
            encoded=True,
            class_token=True,
            by_rows=True,
            behind=1,
        ),
    ),
    # learned queries between vision tower and text
    *(
        Family(
            name,
            geometry=geometry.QueryTokens("num_query_tokens", class_token=True),
            in_front=True,
            reason=QUERIES,
        )
        for name in ("blip-2", "instructblip")
    ),
    Family(
        "deepseek_ocr2",
        geometry=geometry.SeparateTiles(
            geometry.large_pages, geometry.fitted, encoded=True, queries=True, behind=1
        ),
        reason="Its image tokens are learned queries after the patches of each view in the vision "
        "tower, so they have no row and column. xi.attention_rollout(..., tower='vision') "
        "estimates which patches they draw on.",
    ),
    Family(
        "instructblipvideo",
        "video_token_id",
        geometry=geometry.QueryTokens(
            "num_query_tokens", class_token=True, show=geometry.shown_in_frames, n_frames=4
        ),
        in_front=True,
        reason=QUERIES,
    ),
    Family("idefics2", geometry=geometry.resampled_patches, reason=QUERIES),
    Family("aria", geometry=geometry.query_crops, reason=QUERIES),
    *BESIDE,
)

# Images are not among the tokens of the prompt.
_NOT_PLACEHOLDERS: dict[str, str] = {
    "evolla": "Its input is a protein, attended to by cross-attention; it has no image input.",
    "mistral4": "Its input is text only.",
    "udop": "It joins image patches with the words that OCR found on the page, by their boxes; "
    "its processor requires these words besides the prompt.",
}

FAMILIES: dict[str, Family] = {family.model_type: family for family in _RECORDS} | {
    name: Family(name, image_token=None, in_front=True, reason=reason)
    for name, reason in _NOT_PLACEHOLDERS.items()
}


def family_of(config: Any) -> Family:
    """Return the record of a model's type.

    A type without a record gets one if its configuration has the id of image tokens. The boxes of
    these tokens are then measured with test images.

    Raises:
        UnsupportedModelError: The type has no record, and its configuration has no id of image
            tokens; or the model is a text-only model.
    """
    model_type = getattr(config, "model_type", None)
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    for name in ("image_token_id", "image_token_index"):
        if isinstance(getattr(config, name, None), int):
            return Family(str(model_type), name, geometry=geometry.ProbedTokens(name))
    if getattr(config, "vision_config", None) is None and _reads_text_only(config):
        raise UnsupportedModelError(
            f"The model type {model_type!r} is text-only: its configuration has no vision_config. "
            "Record its attention with xi.record(model), or load one of the "
            f"{len(FAMILIES)} types in xmodal_interp.models.FAMILIES."
        )
    raise UnsupportedModelError(
        f"The model type {model_type!r} has no family record, which labelling tokens requires; "
        f"xmodal_interp.models.FAMILIES has {len(FAMILIES)} types. "
        "Write one (xmodal_interp.models.Family) and pass it as VLM(model, processor, family=...), "
        "or record the bare attention with xi.record(model)."
    )


def refuse_other_class(model: Any) -> None:
    """Raise UnsupportedModelError unless the model is of the generating class of its model type.

    Other classes share the model type but take other inputs or return no logits:
    ``BlipForQuestionAnswering`` encodes the question separately, ``LlavaModel`` returns hidden
    states. Subclasses, and wrappers that hold the generating class, are accepted.
    """
    model_type = model.config.model_type
    expected = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(model_type)
    if expected is None:
        return
    for module in model.modules():
        if any(each.__name__ == expected for each in type(module).__mro__):
            return
    raise UnsupportedModelError(
        f"A VLM of the model type {model_type!r} needs a {expected}; got a "
        f"{type(model).__name__}. Load it with xi.load(name), or record this model's attention "
        "with xi.record(model)."
    )


def _reads_text_only(config: Any) -> bool:
    """Whether transformers registers a text-only model for this configuration."""
    known: Any = MODEL_MAPPING.get(type(config), None)
    kinds = known if isinstance(known, tuple) else (known,)
    return any(
        getattr(kind, "main_input_name", None) == "input_ids"
        and set(_as_list(getattr(kind, "input_modalities", ()))) == {"text"}
        for kind in kinds
    )


def _as_list(modalities: str | Iterable[str]) -> list[str]:
    """Return the modalities that a model's class declares, as a list."""
    return [modalities] if isinstance(modalities, str) else list(modalities)
