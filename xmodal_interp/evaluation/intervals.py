"""Confidence intervals over samples, and corrections for multiple tests.

Samples are independent; tokens, rows and heads of one sample are not, and an interval from
resampled tokens is far too narrow. Pass one value per sample, or also the cluster (for example the
image) of each value: whole clusters are resampled. :mod:`xmodal_interp.analysis.bootstrap`
describes the methods.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from xmodal_interp.analysis.bootstrap import (
    FEW,
    LEVEL,
    Series,
    bca_interval,
    cluster_numbers,
    mean_intervals,
    series_of,
    student_interval,
)
from xmodal_interp.arguments import MOST, as_list, checked, real_number, whole_number
from xmodal_interp.errors import InputError, quoted

Values = Iterable[float] | np.ndarray
Statistic = Callable[[np.ndarray], float]


class Interval(NamedTuple):
    """A statistic and its interval.

    Attributes:
        estimate: The statistic of the given samples.
        low: Low end; NaN with fewer than 2 clusters.
        high: High end; NaN with fewer than 2 clusters.
        n: Number of clusters, or of samples if no clusters are given.
        n_draws: Number of bootstrap resamples; 0 for a method without resampling.
        seed: Seed of the draws.
        method: ``"wilson"``, ``"bca"``, ``"student"``, or ``"none"`` with fewer than 2 clusters.
    """

    estimate: float
    low: float
    high: float
    n: int
    n_draws: int
    seed: int
    method: str = "bca"


@checked
def bootstrap_interval(
    values: Values,
    statistic: Statistic = np.mean,
    *,
    paired: Values | None = None,
    clusters: Iterable[Hashable] | None = None,
    n: int = 1000,
    level: float = LEVEL,
    seed: int = 0,
) -> Interval:
    """Return the interval of a statistic: BCa bootstrap (Efron 1987), or Wilson's for a rate.

    The mean of values that are all 0 or 1 is a rate and has Wilson's interval. The difference of
    two such rates combines their Wilson intervals by Newcombe's rule. With fewer than 10 clusters,
    any other statistic has Student's interval with the jackknife standard error.

    Args:
        values: ``[sample]`` or ``[sample, ...]``. Samples are drawn along the first axis, with
            replacement.
        statistic: Function of such an array that returns a number.
        paired: Values of a second method on the same samples. The interval is then that of
            ``statistic(values) - statistic(paired)``, both from the same draws.
        clusters: One label per sample; samples with the same label are drawn together.
        n: Number of draws.
        level: Nominal coverage, between 0 and 1.
        seed: Seed of the draws.

    Returns:
        The interval; its ends are NaN with fewer than 2 clusters.

    Raises:
        InputError: There are no samples, a value is NaN, lengths differ, or ``level`` or ``n`` is
            outside its range.

    Example:
        >>> bootstrap_interval([1, 1, 1, 0]).low
        0.30
    """
    real_number(level, "level")
    if not 0 < level < 1:
        raise InputError(f"level must be between 0 and 1, such as 0.95; got {level!r}.")
    if whole_number(n, "n", -MOST) < 1:
        raise InputError(f"n must be at least 1; got {n!r}.")
    first = _checked("values", values, None)
    second = None if paired is None else _checked("paired", paired, len(first))
    numbers = np.arange(len(first))
    if clusters is not None:
        labels = list(clusters) if isinstance(clusters, str) else as_list(clusters, "clusters")
        if len(labels) != len(first):
            raise InputError(
                f"clusters must have one label per sample; got {len(labels)} for {len(first)}."
            )
        numbers = cluster_numbers(labels)
    members = [np.flatnonzero(numbers == number) for number in range(int(numbers.max()) + 1)]

    def estimate(index: np.ndarray) -> float:
        one = float(statistic(first[index]))
        return one if second is None else one - float(statistic(second[index]))

    whole = estimate(np.arange(len(first)))
    if len(members) < 2:
        return Interval(whole, np.nan, np.nan, len(members), 0, seed, "none")
    if statistic is np.mean and first.ndim == 1:
        parts = [first] if second is None else [first, second]
        if all(series_of(part) == "rate" for part in parts):
            rates: Series = "rate" if second is None else "rate difference"
            values_of = first if second is None else first - second
            ends = mean_intervals(
                values_of[None], numbers, n_draws=0, seed=seed, level=level, series=rates
            )
            return Interval(whole, *_numbers(ends), len(members), 0, seed, "wilson")
    without = np.array([estimate(np.flatnonzero(numbers != i)) for i in range(len(members))])
    if len(members) < FEW:
        ends = student_interval(np.array([whole]), without[:, None], level)
        return Interval(whole, *_numbers(ends), len(members), 0, seed, "student")
    rng = np.random.default_rng(seed)
    drawn = [
        estimate(
            np.concatenate([members[i] for i in rng.integers(len(members), size=len(members))])
        )
        for _ in range(n)
    ]
    ends = bca_interval(np.array([whole]), np.array(drawn)[:, None], without[:, None], level)
    return Interval(whole, *_numbers(ends), len(members), n, seed, "bca")


def _numbers(ends: tuple[np.ndarray, np.ndarray]) -> tuple[float, float]:
    return float(ends[0][0]), float(ends[1][0])


def holm_adjusted(p_values: Values) -> Float[np.ndarray, " test"]:
    """Return p-values corrected for multiple tests (Holm 1979).

    The k-th smallest of m p-values (k from 0) is multiplied by m - k; the results are made monotone
    and clipped at 1. If hypotheses with an adjusted value below alpha are rejected, the probability
    of any false rejection is below alpha, also for dependent tests.

    Raises:
        InputError: A value is not a probability.

    Example:
        >>> holm_adjusted([0.01, 0.04, 0.03]).tolist()
        [0.03, 0.06, 0.06]
    """
    p = _as_numbers("p_values", p_values)
    if p.ndim != 1 or not ((p >= 0) & (p <= 1)).all():
        raise InputError(f"p_values must be numbers from 0 to 1, in one row; got {p.tolist()}.")
    order = np.argsort(p, kind="stable")
    scaled = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(scaled, 1)
    return adjusted


def _as_numbers(name: str, values: Values) -> np.ndarray:
    try:
        return np.asarray(values, dtype=float)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} must be numbers; got {quoted(values)}.") from error


def _checked(name: str, values: Values, length: int | None) -> np.ndarray:
    array = _as_numbers(name, values)
    if array.ndim == 0 or len(array) == 0 or np.isnan(array).any():
        raise InputError(
            f"{name} has shape {array.shape} with {int(np.isnan(array).sum())} NaN. Pass a number "
            "for each sample, and at least one sample."
        )
    if length is not None and len(array) != length:
        raise InputError(
            f"{name} must have the same samples as values; got {len(array)} for {length}."
        )
    return array
