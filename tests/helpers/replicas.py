"""Slow reference versions of the analyses, written from the equations of the papers.

They take whole probability matrices (``[head, query, key]``) and use plain loops.
"""

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np


def rollout_of_abnar_and_zuidema(attentions: np.ndarray) -> np.ndarray:
    """Abnar & Zuidema 2020, section 3: add the identity, normalise rows, multiply all layers.

    ``attentions``: ``[layer, head, query, key]``.
    """
    averaged = attentions.mean(axis=1)
    with_residual = averaged + np.eye(averaged.shape[-1])
    with_residual = with_residual / with_residual.sum(axis=-1, keepdims=True)
    joint = with_residual[0]
    for layer in range(1, len(with_residual)):
        joint = with_residual[layer] @ joint
    return joint


def rollout_of_a_variant(
    attentions: np.ndarray,
    alphas: Sequence[float],
    *,
    fusion: str = "mean",
    discard: float = 0.0,
    sinks: Sequence[int] = (),
) -> np.ndarray:
    """Rollout as a product of whole layers, row by row, with all options of the fast version."""
    n = attentions.shape[-1]
    product = np.eye(n)
    for layer, alpha in zip(attentions, alphas, strict=True):
        fused = {"mean": np.mean, "max": np.max, "min": np.min}[fusion](layer, axis=0)
        order = np.argsort(fused, axis=None, kind="stable")
        fused = fused.reshape(-1).copy()
        fused[order[: int(discard * n * n)]] = 0.0
        fused = fused.reshape(n, n)
        step = np.empty((n, n))
        for i in range(n):
            row = fused[i].copy()
            others = [j for j in range(n) if j not in sinks]
            if sinks and row[others].sum() > 0:
                former = row.sum()
                row[list(sinks)] = 0.0
                row *= former / row.sum()
            mixed = alpha * row + (1 - alpha) * np.eye(n)[i]
            step[i] = mixed / mixed.sum()
        product = step @ product
    return product


def seed_statistics(probs: np.ndarray, n_visual: int) -> dict[str, float]:
    """Statistics of an image-first sequence in which every query sees every key."""
    mean = probs.mean(axis=0)
    text = mean[n_visual:]
    return {
        "tv_mean": mean[n_visual:, :n_visual].mean(),
        "vt_mean": mean[:n_visual, n_visual:].mean(),
        "vv_mean": mean[:n_visual, :n_visual].mean(),
        "tt_mean": mean[n_visual:, n_visual:].mean(),
        "most_attended_patch": int(text[:, :n_visual].sum(axis=0).argmax()),
        "cross_modal_ratio": text[:, :n_visual].sum(axis=1).mean(),
    }


def ratio_of_a_query(
    row: np.ndarray, visible: np.ndarray, image: Sequence[int], sinks: Sequence[int] = ()
) -> tuple[float, float, float]:
    """Ratio, null and lift of one query, cell by cell; sinks are removed and the rest rescaled."""
    total = on_image = n_image = n_all = 0.0
    for key, p in enumerate(row):
        if key in sinks or not visible[key]:
            continue
        total, n_all = total + p, n_all + 1
        if key in image:
            on_image, n_image = on_image + p, n_image + 1
    ratio = on_image / total if sinks else on_image
    null = n_image / n_all
    return ratio, null, ratio / null


def block(
    probs: np.ndarray, visible: np.ndarray, queries: Sequence[int], keys: Sequence[int]
) -> dict[str, float]:
    """One block of one head's matrix, cell by cell."""
    total = n_cells = mass = null = lift = 0.0
    n_queries = 0
    for q in queries:
        seen = [k for k in keys if visible[q, k]]
        if not seen:
            continue
        n_queries += 1
        share = sum(probs[q, k] for k in seen)
        even = len(seen) / visible[q].sum()
        total, n_cells = total + share, n_cells + len(seen)
        mass, null, lift = mass + share, null + even, lift + share / even
    return {
        "mass": mass / n_queries,
        "mean": total / n_cells,
        "null": null / n_queries,
        "lift": lift / n_queries,
        "n_queries": n_queries,
        "n_visible_cells": n_cells,
    }


def fastv_allocation(
    probs: np.ndarray, outputs: Sequence[int], segment: Sequence[int]
) -> tuple[float, float]:
    """Chen et al. 2024: lambda (sum over output tokens) and epsilon of a segment; mean of heads."""
    mean = probs.mean(axis=0)
    allocation = sum(mean[q, k] for q in outputs for k in segment)
    return allocation, allocation / len(segment)


def received(probs: np.ndarray, visible: np.ndarray) -> np.ndarray:
    """Gu et al. 2025: the mean attention of each key over the queries that see it."""
    n = len(probs)
    out = np.zeros(n)
    for k in range(n):
        seeing = [q for q in range(n) if visible[q, k]]
        out[k] = sum(probs[q, k] for q in seeing) / len(seeing)
    return out


def profile(
    probs: np.ndarray,
    visible: np.ndarray,
    queries: Sequence[int],
    keys: Sequence[int],
    axis: str,
    width: int,
) -> dict[int, tuple[float, float, float, int]]:
    """By start of a bin: mean probability, mean 1/v, mean of probability times v, cell count.

    ``v`` is the number of keys that the query sees.
    """
    bins: dict[int, list[tuple[float, float, float]]] = {}
    for q in queries:
        for k in keys:
            if visible[q, k]:
                place = q - k if axis == "distance" else k
                v = visible[q].sum()
                start = width * math.floor(place / width)
                bins.setdefault(start, []).append((probs[q, k], 1 / v, probs[q, k] * v))
    return {
        start: (*(float(x) for x in np.mean(cells, axis=0)), len(cells))
        for start, cells in bins.items()
    }


def entropy(row: np.ndarray) -> float:
    """Entropy of one row, in nats."""
    return -sum(p * math.log(p) for p in row if p > 0)


def attention_distance(probs: np.ndarray, places: np.ndarray, height: float, width: float) -> float:
    """Dosovitskiy et al. 2021: mean distance in px, without class tokens (place -1).

    Rows are rescaled to sum to 1 over patches.
    """
    patches = [i for i, (row, _) in enumerate(places) if row >= 0]
    means = []
    for q in patches:
        within = sum(probs[q, k] for k in patches)
        reach = 0.0
        for k in patches:
            dy = (places[q][0] - places[k][0]) * height
            dx = (places[q][1] - places[k][1]) * width
            reach += probs[q, k] / within * math.hypot(dy, dx)
        means.append(reach)
    return float(np.mean(means))


def uniform_output(values: np.ndarray, visible: np.ndarray, n_heads: int) -> np.ndarray:
    """Output of uniform attention: for each query the mean of the values that it can see.

    ``values``: ``[kv_head, key, d_head]``; ``visible``: ``[query, key]``; out ``[head, query, d]``.
    """
    out = np.zeros((n_heads, len(visible), values.shape[-1]))
    for head in range(n_heads):
        of_group = values[head // (n_heads // len(values))]
        for query, row in enumerate(visible):
            seen = [of_group[key] for key in range(len(row)) if row[key]]
            out[head, query] = sum(seen) / len(seen)
    return out


def knocked_out(
    probs: np.ndarray, queries: Sequence[int], keys: Sequence[int], *, renormalise: bool
) -> np.ndarray:
    """Geva et al. 2023: blocked cells become 0, except a query's attention to itself."""
    out = probs.copy()
    for head in range(len(probs)):
        for query in queries:
            for key in keys:
                if key != query:
                    out[head, query, key] = 0
            if renormalise:
                out[head, query] /= out[head, query].sum()
    return out


def answer_scores(logits: np.ndarray, ids: Sequence[int], n_prompt: int) -> tuple[float, ...]:
    """Accuracy, mean log-probability and first margin of the answer after a prompt.

    ``logits``: ``[position, vocabulary]`` of prompt and answer.
    """
    right, log_probs, margin = True, [], 0.0
    for position in range(n_prompt, len(ids)):
        row, gold = logits[position - 1].astype(float), ids[position]
        right = right and int(row.argmax()) == gold
        log_probs.append(row[gold] - math.log(sum(math.exp(x) for x in row)))
        if position == n_prompt:
            margin = row[gold] - max(x for word, x in enumerate(row) if word != gold)
    return float(right), sum(log_probs) / len(log_probs), float(margin)


def pointed_at(
    row: np.ndarray, boxes: np.ndarray, box: Sequence[float], *, criterion: str
) -> tuple[bool, float]:
    """Pointing game and energy of one map, computed token by token from overlap areas."""
    peak = max(range(len(row)), key=lambda token: row[token])
    x0, y0, x1, y1 = boxes[peak]
    if criterion == "centre":
        hit = box[0] <= (x0 + x1) / 2 <= box[2] and box[1] <= (y0 + y1) / 2 <= box[3]
    else:
        hit = x0 < box[2] and box[0] < x1 and y0 < box[3] and box[1] < y1
    inside = 0.0
    for mass, (left, top, right, bottom) in zip(row, boxes, strict=True):
        width = max(0.0, min(right, box[2]) - max(left, box[0]))
        height = max(0.0, min(bottom, box[3]) - max(top, box[1]))
        inside += mass * width * height / ((right - left) * (bottom - top))
    return hit, inside / sum(row)


def bca(values: Sequence[float], n: int, seed: int, student: float) -> tuple[float, float]:
    """Efron 1987, section 3: the BCa interval of a mean. Each end is the quantile of the resampled
    means at

        Phi(z0 + (z0 + z) / (1 - a (z0 + z)))

    ``z`` is Student's quantile (``student``) times ``sqrt(N / (N - 1))`` (Hesterberg 2015).
    """
    normal, size = NormalDist(), len(values)
    rng = np.random.default_rng(seed)
    means = []
    for _ in range(n):
        drawn = [values[i] for i in rng.integers(size, size=size)]
        means.append(sum(drawn) / len(drawn))
    estimate = sum(values) / size
    z0 = normal.inv_cdf(sum(mean < estimate for mean in means) / n)
    left_out = [(sum(values) - value) / (size - 1) for value in values]
    middle = sum(left_out) / size
    skewed = sum((middle - one) ** 3 for one in left_out)
    a = skewed / (6 * sum((middle - one) ** 2 for one in left_out) ** 1.5)
    ends = []
    for sign in (-1, 1):
        z = z0 + sign * student * math.sqrt(size / (size - 1))
        ends.append(float(np.quantile(means, normal.cdf(z0 + z / (1 - a * z)))))
    return ends[0], ends[1]


def wilson(hits: int, n: int) -> tuple[float, float]:
    """Wilson 1927: the rates that a score test at 5% does not reject, by grid search."""
    z = NormalDist().inv_cdf(0.975)
    rates = np.linspace(0, 1, 1_000_001)
    kept = rates[np.abs(hits / n - rates) <= z * np.sqrt(rates * (1 - rates) / n)]
    return float(kept[0]), float(kept[-1])
