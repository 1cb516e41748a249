import numpy as np
import pytest

from tests.helpers.figure_samples import bars, titles, words
from xmodal_interp import figures
from xmodal_interp.errors import InputError

RNG = np.random.default_rng(0)
PANELS = {"a": RNG.uniform(size=(3, 20)), "b": RNG.uniform(size=(3, 20))}


def test_a_panel_shows_each_word_over_its_seconds() -> None:
    figure = figures.time_panels(
        PANELS,
        ["one", "two", "three"],
        duration_s=0.4,
        starts_s=[0.0, np.nan, 0.25],
        emphasised=["b"],
        note="Red: b.",
    )
    first, second = figure.axes[:2]
    assert titles(figure) == ["a", "b"]
    np.testing.assert_array_equal(first.images[0].get_array(), PANELS["a"])
    assert first.images[0].get_extent() == [0, 0.4, 2.5, -0.5]
    assert [label.get_text() for label in first.get_yticklabels()] == ["one", "two", "three"]
    (lines,) = second.collections
    drawn = [segment.tolist() for segment in lines.get_segments() if len(segment)]
    assert drawn == [[[0.0, -0.5], [0.0, 0.5]], [[0.25, 1.5], [0.25, 2.5]]]
    assert [axes.title.get_weight() for axes in (first, second)] == ["normal", "bold"]
    assert bars(figure)[0].get_ylabel() == "attention probability\n(square-root scale)"
    assert "Red: b. Red line: known start of the word." in words(figure)


def test_panels_that_do_not_fit_the_words_are_refused() -> None:
    with pytest.raises(InputError) as refused:
        figures.time_panels(PANELS, ["one", "two"], duration_s=0.4)
    assert str(refused.value) == (
        "The panel 'a' must have one row for each of the 2 words; its shape is (3, 20)."
    )
    with pytest.raises(InputError) as refused:
        figures.time_panels(PANELS, ["one", "two", "three"], duration_s=0.4, starts_s=[0.1])
    assert str(refused.value) == "starts_s must have one number for each of the 3 words; got 1."
    with pytest.raises(InputError) as refused:
        figures.time_panels({}, ["one"], duration_s=0.4)
    assert str(refused.value) == "panels and words must not be empty."
