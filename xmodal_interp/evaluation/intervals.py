"""How sure a number is: bootstrap intervals over samples, and corrections for many tests.

Samples are what is independent. Tokens, rows and heads of one sample are not: an interval from
resampled tokens is far too narrow. So values come one row per sample, or with the cluster (the
sample, the image) that each belongs to, and whole clusters are drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from xmodal_interp.analysis.resampling import LEVEL, cluster_numbers
from xmodal_interp.errors import InputError

Values = Sequence[float] | np.ndarray
Statistic = Callable[[np.ndarray], float]


class Interval(NamedTuple):
    """A statistic and its percentile bootstrap interval.

    Attributes:
        estimate: The statistic of the samples as they are.
        low: Low end.
        high: High end.
        n: How many samples (or clusters of them) were drawn each time.
        n_draws: How many times.
        seed: Seed of the draws.
    """

    estimate: float
    low: float
    high: float
    n: int
    n_draws: int
    seed: int


def bootstrap_interval(
    values: Values,
    statistic: Statistic = np.mean,
    *,
    paired: Values | None = None,
    clusters: Sequence[Hashable] | None = None,
    n: int = 1000,
    level: float = LEVEL,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap interval of a statistic of samples (Efron 1979).

    Args:
        values: ``[sample]`` or ``[sample, ...]``: what the statistic is given, samples drawn with
            replacement along the first axis.
        statistic: From such an array to a number.
        paired: Values of a second method on the same samples: the interval is that of the
            statistic's difference, ``statistic(values) - statistic(paired)``, both from the same
            draws.
        clusters: A label per sample; samples of one label are drawn together.
        n: How many draws.
        level: Coverage aimed at.
        seed: Seed of the draws.

    Raises:
        InputError: No samples, NaN among them, or lengths that differ.

    Example:
        >>> bootstrap_interval([1, 1, 1, 0], n=500).estimate
        0.75
    """
    first = _checked("values", values, None)
    second = None if paired is None else _checked("paired", paired, len(first))
    numbers = np.arange(len(first))
    if clusters is not None:
        if len(clusters) != len(first):
            raise InputError(
                f"clusters must have one label per sample; got {len(clusters)} for {len(first)}."
            )
        numbers = cluster_numbers(clusters)
    members = [np.flatnonzero(numbers == number) for number in range(int(numbers.max()) + 1)]
    rng = np.random.default_rng(seed)

    def estimate(index: np.ndarray) -> float:
        one = float(statistic(first[index]))
        return one if second is None else one - float(statistic(second[index]))

    drawn = [
        estimate(
            np.concatenate([members[i] for i in rng.integers(len(members), size=len(members))])
        )
        for _ in range(n)
    ]
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2]).tolist()
    return Interval(estimate(np.arange(len(first))), low, high, len(members), n, seed)


def holm_adjusted(p_values: Values) -> Float[np.ndarray, " test"]:
    """P-values corrected for the number of tests (Holm 1979): the k-th smallest of m, times m - k.

    With k counted from 0, made monotone and cut at 1. Rejecting where the adjusted value is below
    alpha keeps the chance of any false rejection below alpha, whatever the dependence.

    Raises:
        InputError: A number that is no probability.

    Example:
        >>> holm_adjusted([0.01, 0.04, 0.03]).tolist()
        [0.03, 0.06, 0.06]
    """
    p = np.asarray(p_values, dtype=float)
    if p.ndim != 1 or not ((p >= 0) & (p <= 1)).all():
        raise InputError(f"P-values are a row of numbers from 0 to 1; got {p.tolist()}.")
    order = np.argsort(p, kind="stable")
    scaled = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(scaled, 1)
    return adjusted


def _checked(name: str, values: Values, length: int | None) -> np.ndarray:
    array = np.asarray(values, dtype=float)
    if array.ndim == 0 or len(array) == 0 or np.isnan(array).any():
        raise InputError(
            f"{name} must hold a number for each sample, and at least one; got shape {array.shape} "
            f"with {int(np.isnan(array).sum())} NaN."
        )
    if length is not None and len(array) != length:
        raise InputError(
            f"{name} must hold the same samples as values; got {len(array)} for {length}."
        )
    return array
