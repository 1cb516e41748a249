"""Tokenizer and processors of the tiny models: Hugging Face classes, a few dozen words."""

from __future__ import annotations

from typing import Any

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import LlavaProcessor, PreTrainedTokenizerFast

from xmodal_interp.shapes.questions import NUMBERS
from xmodal_interp.shapes.scenes import COLORS, SHAPES

IMAGE_TOKEN = {"llava": "<image>", "qwen2_vl": "<|image_pad|>", "mllama": "<|image|>"}
VISION_START, VISION_END, VIDEO_TOKEN = "<|vision_start|>", "<|vision_end|>", "<|video_pad|>"
PATCH = {"llava": 8, "qwen2_vl": 4, "mllama": 8}  # px
SIDE = 96  # px, side of the training images
MERGE = 2  # Qwen2-VL joins 2 x 2 patches into one token
TILE, MAX_TILES = 48, 4  # Mllama cuts an image into up to four square tiles of 48 px

_WORDS = (
    *(
        "user:",
        "assistant:",
        "system:",
        "what",
        "color",
        "is",
        "the",
        "shape",
        "where",
        "how",
        "many",
    ),
    *("shapes", "there", "a", "describe", "image", "?", ".", ","),
    *("top", "bottom", "left", "right", "yes", "no"),
)


def vocabulary(family: str) -> dict[str, int]:
    """Return the token id of each word, for ``"llava"``, ``"qwen2_vl"`` or ``"mllama"``."""
    special = ["<pad>", "<bos>", "<eos>", "<unk>", IMAGE_TOKEN[family]]
    extra = [VISION_START, VISION_END, VIDEO_TOKEN] if family == "qwen2_vl" else []
    words = [*special, *extra, *_WORDS, *NUMBERS.values(), *COLORS, *SHAPES]
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
    extra = [VISION_START, VISION_END, VIDEO_TOKEN] if family == "qwen2_vl" else []
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=[IMAGE_TOKEN[family], *extra],
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
