"""Clips of noise, and models that read them."""

import numpy as np
from PIL import Image

import xmodal_interp as xi
from tests.helpers.real import real

QUESTION = "where is the red circle?"


def noise(width: int, height: int, seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def clip(n_frames: int, seed: int, width: int = 96, height: int = 64) -> xi.Video:
    return xi.Video([noise(width, height, 10 * seed + i) for i in range(n_frames)], fps=2.0)


def vlm_of(model_type: str) -> xi.VLM:
    return xi.VLM(*real(model_type))
