"""The pictures of the demo, in the order of the report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from xmodal_interp import figures
from xmodal_interp.store import Store


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
    after, before, phrase = shown["after"], shown["before"], shown["phrase"]
    best = tables["best_head"].iloc[0]
    layer, head = int(best["layer"]), int(best["head"])
    pointed = store[0]
    made: list[Captioned] = []

    def picture(name: str, title: str, caption: str) -> Path:
        made.append(Captioned(folder / f"{name}.png", title, caption))
        return made[-1].path

    figures.overlay(
        pointed,
        [pointed.last],
        layer,
        head,
        boxes=[tuple(pointed.labels["box"])],
        path=picture(
            "pointing",
            f"Layer {layer}, head {head} finds the asked thing",
            "Where the last token of the prompt looks, just before the answer; the box is the "
            "truth.",
        ),
    )
    figures.layer_overlays(
        after,
        phrase,
        path=picture(
            "layers", f"“{phrase}”, layer by layer", "Mean of all heads; one scale for all panels."
        ),
    )
    figures.head_overlays(
        after,
        phrase,
        0,
        path=picture(
            "heads",
            f"“{phrase}” in the heads of layer 0",
            "Heads differ: some find the thing at once.",
        ),
    )
    figures.before_after(
        before,
        after,
        phrase,
        layer,
        head,
        path=picture(
            "before_after", "Before and after training", "The same head, phrase and image."
        ),
    )
    figures.rollout_overlay(
        tables["rollout"],
        after,
        path=picture(
            "rollout",
            "Attention rollout",
            "All layers together. In a causal model, plain rollout mostly shows the mask: the top "
            "rows are seen by all that follow.",
        ),
    )
    figures.rollout_overlay(
        tables["rollout"],
        after,
        "log2_ratio",
        path=picture(
            "rollout_lift",
            "Attention rollout beside that of uniform attention",
            "The same rollout over what uniform attention would give: what is left is the model's.",
        ),
    )
    figures.attention_matrix(
        after,
        layer,
        head,
        path=picture(
            "matrix",
            "The whole matrix, with its blocks",
            "Grey cells are hidden by the mask: image tokens cannot see text behind them.",
        ),
    )
    figures.token_patch_matrix(
        after,
        layer,
        head,
        path=picture("token_patch", "Text tokens by image tokens", "Rows of the image one by one."),
    )
    figures.head_grid(
        tables["pointing"],
        "hit",
        label="share of scenes",
        title="Peak on the asked thing, by head",
        path=picture(
            "pointing_heads",
            "Which heads point",
            "Share of scenes whose peak is on the asked thing.",
        ),
    )
    figures.layer_curves(
        tables["ratio"],
        "ratio",
        null="null",
        label="share of attention on the image",
        title="Attention of the last token on the image",
        path=picture(
            "ratio",
            "How much of the attention is on the image",
            "Of the last token of the prompt; dashed is uniform attention over what it can see.",
        ),
    )
    figures.head_grid(
        tables["pruning"][tables["pruning"]["question_kind"] == "all"],
        "log_prob_drop",
        label="log-probability lost (nats)",
        title="Each head made uniform",
        path=picture(
            "pruning", "What each head is worth", "Loss of log-probability when it is made uniform."
        ),
    )
    figures.pruning_curve_plot(
        tables["pruning_curve"],
        path=picture(
            "pruning_curve",
            "Removing more and more heads",
            "Least important first, most important first, and at random.",
        ),
    )
    figures.positional_profiles(
        tables["positions"],
        path=picture("positions", "Attention by distance", "As lift: 1 is uniform attention."),
    )
    figures.raster_profiles(
        tables["raster_profile"],
        path=picture(
            "raster",
            "Rows and columns of the image",
            "Beside a blank image: what is left without content is bias of position.",
        ),
    )
    return made
