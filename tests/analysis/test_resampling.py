"""Coverage of the intervals: by simulation, and exact for binomials."""

import math

import numpy as np
import pytest

from xmodal_interp.analysis.resampling import known_mean_intervals, mean_intervals, student_quantile

RATES = (0.5, 0.7, 0.9, 0.97)


def covered(values: np.ndarray, clusters: np.ndarray, true: float, **more: object) -> float:
    """The share of series (one per trial) whose interval contains the true value."""
    low, high = mean_intervals(values, clusters, **{"n_draws": 1000, "seed": 0, **more})
    return float(((low <= true + 1e-12) & (true - 1e-12 <= high)).mean())


@pytest.mark.parametrize("n", [10, 20, 30, 100])
def test_rates_of_independent_samples_are_covered(n: int) -> None:
    """Exact coverage over all counts of hits. Counts are integers, so at n = 10 no interval is
    closer to 95% for all rates at once.
    """
    hits = np.arange(n + 1)
    values = (np.arange(n) < hits[:, None]).astype(float)  # a series for each count
    low, high = mean_intervals(values, np.arange(n), n_draws=1, seed=0, value_kind="rate")
    for rate in np.linspace(0.5, 0.97, 48):
        chances = np.array([math.comb(n, k) for k in hits]) * rate**hits * (1 - rate) ** (n - hits)
        held = chances[(low <= rate + 1e-12) & (rate - 1e-12 <= high)].sum()
        assert 0.895 < held < 0.99
        if rate in RATES:
            assert 0.92 <= held <= 0.98
    assert (high - low > 0).all()


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("n_clusters", [10, 30])
@pytest.mark.parametrize(("size", "alike"), [(2, 0.0), (3, 0.5), (4, 0.2), (3, 1.0), (8, 0.2)])
def test_rates_of_clusters_are_covered(
    n_clusters: int, size: int, alike: float, rate: float
) -> None:
    """Clusters of ``size`` samples whose hits are correlated by ``alike``: 95% +- 3."""
    rng = np.random.default_rng(0)
    n_trials = 4000
    if 0 < alike < 1:
        spread = (1 - alike) / alike
        of_cluster = rng.beta(rate * spread, (1 - rate) * spread, (n_trials, n_clusters))
    elif alike == 0:
        of_cluster = np.full((n_trials, n_clusters), rate)
    else:
        of_cluster = (rng.random((n_trials, n_clusters)) < rate).astype(float)
    chances = of_cluster.repeat(size, 1)
    values = (rng.random(chances.shape) < chances).astype(float)
    clusters = np.arange(n_clusters).repeat(size)
    assert 0.92 <= covered(values, clusters, rate, value_kind="rate") <= 0.985


def test_clusters_of_different_sizes_are_covered() -> None:
    rng = np.random.default_rng(1)
    sizes = np.tile([1, 2, 3, 6], 5)
    clusters = np.arange(20).repeat(sizes)
    chances = rng.beta(3.2, 0.8, (4000, 20))[:, clusters]  # 0.8, correlated by 0.2
    values = (rng.random(chances.shape) < chances).astype(float)
    assert 0.92 <= covered(values, clusters, 0.8, value_kind="rate") <= 0.98


@pytest.mark.parametrize("gain", [0.0, 0.03, 0.3])
@pytest.mark.parametrize("n", [10, 30])
def test_differences_of_rates_are_covered(n: int, gain: float) -> None:
    """Values are 1 with probability ``gain`` and -1 with a tenth of it."""
    rng = np.random.default_rng(2)
    drawn = rng.random((4000, n))
    values = (drawn < gain).astype(float) - (drawn > 1 - gain / 10)
    held = covered(values, np.arange(n), 0.9 * gain, value_kind="rate difference")
    assert held > 0.92
    if gain == 0.3:
        assert held < 0.98  # with rare changes, every interval with a width covers


MEANS = {
    "normal": (lambda rng, shape: rng.normal(size=shape), 0.0),
    "skewed": (lambda rng, shape: rng.beta(5, 1, shape), 5 / 6),
    "mostly zero": (lambda rng, shape: rng.random(shape) * (rng.random(shape) < 0.3), 0.15),
}


@pytest.mark.parametrize("name", MEANS)
@pytest.mark.parametrize(("n", "least"), [(4, 0.65), (12, 0.90), (30, 0.92)])
def test_means_are_covered(name: str, n: int, least: float) -> None:
    """For comparison, the percentile bootstrap covers 0.89, 0.88 and 0.83 with 10 clusters."""
    draw, mean = MEANS[name]
    values = draw(np.random.default_rng(3), (1000, n))
    assert least <= covered(values, np.arange(n), mean) <= 0.985


def test_clusters_are_counted_per_series() -> None:
    values = np.array([[1.0, 1, 0, 1], [1, np.nan, np.nan, 0], [np.nan] * 4, [0.2, 0.4, 0.6, 0.1]])
    found = known_mean_intervals(values, np.array([0, 0, 1, 2]), n_draws=10, seed=0)
    assert found.n_clusters.tolist() == [3, 2, 0, 3]
    assert np.isnan(found.low).tolist() == [False, False, True, False]
    alone = known_mean_intervals(values[:1, :2], np.array([4, 4]), n_draws=10, seed=0)
    assert (alone.n_clusters.tolist(), np.isnan(alone.low).all()) == ([1], True)


@pytest.mark.parametrize(
    ("level", "freedom", "quantile"),
    [
        (0.95, 1, 12.7062),
        (0.95, 9, 2.2622),
        (0.9, 29, 1.6991),
        (0.99, 4, 4.6041),
        (0.95, 5000, 1.9604),
    ],
)
def test_students_quantiles(level: float, freedom: int, quantile: float) -> None:
    assert student_quantile(level, freedom) == pytest.approx(quantile, abs=1e-4)
