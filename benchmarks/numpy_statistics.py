"""The statistics of the public analyses, computed by numpy from whole attention matrices.

This is what a user writes today after a forward with ``attn_implementation="eager"`` and
``output_attentions=True``: one ``[head, query, key]`` array per layer. ``public_analyses.py``
measures its cost next to the cost of the package, and a test compares the results of both.

The functions assume the prompt of the benchmark: one causal sequence without padding or generated
tokens, and text after the images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

Attentions = Sequence[np.ndarray]  # per layer [head, query, key]
Statistic = Callable[[Attentions, "Layout"], dict[str, np.ndarray]]
SINK, MIN_QUERIES, WINDOW, N_BINS = 0.3, 8, 16, 32


@dataclass(frozen=True)
class Layout:
    """What is at each position of the sequence.

    Attributes:
        kind: ``[position]``, the kind of each token.
        image: ``[position]``, the index of the image of each token; -1 for others.
        first_text: The first text token after the images.
    """

    kind: np.ndarray
    image: np.ndarray
    first_text: int

    @cached_property
    def visual(self) -> np.ndarray:
        """``[position]``, whether a token belongs to an image."""
        return self.image >= 0

    @cached_property
    def text(self) -> np.ndarray:
        """Positions of the text after the images."""
        after = np.flatnonzero(self.kind == "text")
        return after[after >= self.first_text]

    @cached_property
    def seen(self) -> np.ndarray:
        """``[query]``, the number of keys that each query sees."""
        return np.arange(1, len(self.kind) + 1)

    @cached_property
    def seen_by(self) -> np.ndarray:
        """``[key]``, the number of queries that see each key."""
        return self.seen[::-1]


def image_mass(attentions: Attentions, layout: Layout) -> dict[str, np.ndarray]:
    return {"mass": np.stack([_mass(a, layout.text, layout.visual) for a in attentions])}


def token_ratio(attentions: Attentions, layout: Layout) -> dict[str, np.ndarray]:
    """Return values ``[layer, head, query]``."""
    found: dict[str, list[np.ndarray]] = {"ratio": [], "lift": [], "sink_free_ratio": []}
    null = layout.visual.sum() / layout.seen[layout.text]
    for a in attentions:
        rows = a[:, layout.text]
        ratio = rows[:, :, layout.visual].sum(-1)
        kept = ~_sinks(a, layout)
        kept[:, 0] = False
        free = (rows * (kept & layout.visual)[:, None]).sum(-1) / (rows * kept[:, None]).sum(-1)
        has_image = (kept & layout.visual).any(-1)[:, None]
        free = np.where(has_image, free, np.nan)
        for name, values in zip(found, (ratio, ratio / null, free), strict=True):
            found[name].append(values)
    return {name: np.stack(values) for name, values in found.items()}


def cross_modal_ratio(attentions: Attentions, layout: Layout) -> dict[str, np.ndarray]:
    return {name: each.mean(-1) for name, each in token_ratio(attentions, layout).items()}


def rollout(rows: Sequence[int]) -> Statistic:
    """Return the rollout of some rows, by vectors times matrices."""

    def of(attentions: Attentions, layout: Layout) -> dict[str, np.ndarray]:
        shares = np.eye(len(layout.kind), dtype=np.float64)[list(rows)]
        for a in reversed(attentions):
            shares = 0.5 * shares @ a.mean(0, dtype=np.float64) + 0.5 * shares
        return {"rollout": shares}

    return of


def rollout_matrix(attentions: Attentions, layout: Layout) -> dict[str, np.ndarray]:
    """Return the product of all layers, as the authors of rollout compute it."""
    half = 0.5 * np.eye(len(layout.kind))
    product = np.eye(len(layout.kind))
    for a in attentions:
        product = (0.5 * a.mean(0, dtype=np.float64) + half) @ product
    return {"rollout": product}


def attention_sinks(attentions: Attentions, layout: Layout) -> dict[str, np.ndarray]:
    """Return the share that each key receives, ``[layer, head, key]``, and whether it is a sink."""
    received = np.stack([a.sum(1) / layout.seen_by for a in attentions])
    return {"received": received, "sink": (received > SINK) & (layout.seen_by >= MIN_QUERIES)}


def sink_rate(attentions: Attentions, layout: Layout) -> dict[str, np.ndarray]:
    sink = attention_sinks(attentions, layout)["sink"]
    return {"first": sink[..., 0].mean(1), "any": sink.any(-1).mean(1)}


def block_statistics(attentions: Attentions, layout: Layout) -> dict[str, np.ndarray]:
    """Return values ``[layer, head, block]``; blocks T-V, V-T, V-V, T-T (query, key)."""
    sides = {"T": ~layout.visual, "V": layout.visual}
    found: dict[str, list[np.ndarray]] = {"mass": [], "mean": [], "lift": []}
    for query, key in ("TV", "VT", "VV", "TT"):
        n_keys = sides[key].cumsum()
        queries = np.flatnonzero(sides[query] & (n_keys > 0))
        n_seen = n_keys[queries]
        mass = np.stack([_mass(a, queries, sides[key]) for a in attentions])
        found["mass"].append(mass.mean(-1))
        found["mean"].append(mass.sum(-1) / n_seen.sum())
        found["lift"].append((mass / (n_seen / layout.seen[queries])).mean(-1))
    return {name: np.stack(values, -1) for name, values in found.items()}


def cross_modal_summary(attentions: Attentions, layout: Layout) -> dict[str, np.ndarray]:
    """Return ``tv_mean``, ... of the last layer, the image mass and the most attended patch."""
    last = attentions[-1:]
    means = block_statistics(last, layout)["mean"].mean((0, 1))
    named = dict(zip(("tv_mean", "vt_mean", "vv_mean", "tt_mean"), means, strict=True))
    received = last[0][:, layout.text][:, :, layout.visual].sum((0, 1))
    ratio = image_mass(last, layout)["mass"].mean()
    return named | {"cross_modal_ratio": ratio, "most_attended_patch": received.argmax()}


def attention_entropy(attentions: Attentions, _: Layout) -> dict[str, np.ndarray]:
    """Return the mean over rows that see more than one key, ``[layer, head]``."""
    found = []
    for a in attentions:
        logs = np.log(a, where=a > 0, out=np.zeros_like(a))
        found.append(-(a * logs).sum(-1)[:, 1:].mean(-1))
    return {"entropy": np.stack(found)}


def attention_allocation(attentions: Attentions, layout: Layout) -> dict[str, np.ndarray]:
    """Return the allocation of the last position on the image, ``[layer, head]``."""
    last = np.array([len(layout.kind) - 1])
    mass = np.stack([_mass(a, last, layout.visual)[:, 0] for a in attentions])
    return {"allocation_mean": mass}


def recency_index(attentions: Attentions, layout: Layout) -> dict[str, np.ndarray]:
    """Return the mean share of the last positions over text that sees more keys than these."""
    text = np.flatnonzero(layout.kind == "text")
    beyond = text[layout.seen[text] > WINDOW]
    places = np.arange(len(layout.kind))
    near = (beyond[:, None] - places >= 0) & (beyond[:, None] - places < WINDOW)
    return {"mass": np.stack([(a[:, beyond] * near).sum(-1).mean(-1) for a in attentions])}


def raster_map(attentions: Attentions, layout: Layout) -> dict[str, np.ndarray]:
    """Return the lift of each token of image 0, ``[layer, head, token]``."""
    first = layout.image == 0
    mass = np.stack([a[:, layout.text][:, :, first].sum(1) for a in attentions])
    return {"lift": mass / mass.mean(-1, keepdims=True)}


def positional_bias(attentions: Attentions, layout: Layout) -> dict[str, np.ndarray]:
    """Return means over bins of distance and key, ``[layer, head, block, axis, bin]``."""
    n = len(layout.kind)
    width = -(-n // N_BINS)
    sides = {"text": layout.kind == "text", "image": layout.visual}
    found = np.full((len(attentions), attentions[0].shape[0], 3, 2, N_BINS), np.nan)
    for b, block in enumerate(("text->text", "text->image", "image->image")):
        query, key = (np.flatnonzero(sides[side]) for side in block.split("->"))
        visible = query[:, None] >= key
        bins = (
            (query[:, None] - key)[visible] // width,
            np.broadcast_to(key, visible.shape)[visible] // width,
        )
        for i, index in enumerate(bins):
            cells = np.bincount(index, minlength=N_BINS)
            for layer, a in enumerate(attentions):
                for head in range(len(a)):
                    inside = a[head][np.ix_(query, key)][visible]
                    total = np.bincount(index, inside, minlength=N_BINS)
                    with np.errstate(invalid="ignore"):
                        found[layer, head, b, i] = total / cells
    return {"raw": found}


def _mass(a: np.ndarray, queries: np.ndarray, keys: np.ndarray) -> np.ndarray:
    return a[:, queries][:, :, keys].sum(-1)


def _sinks(a: np.ndarray, layout: Layout) -> np.ndarray:
    return (a.sum(1) / layout.seen_by > SINK) & (layout.seen_by >= MIN_QUERIES)
