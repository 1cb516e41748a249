"""Tiny untrained models with their tokenizers and processors, of Hugging Face classes.

A model has about a million weights (:func:`untrained`), a tokenizer a few dozen words
(:func:`build_tokenizer`, :func:`build_processor`).
"""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    MllamaConfig,
    MllamaForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from xmodal_interp.shapes.scenes import COLORS, NUMBERS, SHAPES

IMAGE_TOKEN = {"llava": "<image>", "qwen2_vl": "<|image_pad|>", "mllama": "<|image|>"}
VISION_START, VISION_END, VIDEO_TOKEN = "<|vision_start|>", "<|vision_end|>", "<|video_pad|>"
PATCH = {"llava": 8, "qwen2_vl": 4, "mllama": 8}  # px
SIDE = 96  # px, side of the training images
MERGE = 2  # Qwen2-VL joins 2 x 2 patches into one token
TILE, MAX_TILES = 48, 4  # Mllama cuts an image into up to four square tiles of 48 px

_WORDS = (
    *("user:", "assistant:", "system:", "what", "color", "is", "the", "shape", "where", "how"),
    *("many", "shapes", "there", "a", "describe", "image", "?", ".", ","),
    *("top", "bottom", "left", "right", "yes", "no"),
)


def _special_tokens(family: str) -> list[str]:
    """Return the tokens of images and videos, which are not words."""
    extra = [VISION_START, VISION_END, VIDEO_TOKEN] if family == "qwen2_vl" else []
    return [IMAGE_TOKEN[family], *extra]


def vocabulary(family: str) -> dict[str, int]:
    """Return the token id of each word, for ``"llava"``, ``"qwen2_vl"`` or ``"mllama"``."""
    special = ["<pad>", "<bos>", "<eos>", "<unk>", *_special_tokens(family)]
    words = [*special, *_WORDS, *NUMBERS.values(), *COLORS, *SHAPES]
    return {word: index for index, word in enumerate(words)}


def build_tokenizer(family: str) -> PreTrainedTokenizerFast:
    """Return a word-level tokenizer that lower-cases and splits off punctuation.

    Offsets refer to the original text.
    """
    words = Tokenizer(models.WordLevel(vocabulary(family), unk_token="<unk>"))
    words.normalizer = normalizers.Lowercase()
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(r"[?.,]"), "isolated")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=_special_tokens(family),
        model_max_length=512,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def build_processor(family: str) -> Any:
    """Return the processor of a family, built offline.

    Only ``Qwen2VLProcessor`` requires torchvision, because it contains a video processor.
    """
    tokenizer = build_tokenizer(family)
    if family == "llava":
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

        side = {"height": SIDE, "width": SIDE}
        images = CLIPImageProcessorPil(
            size={"shortest_edge": SIDE}, crop_size=side, image_mean=[0.5] * 3, image_std=[0.5] * 3
        )
        return LlavaProcessor(
            image_processor=images,
            tokenizer=tokenizer,
            patch_size=PATCH[family],
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            image_token=IMAGE_TOKEN[family],
            chat_template=_chat_template(IMAGE_TOKEN[family]),
        )
    if family == "mllama":
        from transformers import MllamaProcessor
        from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

        return MllamaProcessor(
            image_processor=MllamaImageProcessorPil(
                size={"height": TILE, "width": TILE}, max_image_tiles=MAX_TILES
            ),
            tokenizer=tokenizer,
            chat_template=_chat_template(IMAGE_TOKEN[family]),
        )
    from transformers import Qwen2VLProcessor, Qwen2VLVideoProcessor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    geometry: dict[str, Any] = {
        "patch_size": PATCH[family],
        "merge_size": MERGE,
        "temporal_patch_size": 2,
    }
    pixels: dict[str, Any] = {"size": {"shortest_edge": 48 * 48, "longest_edge": SIDE * SIDE}}
    norm: dict[str, Any] = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    return Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessorPil(**geometry, **pixels, **norm),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(**geometry, **pixels, **norm),
        chat_template=_chat_template(
            VISION_START + IMAGE_TOKEN[family] + VISION_END, VISION_START + VIDEO_TOKEN + VISION_END
        ),
    )


def _chat_template(image: str, video: str = "") -> str:
    """Return the template ``<bos>user: IMAGE question assistant: answer<eos>``.

    Images and texts of a message keep their order.
    """
    shown = "{% elif part['type'] == 'video' %}" + video if video else ""
    return (
        "{{ bos_token }}{% for message in messages %}"
        "{% if not loop.first %} {% endif %}{{ message['role'] }}: "
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
        "{% for part in message['content'] %}{% if not loop.first %} {% endif %}"
        "{% if part['type'] == 'image' %}"
        + image
        + shown
        + "{% else %}{{ part['text'] }}{% endif %}"
        "{% endfor %}{% endif %}"
        "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %} assistant:{% endif %}"
    )


_INIT = 0.06  # a width of 128 requires larger initial weights than the 0.02 of large models
_TEXT: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "initializer_range": _INIT,
    "tie_word_embeddings": False,
}


def untrained(family: str, seed: int = 0) -> PreTrainedModel:
    """Return a model with random weights; the same seed gives the same weights.

    Args:
        family: ``"llava"`` (CLIP vision tower, MLP projector, Llama), ``"qwen2_vl"``, or
            ``"mllama"`` (cross-attention; its gates are set to 1, because the default 0 would
            remove the image's effect).
        seed: Seed of the weights; training of the shipped checkpoints started from seed 0.
    """
    ids = vocabulary(family)
    special: dict[str, Any] = {
        "bos_token_id": ids["<bos>"],
        "eos_token_id": ids["<eos>"],
        "pad_token_id": ids["<pad>"],
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        build = {"llava": _llava, "qwen2_vl": _qwen2_vl, "mllama": _mllama}[family]
        model = build(ids, special)
    model.eval()
    model.generation_config = GenerationConfig(**special, max_new_tokens=20, do_sample=False)
    return model


def _llava(ids: dict[str, int], special: dict[str, Any]) -> PreTrainedModel:
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=PATCH["llava"],
        projection_dim=128,
        hidden_act="gelu",
        initializer_range=0.05,
    )
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    text = LlamaConfig(vocab_size=len(ids), head_dim=16, rope_parameters=rope, **_TEXT, **special)
    return LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision,
            text_config=text,
            image_token_index=ids[IMAGE_TOKEN["llava"]],
            image_seq_length=(SIDE // PATCH["llava"]) ** 2,
            vision_feature_layer=-1,
            vision_feature_select_strategy="default",
            tie_word_embeddings=False,
        )
    )


def _qwen2_vl(ids: dict[str, int], special: dict[str, Any]) -> PreTrainedModel:
    vision = {
        "depth": 2,
        "embed_dim": 64,
        "hidden_size": _TEXT["hidden_size"],
        "num_heads": 4,
        "mlp_ratio": 4,
        "patch_size": PATCH["qwen2_vl"],
        "spatial_merge_size": MERGE,
        "temporal_patch_size": 2,
        "hidden_act": "gelu",
        "initializer_range": _INIT,
    }
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    return Qwen2VLForConditionalGeneration(
        Qwen2VLConfig(
            text_config={"vocab_size": len(ids), "rope_parameters": rope, **_TEXT, **special},
            vision_config=vision,
            image_token_id=ids[IMAGE_TOKEN["qwen2_vl"]],
            video_token_id=ids[VIDEO_TOKEN],
            vision_start_token_id=ids[VISION_START],
            vision_end_token_id=ids[VISION_END],
            tie_word_embeddings=False,
        )
    )


def _mllama(ids: dict[str, int], special: dict[str, Any]) -> PreTrainedModel:
    vision = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_global_layers": 1,
        "attention_heads": 4,
        "image_size": TILE,
        "patch_size": PATCH["mllama"],
        "max_num_tiles": MAX_TILES,
        "intermediate_layers_indices": [0, 2],
        "vision_output_dim": 3 * 64,
        "supported_aspect_ratios": [
            [rows, cols]
            for rows in range(1, MAX_TILES + 1)
            for cols in range(1, MAX_TILES + 1)
            if rows * cols <= MAX_TILES
        ],
        "initializer_range": _INIT,
    }
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    text = {"vocab_size": len(ids), "rope_parameters": rope, "cross_attention_layers": [1, 3]}
    model = MllamaForConditionalGeneration(
        MllamaConfig(
            vision_config=vision,
            text_config={**text, **_TEXT, **special},
            image_token_index=ids[IMAGE_TOKEN["mllama"]],
        )
    )
    for name, weight in model.named_parameters():
        if "cross_attn_attn_gate" in name or "cross_attn_mlp_gate" in name:
            torch.nn.init.constant_(weight, 1.0)
    return model
