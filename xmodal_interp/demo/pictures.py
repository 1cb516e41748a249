"""The pictures of the demo, in the order of the report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from xmodal_interp import figures
from xmodal_interp.store import Store

_Planned = tuple[str, str, str, Callable[..., object]]
"""File name, title, caption, and the function that draws the picture to ``path``."""


@dataclass(frozen=True)
class Captioned:
    """A picture with its title and caption."""

    path: Path
    title: str
    caption: str


def draw_all(
    shown: dict[str, Any], tables: dict[str, pd.DataFrame], store: Store, folder: Path
) -> list[Captioned]:
    """Draw all pictures to a folder, and return them with their captions."""
    folder.mkdir(exist_ok=True)
    best = tables["best_head"].iloc[0]
    layer, head = int(best["layer"]), int(best["head"])
    made: list[Captioned] = []
    for name, title, caption, draw in (
        *_of_samples(shown, tables["rollout"], store, layer, head),
        *_of_tables(tables),
    ):
        path = folder / f"{name}.png"
        draw(path=path)
        made.append(Captioned(path, title, caption))
    return made


def _of_samples(
    shown: dict[str, Any], rollout: pd.DataFrame, store: Store, layer: int, head: int
) -> list[_Planned]:
    """Return the pictures of single samples; those of one head use ``layer`` and ``head``."""
    after, phrase = shown["after"], shown["phrase"]
    pointed = store[0]
    box = tuple(pointed.labels["box"])
    return [
        (
            "pointing",
            f"Layer {layer}, head {head} attends to the object asked about",
            "Attention of the last token of the prompt, just before the answer. The box is the "
            "true box of the object.",
            partial(figures.overlay, pointed, [pointed.last], layer, head, boxes=[box]),
        ),
        (
            "layers",
            f"“{phrase}”, layer by layer",
            "Mean of all heads, with one colour scale for all panels.",
            partial(figures.layer_overlays, after, phrase),
        ),
        (
            "heads",
            f"“{phrase}” in the heads of layer 0",
            "Heads differ: some attend to the object already in the first layer.",
            partial(figures.head_overlays, after, phrase, 0),
        ),
        (
            "before_after",
            "Before and after training",
            "Attention of the last token of the prompt in both models, for the same head, question "
            "and image.",
            partial(
                figures.before_after,
                shown["pointed_before"],
                pointed,
                [pointed.last],
                layer,
                head,
                boxes=[box],
            ),
        ),
        (
            "rollout",
            "Attention rollout",
            "All layers combined. In a causal model, rollout mostly shows the mask: all later "
            "tokens can attend to the top rows of the image.",
            partial(figures.rollout_overlay, rollout, after),
        ),
        (
            "rollout_lift",
            "Attention rollout divided by that of uniform attention",
            "The same rollout divided by the rollout of uniform attention, which removes the "
            "effect of the mask.",
            partial(figures.rollout_overlay, rollout, after, "log2_ratio"),
        ),
        (
            "matrix",
            "The whole matrix, with its blocks",
            "Grey cells are hidden by the mask: image tokens cannot attend to the text after them.",
            partial(figures.attention_matrix, after, layer, head),
        ),
        (
            "token_patch",
            "Text tokens by image tokens",
            "Columns are the image tokens, ordered by rows of the image.",
            partial(figures.token_patch_matrix, after, layer, head),
        ),
    ]


def _of_tables(tables: dict[str, pd.DataFrame]) -> list[_Planned]:
    """Return the pictures of the tables, over all samples."""
    pruning = tables["pruning"]
    return [
        (
            "pointing_heads",
            "Heads that attend to the object asked about",
            "Share of scenes in which a head's peak is on the object.",
            partial(
                figures.head_grid,
                tables["pointing"],
                "hit",
                label="share of scenes",
                title="Peak on the object asked about, by head",
            ),
        ),
        (
            "ratio",
            "Share of attention on the image",
            "Attention of the last token of the prompt. The dashed line is uniform attention over "
            "its visible keys.",
            partial(
                figures.layer_curves,
                tables["ratio"],
                "ratio",
                null="null",
                label="share of attention on the image",
                title="Attention of the last token on the image",
            ),
        ),
        (
            "pruning",
            "Importance of each head",
            "Loss of the answer's log-probability when the head's attention is made uniform.",
            partial(
                figures.head_grid,
                pruning[pruning["question_kind"] == "all"],
                "log_prob_drop",
                label="log-probability lost (nats)",
                title="Loss when a head is made uniform",
            ),
        ),
        (
            "pruning_curve",
            "Removing more and more heads",
            "Accuracy as heads are removed: least important first, most important first, and in "
            "random order.",
            partial(figures.pruning_curve_plot, tables["pruning_curve"]),
        ),
        (
            "positions",
            "Attention by distance",
            "Lift over uniform attention, which is 1.",
            partial(figures.positional_profiles, tables["positions"]),
        ),
        (
            "raster",
            "Rows and columns of the image",
            "Dotted lines are a blank image: attention that remains without content is a bias of "
            "position.",
            partial(figures.raster_profiles, tables["raster_profile"]),
        ),
    ]
