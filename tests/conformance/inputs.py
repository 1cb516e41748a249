"""Inputs for the forward of a model: pixels, a prompt, and the extras of its record."""

from __future__ import annotations

import inspect
from typing import Any

from transformers import PreTrainedModel

from tests.conformance import extras, pictures, prompts
from tests.conformance.overrides import Record
from tests.helpers.tiny_configs import SIDE

Inputs = dict[str, Any]


def inputs_for(model: PreTrainedModel, record: Record) -> Inputs:
    """Return inputs of two rows with an image each; the shorter prompt is padded.

    Args:
        model: The model.
        record: The record of its type.
    """
    n_images = sum(record.images_per_row)
    side = record.side or getattr(pictures.vision_of(model.config), "image_size", SIDE)
    layout = getattr(pictures, record.pixels or _layout(model))
    images = layout(model.config, n_images, pictures.first(side))
    inputs: Inputs = getattr(prompts, record.prompt)(model, record, images)
    for name in record.extras:
        inputs |= getattr(extras, name)(model, inputs)
    return inputs


def _layout(model: PreTrainedModel) -> str:
    takes = inspect.signature(model.forward).parameters
    return "packed" if "image_grid_thw" in takes else "square"
