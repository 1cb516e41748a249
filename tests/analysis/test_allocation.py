"""FastV's allocation of attention over the segments of the prompt."""

import numpy as np
import pytest

from tests.helpers.replicas import fastv_allocation
from tests.helpers.synthetic import dense_call, grid, random_call, sample_of, uniform_call
from xmodal_interp.analysis import attention_allocation
from xmodal_interp.errors import InputError

SEGMENTS = ["system", "image", "instruction", "output"]
LAYOUT = "b s vvvv tt oo"


def test_worked_example_of_five_positions() -> None:
    last = [0.5, 0.1, 0.2, 0.2, 0.0]
    answer = [0.2, 0.2, 0.2, 0.2, 0.2]
    matrix = [[1, 0, 0, 0, 0], [1, 0, 0, 0, 0], [1, 0, 0, 0, 0], last, answer]
    table = attention_allocation(sample_of("b vv t o", [dense_call(matrix)], [grid(1, 2)]))
    assert list(table) == [
        *("sample", "tower", "kind", "layer", "head", "segment"),
        *("allocation_sum", "allocation_mean", "efficiency_sum", "efficiency_mean"),
        *("null", "lift", "n_tokens", "n_queries"),
    ]
    assert table["segment"].tolist() == SEGMENTS
    assert table["allocation_sum"].tolist() == pytest.approx([0.7, 0.7, 0.4, 0.2])
    assert table["allocation_mean"].tolist() == pytest.approx([0.35, 0.35, 0.2, 0.1])
    assert table["efficiency_sum"].tolist() == pytest.approx([0.7, 0.35, 0.4, 0.2])
    assert table["lift"].tolist() == pytest.approx([1.5, 0.8, 0.9, 1.0])
    assert table["n_tokens"].tolist() == [1, 2, 1, 1]
    assert table["n_queries"].unique().tolist() == [2]


def test_is_lambda_and_epsilon_of_the_paper() -> None:
    call = random_call(10)
    table = attention_allocation(sample_of(LAYOUT, [call], [grid(2, 2)]))
    means = table.groupby("segment")[["allocation_sum", "efficiency_sum"]].mean()
    segments = {"system": [0, 1], "image": range(2, 6), "instruction": [6, 7], "output": [8, 9]}
    for name, positions in segments.items():
        slow = fastv_allocation(call.probs()[0].numpy(), [7, 8, 9], positions)
        assert means.loc[name].tolist() == pytest.approx(slow, rel=1e-5)


def test_segments_sum_to_one_for_each_query() -> None:
    sample = sample_of(LAYOUT, [random_call(10), uniform_call(10, layer=1)], [grid(2, 2)])
    table = attention_allocation(sample)
    sums = table.groupby(["layer", "head"])[["allocation_mean", "null"]].sum()
    assert sums.to_numpy() == pytest.approx(1.0, abs=1e-6)
    even = table[table["layer"] == 1]
    assert even["lift"].to_numpy() == pytest.approx(1.0, abs=1e-6)
    np.testing.assert_allclose(even["allocation_mean"], even["null"], atol=1e-6)


def test_without_an_answer_or_a_system_prompt() -> None:
    table = attention_allocation(sample_of("vv tt", [random_call(4)], [grid(1, 2)]), heads=0)
    assert table["n_tokens"].tolist() == [0, 2, 2, 0]
    assert table["allocation_sum"].isna().tolist() == [True, False, False, True]
    assert table["n_queries"].unique().tolist() == [1]
    question_first = attention_allocation(
        sample_of("b tt vv", [random_call(5)], [grid(1, 2)]), heads=0
    )
    assert question_first["n_tokens"].tolist() == [1, 2, 2, 0]


def test_refuses_a_sample_without_an_image() -> None:
    with pytest.raises(InputError) as caught:
        attention_allocation(sample_of("btt", [random_call(3)]))
    assert str(caught.value) == (
        "Sample 'fake' has no image tokens among its 3 positions. attention_allocation requires a "
        "sample with an image or a video."
    )
