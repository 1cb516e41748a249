"""Samples for figures: cropped and resized images, cross-attention, and constructed samples."""

import dataclasses
import functools

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

import xmodal_interp as xi
from tests.helpers import synthetic
from tests.helpers.tiny import QUESTION, picture, tiny_vlm
from xmodal_interp.sample import Sample

SIZES = {"llava": (160, 96), "qwen2_vl": (128, 72), "mllama": (160, 96)}


@functools.cache
def sample_of(family: str, question: str = QUESTION) -> Sample:
    """Return a captured sample with a rectangular image and two generated tokens."""
    return xi.capture(tiny_vlm(family), picture(*SIZES[family]), question, max_new_tokens=2)


def fake(layout: str = "bsvvvvvvtto", rows: int = 2, cols: int = 3, **more: object) -> Sample:
    """Return a constructed sample: 2 x 3 image tokens of 10 px, four heads, one layer."""
    torch.manual_seed(1)
    call = more.pop("call", None) or synthetic.random_call(len(layout), **more)
    sample = synthetic.sample_of(layout, [call], [synthetic.grid(rows, cols)])
    image = Image.fromarray(np.zeros((rows * 10, cols * 10, 3), np.uint8))
    return dataclasses.replace(sample, images=(image,), question="why?", answer="so")


def titles(figure: Figure) -> list[str]:
    """Return the titles of a figure's axes."""
    return [axes.get_title() for axes in figure.axes if axes.get_title()]


def words(figure: Figure) -> str:
    """Return the text of a figure outside its axes."""
    return "\n".join(text.get_text() for text in figure.texts)


def panels(figure: Figure) -> list[Axes]:
    """Return the axes with a map over an image."""
    return [axes for axes in figure.axes if len(axes.images) == 2]


def bars(figure: Figure) -> list[Axes]:
    """Return the axes of the colour bars."""
    return [axes for axes in figure.axes if hasattr(axes, "_colorbar")]
