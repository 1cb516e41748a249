"""Compute the rows of many samples in parallel processes, bit for bit as in one process.

Each process is given one sample at a time: the name of a stored sample, which it reads itself, or
the whole sample if it is in memory. The rows come back in the order of the samples, and this
process makes the table of them as it does of rows that it has computed itself. An error is raised
when its sample is next in order, so it is the error that one process would raise.

A function that is defined inside another one cannot be pickled. The function that computes the rows
of an analysis is sent as the place of its definition and the values that it uses from there.

The processes compute with as many torch threads as this one, because the last bits of a matrix
product can depend on their number (those of a rollout of 415 positions do from 3 threads on, by
2e-16). More threads than cores are slow only if a thread that waits keeps its core busy, so they
are started with ``OMP_WAIT_POLICY=passive``: 8 threads on 2 cores then cost 8% more than one.
"""

from __future__ import annotations

import importlib
import inspect
import io
import multiprocessing
import os
import pickle
import signal
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from itertools import islice
from types import CellType, CodeType, FunctionType
from typing import Any, NamedTuple

import torch

from xmodal_interp.errors import InputError
from xmodal_interp.sample import Sample
from xmodal_interp.store import Store

_LOCAL = ".<locals>."  # in the qualified name of a nested function, after that of the outer one


class SampleRows(NamedTuple):
    """The rows of one sample.

    Attributes:
        name: Name of the sample.
        provenance: Provenance of the sample.
        parts: The rows, as parts of a table.
    """

    name: str
    provenance: Mapping[str, Any]
    parts: list[dict[str, Any]]


def rows_of_samples(
    samples: Sequence[Sample],
    table_rows: Callable[[Sample], Iterable[dict[str, Any]]],
    workers: int,
) -> Generator[SampleRows, None, None]:
    """Yield the rows of each sample, in order; closing the generator ends the processes.

    Args:
        samples: The samples.
        table_rows: Function that returns or yields the rows of one sample. With several workers, it
            is a function of a module, or defined inside a function of a module.
        workers: Number of processes; 1 for this process alone.

    Raises:
        InputError: A sample or an argument of the analysis cannot be pickled, or a process was
            killed.
    """
    if workers == 1 or len(samples) < 2:
        yield from (_rows(table_rows, sample) for sample in samples)
        return
    pool = ProcessPoolExecutor(
        min(workers, len(samples)),
        multiprocessing.get_context("spawn"),  # a forked process could hang in a thread of torch
        initializer=_start,
        initargs=(torch.get_num_threads(),),
    )
    try:
        tasks = (pool.submit(_run, each) for each in _tasks(samples, table_rows))
        with _passive_waiting():
            ahead: deque[Future[SampleRows]] = deque(islice(tasks, 2 * workers))
        while ahead:
            found = ahead.popleft().result()
            ahead.extend(islice(tasks, 1))
            yield found
    except BrokenProcessPool as error:
        raise InputError(
            f"One of workers={workers} processes ended before it returned its rows. If memory ran "
            "out, use fewer workers; a script must call the analysis under `if __name__ == "
            "'__main__':`, because each process imports it."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _rows(table_rows: Callable[[Sample], Iterable[dict[str, Any]]], sample: Sample) -> SampleRows:
    return SampleRows(sample.name, sample.provenance, list(table_rows(sample)))


def _tasks(
    samples: Sequence[Sample], table_rows: Callable[[Sample], Iterable[dict[str, Any]]]
) -> Iterator[bytes]:
    """Yield per sample what a process needs: the function, and one that returns the sample."""
    if isinstance(samples, Store):
        yield from (_pickled((table_rows, read)) for read in samples.readers())
    else:
        yield from (_pickled((table_rows, partial(_itself, each))) for each in samples)


def _itself(sample: Sample) -> Sample:
    return sample


@contextmanager
def _passive_waiting() -> Iterator[None]:
    """Set ``OMP_WAIT_POLICY`` for processes that are started in this block, unless it is set."""
    if "OMP_WAIT_POLICY" in os.environ:
        yield
        return
    os.environ["OMP_WAIT_POLICY"] = "passive"
    try:
        yield
    finally:
        del os.environ["OMP_WAIT_POLICY"]


def _start(n_threads: int) -> None:
    """Prepare a process; Ctrl-C ends it at once."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    torch.set_num_threads(n_threads)


def _run(task: bytes) -> SampleRows:
    table_rows, read = pickle.loads(task)
    return _rows(table_rows, read())


def _pickled(value: Any) -> bytes:
    """Pickle a value; tensors are copied instead of moved to shared memory."""
    file = io.BytesIO()
    try:
        _Pickler(file).dump(value)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise InputError(
            f"With several workers, samples and arguments are pickled: {error}. Use workers=1."
        ) from error
    return file.getvalue()


class _Pickler(pickle.Pickler):
    """Pickles functions that are defined directly inside a function of a module."""

    def reducer_override(self, value: Any) -> Any:
        """Return how a nested function is rebuilt; other values are pickled as usual."""
        if not isinstance(value, FunctionType) or value.__qualname__.count(_LOCAL) != 1:
            return NotImplemented
        inner = inspect.unwrap(value)
        outer, name = inner.__qualname__.split(_LOCAL)
        if not (outer.isidentifier() and name.isidentifier()):  # a lambda, or in a class
            return NotImplemented
        cells = zip(inner.__code__.co_freevars, inner.__closure__ or (), strict=True)
        values = {variable: cell.cell_contents for variable, cell in cells}
        return _nested_function, (inner.__module__, outer, name, values)


def _nested_function(
    module: str, outer: str, name: str, values: Mapping[str, Any]
) -> Callable[..., Any]:
    """Return a function that is defined inside another one, which is not called.

    Args:
        module: Name of the module.
        outer: Name of the outer function.
        name: Name of the function.
        values: The variables of the outer function that it uses.
    """
    namespace = vars(importlib.import_module(module))
    constants = inspect.unwrap(namespace[outer]).__code__.co_consts
    (code,) = (each for each in constants if isinstance(each, CodeType) and each.co_name == name)
    return FunctionType(
        code, namespace, name, None, tuple(CellType(values[each]) for each in code.co_freevars)
    )
