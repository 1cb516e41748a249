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
"""Name of the file, title, caption, and what draws it to a ``path``."""


@dataclass(frozen=True)
class Captioned:
    """A picture and what there is to see on it."""

    path: Path
    title: str
    caption: str


def draw_all(
    shown: dict[str, Any], tables: dict[str, pd.DataFrame], store: Store, folder: Path
) -> list[Captioned]:
    """Draw everything; the files are named for what they show."""
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
    """What one sample shows, in the head that points best where there is only one."""
    after, phrase = shown["after"], shown["phrase"]
    pointed = store[0]
    box = tuple(pointed.labels["box"])
    return [
        (
            "pointing",
            f"Layer {layer}, head {head} finds the asked thing",
            "Where the last token of the prompt looks, just before the answer; the box is the "
            "truth.",
            partial(figures.overlay, pointed, [pointed.last], layer, head, boxes=[box]),
        ),
        (
            "layers",
            f"“{phrase}”, layer by layer",
            "Mean of all heads; one scale for all panels.",
            partial(figures.layer_overlays, after, phrase),
        ),
        (
            "heads",
            f"“{phrase}” in the heads of layer 0",
            "Heads differ: some find the thing at once.",
            partial(figures.head_overlays, after, phrase, 0),
        ),
        (
            "before_after",
            "Before and after training",
            "The same head, question and image: where the last token of the prompt looks, in both "
            "models.",
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
            "All layers together. In a causal model, plain rollout mostly shows the mask: the top "
            "rows are seen by all that follow.",
            partial(figures.rollout_overlay, rollout, after),
        ),
        (
            "rollout_lift",
            "Attention rollout beside that of uniform attention",
            "The same rollout over what uniform attention would give: what is left is the model's.",
            partial(figures.rollout_overlay, rollout, after, "log2_ratio"),
        ),
        (
            "matrix",
            "The whole matrix, with its blocks",
            "Grey cells are hidden by the mask: image tokens cannot see text behind them.",
            partial(figures.attention_matrix, after, layer, head),
        ),
        (
            "token_patch",
            "Text tokens by image tokens",
            "Rows of the image one by one.",
            partial(figures.token_patch_matrix, after, layer, head),
        ),
    ]


def _of_tables(tables: dict[str, pd.DataFrame]) -> list[_Planned]:
    """What all samples show together."""
    pruning = tables["pruning"]
    return [
        (
            "pointing_heads",
            "Which heads point",
            "Share of scenes whose peak is on the asked thing.",
            partial(
                figures.head_grid,
                tables["pointing"],
                "hit",
                label="share of scenes",
                title="Peak on the asked thing, by head",
            ),
        ),
        (
            "ratio",
            "How much of the attention is on the image",
            "Of the last token of the prompt; dashed is uniform attention over what it can see.",
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
            "What each head is worth",
            "Loss of log-probability when it is made uniform.",
            partial(
                figures.head_grid,
                pruning[pruning["question_kind"] == "all"],
                "log_prob_drop",
                label="log-probability lost (nats)",
                title="Each head made uniform",
            ),
        ),
        (
            "pruning_curve",
            "Removing more and more heads",
            "Least important first, most important first, and at random.",
            partial(figures.pruning_curve_plot, tables["pruning_curve"]),
        ),
        (
            "positions",
            "Attention by distance",
            "As lift: 1 is uniform attention.",
            partial(figures.positional_profiles, tables["positions"]),
        ),
        (
            "raster",
            "Rows and columns of the image",
            "Beside a blank image: what is left without content is bias of position.",
            partial(figures.raster_profiles, tables["raster_profile"]),
        ),
    ]
