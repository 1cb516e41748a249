"""Head pruning: remove attention heads and measure how the scores of known answers change.

Michel et al. 2019 (arXiv:1905.10650):

* ``head_pruning`` (section 3) removes one head at a time. The importance of a head is

      drop = score of the intact model - score without the head

  for three scores (:mod:`xmodal_interp.analysis.answers`), each with an interval over samples
  (:mod:`xmodal_interp.analysis.resampling`). Intact and pruned model answer the same questions, so
  the drops are paired differences.
* ``pruning_curve`` (section 4) removes more and more heads, from none to all, in order of
  increasing importance. The curve is compared with the reverse order and with random orders. If the
  importance carries no information, the curve lies within the range of the random orders.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd

from xmodal_interp.analysis.answers import (
    METRICS,
    Removal,
    origin,
    removal_scores,
)
from xmodal_interp.analysis.resampling import (
    LEVEL,
    ValueKind,
    cluster_numbers,
    mean_intervals,
    picture_key,
)
from xmodal_interp.analysis.selection import Layers, refuse_text
from xmodal_interp.analysis.tables import stamped
from xmodal_interp.arguments import as_list, checked
from xmodal_interp.attention import entries_of, numbers
from xmodal_interp.errors import InputError
from xmodal_interp.hooks.ablation import AblationMode
from xmodal_interp.hooks.attention_modules import checked_heads, head_counts
from xmodal_interp.models import VLM
from xmodal_interp.models.known_answers import ItemDict, Items, listed, visuals_of
from xmodal_interp.vocabulary import Tower

ALL_KINDS = "all"
Order = Literal["increasing", "decreasing", "random"]
Head = tuple[int, int]
_KEPT = 0.95  # of the accuracy of the intact model


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
    removals: list[Removal] = [{}, *({layer: [head]} for layer, head in chosen)]
    scores = removal_scores(
        vlm, items, removals, mode=mode, tower=tower, batch_size=batch_size, progress=progress
    )
    drops = scores[:1] - scores[1:]
    clusters = cluster_numbers([_picture_key(*pair) for pair in enumerate(items)])
    tables = []
    for kind, of_kind in _by_question_kind(items).items():
        table = pd.DataFrame(
            [(tower, "self", layer, head, kind) for layer, head in chosen],
            columns=["tower", "kind", "layer", "head", "question_kind"],
        )
        _, numbered = np.unique(clusters[of_kind], return_inverse=True)
        for place, metric in enumerate(METRICS):
            series = drops[:, place, of_kind]
            value_kind: ValueKind = "rate difference" if metric == "accuracy" else "mean"
            low, high = mean_intervals(
                series, numbered, n_draws=n_bootstrap, seed=seed, value_kind=value_kind
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
        for kind, of_kind in _by_question_kind(items).items()
    }
    return rows


@checked
def pruning_curve(  # noqa: PLR0913 - one experiment, every option with a default
    vlm: VLM,
    items: Items,
    ranking: pd.DataFrame | Literal["random"],
    *,
    by: str = "log_prob_drop",
    orders: Sequence[Order] = ("increasing", "decreasing", "random"),
    n_random: int = 5,
    steps: int = 11,
    keep_per_layer: int = 0,
    mode: AblationMode = "uniform",
    tower: Tower | None = None,
    batch_size: int = 32,
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """Score known answers while more and more heads are removed (Michel et al. 2019).

    Args:
        vlm: Model and processor.
        items: Dicts with ``image``, ``prompt`` and ``answer``. Use other items than for the
            ranking, which is overfitted to the items that it was computed from.
        ranking: A table with the columns ``layer``, ``head`` and an importance, such as the result
            of ``head_pruning`` (if it has the column ``question_kind``, its rows ``"all"`` are
            used); or ``"random"`` for random orders only. Heads that are not in the table are never
            removed.
        by: The column with the importance.
        orders: ``"increasing"`` removes the least important head first, ``"decreasing"`` the most
            important one, ``"random"`` removes heads in random order.
        n_random: Number of random orders.
        steps: Number of points of each curve, including no head removed and all removed.
        keep_per_layer: Number of heads that are kept in every layer: the last ones in the order of
            removal.
        mode: How a head is removed: ``"uniform"``, ``"zero"`` or ``"mean"``; see ``ablate_heads``.
        tower: Part of the model. If not given, the tower of the ranking, or ``"language"`` if the
            ranking has no column ``tower``.
        batch_size: The largest number of questions per forward.
        seed: Seed of the random orders.
        progress: Whether to show a progress bar.

    Returns:
        One row per order, draw and step: ``tower, kind, order, draw`` (the number of the random
        order; 0 for the other orders), ``n_removed, share_removed`` (of all heads of the tower,
        ranked or not), then ``accuracy`` (0 to 1), ``log_prob`` (nats per token), ``margin``
        (logits), and ``n`` (number of items). ``.attrs["summary"]`` has for each order and draw
        ``auc`` (mean accuracy over the removed share, trapezoid rule) and ``share_at_95``: the
        largest removed share up to which accuracy stays at or above 95% of the accuracy of the
        intact model (NaN if that is 0).

    Raises:
        LayerError: The ranking names a head that does not exist.
        InputError: An order or column is unknown, ``steps`` is below 2, or the ranking is of
            another tower or of cross-attention.
        UnsupportedModelError: Positions of the model depend on later ones.
    """
    refuse_text(orders, "orders", "['increasing']")
    named = ("random",) if isinstance(ranking, str) else tuple(as_list(orders, "orders"))
    _check(named, steps, n_random)
    tower = _tower_of(ranking, tower)
    heads = _ranked(vlm, ranking, by, tower)
    n_heads = len(chosen_heads(vlm, tower, None, None))
    rng = np.random.default_rng(seed)
    sequences: list[tuple[Order, int, list[Head]]] = []
    for order in named:
        if order == "random":
            for draw in range(n_random):
                sequences.append((order, draw, [heads[i] for i in rng.permutation(len(heads))]))
        else:
            sequences.append((order, 0, heads if order == "increasing" else heads[::-1]))
    removals: list[Removal] = [{}]
    keys: list[dict[str, Any]] = []
    for order, draw, sequence in sequences:
        removable = _sparing(sequence, keep_per_layer)
        for n_removed in np.unique(np.linspace(0, len(removable), steps).round().astype(int)):
            share = n_removed / n_heads
            keys.append(
                {"order": order, "draw": draw, "n_removed": n_removed, "share_removed": share}
            )
            removals.append(_by_layer(removable[:n_removed]))
    items = listed(items)
    scores = removal_scores(
        vlm, items, removals, mode=mode, tower=tower, batch_size=batch_size, progress=progress
    ).mean(2)
    table = pd.DataFrame([{"tower": tower, "kind": "self"} | key for key in keys])
    table[list(METRICS)] = scores[1:]
    table["n"] = len(items)
    stamped(
        table,
        analysis="pruning_curve",
        parameters={
            "by": by,
            "orders": named,
            "n_random": n_random,
            "steps": steps,
            "keep_per_layer": keep_per_layer,
            "mode": mode,
            "tower": tower,
            "seed": seed,
        },
        provenance=[origin(vlm)],
        n_samples=len(items),
    )
    table.attrs["summary"] = _summary(table)
    return table


def chosen_heads(vlm: VLM, tower: Tower, layers: Layers, heads: Layers) -> list[Head]:
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


def _by_question_kind(items: Sequence[ItemDict]) -> dict[str, np.ndarray]:
    """Return the indices of the items of each question kind, starting with all items."""
    found: dict[str, list[int]] = {ALL_KINDS: list(range(len(items)))}
    for index, item in enumerate(items):
        if item.get("kind") is not None:
            found.setdefault(str(item["kind"]), []).append(index)
    return {kind: np.array(of_kind) for kind, of_kind in found.items()}


def _picture_key(index: int, item: ItemDict) -> Hashable:
    """Return a key that is equal for items with the same images and videos."""
    images, videos = visuals_of(item, title=f"Item {index}")
    return picture_key([*images, *(frame for video in videos for frame in video.frames)])


def _check(named: Sequence[str], steps: int, n_random: int) -> None:
    known = get_args(Order)
    unknown = [order for order in named if order not in known]
    if unknown or not named:
        raise InputError(f"orders must be among {', '.join(known)}; got {list(named)!r}.")
    if steps < 2:
        raise InputError(f"steps must be at least 2; got {steps}.")
    if "random" in named and n_random < 1:
        raise InputError(f"n_random must be at least 1 for the order 'random'; got {n_random}.")


def _tower_of(ranking: pd.DataFrame | str, tower: Tower | None) -> Tower:
    """Return the given tower, or the tower of the ranking."""
    given: dict[str, Any] = {"tower": tower, "kind": "self"}
    for name, wanted in given.items():
        if isinstance(ranking, str) or name not in ranking.columns:
            continue
        found = ranking[name].unique().tolist()
        if len(found) != 1 or wanted not in (None, found[0]):
            required = f"only {wanted!r}" if wanted is not None else "a single value"
            raise InputError(
                f"The ranking's column {name!r} holds {' and '.join(map(repr, found)) or 'no rows'}"
                f"; it must hold {required}. Select rows of one tower's self-attention, or pass "
                "another tower=."
            )
        given[name] = found[0]
    chosen: Tower = given["tower"] or "language"
    return chosen


def _ranked(vlm: VLM, ranking: pd.DataFrame | str, by: str, tower: Tower) -> list[Head]:
    """Return the ranked heads, from the least to the most important."""
    if isinstance(ranking, str):
        if ranking != "random":
            raise InputError(
                "ranking must be a table with the columns layer, head and an importance, or "
                f"'random'; got {ranking!r}."
            )
        return chosen_heads(vlm, tower, None, None)
    missing = [name for name in ("layer", "head", by) if name not in ranking.columns]
    if missing:
        raise InputError(
            f"The ranking lacks the columns {', '.join(missing)}; it has "
            f"{', '.join(ranking.columns)}. Name the column with the importance with by=."
        )
    rows = ranking
    if "question_kind" in rows.columns and rows["question_kind"].eq(ALL_KINDS).any():
        rows = rows[rows["question_kind"].eq(ALL_KINDS)]
    if rows.duplicated(["layer", "head"]).any() or rows[by].isna().any():
        raise InputError(
            f"The ranking has {len(rows)} rows for "
            f"{len(rows[['layer', 'head']].drop_duplicates())} heads, and "
            f"{int(rows[by].isna().sum())} NaN in {by!r}. Pass one row with a number for each head."
        )
    ordered = rows.sort_values(by, kind="stable")
    heads = list(zip(ordered["layer"].tolist(), ordered["head"].tolist(), strict=True))
    for layer, head in heads:
        chosen_heads(vlm, tower, [layer], [head])
    return heads


def _sparing(sequence: Sequence[Head], keep_per_layer: int) -> list[Head]:
    """Return the sequence without the last ``keep_per_layer`` heads of each layer."""
    left: dict[int, int] = {}
    for layer, _ in sequence:
        left[layer] = left.get(layer, 0) + 1
    removable = []
    for layer, head in sequence:
        if left[layer] > keep_per_layer:
            left[layer] -= 1
            removable.append((layer, head))
    return removable


def _by_layer(heads: Sequence[Head]) -> Removal:
    removal: dict[int, list[int]] = {}
    for layer, head in heads:
        removal.setdefault(layer, []).append(head)
    return removal


def _summary(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Return the area under each accuracy curve and the removable share, per order and draw."""
    found = []
    for (order, draw), curve in table.groupby(["order", "draw"], sort=False):
        share, accuracy = curve["share_removed"].to_numpy(), curve["accuracy"].to_numpy()
        steps = np.diff(share) * (accuracy[1:] + accuracy[:-1]) / 2
        area = steps.sum() / share[-1] if share[-1] > 0 else accuracy[0]
        fell = np.flatnonzero(accuracy < _KEPT * accuracy[0])
        kept = share[fell[0] - 1] if len(fell) else share[-1]
        kept = kept if accuracy[0] > 0 else np.nan  # 95% of 0 is always reached
        found.append({"order": order, "draw": draw, "auc": float(area), "share_at_95": float(kept)})
    return found
