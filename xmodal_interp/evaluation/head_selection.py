"""Select the best head on one half of the samples and score it on the other half."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from xmodal_interp.analysis.resampling import (
    ValueKind,
    cluster_numbers,
    kind_of_values,
    known_mean_intervals,
)
from xmodal_interp.analysis.tables import stamped
from xmodal_interp.arguments import checked
from xmodal_interp.errors import InputError

RATES = ("hit", "any_object", "other_object")
HEAD_KEYS = ["tower", "kind", "layer", "head"]


@checked
def best_head(
    hits: pd.DataFrame, value: str = "hit", *, n_bootstrap: int = 1000, seed: int = 0
) -> pd.DataFrame:
    """Select the best head on the first half of the samples and score it on the second half.

    Args:
        hits: The result of :func:`pointing_hits`, or any table with ``layer``, ``head`` and one row
            for each sample and head, samples in random order. If it has the column ``picture``, no
            picture is in both halves, and intervals are over pictures.
        value: The column to maximise. Of tied heads, the first is chosen. NaN values are left out
            of the mean of a head; a head with NaN only is not chosen.
        n_bootstrap: Number of bootstrap resamples for the interval, if the value is not a rate.
        seed: Seed of the resamples.

    Returns:
        One row: the keys of the head, ``chosen_with`` (mean of the value in the first half, biased
        upwards by the selection), then ``{value}``, ``{value}_low``, ``{value}_high`` (mean and 95%
        interval in the second half; NaN with fewer than 2 clusters), ``n_chosen`` and ``n``
        (samples that are not NaN, in the first and second half), ``n_clusters`` (distinct pictures
        among ``n``).

    Raises:
        InputError: There are fewer than two samples or pictures, the table lacks a row or a column,
            or all values in the first half are NaN.
    """
    keys = [name for name in HEAD_KEYS if name in hits.columns]
    if not {"layer", "head", value} <= set(hits.columns):
        raise InputError(
            f"hits must have the columns layer, head and {value}; got {', '.join(hits.columns)}."
        )
    wide = {key: of_head[value].to_numpy(float) for key, of_head in hits.groupby(keys, sort=True)}
    lengths = {len(values) for values in wide.values()}
    if len(lengths) != 1 or max(lengths) < 2:
        raise InputError(
            "hits must have one row per head and sample, with the same two or more samples for "
            f"each head; got {' or '.join(map(str, sorted(lengths))) or 'no'} rows per head."
        )
    values = np.stack(list(wide.values()))  # [head, sample]
    pictures = np.arange(values.shape[1])
    if "picture" in hits.columns:
        of_first = next(of_head["picture"] for _, of_head in hits.groupby(keys, sort=True))
        pictures = cluster_numbers(of_first.tolist())
    first = pictures < (pictures.max() + 2) // 2  # the first half is larger by one if odd
    if first.all():
        raise InputError(
            "All samples show the same picture. At least two pictures are required: one to choose "
            "a head, another to score it."
        )
    means = _known_means(values[:, first])
    if np.isnan(means).all():
        raise InputError(
            f"All values of {value!r} in the first half of the samples are NaN, so no head can be "
            "chosen."
        )
    best = int(np.nanargmax(means))
    scored = values[best : best + 1, ~first]
    value_kind: ValueKind = "rate" if value in RATES else kind_of_values(scored)
    found = known_mean_intervals(
        scored, pictures[~first], n_draws=n_bootstrap, seed=seed, value_kind=value_kind
    )
    known_in = [int((~np.isnan(values[best, of])).sum()) for of in (first, ~first)]
    known = hits.attrs.get("provenance", [])  # one origin, or a list of several
    row: dict[str, Any] = dict(zip(keys, list(wide)[best], strict=True))
    row |= {"chosen_with": means[best], value: _known_means(scored)[0]}
    row |= {f"{value}_low": found.low[0], f"{value}_high": found.high[0]}
    counts = {"n_chosen": known_in[0], "n": known_in[1], "n_clusters": found.n_clusters[0]}
    return stamped(
        pd.DataFrame([{**row, **counts}]),
        analysis="best_head",
        parameters={"value": value, "n_bootstrap": n_bootstrap, "seed": seed},
        provenance=known if isinstance(known, list) else [known],
        n_samples=values.shape[1],
    )


def _known_means(values: Float[np.ndarray, "series sample"]) -> Float[np.ndarray, " series"]:
    """Return means over samples that are not NaN; NaN if all are."""
    means: np.ndarray = np.ma.masked_where(np.isnan(values), values).mean(1).filled(np.nan)
    return means
