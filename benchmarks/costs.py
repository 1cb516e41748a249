"""Measure time and memory: what the benchmarks in this folder share.

Time on the CPU is processor time, which does not count waiting for other processes. Time on a GPU
is wall time between two synchronisations. Memory on the CPU is the peak of the resident set, on a
GPU the peak of the memory that torch allocated.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

_Result = TypeVar("_Result")
MB = 2**20

STEADY = {"MMAP_MAX": 0, "TRIM_THRESHOLD": 2**40}
"""Allocator settings for timing: memory is not returned to the kernel.

With the default settings, the number of pages that the same forward requests varies between 0.1 and
0.5 million between processes.
"""

LEAN = {"MMAP_THRESHOLD": MB}
"""Allocator settings for measuring memory: freed memory is returned to the kernel at once."""


def alone(function: Callable[..., _Result], *args: Any, **malloc: int) -> _Result:
    """Call a function in a separate process, with settings of the C allocator."""
    settings = {f"MALLOC_{name}_": str(value) for name, value in malloc.items()}
    os.environ.update(settings)  # read when a process starts
    try:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            return pool.apply(function, args)
    finally:
        for name in settings:
            del os.environ[name]


def resident(entry: str) -> float:
    """Return an entry of this process's status, such as ``"VmRSS"``, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(entry)) / 2**10


def median_ratio(
    times: Sequence[float], plain: Sequence[float], again: Sequence[float]
) -> tuple[float, float]:
    """Return the median ratio to the mean of two plain forwards of a round, and its half range."""
    ratios = [2 * t / (one + other) for t, one, other in zip(times, plain, again, strict=True)]
    return statistics.median(ratios), (max(ratios) - min(ratios)) / 2


class Meter:
    """Measure the time and the peak memory of a function on one device."""

    def __init__(self, device: str) -> None:
        self.on_gpu = device.startswith("cuda")

    def seconds(self, function: Callable[[], object]) -> float:
        """Return the seconds that a call takes; its result is dropped afterwards."""
        return self.timed(function)[0]

    def timed(self, function: Callable[[], _Result]) -> tuple[float, _Result]:
        """Return the seconds that a call takes, and its result."""
        start = self._now()
        result = function()
        return self._now() - start, result

    def growth(self, function: Callable[[], _Result]) -> tuple[float, _Result]:
        """Return by how many MB a call raises the peak of the memory in use, and its result."""
        gc.collect()
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            result = function()
            return (torch.cuda.max_memory_allocated() - before) / MB, result
        Path("/proc/self/clear_refs").write_text("5")  # reset the peak
        held = resident("VmRSS")
        result = function()
        return resident("VmHWM") - held, result

    def _now(self) -> float:
        if self.on_gpu:
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()
