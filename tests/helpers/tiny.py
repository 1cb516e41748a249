"""Tiny random models and inputs shared by tests; offline."""

import functools

import numpy as np
import torch
from PIL import Image

from xmodal_interp.models import VLM
from xmodal_interp.shapes import sample_scene
from xmodal_interp.shapes.tiny_models import build_processor, untrained

QUESTION = "What color is the red circle?"


@functools.cache
def tiny_vlm(family: str) -> VLM:
    """Return a random model with large query weights, so that its attention is not uniform."""
    model = untrained(family, seed=3)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "q_proj.weight" in name:
                weight.mul_(6)
    return VLM(model, build_processor(family))


def picture(width: int = 96, height: int = 96, seed: int = 0) -> Image.Image:
    """Return a scene with a few shapes."""
    return sample_scene(np.random.default_rng(seed), width=width, height=height).image()
