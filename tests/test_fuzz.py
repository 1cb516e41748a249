"""Public functions with random arguments return a result or raise an error of this package."""

import inspect

import numpy as np
import pandas as pd
import pytest
from PIL import Image

import xmodal_interp as xi
from tests.helpers.figure_samples import fake
from tests.helpers.fuzzing import nested, raw_errors
from xmodal_interp import evaluation
from xmodal_interp.analysis.tables import samples_of
from xmodal_interp.errors import InputError, LayerError
from xmodal_interp.evaluation import faithfulness
from xmodal_interp.store.schema import check_name

N_CALLS = 250


@pytest.mark.usefixtures("any_type")
def test_random_arguments_raise_only_errors_of_this_package() -> None:
    """``python -m tests.helpers.fuzzing 10000`` makes more calls."""
    found = raw_errors(N_CALLS, seed=0)
    assert [what for what in found if what.startswith("raw ")] == []
    assert found["results"] > N_CALLS / 20


SAMPLE = fake()
NONSENSE = {
    "maps": lambda: inspect.unwrap(faithfulness._curve)(
        xi.load(), [item()], "zzz", "deletion_curve", 2, 1, 0, False
    ),
    "image": lambda: xi.attention_rollout(SAMPLE, [9], image=99),
    "role": lambda: SAMPLE.where(role="usr"),
    "window": lambda: xi.recency_index(SAMPLE, window=float("nan")),
    "level": lambda: evaluation.bootstrap_interval([0.0, 1.0], level=-1.0),
    "towers": lambda: xi.Keep(towers=()),
    "surrogates": lambda: xi.capture(xi.load(), Image.new("RGB", (32, 32)), "what \ud800 ?"),
    "no pixels": lambda: xi.capture(xi.load(), Image.new("RGB", (0, 0)), "what ?"),
    "device": lambda: check_name("CON"),
    "device with an ending": lambda: check_name("nul.txt"),
    "criterion": lambda: evaluation.pointing_hits(SAMPLE, criterion="near"),
    "n_bootstrap": lambda: evaluation.pointing_game(SAMPLE, n_bootstrap=0),
    "samples": lambda: inspect.unwrap(samples_of)([SAMPLE, None]),
}


def item() -> dict[str, object]:
    return {"image": Image.new("RGB", (32, 32)), "prompt": "what ?", "answer": "red"}


@pytest.mark.parametrize("name", NONSENSE)
def test_invalid_arguments_are_errors(name: str) -> None:
    with pytest.raises(InputError):
        NONSENSE[name]()


def test_no_heads_are_an_error_of_analyses() -> None:
    with pytest.raises(LayerError, match="heads is empty"):
        xi.cross_modal_ratio(SAMPLE, heads=[])


def test_an_error_in_nested_labels_names_the_item(tmp_path) -> None:
    items = [{**item(), "extra": nested(5000)}]
    with pytest.raises(InputError, match=r"^Item 0 \('item-000000'\)"):
        xi.capture_dataset(xi.load(), items, tmp_path / "store", progress=False)


def test_sequences_of_samples_may_be_arrays() -> None:
    both = pd.Series([SAMPLE, SAMPLE], index=[7, 3])
    table = xi.cross_modal_ratio([SAMPLE, SAMPLE])
    pd.testing.assert_frame_equal(xi.cross_modal_ratio(list(both)), table)
    assert np.isfinite(table["ratio"]).all()
