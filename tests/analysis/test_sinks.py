"""Attention sinks: the paper's mean over the queries that see a key, and its null."""

import numpy as np
import pytest
import torch

from tests.helpers.replicas import received
from tests.helpers.synthetic import captured, dense_call, grid, random_call, sample_of, uniform_call
from xmodal_interp.analysis import attention_sinks, sink_rate
from xmodal_interp.errors import InputError


def test_worked_example_of_three_positions() -> None:
    matrix = [[1.0, 0.0, 0.0], [0.8, 0.2, 0.0], [0.3, 0.6, 0.1]]
    table = attention_sinks(sample_of("btt", [dense_call(matrix)]), min_queries=1)
    assert list(table) == [
        *("sample", "tower", "kind", "layer", "head", "key"),
        *("token", "token_kind", "image", "row", "col", "video", "frame"),
        *("received", "null", "lift", "sink", "n_queries"),
    ]
    assert table["key"].tolist() == [0, 1]  # 2 receives a tenth of one query
    assert table["received"].tolist() == pytest.approx([0.7, 0.4])
    assert table["null"].tolist() == pytest.approx([(1 + 1 / 2 + 1 / 3) / 3, (1 / 2 + 1 / 3) / 2])
    assert table["n_queries"].tolist() == [3, 2]
    assert table["sink"].tolist() == [True, True]
    assert table["token"].tolist() == ["b0", "t1"]


def test_is_alpha_of_the_paper() -> None:
    call = random_call(20, spread=4.0)
    table = attention_sinks(sample_of("b" + "t" * 19, [call]), threshold=1e-6, min_queries=1)
    slow = np.stack([received(p, np.tri(20)) for p in call.probs()[0].numpy()])
    np.testing.assert_allclose(table["received"].to_numpy().reshape(4, 20), slow, atol=1e-6)


def test_null_of_the_first_position_is_a_harmonic_number() -> None:
    table = attention_sinks(sample_of("b" + "t" * 99, [uniform_call(100)]), n_positions=64)
    harmonic = sum(1 / k for k in range(1, 65)) / 64
    assert harmonic == pytest.approx(0.07412, abs=5e-6)
    assert table["received"].tolist() == pytest.approx([harmonic] * 2, abs=1e-6)
    assert table["lift"].tolist() == pytest.approx([1.0] * 2, abs=1e-6)
    assert table["n_queries"].tolist() == [64, 64]
    assert not table["sink"].any()


def test_rate_is_the_share_of_heads() -> None:
    n = 12
    on_first, on_third = torch.zeros(n, n), torch.eye(n)
    on_first[:, 0] = 1.0
    on_third[3:] = 0.0
    on_third[3:, 3] = 1.0
    calls = [
        dense_call(
            torch.stack(
                [
                    on_first,
                    on_third,
                    torch.ones(n, n).tril() / torch.arange(1, n + 1)[:, None],
                    on_first,
                ]
            )
        )
    ]
    rate = sink_rate(sample_of("b" + "t" * (n - 1), calls))
    assert list(rate) == ["sample", "tower", "kind", "layer", "first", "any", "n_heads"]
    assert rate[["first", "any", "n_heads"]].to_numpy().tolist() == [[0.5, 0.75, 4]]
    assert rate.attrs["analysis"] == "sink_rate"


def test_samples_with_the_same_name_have_separate_rates() -> None:
    n = 12
    on_first, even = torch.zeros(n, n), torch.ones(n, n).tril() / torch.arange(1, n + 1)[:, None]
    on_first[:, 0] = 1.0
    samples = [sample_of("b" + "t" * (n - 1), [dense_call(m)]) for m in (on_first, even)]
    rate = sink_rate(samples)
    assert rate["any"].tolist() == [1.0, 0.0]
    assert rate["sample"].tolist() == ["fake", "fake (2)"]
    assert rate.attrs["n_samples"] == 2


def test_first_position_is_not_padding_and_some_rows_suffice() -> None:
    mask = torch.ones(1, 1, 10, 10, dtype=torch.bool).tril()
    mask[..., :2] = False
    sample = sample_of("pp b vvvv ttt", [random_call(10, causal=False, mask=mask)], [grid(2, 2)])
    assert attention_sinks(sample)["key"].unique().tolist() == [2]
    rows = random_call(10).select_rows(torch.tensor([7, 8, 9]))
    few = attention_sinks(sample_of("b vvvvvv ttt", [rows], [grid(2, 3)]), min_queries=3)
    assert few.loc[few["key"] == 0, "n_queries"].unique().tolist() == [3]


def test_of_a_model() -> None:
    table = attention_sinks(captured("llava"))
    assert table["received"].between(0, 1).all()
    assert table["null"].between(0, 1).all()
    assert (table["sink"] == (table["received"] > 0.3)).all()


def test_refuses_a_threshold_above_one() -> None:
    with pytest.raises(InputError) as caught:
        attention_sinks(sample_of("bt", [random_call(2)]), threshold=30.0)
    assert str(caught.value) == ("threshold must be above 0 and at most 1; got 30.0.")
