"""Tiny models of every image-text type that transformers registers, and their inputs."""

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
from tests.conformance.videos import video_inputs
from tests.helpers.random_weights import randomize
from tests.helpers.tiny_configs import tiny_config

STEPS = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}


@dataclass(frozen=True)
class Tiny:
    """A tiny random model and its inputs.

    Attributes:
        model: The model, in float32 and evaluation mode.
        inputs: Arguments of the forward.
        generates: Whether ``model.generate(**generate_inputs)`` works.
        generate_inputs: Arguments of ``generate`` for three steps; empty if it does not work.
        others: Other calls, of attention that neither forward nor ``generate`` runs.
    """

    model: PreTrainedModel
    inputs: dict[str, Any]
    generates: bool
    generate_inputs: dict[str, Any]
    others: tuple[Callable[[], Any], ...] = ()


def types() -> list[str]:
    """Return every image-text-to-text model type, in the order of transformers."""
    return list(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)


def representatives() -> list[str]:
    """Return a third of the types: one for each way to take images and text, then every third."""
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
    """Build a tiny model of a type and its inputs.

    Args:
        model_type: One of :func:`types`, or of ``DUAL_ENCODERS``.
        seed: Seed of weights and inputs.
        attn_implementation: The attention backend; the type's own default if not given.
        video: Whether to make videos instead of images; only for the types in ``CLIPS``.
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
