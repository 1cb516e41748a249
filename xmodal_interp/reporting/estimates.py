"""Means over samples with intervals, beside their null, and one sentence for each.

1. A value is averaged within each sample, over heads and whatever else has several rows.
2. The mean over samples has a 95% interval (:mod:`xmodal_interp.analysis.resampling`). Samples are
   the independent units, never tokens or heads; samples of the same picture are one cluster. With
   one picture there is no interval.
3. The difference from the null is computed within each sample and has its own interval. A value is
   called higher or lower than its null only if this interval excludes 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from xmodal_interp.analysis.resampling import ValueKind, cluster_numbers, known_mean_intervals
from xmodal_interp.errors import counted

N_DRAWS, SEED = 1000, 0


def estimates(
    table: pd.DataFrame,
    by: Sequence[str],
    value: str,
    null: str | float | None,
    clusters: Mapping[str, int],
    *,
    value_kind: ValueKind = "mean",
) -> pd.DataFrame:
    """Return the mean over samples of a column, by other columns, with intervals.

    Args:
        table: A table with a column ``sample``, the columns ``by`` and the value.
        by: Columns that identify a series, such as tower and layer; may be empty.
        value: Column to average.
        null: Column of the null model, its value as a number, or None if there is none.
        clusters: The cluster of each sample, by name.
        value_kind: Kind of the values per sample; see ``mean_intervals``.

    Returns:
        One row per series that has a value in some sample: ``by``, then the value, ``low``,
        ``high``, ``null``, ``difference`` (value - null), ``difference_low``, ``difference_high``
        (95% intervals, NaN with fewer than 2 clusters), ``n`` (samples with a value) and
        ``n_clusters``.
    """
    columns = [value] + ([null] if isinstance(null, str) else [])
    means = table.groupby([*by, "sample"], sort=False)[columns].mean().reset_index()
    names = list(dict.fromkeys(means["sample"]))
    of_samples = cluster_numbers([clusters[name] for name in names])
    means["series"] = means.groupby(list(by), sort=False).ngroup() if by else 0
    series = means.drop_duplicates("series").set_index("series")[list(by)]
    shape = (len(series), len(names))
    place = means["series"].to_numpy(), pd.factorize(means["sample"])[0]

    def wide(column: str) -> np.ndarray:
        values = np.full(shape, np.nan)
        values[place] = means[column].to_numpy(dtype=float)
        return values

    values = wide(value)
    known = ~np.isnan(values)
    options: dict[str, int] = {"n_draws": N_DRAWS, "seed": SEED}
    found = known_mean_intervals(values, of_samples, value_kind=value_kind, **options)
    result = series.assign(**{value: _means(values), "low": found.low, "high": found.high})
    if null is not None:
        nulls = wide(null) if isinstance(null, str) else np.full(shape, float(null))
        nulls = np.where(known, nulls, np.nan)
        beyond = known_mean_intervals(values - nulls, of_samples, value_kind="mean", **options)
        result["null"] = _means(nulls)
        result["difference"] = _means(values - nulls)
        result["difference_low"], result["difference_high"] = beyond.low, beyond.high
    result["n"], result["n_clusters"] = known.sum(1), found.n_clusters
    return result[result["n"] > 0].reset_index(drop=True)


def _means(values: np.ndarray) -> np.ndarray:
    known = ~np.isnan(values)
    counts = known.sum(1)
    sums = np.where(known, values, 0).sum(1)
    means: np.ndarray = np.full(len(values), np.nan)
    np.divide(sums, counts, out=means, where=counts > 0)
    return means


def records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Return the rows of a table as dicts."""
    return [
        dict(zip(map(str, table.columns), row, strict=True))
        for row in table.itertuples(index=False, name=None)
    ]


def verdict(row: Mapping[str, Any]) -> str:
    """Return how a value compares with its null: in words that the interval supports."""
    if "null" not in row or np.isnan(row["null"]):
        return "no null"
    if np.isnan(row["difference_low"]):
        return "no interval"
    if row["difference_low"] > 0:
        return "higher"
    return "lower" if row["difference_high"] < 0 else "not distinguished"


def sentence(
    what: str, row: Mapping[str, Any], value: str, null_name: str, *, unit: str = ""
) -> str:
    """Return a sentence with the value, its interval, its null, and how they compare.

    Args:
        what: What the value is, as the subject of the sentence.
        row: A row of ``estimates``.
        value: Column of the value.
        null_name: What the null is, after a preposition, such as ``"under uniform attention"``.
        unit: Unit after each number, with a space before it.
    """
    units = " " + unit if unit else ""
    judged = verdict(row)
    text = f"{what}: {short(row[value])}{units}{_interval(row, units)}"
    if judged == "no null":
        return f"{text}."
    text += f"; {short(row['null'])}{units} {null_name}."
    low, high = row["difference_low"], row["difference_high"]
    between = f"the difference is {short(row['difference'])}"
    if judged == "no interval":
        return f"{text} {between[0].upper()}{between[1:]}; whether it holds for others is unknown."
    between += f" ({short(low)} to {short(high)})"
    if judged == "not distinguished":
        return f"{text} These samples do not distinguish the two: {between}."
    return f"{text} It is {judged}: {between}."


def _interval(row: Mapping[str, Any], units: str) -> str:
    n, n_clusters = int(row["n"]), int(row["n_clusters"])
    of = counted(n, "sample")
    if n_clusters < 2:
        same = "" if n == 1 else " of one picture"
        return f" ({of}{same}, so there is no interval)"
    of += f" of {n_clusters} pictures" if n_clusters != n else ""
    return f" (95% interval {short(row['low'])} to {short(row['high'])}{units}, {of})"


def short(value: float) -> str:
    """Return a number with three significant digits."""
    if value == 0 or not np.isfinite(value):
        return f"{value:g}"
    if 1e-3 <= abs(value) < 1e5:
        digits = max(0, 2 - int(np.floor(np.log10(abs(value)))))
        return f"{value:.{digits}f}"
    return f"{value:.2e}"


def over_layers(rows: pd.DataFrame, value: str) -> str:
    """Return a sentence on the lowest and the highest layer; empty if there is one layer."""
    layers = rows.dropna(subset=[value])
    if len(layers) < 2:
        return ""
    ordered = records(layers.sort_values(value, kind="stable"))
    low, high = ordered[0], ordered[-1]
    text = (
        f"By layer: {short(low[value])} (layer {int(low['layer'])}) to {short(high[value])} "
        f"(layer {int(high['layer'])})"
    )
    if "difference_low" not in rows or layers["difference_low"].isna().all():
        return f"{text}."
    counts = {"higher": int((layers["difference_low"] > 0).sum())}
    counts["lower"] = int((layers["difference_high"] < 0).sum())
    parts = [f"{n} {'is' if n == 1 else 'are'} {word}" for word, n in counts.items() if n]
    return f"{text}; of {len(layers)} layers, {' and '.join(parts) or 'none is distinguished'}."
