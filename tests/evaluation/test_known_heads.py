import itertools

import numpy as np
import pandas as pd
import pytest

from xmodal_interp.errors import InputError
from xmodal_interp.evaluation import known_heads


def table_of(scores: np.ndarray) -> pd.DataFrame:
    layers, heads = np.indices(scores.shape)
    return pd.DataFrame(
        {"layer": layers.ravel(), "head": heads.ravel(), "score": scores.ravel().astype(float)}
    )


def test_the_best_ranking_has_auc_one_and_the_smallest_p_value() -> None:
    (row,) = known_heads(table_of(np.array([[1, 2], [3, 4]])), [(1, 1), (1, 0)], "score").to_dict(
        "records"
    )
    expected = {"auc": 1.0, "p_value": 1 / 6, "n_found": 2, "n_known": 2, "n_heads": 4}
    assert row == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_auc_and_p_value_are_those_of_all_pairs_and_all_sets(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 5, size=(3, 4)) * 0.1  # with ties
    known = [(int(i) // 4, int(i) % 4) for i in rng.choice(12, 4, replace=False)]
    row = known_heads(table_of(scores), known, "score").iloc[0]
    flat, chosen = scores.ravel(), {4 * layer + head for layer, head in known}

    def auc(of: set[int]) -> float:
        pairs = [(flat[i], flat[j]) for i in of for j in set(range(12)) - of]
        return float(np.mean([(a > b) + (a == b) / 2 for a, b in pairs]))

    sets = [auc(set(each)) for each in itertools.combinations(range(12), 4)]
    assert row["auc"] == pytest.approx(auc(chosen), abs=1e-12)
    assert row["p_value"] == pytest.approx(
        np.mean([each >= auc(chosen) - 1e-9 for each in sets]), abs=1e-12
    )
    largest = set(np.argsort(-flat, kind="stable")[:4].tolist())
    assert row["n_found"] == len(largest & chosen)


def test_arguments_that_cannot_be_compared_are_refused() -> None:
    table = table_of(np.array([[1, 2], [3, 4]]))
    for heads, given, message in (
        ([(2, 0)], table, "heads must be pairs of layer and head in the table; got (2, 0)."),
        ([], table, "Some of the 4 heads must be known, and not all; got 0."),
        (
            [(0, 0)],
            pd.concat([table, table]),
            "table must have one row per head; got 8 rows of 4 heads.",
        ),
        (
            [(0, 0)],
            table.drop(columns="score"),
            "table must have the columns layer, head and score; got layer, head.",
        ),
        (
            [(0, 0)],
            table.assign(score=[1.0, 2.0, np.nan, 3.0]),
            "The column 'score' must not hold NaN; it does in 1 of 4 rows.",
        ),
    ):
        with pytest.raises(InputError) as refused:
            known_heads(given, heads, "score")
        assert str(refused.value) == message
