"""Helpers that change pixels and find the image token whose input to the model changes."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import nn

from tests.helpers.families import RECORDS
from tests.helpers.real import prompt as written
from tests.helpers.real import real, settled
from xmodal_interp.models import FAMILIES, VLM
from xmodal_interp.models.labels import Prompt

QUESTION = "where is the red circle?"
INTO_LAYERS = {"granite4_vision"}
"""Types that add image features inside the language model, not to its input."""
READ_BY = {"git": "git.encoder", "idefics": "model.gated_cross_attn_layers.0.cross_attn"}
"""The module that reads the image features, for types without a separate language model."""
FEATURES = ("encoder_hidden_states", "key_value_states", "inputs_embeds", "image_embeds")
OVERLAPPING = {
    **dict.fromkeys(("florence2", "got_ocr2", "step3p7", "pp_chart2table", "fast_vlm"), 1 / 4),
    **dict.fromkeys(("gemma3n", "chameleon", "emu3", "pp_formulanet"), 1 / 4),
    **dict.fromkeys(("unlimited_ocr", "deepseek_ocr2"), 3 / 8),
}
"""Types whose convolutions overlap: the fraction of a box that is left unpainted on each side."""
POOLING = {"molmo2": "image_pooling_2d"}
"""Attention modules that stay enabled, because each token only pools its own patches."""
SHARED = {"gemma3n": "timm_model.blocks.3"}
"""Coarser stages that are disabled, because each of their features is shared by several tokens."""


class _SeenError(Exception):
    """Stops the forward once the inputs of the language model are known."""


@functools.cache
def vlm_of(model_type: str) -> VLM:
    """Return a VLM with the real processor and a vision tower that does not mix positions."""
    known, _ = real(model_type)
    model, processor = _plain(type(known)(copy.deepcopy(known.config))), settled(model_type)
    language = language_of(model)
    inside = set(language.modules()) if model_type not in INTO_LAYERS else set()
    pooling = POOLING.get(model_type)
    for name, module in model.named_modules():
        mixes = _mixes(module) and name.rpartition(".")[-1] != pooling
        shared = name.endswith(SHARED.get(model_type, "/"))
        if module not in inside and (shared or mixes):
            module.register_forward_hook(_nothing)
        elif isinstance(module, nn.GroupNorm):  # its statistics are over the whole image
            module.register_forward_hook(_as_given)
    vlm = VLM(model, processor)
    _order_codes(vlm)
    return vlm


def with_options(vlm: VLM, options: Mapping[str, Any]) -> VLM:
    """Return a copy with other settings of the image processor, as if loaded with them."""
    processor = copy.copy(vlm.processor)
    processor.image_processor = copy.copy(processor.image_processor)
    processor.images_kwargs = {**processor.images_kwargs, **options}
    for name, value in options.items():
        setattr(processor.image_processor, name, value)
    return dataclasses.replace(vlm, processor=processor)


@torch.no_grad()
def _plain(model: nn.Module) -> nn.Module:
    """Set weights with which the features of a position dominate those of its neighbours."""
    made = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        if weight.ndim > 1:
            nn.init.normal_(weight, std=weight[0].numel() ** -0.5, generator=made)
        else:
            weight.add_(torch.randn(weight.shape, generator=made), alpha=0.1)
    for module in model.modules():
        if (
            isinstance(module, (nn.Conv2d, nn.Conv3d))
            and module.kernel_size[-1] > module.stride[-1]
        ):
            _narrow(module)
    return model.eval()


def _narrow(convolution: nn.Conv2d | nn.Conv3d) -> None:
    """Concentrate overlapping kernels on their centre, and keep their norm."""
    rows, cols = (torch.arange(n) - (n - 1) / 2 for n in convolution.kernel_size[-2:])
    before = convolution.weight.norm()
    convolution.weight *= torch.exp(-3 * (rows[:, None] ** 2 + cols**2))
    convolution.weight *= before / convolution.weight.norm()


@torch.no_grad()
def _order_codes(vlm: VLM) -> None:
    """Order the codes of a VQ-VAE, and their token embeddings, on a line from dark to bright.

    A larger change of a feature then leads to a larger change of the token embedding.
    """
    vocabulary = getattr(vlm.model.base_model, "vocabulary_mapping", None)
    if vocabulary is None:
        return
    (codes,) = (m for m in vlm.model.modules() if type(m).__name__.endswith("VectorQuantizer"))
    seen: list[torch.Tensor] = []
    with _hook(codes, lambda _module, given, _named: seen.append(given[0])):
        embeddings(vlm, [textured(96, 96)])
        embeddings(vlm, [Image.new("RGB", (96, 96), "white")])
    dark, bright = (features.movedim(-3, -1).flatten(0, -2).mean(0) for features in seen)
    steps = torch.linspace(-0.5, 1.5, len(codes.embedding.weight))[:, None]
    codes.embedding.weight.copy_(dark + steps * (bright - dark))
    words = vlm.model.get_input_embeddings().weight
    words[[vocabulary.img2bpe[code] for code in range(len(steps))]] = steps * words[0]


def language_of(model: nn.Module) -> nn.Module:
    """Return the module that reads the image tokens."""
    if model.config.model_type in READ_BY:
        return model.get_submodule(READ_BY[model.config.model_type])
    if not FAMILIES[model.config.model_type].in_sequence:
        return model.get_decoder()
    if not model.config.is_encoder_decoder:
        inner = (getattr(model.base_model, name, None) for name in ("encoder", "vlm"))
        inside = (getattr(each, "language_model", None) for each in inner)
        found = next((each for each in inside if each is not None), None) or model.get_decoder()
        return found.layers[0] if hasattr(found, "vqmodel") else found
    encoder = model.get_encoder()
    return getattr(encoder, "text_model", encoder)


def _mixes(module: nn.Module) -> bool:
    """Whether a module is attention that adds to a residual stream."""
    names = [type(each).__name__ for each in (module, *module.children())]
    named, *inside = [name.endswith(("Attention", "Attention2d")) for name in names]
    return named and not any(inside)


def _nothing(_module: nn.Module, _given: Any, output: Any) -> Any:
    if isinstance(output, tuple):
        return (torch.zeros_like(output[0]), *output[1:])
    return torch.zeros_like(output)


def _as_given(_module: nn.Module, given: Any, _output: Any) -> torch.Tensor:
    return given[0]


def embeddings(vlm: VLM, images: list[Image.Image]) -> tuple[np.ndarray, Prompt]:
    """Return the inputs of the language model, ``[position, d]``, and the labelled positions.

    If text attends to the image by cross-attention, the inputs are the keys.
    """
    question = QUESTION if vlm.family.reads_text else ""
    if vlm.processor.chat_template is None and not vlm.family.in_front and question:
        question = written(vlm.family.model_type, len(images), QUESTION)
    inputs, (prompt,) = vlm.prepare([images], [question])
    return language_inputs(vlm, inputs), prompt


def places_of(prompt: Prompt) -> pd.DataFrame:
    """Return the token table of the positions that :func:`embeddings` returns."""
    if prompt.cross_keys is not None:
        return prompt.cross_keys
    return prompt.tokens[: prompt.n_encoder or len(prompt.tokens)]


def language_inputs(vlm: VLM, inputs: dict[str, Any]) -> np.ndarray:
    """Return the inputs of the language model for one sample, ``[position, d]``."""
    seen: list[torch.Tensor] = []

    def look(_module: nn.Module, given: tuple, named: dict) -> None:
        found = next((named[name] for name in FEATURES if named.get(name) is not None), None)
        if found is None:
            found = next(each for each in given if torch.is_tensor(each) and each.ndim == 3)
        seen.append(found.detach())
        raise _SeenError

    for name, value in RECORDS[vlm.family.model_type].beside.items():
        inputs.setdefault(name, torch.tensor(value))
    with torch.no_grad():
        if vlm.family.model_type in INTO_LAYERS:
            output = vlm.model(**inputs, use_cache=False, output_hidden_states=True)
            seen.append(output.hidden_states[-1])
        else:
            with _hook(language_of(vlm.model), look), suppress(_SeenError):
                vlm.model(**inputs, use_cache=False)
    return seen[0][0].float().numpy()


TOWERS = ("vision_tower", "vision_model")


def tower_outputs(vlm: VLM, images: list[Image.Image]) -> tuple[np.ndarray, Prompt]:
    """Return the outputs of the vision tower for one sample, ``[position, d]``, and its prompt."""
    (tower,) = (m for name, m in vlm.model.named_modules() if name.split(".")[-1] in TOWERS)
    seen: list[torch.Tensor] = []
    handle = tower.register_forward_hook(lambda _module, _given, output: seen.append(output))
    try:
        _, prompt = embeddings(vlm, images)
    finally:
        handle.remove()
    return seen[0].last_hidden_state.flatten(0, -2).float().numpy(), prompt


@contextmanager
def _hook(module: nn.Module, look: Any) -> Iterator[None]:
    handle = module.register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def textured(width: int, height: int) -> Image.Image:
    """Return a picture of noise. On an even picture, norms would amplify the smallest changes."""
    noise = np.random.default_rng(0).integers(0, 120, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def painted(image: Image.Image, box: np.ndarray) -> Image.Image | None:
    """Return the image with a box filled, or None if less than a pixel of it is in the image.

    A margin of one pixel of larger boxes is left out, because resizing would blur it into the next.
    """
    x0, y0, x1, y1 = np.round(box).astype(int)
    if x1 - x0 > 6 and y1 - y0 > 6:
        x0, y0, x1, y1 = x0 + 1, y0 + 1, x1 - 1, y1 - 1
    x0, y0, x1, y1 = max(x0, 0), max(y0, 0), min(x1, image.width), min(y1, image.height)
    if x1 <= x0 or y1 <= y0:
        return None
    pixels = np.array(image)
    pixels[y0:y1, x0:x1] = 255
    return Image.fromarray(pixels)


def changes(
    vlm: VLM,
    image: Image.Image,
    box: np.ndarray,
    plain: np.ndarray,
    before: Sequence[Image.Image] = (),
) -> np.ndarray:
    """Return how much the input of each position changes when a box is painted, ``[position]``.

    Args:
        vlm: A model with its processor.
        image: The image to paint.
        box: The box to paint.
        plain: The inputs for the unpainted image.
        before: Images before this one in the prompt.
    """
    box = middle_of(vlm.family.model_type, box)
    other, _ = embeddings(vlm, [*before, painted(image, box)])
    return np.linalg.norm(other - plain, axis=1)


def middle_of(model_type: str, box: np.ndarray) -> np.ndarray:
    """Return the part of a box to paint: its middle, for types whose convolutions overlap."""
    edge = (box[2:] - box[:2]) * OVERLAPPING.get(model_type, 0)
    return box + np.concatenate([edge, -edge])


QUERYING = (
    *("blip-2", "instructblip", "instructblipvideo", "idefics2", "aria"),
    *("kosmos-2", "kosmos-2.5"),
)


def fits(box: np.ndarray, size: tuple[int, int]) -> bool:
    """Whether a box contains no padding and at least one pixel."""
    within = (box[:2] >= -1).all() and box[2] <= size[0] + 1 and box[3] <= size[1] + 1
    return bool(within) and painted(Image.new("RGB", size), box) is not None
