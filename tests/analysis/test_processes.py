"""Analyses in several processes: the same table, attributes and errors as in one."""

import multiprocessing
import os
import pickle
from concurrent.futures import Future

import numpy as np
import pandas as pd
import pytest
import torch

import xmodal_interp as xi
from tests.helpers.in_processes import about_process, killed
from tests.helpers.store_samples import items, shipped
from xmodal_interp.analysis import processes
from xmodal_interp.cli.menu import ANALYSES
from xmodal_interp.errors import InputError, NotRecordedError
from xmodal_interp.sample import Sample
from xmodal_interp.store import Store


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    keep = xi.Keep(towers=("vision", "language"), norms=True)
    folder = tmp_path_factory.mktemp("processes") / "store"
    return xi.capture_dataset(shipped(), items(7), folder, keep=keep, progress=False)


def assert_same_tables(found: pd.DataFrame, expected: pd.DataFrame) -> None:
    pd.testing.assert_frame_equal(found, expected, check_exact=True)
    assert found.attrs == expected.attrs
    for name, column in expected.items():
        assert list(map(type, found[name])) == list(map(type, column)), name
        if isinstance(column.dtype, np.dtype) and column.dtype.kind == "f":
            assert found[name].to_numpy().tobytes() == column.to_numpy().tobytes(), name


class SameProcess:
    """An executor that runs each task at once; tasks and results are pickled."""

    n_tasks = 0

    def submit(self, function, task) -> Future:
        self.n_tasks += 1
        future: Future = Future()
        future.set_result(pickle.loads(pickle.dumps(function(task))))
        return future

    def shutdown(self, *, cancel_futures: bool) -> None:
        assert cancel_futures


FORMS = {
    "store": lambda store: store,
    "list of stored samples": lambda store: store[[0, 1, 2, 0, 3]],
    "samples in memory": lambda store: [in_memory(each) for each in store[:3]],
}
NAMES = [name.replace("-", "_") for name in ANALYSES]


@pytest.mark.parametrize(
    ("name", "form"),
    [
        *((name, "store") for name in NAMES),
        *((name, form) for name in ("token_ratio", "raster_bias") for form in list(FORMS)[1:]),
    ],
)
def test_every_analysis_can_be_sent(name, form, store, monkeypatch) -> None:
    pool = SameProcess()
    monkeypatch.setattr(processes, "ProcessPoolExecutor", lambda *_, **__: pool)
    analysis, samples = getattr(xi, name), FORMS[form](store)
    assert_same_tables(analysis(samples, workers=2), analysis(samples))
    assert pool.n_tasks == len(samples)


def in_memory(sample: Sample) -> Sample:
    return sample.changed(calls=dict(sample.calls), tokens=sample.tokens.copy())


@pytest.mark.parametrize("workers", [2, 3])
def test_the_table_does_not_depend_on_the_number_of_processes(workers, store) -> None:
    seven = store[[0, 1, 2, 3, 0, 4, 1]] if workers == 2 else store
    found = xi.attention_rollout(seven, "last", layers=(1, None), workers=workers)
    assert_same_tables(found, xi.attention_rollout(seven, "last", layers=(1, None)))
    assert found.attrs["n_samples"] == 7
    assert len(found.attrs.get("numbered", {})) == (2 if workers == 2 else 0)


def test_a_process_has_the_threads_of_this_one_and_no_heavy_library(store, monkeypatch) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)  # the benchmarks set it
    found = list(processes.rows_of_samples(store, about_process, 2))
    assert [each.name for each in found] == list(store.names)
    (about,) = {each.parts[0]["threads"] for each in found}
    assert about == torch.get_num_threads()
    assert {each.parts[0]["waiting"] for each in found} == {"passive"}
    assert [each.parts[0]["heavy"] for each in found] == [[]] * 7
    assert os.getpid() not in {each.parts[0]["id"] for each in found}
    assert "OMP_WAIT_POLICY" not in os.environ


def test_the_first_error_in_order_is_raised_and_the_processes_end(store) -> None:
    few = [each if i < 3 else each.changed(calls={}) for i, each in enumerate(store)]
    with pytest.raises(NotRecordedError) as expected:
        xi.attention_entropy(few)
    with pytest.raises(NotRecordedError) as found:
        xi.attention_entropy(few, workers=2)
    assert repr(store.names[3]) in str(found.value)
    assert str(found.value) == str(expected.value)
    assert type(found.value) is type(expected.value)
    assert multiprocessing.active_children() == []


def test_a_killed_process_is_an_error(store) -> None:
    with pytest.raises(InputError) as found:
        list(processes.rows_of_samples(store, killed, 2))
    assert str(found.value) == (
        "One of workers=2 processes ended before it returned its rows. If memory ran out, use "
        "fewer workers; a script must call the analysis under `if __name__ == '__main__':`, "
        "because each process imports it."
    )


def test_what_cannot_be_pickled_is_an_error(store) -> None:
    labelled = [each.changed(labels={"ask": lambda: None}) for each in store[:2]]
    with pytest.raises(InputError, match=r"^With several workers, samples and arguments are pick"):
        xi.sink_rate(labelled, workers=2)
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("workers", [0, -1, 1.5, True])
def test_invalid_numbers_of_processes_are_errors(workers, store) -> None:
    with pytest.raises(InputError) as error:
        xi.sink_rate(store, workers=workers)
    assert str(error.value) == (f"workers must be an integer from 1 to 10000000; got {workers!r}.")
