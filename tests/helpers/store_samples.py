"""Samples for the tests of the store: constructed ones, and ones of the shipped model."""

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor

import xmodal_interp as xi
from xmodal_interp.attention import AttentionCall
from xmodal_interp.models import ImageGrid, Thumbnail
from xmodal_interp.sample import Sample
from xmodal_interp.shapes.scenes import ask_all, sample_scene
from xmodal_interp.vocabulary import TOKEN_COLUMNS

SETTINGS = {"model": "none", "kept": {"layers": None, "values": False}}
N = 5  # number of positions of a constructed sample


@functools.cache
def shipped(name: str = "llava") -> xi.VLM:
    return xi.load(name)


def items(n: int, *, first: int = 0) -> list[dict[str, Any]]:
    """Return questions of different lengths, each about a different scene."""
    made = []
    for i in range(first, first + n):
        scene = sample_scene(np.random.default_rng(i))
        questions = ask_all(scene, np.random.default_rng(i))
        question = questions[i % len(questions)]
        made.append({"image": scene.image(), "prompt": question.text, "answer": question.answer})
    return made


def call(layer: int = 0, **changes: Any) -> AttentionCall:
    """Return a call with two query heads, one key head, five queries and five keys."""
    make = torch.Generator().manual_seed(layer)
    fields = {
        "tower": "language",
        "kind": "self",
        "layer": layer,
        "module": f"model.layers.{layer}.self_attn",
        "call": 0,
        "q": torch.randn(1, 2, N, 3, generator=make),
        "k": torch.randn(1, 1, N, 3, generator=make),
        "scaling": 1 / 3,
        "causal": True,
    }
    return AttentionCall(**{**fields, **changes})


def sample(name: str = "one", calls: Iterable[AttentionCall] = (), **changes: Any) -> Sample:
    """Return a sample with one image of 1 x 2 tokens, then three words."""
    tokens = pd.DataFrame(
        {column: [None] * N for column in TOKEN_COLUMNS},
        index=pd.RangeIndex(N, name="position"),
    ).assign(
        token=["<image>"] * 2 + ["is", "it", "\u00e9t\u00e9"], kind=["image"] * 2 + ["text"] * 3
    )
    tokens["image"] = [0, 0, None, None, None]
    strings = dict.fromkeys(("token", "kind", "role", "view"), "string")
    numbers = ("image", "row", "col", "start", "end", "tile", "video", "frame")
    integers = dict.fromkeys(numbers, "Int64")
    floats = dict.fromkeys(("x0", "y0", "x1", "y1"), "float64")
    grid = ImageGrid(
        width=8,
        height=4,
        rows=1,
        cols=2,
        places=np.array([[0, 0], [0, 1]]),
        boxes=np.array([[0.0, 0, 4, 4], [4, 0, 8, np.nan]]),
        patch_rows=1,
        patch_cols=2,
        patch_places=np.array([[-1, -1], [0, 0], [0, 1]]),
    )
    pixels = np.random.default_rng(0).integers(0, 256, (4, 8, 3), dtype=np.uint8)
    fields = {
        "name": name,
        "tokens": tokens.astype({**strings, **integers, **floats}),
        "text": "is it \u00e9t\u00e9",
        "question": "is it",
        "answer": "\u00e9t\u00e9",
        "n_prompt": 4,
        "grids": (grid,),
        "images": (Image.fromarray(pixels),),
        "calls": {(c.tower, c.kind, c.layer, c.call): c for c in (list(calls) or [call()])},
        "labels": {"box": [1, 2.5], "is_hard": None},
        "provenance": {"layers": {"language.self": [0, 1, 2, 3]}},
    }
    return Sample(**{**fields, **changes})


def assert_same(found: Sample, expected: Sample) -> None:
    """Assert that two samples have equal fields and bit-identical tensors."""
    for name in ("name", "text", "question", "answer", "n_prompt"):
        assert getattr(found, name) == getattr(expected, name)
    pd.testing.assert_frame_equal(found.tokens, expected.tokens)
    assert (found.cross_keys is None) == (expected.cross_keys is None)
    if found.cross_keys is not None:
        pd.testing.assert_frame_equal(found.cross_keys, expected.cross_keys)
    for one, other in zip(found.images, expected.images, strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
    for one, other in zip(found.grids, expected.grids, strict=True):
        assert_same_fields(vars(one), vars(other))
    for one, other in zip(found.video_grids, expected.video_grids, strict=True):
        assert_same_fields(vars(one), vars(other))
    for one, other in zip(found.videos, expected.videos, strict=True):
        assert one.fps == other.fps
        np.testing.assert_array_equal(one.pixels(), other.pixels())
    assert list(found.calls) == list(expected.calls)
    for key, other in expected.calls.items():
        one, other_fields = (dict(vars(call)) for call in (found.calls[key], other))
        for each in (one, other_fields):
            each.pop("memo", None)  # results that were computed from the call
        assert_same_fields(one, other_fields)
        assert_same_bits(found.calls[key].probs(), other.probs())
        assert_same_bits(found.calls[key].visible(), other.visible())


def assert_same_fields(found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, Tensor):
            assert_same_bits(found[name], value)
        elif isinstance(value, np.ndarray):
            np.testing.assert_array_equal(found[name], value, strict=True)
        elif isinstance(value, Thumbnail):
            assert_same_fields(vars(found[name]), vars(value))
        else:
            assert type(found[name]) is type(value), name
            assert found[name] == value, name


def assert_same_bits(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
