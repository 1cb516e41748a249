"""Which image token hears of a change in the picture: the one whose input to the model changes."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import nn

from tests.models.real import prompt as written
from tests.models.real import real, settled
from xmodal_interp.models import FAMILIES, VLM
from xmodal_interp.models.labelling import Prompt

QUESTION = "where is the red circle?"
INTO_LAYERS = {"granite4_vision"}
"""Types that add the image's features inside of the language model, not to its input."""
READ_BY = {"git": "git.encoder", "idefics": "model.gated_cross_attn_layers.0.cross_attn"}
"""Where a model that reads the image's features has no module of its own for its language part."""
FEATURES = ("encoder_hidden_states", "key_value_states", "inputs_embeds")
OVERLAPPING = {"florence2", "got_ocr2", "pp_formulanet"}
"""Types whose convolutions also look at half of the neighbours: there the middle is painted."""


class _SeenError(Exception):
    """The inputs of the language model are known; the rest need not run."""


@functools.cache
def vlm_of(model_type: str) -> VLM:
    """The real processor with a model whose vision tower does not mix positions."""
    known, _ = real(model_type)
    model, processor = _plain(type(known)(copy.deepcopy(known.config))), settled(model_type)
    language = language_of(model)
    inside = set(language.modules()) if model_type not in INTO_LAYERS else set()
    for module in model.modules():
        if module not in inside and _mixes(module):
            module.register_forward_hook(_nothing)
    return VLM(model, processor)


@torch.no_grad()
def _plain(model: nn.Module) -> nn.Module:
    """Weights under which what is next to a position does not drown what stands at it."""
    made = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        if weight.ndim > 1:
            nn.init.normal_(weight, std=weight[0].numel() ** -0.5, generator=made)
        else:
            weight.add_(torch.randn(weight.shape, generator=made), alpha=0.1)
    return model.eval()


def language_of(model: nn.Module) -> nn.Module:
    """What reads the image tokens, among the text tokens or beside them."""
    if model.config.model_type in READ_BY:
        return model.get_submodule(READ_BY[model.config.model_type])
    if not FAMILIES[model.config.model_type].in_sequence:
        return model.get_decoder()
    if not model.config.is_encoder_decoder:
        before = getattr(getattr(model.base_model, "encoder", None), "language_model", None)
        return model.get_decoder() if before is None else before
    encoder = model.get_encoder()
    return getattr(encoder, "text_model", encoder)


def _mixes(module: nn.Module) -> bool:
    """Whether a module is attention or a depthwise convolution that adds to a residual stream."""
    if isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1:
        return True
    name = type(module).__name__
    return name.endswith("Attention") and not any(
        type(child).__name__.endswith("Attention") for child in module.children()
    )


def _nothing(_module: nn.Module, _given: Any, output: Any) -> Any:
    if isinstance(output, tuple):
        return (torch.zeros_like(output[0]), *output[1:])
    return torch.zeros_like(output)


def embeddings(vlm: VLM, images: list[Image.Image]) -> tuple[np.ndarray, Prompt]:
    """What the language model is given at each position, ``[position, d]``, and the positions.

    Where text reaches the image by cross-attention: at each key.
    """
    question = QUESTION if vlm.family.reads_text else ""
    if vlm.processor.chat_template is None and not vlm.family.in_front and question:
        question = written(vlm.family.model_type, len(images), QUESTION)
    inputs, (prompt,) = vlm.prepare([images], [question])
    return language_inputs(vlm, inputs), prompt


def places_of(prompt: Prompt) -> pd.DataFrame:
    """What stands at each position that :func:`embeddings` gives."""
    if prompt.cross_keys is not None:
        return prompt.cross_keys
    return prompt.tokens[: prompt.n_encoder or len(prompt.tokens)]


def language_inputs(vlm: VLM, inputs: dict[str, Any]) -> np.ndarray:
    """What the language model is given at each position of one sample, ``[position, d]``."""
    seen: list[torch.Tensor] = []

    def look(_module: nn.Module, given: tuple, named: dict) -> None:
        found = next((named[name] for name in FEATURES if named.get(name) is not None), None)
        if found is None:
            found = next(each for each in given if torch.is_tensor(each) and each.ndim == 3)
        seen.append(found.detach())
        raise _SeenError

    with torch.no_grad():
        if vlm.family.model_type in INTO_LAYERS:
            output = vlm.model(**inputs, use_cache=False, output_hidden_states=True)
            seen.append(output.hidden_states[-1])
        else:
            with _hook(language_of(vlm.model), look), suppress(_SeenError):
                vlm.model(**inputs, use_cache=False)
    return seen[0][0].float().numpy()


@contextmanager
def _hook(module: nn.Module, look: Any) -> Iterator[None]:
    handle = module.register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def textured(width: int, height: int) -> Image.Image:
    """A picture with no even ground: there, norms would make much of the least of changes."""
    noise = np.random.default_rng(0).integers(0, 120, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def painted(image: Image.Image, box: np.ndarray) -> Image.Image | None:
    """The image with a box filled; None if less than a pixel of it is in the image.

    A larger box is filled but for a pixel at its edge, which resizing would carry to the next one.
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


def changes(vlm: VLM, image: Image.Image, box: np.ndarray, plain: np.ndarray) -> np.ndarray:
    """How much each position's input changes when a box is painted, ``[position]``."""
    if vlm.family.model_type in OVERLAPPING:
        quarter = (box[2:] - box[:2]) / 4
        box = box + np.concatenate([quarter, -quarter])
    other, _ = embeddings(vlm, [painted(image, box)])
    return np.linalg.norm(other - plain, axis=1)
