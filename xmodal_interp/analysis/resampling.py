"""The bootstrap over samples, as a kernel on bare arrays.

What is resampled is whole clusters of samples (those that share an image), never heads, tokens or
rows: they are not independent. All series are resampled with the same draws, so differences between
them, and a difference to a base run taken before, are paired.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from os import PathLike

import numpy as np
from jaxtyping import Float, Int

from xmodal_interp.models import ImageLike

LEVEL = 0.95  # of every interval


def shown(pictures: Iterable[ImageLike]) -> Hashable:
    """What tells whether two samples show the same pictures: their paths, else their pixels."""
    return tuple(
        str(one) if isinstance(one, (str, PathLike)) else hash((one.size, one.tobytes()))
        for one in pictures
    )


def cluster_numbers(labels: Sequence[Hashable]) -> Int[np.ndarray, " sample"]:
    """Labels as numbers 0, 1, ... in order of first appearance."""
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(label, len(numbers)) for label in labels], dtype=np.int64)


def cluster_draws(n_clusters: int, n_draws: int, seed: int) -> Int[np.ndarray, "draw cluster"]:
    """How often each cluster is drawn, with replacement."""
    shares = np.full(n_clusters, 1 / n_clusters)
    return np.random.default_rng(seed).multinomial(n_clusters, shares, size=n_draws)


def mean_intervals(
    values: Float[np.ndarray, "series sample"],
    clusters: Int[np.ndarray, " sample"],
    *,
    n_draws: int,
    seed: int,
    level: float = LEVEL,
) -> tuple[Float[np.ndarray, " series"], Float[np.ndarray, " series"]]:
    """Percentile bootstrap interval of the mean over samples, for many series at once.

    Args:
        values: One row per series.
        clusters: The cluster of each sample, numbered from 0.
        n_draws: How many resamples.
        seed: Seed of the draws.
        level: Coverage aimed at.

    Returns:
        Low and high end of each series' interval.
    """
    weights = cluster_draws(int(clusters.max()) + 1, n_draws, seed)[:, clusters].astype(float)
    means = (weights @ values.T) / weights.sum(1, keepdims=True)  # [draw, series]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return low, high


def known_mean_intervals(
    values: Float[np.ndarray, "series sample"],
    clusters: Int[np.ndarray, " sample"],
    *,
    n_draws: int,
    seed: int,
) -> tuple[Float[np.ndarray, " series"], Float[np.ndarray, " series"]]:
    """``mean_intervals`` of each series over the samples in which it has a number (not NaN)."""
    ends = np.full((2, len(values)), np.nan)
    known = ~np.isnan(values)
    for pattern in np.unique(known, axis=0):
        same = (known == pattern).all(1)
        if pattern.any():
            among = cluster_numbers(clusters[pattern].tolist())
            found = mean_intervals(values[same][:, pattern], among, n_draws=n_draws, seed=seed)
            ends[:, same] = found
    return ends[0], ends[1]
