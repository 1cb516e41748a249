"""Head pruning: remove one head at a time and measure how much the scores of known answers drop.

Following Michel et al. 2019 (arXiv:1905.10650, section 3),

    drop = score of the intact model - score without the head

for three scores (:mod:`xmodal_interp.analysis.teacher_forcing`), each with an interval over samples
(:mod:`xmodal_interp.analysis.resampling`). Intact and pruned model answer the same questions, so
the drops are paired differences.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
import pandas as pd

from xmodal_interp.analysis.frames import stamped
from xmodal_interp.analysis.resampling import (
    LEVEL,
    Series,
    cluster_numbers,
    mean_intervals,
    shown,
)
from xmodal_interp.analysis.selecting import Layers
from xmodal_interp.analysis.teacher_forcing import (
    METRICS,
    Removal,
    ablation_of,
    origin,
    removal_scores,
)
from xmodal_interp.arguments import checked
from xmodal_interp.attention import entries_of, numbers
from xmodal_interp.hooks.ablation import AblationMode
from xmodal_interp.hooks.heads import checked_heads, head_counts
from xmodal_interp.models import VLM
from xmodal_interp.models.batching import batches_of
from xmodal_interp.models.entries import ItemDict, Items, listed, visuals_of
from xmodal_interp.vocabulary import Tower

ALL_KINDS = "all"


@checked
def head_pruning(  # noqa: PLR0913 - one experiment, every option with a default
    vlm: VLM,
    items: Items,
    *,
    mode: AblationMode = "uniform",
    layers: Layers = None,
    heads: Layers = None,
    tower: Tower = "language",
    batch_size: int = 32,
    n_bootstrap: int = 1000,
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """Measure how much the scores of known answers drop without each head (Michel et al. 2019).

    Args:
        vlm: Model and processor.
        items: Dicts with ``image`` or ``video`` (or several), ``prompt``, ``answer``, and
            optionally ``kind``. If given, the table has separate rows for each ``kind``.
        mode: How a head is removed: ``"uniform"``, ``"zero"`` or ``"mean"``; see ``ablate_heads``.
            Means are taken over the prompts of the items, separately for image and text positions.
        layers: Layers, all if not given.
        heads: Heads of each layer, all if not given.
        tower: Part of the model.
        batch_size: The largest number of questions per forward. Only prompts of equal length are
            batched together.
        n_bootstrap: Number of bootstrap resamples for the intervals. Questions about the same image
            are resampled together.
        seed: Seed of the resamples.
        progress: Whether to show a progress bar.

    Returns:
        One row per layer, head and question kind (``"all"`` first): ``tower, kind, layer, head,
        question_kind``, then ``accuracy_drop`` (0 to 1), ``log_prob_drop`` (nats per answer token),
        ``margin_drop`` (logits), each with ``_low`` and ``_high`` ends of its 95% interval
        (NaN with fewer than 2 clusters), ``n`` (number of items), and ``n_clusters`` (number of
        distinct images).
        ``.attrs["base"]`` holds the scores of the intact model, by question kind.

    Raises:
        LayerError: A layer or head does not exist.
        InputError: There are no items, or an item lacks an image, a prompt or an answer.
        UnsupportedModelError: Positions of the model depend on later ones.
    """
    chosen = chosen_heads(vlm, tower, layers, heads)
    items = listed(items)
    batches = batches_of(vlm, items, batch_size=batch_size)
    removals: list[Removal] = [{}, *({layer: [head]} for layer, head in chosen)]
    ablation = ablation_of(vlm, batches, mode, tower)
    scores = removal_scores(vlm, batches, removals, ablation, progress=progress)
    drops = scores[:1] - scores[1:]
    clusters = cluster_numbers([_shown(*pair) for pair in enumerate(items)])
    tables = []
    for kind, of_kind in _of_kinds(items).items():
        table = pd.DataFrame(chosen, columns=["layer", "head"])
        table.insert(0, "tower", tower)
        table.insert(1, "kind", "self")
        table["question_kind"] = kind
        _, numbered = np.unique(clusters[of_kind], return_inverse=True)
        for place, metric in enumerate(METRICS):
            series = drops[:, place, of_kind]
            kind_of: Series = "rate difference" if metric == "accuracy" else "mean"
            low, high = mean_intervals(
                series, numbered, n_draws=n_bootstrap, seed=seed, series=kind_of
            )
            table[f"{metric}_drop"] = series.mean(1)
            table[f"{metric}_drop_low"], table[f"{metric}_drop_high"] = low, high
        table["n"] = len(of_kind)
        table["n_clusters"] = numbered.max() + 1
        tables.append(table)
    rows = pd.concat(tables).sort_values(["layer", "head"], kind="stable", ignore_index=True)
    stamped(
        rows,
        analysis="head_pruning",
        parameters={
            "mode": mode,
            "layers": layers,
            "heads": heads,
            "tower": tower,
            "n_bootstrap": n_bootstrap,
            "seed": seed,
            "level": LEVEL,
        },
        provenance=[origin(vlm)],
        n_samples=len(items),
    )
    rows.attrs["base"] = {
        kind: dict(zip(METRICS, scores[0][:, of_kind].mean(1).tolist(), strict=True))
        for kind, of_kind in _of_kinds(items).items()
    }
    return rows


def chosen_heads(vlm: VLM, tower: Tower, layers: Layers, heads: Layers) -> list[tuple[int, int]]:
    """Return the chosen ``(layer, head)`` pairs of a tower, counted from 0, sorted.

    Raises:
        LayerError: A layer or head does not exist.
    """
    counts = head_counts(vlm.model, tower)
    row = None if heads is None else entries_of(heads)
    if row is not None and not len(row):
        numbers(heads, "head")
    wanted = {
        layer: range(counts.get(layer, 0)) if heads is None else heads
        for layer in (counts if layers is None else numbers(layers, "layer", max(counts) + 1))
    }
    found = checked_heads(wanted, counts, f"{tower} self-attention")
    if heads is None:
        found = {layer: tuple(range(counts[layer])) for layer in found}
    return [(layer, head) for layer in sorted(found) for head in sorted(set(found[layer]))]


def _of_kinds(items: Sequence[ItemDict]) -> dict[str, np.ndarray]:
    """Return the indices of the items of each question kind, starting with all items."""
    found: dict[str, list[int]] = {ALL_KINDS: list(range(len(items)))}
    for index, item in enumerate(items):
        if item.get("kind") is not None:
            found.setdefault(str(item["kind"]), []).append(index)
    return {kind: np.array(of_kind) for kind, of_kind in found.items()}


def _shown(index: int, item: ItemDict) -> Hashable:
    """Return a key that is equal for items with the same images and videos."""
    images, videos = visuals_of(item, title=f"Item {index}")
    return shown([*images, *(frame for video in videos for frame in video.frames)])
