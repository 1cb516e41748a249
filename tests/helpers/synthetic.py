"""Build samples for tests: one character per position, and explicit attention matrices."""

import functools
from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from tests.helpers.tiny import QUESTION, picture, tiny_vlm
from xmodal_interp.attention import AttentionCall
from xmodal_interp.capturing.run import capture
from xmodal_interp.models import ImageGrid, load
from xmodal_interp.sample import Sample
from xmodal_interp.vocabulary import TOKEN_COLUMNS

KINDS = {"b": "special", "s": "text", "v": "image", "t": "text", "o": "text", "p": "padding"}
ROLES = {"b": "template", "s": "system", "v": "user", "t": "user", "o": "generated", "p": None}


def grid(rows: int, cols: int, cell: float = 10.0, *, class_token: bool = False) -> ImageGrid:
    """A grid of square cells, ``cell`` px wide; patches are the tokens, after the class token."""
    places = np.stack(np.divmod(np.arange(rows * cols), cols), axis=1)
    corners = places[:, ::-1] * cell
    boxes = np.concatenate([corners, corners + cell], axis=1)
    patches = np.concatenate([[[-1, -1]], places]) if class_token else places
    size = (int(cols * cell), int(rows * cell))
    return ImageGrid(*size, rows, cols, places, boxes, rows, cols, patches)


def tokens(layout: str, grids: Sequence[ImageGrid]) -> pd.DataFrame:
    """Token table. b: BOS, s: system, v: image, t: user's text, o: answer, p: padding.

    Spaces are ignored.
    """
    letters = layout.replace(" ", "")
    table = pd.DataFrame({name: [None] * len(letters) for name in TOKEN_COLUMNS})
    table["token"] = [f"{letter}{i}" for i, letter in enumerate(letters)]
    table["kind"] = [KINDS[letter] for letter in letters]
    table["role"] = [ROLES[letter] for letter in letters]
    table["start"] = [3 * i for i in range(len(letters))]
    table["end"] = [3 * i + 2 for i in range(len(letters))]
    runs = np.flatnonzero(table["kind"] == "image")
    if len(runs):
        numbers = np.repeat(np.arange(len(grids)), [len(g.places) for g in grids])
        table.loc[runs, "image"] = numbers
        table.loc[runs, ["row", "col"]] = np.concatenate([g.places for g in grids])
    integers = dict.fromkeys(("image", "row", "col", "start", "end"), "Int64")
    texts = dict.fromkeys(("token", "kind", "role"), "string")
    floats = dict.fromkeys(("x0", "y0", "x1", "y1"), "float64")
    return table.astype({**integers, **texts, **floats})


def dense_call(
    probs: Tensor | list[list[float]], *, layer: int = 0, **more: object
) -> AttentionCall:
    """A call that holds probabilities: ``[query, key]`` for one head, or ``[head, query, key]``."""
    matrix = torch.as_tensor(probs, dtype=torch.float32)
    matrix = matrix[None] if matrix.ndim == 2 else matrix
    given = {"tower": "language", "kind": "self", "causal": True, **more}
    return AttentionCall(
        layer=layer,
        module=f"layers.{layer}",
        call=0,
        q=None,
        k=None,
        scaling=1.0,
        dense=matrix[None],
        **given,
    )


def random_call(
    n_positions: int, *, layer: int = 0, n_heads: int = 4, spread: float = 2.0, **more: object
) -> AttentionCall:
    """A call that holds random queries and keys; grouped, two query heads per key head."""
    given = {"tower": "language", "kind": "self", "causal": True, **more}
    return AttentionCall(
        layer=layer,
        module=f"layers.{layer}",
        call=0,
        q=torch.randn(1, n_heads, n_positions, 8) * spread,
        k=torch.randn(1, max(1, n_heads // 2), n_positions, 8),
        scaling=8**-0.5,
        **given,
    )


def uniform_call(
    n_positions: int, *, layer: int = 0, n_heads: int = 2, **more: object
) -> AttentionCall:
    """A call whose attention is uniform over the visible keys."""
    return random_call(n_positions, layer=layer, n_heads=n_heads, spread=0.0, **more)


def sample_of(
    layout: str,
    calls: Sequence[AttentionCall],
    grids: Sequence[ImageGrid] = (),
    *,
    name: str = "fake",
    **more: object,
) -> Sample:
    """A sample of a layout (see ``tokens``) and calls; the answer begins at the first ``o``."""
    table = tokens(layout, grids)
    generated = np.flatnonzero(table["role"].eq("generated").fillna(value=False))
    return Sample(
        name=name,
        tokens=table,
        text=" ".join(table["token"]),
        question="?",
        answer="",
        n_prompt=int(generated[0]) if len(generated) else len(table),
        grids=tuple(grids),
        images=(),
        calls={(c.tower, c.kind, c.layer, c.call): c for c in calls},
        **{"provenance": {"model": "fake"}, **more},
    )


@functools.cache
def captured(family: str) -> Sample:
    """A sample of a tiny random model; cached, because no analysis changes a sample."""
    return capture(tiny_vlm(family), picture(), QUESTION, max_new_tokens=2)


@functools.cache
def shipped(*, blank: bool = False) -> Sample:
    """A sample of the shipped model, on a scene or on a grey image."""
    image = picture().point(lambda _: 128) if blank else picture()
    return capture(load(), image, QUESTION)
