"""Tiny models of every image-text type that transformers registers, and their inputs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from tests.helpers.clips import clip, noise
from tests.helpers.families import DUAL_ENCODERS, RECORDS, Record
from tests.helpers.real import build_model, inputs, real
from xmodal_interp.models import FAMILIES

STEPS = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
QUESTIONS = ["what is it?", "where is the red circle, and how many?"]


@dataclass(frozen=True)
class Tiny:
    """A tiny random model and its inputs.

    Attributes:
        model: The model, in float32 and evaluation mode.
        inputs: Arguments of the forward, for two rows.
        generate_inputs: Arguments of ``generate`` for three steps; empty if it cannot generate.
        others: Other calls, of attention that neither forward nor ``generate`` runs.
    """

    model: PreTrainedModel
    inputs: dict[str, Any]
    generate_inputs: dict[str, Any]
    others: tuple[Callable[[], Any], ...] = ()


def types() -> list[str]:
    """Return every image-text-to-text model type, in the order of transformers."""
    return list(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)


def representatives() -> list[str]:
    """Return a third of the types: one for each way to make inputs, then every third."""
    chosen: dict[Any, str] = {}
    for name in types():
        record = RECORDS[name]
        ways = record.sound, record.others, record.generate, record.not_square, record.given
        chosen.setdefault((FAMILIES[name].rule, *map(bool, ways)), name)
    names = [*chosen.values(), *types()[::3]]
    return list(dict.fromkeys(names))[: len(types()) // 3]


def record_of(name: str) -> Record:
    """Return the record of a type in transformers' mapping, or of a dual encoder."""
    return DUAL_ENCODERS[name] if name in DUAL_ENCODERS else RECORDS[name]


def reads_videos(name: str) -> bool:
    """Whether the processor and the model of a type read videos."""
    record = RECORDS[name]
    return bool(record.videos) and record.n_frames is None and not record.no_video


def tiny(name: str, *, video: bool = False) -> Tiny:
    """Build a tiny model of a type and its inputs: two prompts, the shorter one left-padded.

    Args:
        name: One of :func:`types`, or of ``DUAL_ENCODERS``.
        video: Whether to pass a video for each prompt, instead of an image and a sound.
    """
    record = record_of(name)
    if record.given:
        model, made = build_model(record), _given(record)
    else:
        model, made = copy.deepcopy(real(name)[0]), _real_inputs(name, video=video)
    generate_inputs = made | STEPS | record.generate if model.can_generate() else {}
    others = () if video else tuple(partial(call, model, made) for call in record.others)
    return Tiny(model, made, generate_inputs, others)


def _real_inputs(name: str, *, video: bool) -> dict[str, Any]:
    record = RECORDS[name]
    if video:
        other = clip(2 if "videos" in record.alike else 4, 1, 48, 64)
        return inputs(name, [[], []], QUESTIONS, videos=[clip(2, 0, 64, 48), other])
    draw = np.random.default_rng(0)
    sounds = [draw.standard_normal(n).astype(np.float32) for n in (6400, 4160)]
    images = [[noise(140, 60, 0)], [noise(*(140, 60) if "images" in record.alike else (48, 48), 1)]]
    return inputs(name, images, QUESTIONS, sounds=sounds if record.sound else ())


def _given(record: Record) -> dict[str, Any]:
    """Return the inputs that a record holds, with random numbers for each shape."""
    noise = torch.Generator().manual_seed(0)
    made: dict[str, Any] = {}
    for name, value in record.given.items():
        if isinstance(value, tuple):
            made[name] = torch.randn(value, generator=noise)
        else:
            made[name] = torch.tensor(value) if isinstance(value, list) else value
    return made
