"""How well a score finds heads that are known from elsewhere, such as a published list."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float

from xmodal_interp.analysis.tables import stamped
from xmodal_interp.arguments import as_list, checked, one_or_several
from xmodal_interp.errors import InputError, quoted


@checked
def known_heads(table: pd.DataFrame, heads: Iterable[Sequence[int]], value: str) -> pd.DataFrame:
    """Return how well a score ranks known heads above all others.

    ``auc`` is the probability that a random known head has a larger score than a random other head,
    ties counted half (Mann and Whitney 1947). The p-value is exact, also with ties: it compares the
    sum of ranks with those of all equally large sets of heads.

    Args:
        table: A table with ``layer``, ``head`` and one row per head, of any analysis.
        heads: ``(layer, head)`` of the known heads.
        value: Column of the score; large for heads like the known ones.

    Returns:
        One row: ``auc``, ``p_value`` (share of all sets of as many heads whose sum of ranks is at
        least as large), ``n_found`` (known heads among the ``n_known`` heads with the largest
        score; of tied heads, the first rows), ``n_known`` and ``n_heads``.

    Raises:
        InputError: The table lacks a column or has several rows for a head, a score is NaN, a known
            head is not in the table, or no head or every head is known.
    """
    if not {"layer", "head", value} <= set(table.columns):
        raise InputError(
            f"table must have the columns layer, head and {value}; got {', '.join(table.columns)}."
        )
    pairs = list(zip(table["layer"].tolist(), table["head"].tolist(), strict=True))
    if len(set(pairs)) < len(pairs):
        raise InputError(
            f"table must have one row per head; got {len(pairs)} rows of {len(set(pairs))} heads."
        )
    given = {tuple(as_list(each, "A head")) for each in one_or_several(heads)}
    unknown = [pair for pair in given if pair not in pairs]
    if unknown:
        raise InputError(
            f"heads must be pairs of layer and head in the table; got {quoted(unknown[0])}."
        )
    if not 0 < len(given) < len(pairs):
        raise InputError(
            f"Some of the {len(pairs)} heads must be known, and not all; got {len(given)}."
        )
    scores = table[value].to_numpy(float)
    if np.isnan(scores).any():
        raise InputError(
            f"The column {value!r} must not hold NaN; it does in "
            f"{int(np.isnan(scores).sum())} of {len(scores)} rows."
        )
    known = np.array([pair in given for pair in pairs])
    ranks = table[value].rank().to_numpy()
    n_known, n_other = len(given), len(pairs) - len(given)
    above = ranks[known].sum() - n_known * (n_known + 1) / 2
    largest = np.argsort(-scores, kind="stable")[:n_known]
    row = {
        "auc": above / (n_known * n_other),
        "p_value": _p_value(ranks, known),
        **{"n_found": int(known[largest].sum()), "n_known": n_known, "n_heads": len(pairs)},
    }
    provenance = table.attrs.get("provenance", {})
    return stamped(
        pd.DataFrame([row]),
        analysis="known_heads",
        parameters={"heads": sorted(given), "value": value},
        provenance=provenance if isinstance(provenance, list) else [provenance],
        n_samples=table.attrs.get("n_samples", 1),
    )


def _p_value(ranks: Float[np.ndarray, " head"], known: Bool[np.ndarray, " head"]) -> float:
    """Return the share of sets of heads whose sum of ranks is at least that of the known ones.

    ``chance[n, s]`` is the probability that a random set drawn head by head has ``n`` heads so far
    and the doubled ranks (integers, also with ties) ``s``. Each head is drawn with the probability
    that it is in a random set of the final size, given the heads drawn so far.
    """
    doubled = np.rint(2 * ranks).astype(int)
    n_known, n_heads = int(known.sum()), len(ranks)
    chance = np.zeros((n_known + 1, np.sort(doubled)[-n_known:].sum() + 1))
    chance[0, 0] = 1
    for place, rank in enumerate(doubled):
        missing = np.clip(n_known - np.arange(n_known + 1), 0, None)[:, None] / (n_heads - place)
        with_head = np.zeros_like(chance)
        with_head[1:, rank:] = (chance * missing)[:-1, : chance.shape[1] - rank]
        chance = chance * (1 - np.minimum(missing, 1)) + with_head
    return float(chance[n_known, doubled[known].sum() :].sum())
