"""Sequences of users in any form: each is read by position, and as often as needed."""

import functools

import numpy as np
import pandas as pd
import pytest

import xmodal_interp as xi
from tests.helpers.tiny import QUESTION, picture, tiny_vlm

FORMS = {
    "generator": lambda many: (each for each in many),
    "iterator": iter,
    "view of a dict": lambda many: dict(enumerate(many)).values(),
    "series": lambda many: pd.Series(list(many), index=range(len(many))[::-1]),
    "array": np.array,
}


@functools.cache
def sample() -> xi.Sample:
    return xi.capture(tiny_vlm("llava"), picture(), QUESTION)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("analysis", "name", "many"),
    [
        (xi.attention_entropy, "layers", [1, 0]),
        (xi.cross_modal_ratio, "heads", [1, 0]),
        (xi.positional_bias, "layers", [1, 0]),
        (xi.recency_index, "queries", [3, 150]),
        (xi.attention_allocation, "layers", [1, 0]),
    ],
)
def test_choices_in_any_form(analysis, name, many, form) -> None:
    two = [sample(), sample()]
    table = analysis(two, **{name: FORMS[form](many)})
    pd.testing.assert_frame_equal(table, analysis(two, **{name: many}))


@pytest.mark.parametrize("form", ["generator", "iterator", "view of a dict"])
def test_samples_that_can_be_read_once_only(form) -> None:
    given = FORMS[form]
    table = xi.positional_bias(given([sample(), sample()]))
    pd.testing.assert_frame_equal(table, xi.positional_bias([sample(), sample()]))
    table = xi.raster_bias(sample(), control=given([sample()]))
    assert (table["row_slope_difference"].dropna() == 0).all()


@pytest.mark.parametrize("form", ["generator", "iterator", "view of a dict"])
def test_choices_of_a_recording(form) -> None:
    given = FORMS[form]
    vlm = tiny_vlm("llava")
    with xi.record(vlm, towers=given(["language"]), layers=given([1, 0])) as recording:
        vlm.run(vlm.prepare([[picture()]], [QUESTION])[0])
    assert [(call.tower, call.layer) for call in recording.calls] == [
        ("language", 0),
        ("language", 1),
    ]


@pytest.mark.parametrize("form", ["generator", "iterator", "view of a dict"])
def test_layers_of_pruning(form) -> None:
    items = [{"image": picture(), "question": QUESTION, "answer": "red"}]
    asked = {"heads": [0], "progress": False, "n_bootstrap": 10}
    table = xi.head_pruning(tiny_vlm("llava"), items, layers=FORMS[form]([1, 0]), **asked)
    expected = xi.head_pruning(tiny_vlm("llava"), items, layers=[1, 0], **asked)
    pd.testing.assert_frame_equal(table, expected)
