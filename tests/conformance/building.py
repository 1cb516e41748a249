"""Tiny models of every type that transformers registers for images and text, and their inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from tests.conformance import methods
from tests.conformance.inputs import inputs_for
from tests.conformance.overrides import CLIPS, DUAL_ENCODERS, RECORDS, Record
from tests.conformance.shrinking import tiny_config
from tests.conformance.videos import video_inputs
from tests.conformance.weights import randomize

STEPS = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}


@dataclass(frozen=True)
class Tiny:
    """A tiny random model and what to call it with.

    Attributes:
        model: In float32, in eval mode.
        inputs: For ``model(**inputs)``.
        generates: Whether ``model.generate(**generate_inputs)`` works.
        generate_inputs: For ``model.generate``, which then makes three steps; empty if it can't.
        others: What else the model offers that runs attention which neither of these reaches.
    """

    model: PreTrainedModel
    inputs: dict[str, Any]
    generates: bool
    generate_inputs: dict[str, Any]
    others: tuple[Callable[[], Any], ...] = ()


def types() -> list[str]:
    """Every model type of image and text in, text out, as transformers lists them."""
    return list(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)


def representatives() -> list[str]:
    """A third of them: the first type of each way to take images and text, then every third."""
    chosen = {}
    for name in types():
        record = RECORDS.get(name, Record())
        chosen.setdefault((record.pixels, record.prompt, record.extras), name)
    names = [*chosen.values(), *types()[::3]]
    return list(dict.fromkeys(names))[: len(types()) // 3]


def tiny(
    model_type: str,
    *,
    seed: int = 0,
    attn_implementation: str | None = None,
    video: bool = False,
) -> Tiny:
    """A tiny model of a type.

    Args:
        model_type: One of :func:`types`, or of ``DUAL_ENCODERS``.
        seed: Seed of weights and inputs.
        attn_implementation: The attention backend; the type's own default if not given.
        video: Whether its inputs are videos, not images; only for the types in ``CLIPS``.
    """
    record = (RECORDS if model_type in types() else DUAL_ENCODERS).get(model_type, Record())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _model(model_type, record, attn_implementation)
        randomize(model, seed)
        inputs = video_inputs(model, CLIPS[model_type]) if video else inputs_for(model, record)
    generates = bool(model.can_generate()) and record.generates
    generate_inputs = inputs | STEPS | record.generate if generates else {}
    others = (
        () if video else tuple(partial(getattr(methods, m), model, inputs) for m in record.methods)
    )
    return Tiny(model, inputs, generates, generate_inputs, others)


def _model(name: str, record: Record, attn_implementation: str | None) -> PreTrainedModel:
    class_name = record.model_class or MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[name]
    config = tiny_config(CONFIG_MAPPING[record.model_type or name], record.config)
    model_class = getattr(transformers, class_name)
    return model_class._from_config(
        config, attn_implementation=attn_implementation, dtype=torch.float32
    ).eval()
