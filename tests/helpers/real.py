"""Real processors, built offline, each with a tiny random model that runs on its outputs."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers import CONFIG_MAPPING, PreTrainedModel, ProcessorMixin
from transformers.models.auto.feature_extraction_auto import FEATURE_EXTRACTOR_MAPPING_NAMES
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
from transformers.models.auto.video_processing_auto import VIDEO_PROCESSOR_MAPPING_NAMES

from tests.helpers.families import RECORDS, Record, Token
from tests.helpers.random_weights import randomize
from tests.helpers.tiny_configs import tiny_config
from tests.helpers.tiny_tokenizer import tokenizer
from xmodal_interp.models import VLM, Video

VOCABULARIES = ("vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size")
BUILT = [
    name for name, record in RECORDS.items() if not record.obstacle and record.n_frames is None
]
"""Types that can be built and read pictures; those with ``n_frames`` read clips."""
REFUSED = {
    "pi0": "PI0ForConditionalGeneration requires state besides images",
    "diffusion_gemma": "DiffusionGemmaForBlockDiffusion generates by block diffusion",
}
SOME = ("mllama", "git", "blip", "kosmos-2", "florence2", "t5gemma2", "vision-encoder-decoder")
"""One type for each way to read images whose tokens no id marks."""
GENERATING = [name for name in BUILT if name not in REFUSED]
"""Types that generate an answer about a picture."""
ANSWER = "a red circle"


@functools.cache
def real(model_type: str) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Return a tiny random model of a type, and its real processor.

    The test is skipped if the type was added to transformers after the installed release.

    Raises:
        LookupError: The type has no record, or its record states that it cannot be built.
    """
    if model_type not in RECORDS:
        raise LookupError(f"{model_type!r} has no record; add one in tests/helpers/families.")
    record = RECORDS[model_type]
    if record.obstacle:
        raise LookupError(f"{model_type!r} cannot be built: {record.obstacle}")
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} does not have {model_type!r}.")
    made = build_processor(record)
    return build_model(record, made.tokenizer), made


def build_processor(record: Record) -> Any:
    """Build the processor of a record: the registered class, with its parts from scratch."""
    name = record.processor_class or PROCESSOR_MAPPING_NAMES[record.model_type]
    kind = getattr(transformers, name)
    optional = inspect.signature(kind.__init__).parameters
    parts = {
        part: _part(part, record, required=optional[part].default is not None)
        for part in kind.get_attributes()
    }
    template = {"chat_template": chat_template(record)} if record.template else {}
    return kind(**parts, **record.processor, **template)


def build_model(record: Record, text: Any = None) -> PreTrainedModel:
    """Build a tiny random model, whose settings agree with a tokenizer if there is one."""
    kind = CONFIG_MAPPING[record.config_type or record.model_type]
    over = dict(record.config)
    if text is not None:
        over = _merged(_vocabularies(kind().to_dict(), len(text)), _with_ids(over, text))
    name = record.model_class or MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[record.model_type]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        built = getattr(transformers, name)(tiny_config(kind, over)).eval()
        randomize(built, seed=0)
    return built


def settled(model_type: str) -> ProcessorMixin:
    """Return the processor with its call-time settings stored as attributes."""
    made = copy.copy(real(model_type)[1])
    of_images = dict(getattr(made, "images_kwargs", None) or {})
    for name, value in RECORDS[model_type].call.items():
        if name.startswith("return_") or hasattr(made, name):
            setattr(made, name, value)
        else:
            of_images[name] = value
    made.images_kwargs = of_images
    return made


def inputs(
    model_type: str,
    images: Sequence[Sequence[Image.Image]],
    questions: Sequence[str],
    *,
    videos: Sequence[Video] = (),
    sounds: Sequence[np.ndarray] = (),
    processor: Any = None,
) -> dict[str, Any]:
    """Return the inputs of the model's forward for some prompts; shorter ones are left-padded.

    Args:
        model_type: A type with a record.
        images: For each prompt, its images.
        questions: The text after the images; the chat template is used if there is one.
        videos: For each prompt, its video, if there are videos.
        sounds: For each prompt, its sound, if there are sounds.
        processor: The processor to use instead of the type's own.
    """
    record = RECORDS[model_type]
    built, own = real(model_type)
    made = own if processor is None else processor
    n_prompts = len(questions)
    texts = [
        prompt(model_type, len(of), question, n_videos=bool(videos), n_sounds=bool(sounds))
        for of, question in zip(images, questions, strict=True)
    ]
    given: dict[str, Any] = {"return_tensors": "pt", **record.call}
    if record.asks:
        given |= {"text": texts}
        if n_prompts > 1:
            given |= {"padding": True, "padding_side": "left"}
        if texts[0].startswith(made.tokenizer.bos_token):
            given |= {"add_special_tokens": False}
    if any(images):
        clip = record.n_frames
        shown = [[one if clip is None else [one] * clip for one in of] for of in images]
        given["images"] = shown if record.nested else [one for of in shown for one in of]
    if videos:
        given["videos"] = [video.pixels() for video in videos]
        given["videos_kwargs"] = {
            "video_metadata": [video.metadata() for video in videos],
            "do_sample_frames": False,
            "return_metadata": True,  # some processors write frame times into the prompt
            **{name: value for name, value in record.videos.items() if name == "size"},
        }
    if sounds:
        given["audio"] = list(sounds)
    returned = made(**given).to(built.dtype)
    for unread in ("labels", "video_metadata"):  # labels are for training
        returned.pop(unread, None)
    if built.config.is_encoder_decoder and "decoder_input_ids" not in returned:
        answer = made.tokenizer.encode(ANSWER, add_special_tokens=False)
        start = made.tokenizer.bos_token_id
        returned["decoder_input_ids"] = torch.tensor([[start, *answer]] * n_prompts)
    beside = {name: torch.tensor(value * n_prompts) for name, value in record.beside.items()}
    return {**returned, **beside}


def prompt(
    model_type: str, n_images: int, question: str, *, n_videos: int = 0, n_sounds: int = 0
) -> str:
    """Return the text that a user passes to the processor, from the chat template if any."""
    record = RECORDS[model_type]
    if not record.template:
        before = record.image * n_images + record.clip * n_videos
        return before + question + record.sound * n_sounds
    content = [
        *({"type": "image"} for _ in range(n_images)),
        *({"type": "video"} for _ in range(n_videos)),
        {"type": "text", "text": question},
        *({"type": "audio"} for _ in range(n_sounds)),
    ]
    messages = [{"role": "user", "content": content}]
    return str(real(model_type)[1].apply_chat_template(messages, add_generation_prompt=True))


def chat_template(record: Record) -> str:
    """Return the template of ``user: IMAGE question assistant:``, parts in the order given."""
    return (
        ("{{ bos_token }}" if record.begins else "") + "{% for message in messages %}"
        "{% if not loop.first %}\n{% endif %}{{ message['role'] }}: "
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
        "{% for part in message['content'] %}{% if not loop.first %} {% endif %}"
        "{% if part['type'] == 'image' %}"
        + record.image
        + "{% elif part['type'] == 'video' %}"
        + record.clip
        + "{% elif part['type'] == 'audio' %}"
        + record.sound
        + "{% else %}{{ part['text'] }}{% endif %}"
        "{% endfor %}{% endif %}"
        "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}\nassistant:{% endif %}"
    )


def _part(part: str, record: Record, *, required: bool) -> Any:
    if "tokenizer" in part:
        return tokenizer(record)
    registered, settings = {
        "image_processor": (IMAGE_PROCESSOR_MAPPING_NAMES, record.images),
        "video_processor": (VIDEO_PROCESSOR_MAPPING_NAMES, record.videos),
        "feature_extractor": (FEATURE_EXTRACTOR_MAPPING_NAMES, record.audio),
    }[part]
    name = settings.get("@") or registered.get(record.model_type)
    if name is None and not required:
        return None
    name = name["torchvision"] if isinstance(name, Mapping) else name
    kind = getattr(transformers, name)
    return kind(**{name: value for name, value in settings.items() if name != "@"})


def _with_ids(settings: Any, text: Any) -> Any:
    """Return the settings with every :class:`Token` replaced by its id."""
    if isinstance(settings, Mapping):
        return {name: _with_ids(value, text) for name, value in settings.items()}
    if isinstance(settings, list):
        return [_with_ids(setting, text) for setting in settings]
    return text.convert_tokens_to_ids(str(settings)) if isinstance(settings, Token) else settings


def _vocabularies(settings: Mapping[str, Any], size: int) -> dict[str, Any]:
    """Return overrides that set each vocabulary size in a configuration to ``size``."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if name in VOCABULARIES:
            found[name] = size
        elif isinstance(value, dict) and "model_type" in value:
            found[name] = _vocabularies(value, size)
    return found


def _merged(settings: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings updated with others, recursively for nested dictionaries."""
    result = dict(settings)
    for name, value in over.items():
        inner = result.get(name)
        nested = isinstance(value, Mapping) and isinstance(inner, Mapping)
        result[name] = _merged(inner, value) if nested else value
    return result


def asked(vlm: VLM, n_images: int) -> str:
    """Return what a user would write: a bare question if possible, else the whole prompt."""
    return asked_in_full(vlm, "where is the red circle?", n_images)


def asked_in_full(vlm: VLM, bare: str, n_images: int) -> str:
    """Return a question as a user would write it."""
    if not vlm.family.reads_text:
        return ""
    if vlm.family.writes_prompt:
        return "no red circles"  # a policy, the same for all
    templated = getattr(vlm.processor, "chat_template", None) is not None
    front = templated or vlm.family.in_front
    return bare if front else prompt(vlm.family.model_type, n_images, bare)


def some_of(names: Sequence[str]) -> list[str]:
    """Return every sixth type, and those of ``SOME``."""
    return [name for name in names if name in (*SOME, "paligemma") or name in names[1::6]]


def vlm_with_exact_steps(name: str) -> VLM:
    """Return the tiny model of a type, without two causes of differences between its own steps.

    Both are in transformers 5.23. Sparse attention (``DeepseekV32Indexer`` and its copies) keeps
    the ``index_topk`` keys with the highest scores. Scores of 0 are frequent, and which of these
    ties ``torch.topk`` keeps depends on the number of keys. The scan of Mamba2 clamps time steps at
    ``time_step_limit``; its single step (``mamba2_selective_state_update``) does not.
    """
    vlm = VLM(real(name)[0], settled(name))
    for module in vlm.model.modules():
        if hasattr(module, "index_topk"):
            module.index_topk = 10_000
        if hasattr(module, "time_step_limit"):
            module.time_step_limit = (0.0, float("inf"))
    return vlm
