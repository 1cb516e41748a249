"""Intervals over samples, and corrections for multiple tests."""

import numpy as np
import pandas as pd
import pytest

from tests.helpers import replicas
from xmodal_interp.analysis.resampling import mean_intervals
from xmodal_interp.errors import InputError
from xmodal_interp.evaluation.intervals import bootstrap_interval, holm_adjusted


def test_worked_examples() -> None:
    """Three equal samples have an interval of width 0; a hit and a miss have a wide one.

    Wilson's interval of 1 hit of 2 with z = 1.645: 0.5 +- 1.645 sqrt(1/8 + 1.645^2/16) / 2.353.
    """
    assert bootstrap_interval([2.0, 2.0, 2.0], n=50)[:3] == (2, 2, 2)
    two = bootstrap_interval([0, 0, 1, 1], clusters="aabb", n=400, level=0.9)
    assert (two.low, two.high) == pytest.approx((0.121, 0.879), abs=1e-3)
    assert (two.n, two.n_draws, two.method) == (2, 0, "wilson")
    three = bootstrap_interval([1.0, 2.0, 4.5])  # 2.5 +- 4.303 * 1.8028 / sqrt(3)
    assert (three.low, three.high) == pytest.approx((-1.978, 6.978), abs=1e-3)
    assert three.method == "student"
    assert holm_adjusted([0.01, 0.04, 0.03]).tolist() == [0.03, 0.06, 0.06]
    assert holm_adjusted([0.5, 0.9, 0.001]).tolist() == [1, 1, 0.003]


def test_equals_the_replica() -> None:
    values = np.random.default_rng(1).exponential(size=30)
    found = bootstrap_interval(values, n=300, seed=5, level=0.9)
    expected = replicas.bca(values.tolist(), 300, 5, student=1.699127)
    np.testing.assert_allclose((found.low, found.high), expected, rtol=1e-6)
    assert found.estimate == pytest.approx(values.mean())


@pytest.mark.parametrize(("hits", "n"), [(10, 10), (29, 30), (50, 100), (0, 12), (3, 17)])
def test_a_rate_of_independent_samples_has_wilsons_interval(hits: int, n: int) -> None:
    found = bootstrap_interval([1] * hits + [0] * (n - hits))
    assert (found.low, found.high) == pytest.approx(replicas.wilson(hits, n), abs=2e-6)
    assert (found.method, found.n) == ("wilson", n)
    repeated = bootstrap_interval(
        np.repeat([1] * hits + [0] * (n - hits), 3), clusters=np.repeat(np.arange(n), 3)
    )
    assert repeated[1:3] == pytest.approx(found[1:3])  # repeated samples add no information


def test_fewer_than_two_clusters_have_no_interval() -> None:
    for values in ([1, 1, 0, 1], [0.2, 0.4, 0.9, 0.1]):
        found = bootstrap_interval(values, clusters=["one"] * 4)
        assert np.isnan([found.low, found.high]).all()
        assert (found.estimate, found.n, found.method) == (np.mean(values), 1, "none")
    low, high = mean_intervals(np.ones((3, 4)), np.zeros(4, dtype=int), n_draws=10, seed=0)
    assert np.isnan([low, high]).all()


def test_intervals_of_constant_rates_have_a_width() -> None:
    hits = bootstrap_interval([1.0] * 30)
    assert (hits.low, hits.high) == pytest.approx((0.8865, 1.0), abs=1e-4)
    unchanged = bootstrap_interval([1.0] * 15 + [0.0] * 15, paired=[1.0] * 15 + [0.0] * 15)
    assert (unchanged.low, unchanged.high) == pytest.approx((-0.1135, 0.1135), abs=1e-4)


def test_labels_are_read_by_position() -> None:
    values = np.random.default_rng(8).normal(size=24)
    labels = pd.Series(np.repeat(list("abcd"), 6), index=np.arange(24)[::-1])
    expected = bootstrap_interval(values, clusters=labels.tolist())
    assert bootstrap_interval(values, clusters=labels) == expected
    assert bootstrap_interval(pd.Series(values, index=range(50, 74)), clusters=labels) == expected


def test_mean_intervals_agree_with_bootstrap_interval() -> None:
    """The draws differ, so the intervals agree up to the noise of the quantiles."""
    values = np.random.default_rng(2).normal(size=(3, 80))
    clusters = np.arange(80) // 2
    low, high = mean_intervals(values, clusters, n_draws=4000, seed=1)
    for series, ends in zip(values, zip(low, high, strict=True), strict=True):
        slow = bootstrap_interval(series, clusters=clusters.tolist(), n=4000, seed=2)
        np.testing.assert_allclose(ends, (slow.low, slow.high), atol=0.02)


def test_resampling_tokens_covers_too_little_and_samples_enough() -> None:
    """Coverage of the true value 0 with 40 samples of 20 tokens that share an offset."""
    rng = np.random.default_rng(0)
    hits = {"tokens": 0, "samples": 0}
    for trial in range(100):
        values = rng.normal(size=(40, 1)) + 0.3 * rng.normal(size=(40, 20))
        flat, labels = values.reshape(1, -1), np.repeat(np.arange(40), 20)
        for name, clusters in (("tokens", np.arange(800)), ("samples", labels)):
            low, high = mean_intervals(flat, clusters, n_draws=200, seed=trial)
            hits[name] += bool(low[0] <= 0 <= high[0])
    assert hits["tokens"] < 50
    assert hits["samples"] > 85


def test_a_paired_difference_is_narrower_than_its_parts() -> None:
    rng = np.random.default_rng(3)
    easy = rng.normal(size=100)
    better = easy + 0.2 + 0.05 * rng.normal(size=100)
    apart = bootstrap_interval(better, n=500)
    paired = bootstrap_interval(better, paired=easy, n=500)
    assert paired.low > 0.15
    assert paired.high - paired.low < 0.2 * (apart.high - apart.low)
    assert paired.estimate == pytest.approx((better - easy).mean())


def test_any_statistic() -> None:
    values = np.random.default_rng(4).normal(size=(50, 2))
    found = bootstrap_interval(values, lambda rows: float(np.corrcoef(rows.T)[0, 1]), n=200)
    assert found.low < found.estimate < found.high


def test_holm_is_monotone_and_never_smaller() -> None:
    p = np.random.default_rng(5).uniform(size=40) ** 3
    adjusted = holm_adjusted(p)
    assert (adjusted >= p).all()
    assert (adjusted <= np.minimum(1, 40 * p) + 1e-12).all()  # at most Bonferroni
    assert (np.diff(adjusted[np.argsort(p)]) >= 0).all()


REFUSALS = {
    "none": (
        lambda: bootstrap_interval([]),
        "values has shape (0,) with 0 NaN. Pass a number for each sample, and at least one sample.",
    ),
    "nan": (
        lambda: bootstrap_interval([1.0, float("nan")]),
        "values has shape (2,) with 1 NaN. Pass a number for each sample, and at least one sample.",
    ),
    "paired": (
        lambda: bootstrap_interval([1.0, 2.0], paired=[1.0]),
        "paired must have the same samples as values; got 1 for 2.",
    ),
    "clusters": (
        lambda: bootstrap_interval([1.0, 2.0], clusters=["a"]),
        "clusters must have one label per sample; got 1 for 2.",
    ),
    "level": (
        lambda: bootstrap_interval([1.0, 2.0], level=-1),
        "level must be between 0 and 1, such as 0.95; got -1.",
    ),
    "draws": (
        lambda: bootstrap_interval([1.0, 2.0], n=0),
        "n must be at least 1; got 0.",
    ),
    "p": (
        lambda: holm_adjusted([0.1, 1.5]),
        "p_values must be numbers from 0 to 1, in one row; got [0.1, 1.5].",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name: str) -> None:
    ask, message = REFUSALS[name]
    with pytest.raises(InputError) as refusal:
        ask()
    assert str(refusal.value) == message
