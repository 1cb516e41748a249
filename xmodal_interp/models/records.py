"""Families: one record per model type, with everything about a type that is data.

To add a family, add one :class:`Family` to ``_RECORDS``, in the group of its kind of geometry:

1. ``model_type``, and the configuration attribute that holds the id of image tokens.
2. ``geometry``: the rule that places image tokens on the image (see ``models/geometry``), or a
   ``reason`` why they have no rows and columns. ``video`` likewise.
3. The flags that describe its processor and its inputs, where they differ from the defaults.

``docs/adding-a-family.md`` describes how to verify the record. No code outside ``models/`` and
``shapes/`` branches on a model type.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from transformers import MODEL_MAPPING, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from xmodal_interp.errors import UnsupportedModelError
from xmodal_interp.models import geometry
from xmodal_interp.models.encoders import ENCODERS, REFUSED, encoder_of
from xmodal_interp.models.geometry import ImageRule, VideoRule


@dataclass(frozen=True)
class Family:
    """The properties of a model type that preparing and labelling its inputs depend on.

    Attributes:
        model_type: ``config.model_type`` in transformers.
        image_token: Configuration attribute that holds the id of the tokens whose embeddings are
            the image's features; dots separate nested attributes and mapping keys. None if images
            are not among the text tokens.
        geometry: The rule that places image tokens on images. None if there is no rule; ``reason``
            then explains why.
        in_sequence: Whether image tokens are among the text tokens. If not, text attends to the
            image by cross-attention, and the rule places its keys.
        video: The rule that places video tokens on frames, if there is one.
        video_token: Configuration attribute that holds the id of video tokens, if there is one.
        video_tower: Name of the vision tower for videos, if it is separate from the one for images.
        in_order: Whether images and videos of a batch are encoded together in the order of the
            prompt, instead of all images first and all videos after them.
        placeholder: Attribute of the processor that holds the placeholder of an image in a prompt;
            None if images have no placeholder.
        flat_images: Whether the processor takes a flat list of images, not one list per prompt.
        in_front: Whether the processor itself inserts images before the prompt, so that a bare
            question is a whole prompt.
        writes_prompt: Whether the processor writes the prompt itself, from the text of a policy
            that images are checked against. The question then is that policy.
        image_mask: The model input whose ones mark image tokens, if their ids do not.
        prepended: Whether the model itself puts the image's features before the ids.
        image_mark: The mark of an image in a prompt, for processors that take texts and images in
            one list.
        reads_text: Whether the model takes a prompt. If not, the decoder reads only a start token.
        language: Whether the model has a language model. If not, it reads one image per sample, and
            its tokens are the positions of its vision tower, which the rule places.
        rewritten: Whether ``generate`` drops the last id of a prompt, and replaces the first by the
            text model's beginning-of-sequence token.
        token_types: Whether the model requires ``mm_token_type_ids``, which processors return on
            request.
        alone: Why samples of this type are run one by one: padding would change their results. None
            if they may share a padded batch.
        reason: Why image tokens have no row and column, or why there is no rule for them.
    """

    model_type: str
    image_token: str | None = "image_token_id"
    geometry: ImageRule | None = None
    in_sequence: bool = True
    video: VideoRule | None = None
    video_token: str | None = None
    video_tower: str | None = None
    in_order: bool = False
    placeholder: str | None = "image_token"
    flat_images: bool = False
    in_front: bool = False
    writes_prompt: bool = False
    image_mask: str | None = None
    prepended: bool = False
    image_mark: str | None = None
    reads_text: bool = True
    language: bool = True
    rewritten: bool = False
    token_types: bool = False
    alone: str | None = None
    reason: str | None = None

    @property
    def rule(self) -> str:
        """Name of the geometry rule; ``"none"`` if there is no rule."""
        return "none" if self.geometry is None else geometry.name_of(self.geometry)

    @property
    def video_rule(self) -> str:
        """Name of the rule that places video tokens; empty if there is no rule."""
        return "" if self.video is None else geometry.name_of(self.video)

    @property
    def marks_tokens(self) -> bool:
        """Whether image tokens are among the text tokens, marked by an id or a mask."""
        named = self.image_token is not None or self.image_mask is not None
        return self.in_sequence and named

    def image_token_id(self, config: PretrainedConfig) -> int | None:
        """Return the id of image tokens, or None if the configuration has none."""
        return _id(config, self.image_token)

    def video_token_id(self, config: PretrainedConfig) -> int | None:
        """Return the id of video tokens, or None if the configuration has none."""
        return _id(config, self.video_token)


def _id(config: PretrainedConfig, name: str | None) -> int | None:
    value: Any = config
    for part in (name or "").split("."):
        value = value.get(part) if isinstance(value, Mapping) else getattr(value, part, None)
    return None if value is None else int(value)


def _same(names: str, **fields: Any) -> tuple[Family, ...]:
    """Return one record per model type, all with the same properties."""
    return tuple(Family(name, **fields) for name in names.split())


_QUERIES = (
    "Its image tokens are learned queries, each of which attends to the whole image, so they have "
    "no row and column; xi.on_patches maps their values to the patches that they attend to."
)
_SPARSE = "which of several equal keys an indexer chooses depends on the number of keys"
_ABSOLUTE = "positions are counted from the first one, padding included"
_LARGEST_IMAGE = "images are padded to the largest image of a batch"
_SHIFTED_QUESTION = "the query tokens read the question at positions that padding shifts"

TEXT_MODELS_ALONE = ("gpt2", "gpt_neo", "gpt_bigcode")
"""Text models whose positions count padding: families that contain one run samples one by one."""

_VIDEO: dict[str, Any] = {"video_token": "video_token_id"}
_MERGED: dict[str, Any] = {
    "geometry": geometry.merged_patches,
    "video": geometry.MergedFrames(),
    **_VIDEO,
}
_BY_ROWS = geometry.MergedPatches(by_rows=True)
_PLACED = geometry.PositionedPatches()
_CLASS_TOKEN = geometry.FixedGrid(before=1, tower_before=1)
_FITTED = geometry.FixedGrid(show=geometry.fitted)
_ENCODERS: dict[str, ImageRule] = {
    **ENCODERS,
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
_SPLIT_SQUARES = geometry.SplitTiles(geometry.longest_edge, merge="scale_factor")
_BEST_CANVAS = geometry.SplitTiles(
    geometry.best_canvas, merge="downsample_ratio", class_token="first"
)
_STRIDED_CANVAS = geometry.SplitTiles(geometry.best_canvas, merge=4, shift=1.5 / 4)
_CROPS = geometry.SplitTiles(geometry.crops, merge="mm_tokens_per_image", thumbnail="first")
_SLICES = geometry.SizedTiles(
    geometry.slices, sizes="target_sizes", block=geometry.slice_block, thumbnail="first"
)
_CLASS_QUERIES = geometry.QueryTokens("num_query_tokens", class_token=True)

_RECORDS: tuple[Family, ...] = (
    # The image's aspect is kept, and blocks of patches are merged.
    *_same(
        "qwen2_vl qwen2_5_vl qwen3_vl qwen3_vl_moe qwen3_5 qwen3_5_moe qwen4_exp "
        "qwen2_5_omni_thinker qwen3_omni_moe_thinker glm4v glm4v_moe glm46v glm_ocr glmga "
        "video_llama_3 cohere_compass cosmos3_omni exaone4_5 hyperclovax_vision_v2 lfm3_vl "
        "minimax_m3_vl",
        **_MERGED,
    ),
    Family("cosmos3_edge", token_types=True, **_MERGED),
    Family("dots3_note", alone=_SPARSE, **_MERGED),
    Family("ernie4_5_vl_moe", **{**_MERGED, "video": geometry.MergedFrames(in_model=True)}),
    Family(
        "glm5_next",
        geometry=geometry.MergedPatches(geometry.within_tokens),
        video=geometry.MergedFrames(content=geometry.within_tokens),
        **_VIDEO,
    ),
    *_same(
        "muse_glimmer muse_spark",
        geometry=_BY_ROWS,
        video=geometry.MergedFrames(by_rows=True),
        **_VIDEO,
    ),
    Family("paddleocr_vl", geometry=_BY_ROWS),
    Family("kimi_k25", geometry=geometry.MergedPatches(geometry.within_patches, by_rows=True)),
    Family(
        "hunyuan_vl",
        geometry=geometry.MergedPatches(by_rows=True, framed=True),
        alone=_ABSOLUTE,
    ),
    Family("nemotron_h_omni", geometry=geometry.counted_patches),
    *_same("mistral3 lighton_ocr", geometry=geometry.sized_patches),
    Family("mistral_large4", geometry=geometry.sized_patches, alone=_SPARSE),
    Family("gemma4", geometry=_PLACED, video=geometry.PositionedFrames(), **_VIDEO),
    Family(
        "gemma4_unified",
        geometry=geometry.PositionedPatches(merged=True),
        video=geometry.PositionedFrames(merged=True),
        **_VIDEO,
    ),
    Family("diffusion_gemma", geometry=_PLACED),
    # As many flattened patches as fit, or squares of pixels; the last of them are padded.
    Family("pix2struct", None, geometry.FlattenedPatches(), in_sequence=False, in_front=True),
    Family(
        "kosmos-2.5",
        None,
        geometry.FlattenedPatches("latent_query_num"),
        placeholder=None,
        image_mask="image_embeds_position_mask",
        in_front=True,
        alone=_ABSOLUTE,
        reason=_QUERIES,
    ),
    Family("fuyu", geometry=geometry.PaddedSquares("patch_size", geometry.shrunk), in_front=True),
    Family("inkling2", geometry=geometry.PaddedSquares(merged=True)),
    Family(
        "inkling_mm_model",
        geometry=geometry.PaddedSquares(resized=geometry.scaled, spare_column=True),
    ),
    # Convolutions compute features or codes.
    Family("chameleon", "vocabulary_map.<image>", geometry=geometry.code_grid),
    Family("emu3", "vocabulary_map.<image>", geometry=geometry.code_rows, alone=_LARGEST_IMAGE),
    Family("gemma3n", geometry=geometry.fused_stages),
    Family("fast_vlm", geometry=geometry.FixedGrid(shift=31.5 / 64)),
    # Every image has the same grid.
    Family(
        "llava",
        geometry=geometry.Chosen(
            lambda config: config.vision_config.model_type == "pixtral",
            {False: geometry.fixed_grid, True: geometry.sized_patches},
        ),
    ),
    Family("vipllava", geometry=geometry.fixed_grid),
    Family(
        "video_llava",
        geometry=geometry.fixed_grid,
        video=geometry.SingleFrames(before=1),
        video_tower="video_tower",
        **_VIDEO,
    ),
    Family("paligemma", geometry=geometry.fixed_grid, in_front=True),
    Family(
        "pi0",
        "vlm_config.image_token_id",
        geometry=geometry.FixedGrid(show=geometry.at_the_top),
        in_front=True,
    ),
    *_same("deepseek_vl deepseek_vl_hybrid janus", geometry=_FITTED),
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
    Family("git", None, _CLASS_TOKEN, prepended=True, in_front=True, alone=_ABSOLUTE),
    Family(
        "blip",
        None,
        _CLASS_TOKEN,
        in_sequence=False,
        in_front=True,
        rewritten=True,
        alone=_ABSOLUTE,
    ),
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
            "There is no geometry rule for an encoder of the type {!r}. Pass VLM(model, processor, "
            "family=dataclasses.replace(FAMILIES['vision-encoder-decoder'], geometry=...)) with a "
            "rule, such as geometry.PatchTokens(before={{'class': 1}}).",
        ),
        in_sequence=False,
        reads_text=False,
    ),
    # Images are cut into tiles, most with a thumbnail.
    *_same("llava_next granite4_vision", geometry=geometry.anyres_tiles),
    Family(
        "llava_onevision",
        geometry=geometry.anyres_tiles,
        video=geometry.SingleFrames(merge=2, after=1),
        **_VIDEO,
    ),
    Family(
        "llava_next_video",
        geometry=geometry.anyres_tiles,
        video=geometry.SingleFrames(merge="spatial_pool_stride"),
        **_VIDEO,
    ),
    Family("idefics3", geometry=_SPLIT_SQUARES),
    Family(
        "smolvlm",
        geometry=_SPLIT_SQUARES,
        video=geometry.SingleFrames(merge="scale_factor", show=geometry.squeezed),
    ),
    Family(
        "internvl",
        geometry=_BEST_CANVAS,
        video=geometry.SingleFrames(merge="downsample_ratio", class_token=True),
        in_order=True,
    ),
    Family("qianfan_ocr", geometry=_BEST_CANVAS, placeholder="image_placeholder_token"),
    *_same(
        "aya_vision cohere2_vision",
        geometry=geometry.SplitTiles(geometry.best_canvas, merge="downsample_factor"),
    ),
    Family(
        "got_ocr2",
        geometry=_STRIDED_CANVAS,
        flat_images=True,
    ),
    Family("pp_chart2table", geometry=_STRIDED_CANVAS),
    *_same("gemma3 t5gemma2", geometry=_CROPS),
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
        alone="images with different numbers of tiles cannot be stacked",
        **_VIDEO,
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
    *_same(
        "minicpmv4_6 minicpmv4_7 minicpm_ocr",
        geometry=_SLICES,
        video=geometry.sliced_frames,
        **_VIDEO,
    ),
    Family(
        "molmo2",
        geometry=geometry.overlapping_crops,
        video=geometry.pooled_frames,
        **_VIDEO,
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
            after=1,
        ),
    ),
    Family("mllama", "image_token_index", geometry.aspect_ratio_tiles, in_sequence=False),
    # Image tokens are learned queries between the vision tower and the text.
    Family("blip-2", geometry=_CLASS_QUERIES, in_front=True, reason=_QUERIES),
    Family(
        "instructblip",
        geometry=_CLASS_QUERIES,
        in_front=True,
        alone=_SHIFTED_QUESTION,
        reason=_QUERIES,
    ),
    Family(
        "instructblipvideo",
        "video_token_id",
        geometry=geometry.QueryTokens(
            "num_query_tokens", class_token=True, show=geometry.shown_in_frames, n_frames=4
        ),
        in_front=True,
        alone=_SHIFTED_QUESTION,
        reason=_QUERIES,
    ),
    Family("idefics2", geometry=geometry.resampled_patches, alone=_LARGEST_IMAGE, reason=_QUERIES),
    Family("aria", geometry=geometry.query_crops, reason=_QUERIES),
    Family(
        "idefics",
        None,
        geometry.Chosen(
            lambda config: config.use_resampler,
            {
                False: _CLASS_TOKEN,
                True: geometry.QueryTokens(
                    "perceiver_config.resampler_n_latents", class_token=True, reason=_QUERIES
                ),
            },
        ),
        in_sequence=False,
        placeholder=None,
        image_mark="<image>",
        in_front=True,
    ),
    Family(
        "kosmos-2",
        None,
        geometry.QueryTokens("latent_query_num", class_token=True),
        placeholder=None,
        image_mask="image_embeds_position_mask",
        in_front=True,
        alone=_ABSOLUTE,
        reason=_QUERIES,
    ),
    Family(
        "deepseek_ocr2",
        geometry=geometry.SeparateTiles(
            geometry.large_pages, geometry.fitted, encoded=True, queries=True, after=1
        ),
        reason="Its image tokens are learned queries after the patches of each view in the vision "
        "tower, so they have no row and column. xi.attention_rollout(..., tower='vision') "
        "estimates which patches they draw on.",
    ),
    # No image features are among the tokens of the prompt, and there is no rule.
    Family(
        "evolla",
        None,
        in_front=True,
        reason="Its input is a protein, attended to by cross-attention; it has no image input.",
    ),
    Family("mistral4", None, in_front=True, reason="Its input is text only."),
    Family(
        "udop",
        None,
        in_front=True,
        reason="It joins image patches with the words that OCR found on the page, by their boxes; "
        "its processor requires these words besides the prompt.",
    ),
)

FAMILIES: dict[str, Family] = {family.model_type: family for family in _RECORDS}


def family_of(config: Any) -> Family:
    """Return the record of a model's type.

    A type without a record gets one if its configuration has the id of image tokens. The boxes of
    these tokens are then measured with test images. A vision model gets a record with the rule of
    its encoder.

    Raises:
        UnsupportedModelError: The type has no record, and its configuration has no id of image
            tokens; or the model is a text-only model, or a vision model without one position per
            patch.
    """
    model_type = getattr(config, "model_type", None)
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    for name in ("image_token_id", "image_token_index"):
        if isinstance(getattr(config, name, None), int):
            return Family(str(model_type), name, geometry=geometry.ProbedTokens(name))
    encoder = encoder_of(config)
    if encoder is not None:
        return Family(
            str(model_type),
            None,
            geometry=ENCODERS[encoder.model_type],
            in_sequence=False,
            placeholder=None,
            reads_text=False,
            language=False,
        )
    if model_type in REFUSED:
        raise UnsupportedModelError(
            f"A model of the type {model_type!r} has no table of tokens: {REFUSED[model_type]}. "
            "Record its attention with xi.record(model); recording.sample(image, grid=...) makes "
            "a sample of layers whose positions are the patches of one grid."
        )
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
        f"A VLM of the model type {model_type!r} requires a {expected}; got a "
        f"{type(model).__name__}. Load it with xi.load(name), or record this model's attention "
        "with xi.record(model)."
    )


def _reads_text_only(config: Any) -> bool:
    """Return whether transformers registers a text-only model for this configuration."""
    known: Any = MODEL_MAPPING.get(type(config), None)
    return any(
        getattr(kind, "main_input_name", None) == "input_ids"
        and getattr(kind, "input_modalities", None) in ("text", ("text",), ["text"])
        for kind in (known if isinstance(known, tuple) else (known,))
    )
