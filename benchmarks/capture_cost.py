"""What capturing costs, as ratios to the plain forward, measured side by side in one run.

python benchmarks/capture_cost.py --tokens 1024 --tokens 3072

A Llama of more than 100M random weights reads a prompt of which nine tenths stand for image tokens.
Each way of capturing runs once a round, in random order, so that whatever else the machine does
falls on all alike. Reported are the medians of the ratios to the mean of the two plain forwards of
the same round, once in time and once in the time that processors spent on this process, where a
forward that had to wait for another process is not the slower one; what the two plain forwards
differ by is noise. It is less still in two comparisons within the same forwards: of the layers that
are listened to with those between them that are not, and of the time inside of the recorder's hooks
with the time outside. Peak memory is measured in a process of its own per way, as the growth of the
resident set during the forward.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import random
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeVar

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # a thread that waits takes no time; read by:
import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from xmodal_interp.attention import AttentionCall
from xmodal_interp.hooks import record
from xmodal_interp.hooks.recorder import _Recorder

_Result = TypeVar("_Result")
WAYS = (
    *("plain", "plain again"),
    *("keep q and k", "mass of text rows", "mass of all rows"),
    "eager with attentions",
)


def build() -> LlamaForCausalLM:
    """136M weights: 8 layers, width 1024, 16 query and 4 key heads."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=4,
        max_position_embeddings=4096,
    )
    return LlamaForCausalLM(config).eval()


def runner(
    way: str, model: LlamaForCausalLM, n_tokens: int, layers: Sequence[int] | None = None
) -> Callable[[], int]:
    """A function that runs one forward in this way and returns the bytes it has kept.

    Args:
        way: One of ``WAYS``.
        model: What runs.
        n_tokens: Length of the prompt.
        layers: Which layers are listened to; all if not given.
    """
    ids = torch.randint(0, 8192, (1, n_tokens), generator=torch.Generator().manual_seed(1))
    n_image = n_tokens * 9 // 10
    image = torch.zeros(1, n_tokens)
    image[0, :n_image] = 1
    text = torch.arange(n_image, n_tokens)

    def forward(**options: bool) -> object:
        with torch.no_grad():
            return model(input_ids=ids, use_cache=False, logits_to_keep=1, **options)

    def run() -> int:
        model.set_attn_implementation("eager" if way.startswith("eager") else "sdpa")
        if way.startswith("plain"):
            forward()
            return 0
        if way == "keep q and k":
            with record(model, layers=layers) as recording:
                forward()
            return sum(call.n_bytes for call in recording.calls)
        if way.startswith("mass"):
            rows = text if "text" in way else None
            mass = partial(AttentionCall.mass, groups=image, queries=rows)
            with record(model, layers=layers, reduce=mass) as recording:
                forward()
            return sum(m.numel() * m.element_size() for m in recording.results)
        attentions = forward(output_attentions=True).attentions  # type: ignore[attr-defined]
        return sum(a.numel() * a.element_size() for a in attentions)

    return run


def time_ratios(
    ways: tuple[str, ...], n_tokens: int, rounds: int
) -> tuple[dict[str, float], dict[str, float]]:
    """What each way takes over the mean plain forward of its round, medians: time, CPU time.

    In a process whose allocator gives nothing back: else the same forward asks the kernel for a
    tenth of a million pages in one process and for half a million in another, whatever it keeps.
    """
    return _alone(_time_ratios, ways, n_tokens, rounds, MMAP_MAX=0, TRIM_THRESHOLD=2**40)


def _time_ratios(
    ways: tuple[str, ...], n_tokens: int, rounds: int
) -> tuple[dict[str, float], dict[str, float]]:
    torch.set_num_threads(2)
    model = build()
    runs = {way: runner(way, model, n_tokens) for way in ways}
    clocks = (time.perf_counter, time.process_time)
    took: dict[str, list[list[float]]] = {way: [[], []] for way in ways}
    for number in range(rounds + 1):
        for way in random.Random(number).sample(ways, len(ways)):
            start = [clock() for clock in clocks]
            runs[way]()
            if number > 0:  # the first round warms up
                for times, clock, began in zip(took[way], clocks, start, strict=True):
                    times.append(clock() - began)
    wall, processor = (
        {way: _median_ratio(took[way][i], took["plain"][i], took["plain again"][i]) for way in ways}
        for i in range(2)
    )
    return wall, processor


def _median_ratio(times: list[float], plain: list[float], again: list[float]) -> float:
    rounds = zip(times, plain, again, strict=True)
    return statistics.median(2 * t / (one + other) for t, one, other in rounds)


def layer_ratio(way: str, n_tokens: int, rounds: int) -> float:
    """Time of layers that are listened to, over that of the others in the same forward.

    Of each two forwards, one listens to the even layers and one to the odd ones; the geometric mean
    of both ratios is free of what the layers differ in. The median over the pairs.
    """
    model = build()
    clock: list[float] = []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda *_: clock.append(time.perf_counter()))
        layer.register_forward_hook(lambda *_: clock.append(time.perf_counter()))

    def ratio(first: int) -> float:
        clock.clear()
        runner(way, model, n_tokens, layers=range(first, len(model.model.layers), 2))()
        took = [after - before for before, after in zip(clock[::2], clock[1::2], strict=True)]
        return sum(took[first::2]) / sum(took[1 - first :: 2])

    pairs = [(ratio(0), ratio(1)) for _ in range(rounds + 1)]
    return statistics.median(statistics.geometric_mean(pair) for pair in pairs[1:])


def share_inside(way: str, n_tokens: int, rounds: int) -> float:
    """Time inside of the recorder's hooks over the time outside of them: hardly any noise."""
    run, inside = runner(way, build(), n_tokens), [0.0]

    def timed(method: Callable[..., Any]) -> Callable[..., Any]:
        def around(*args: Any) -> Any:
            start = time.perf_counter()
            try:
                return method(*args)
            finally:
                inside[0] += time.perf_counter() - start

        return around

    names = ("open", "close", "after", "finish")
    originals = {name: getattr(_Recorder, name) for name in names}
    try:
        for name, method in originals.items():
            setattr(_Recorder, name, timed(method))
        run()  # warms up
        inside[0], start = 0.0, time.perf_counter()
        for _ in range(rounds):
            run()
        total = time.perf_counter() - start
    finally:
        for name, method in originals.items():
            setattr(_Recorder, name, method)
    return inside[0] / (total - inside[0])


def peak_memory(way: str, n_tokens: int) -> tuple[float, float]:
    """Peak growth of the resident set in a forward, and what was kept of it; MB, own process."""
    return _alone(_peak, way, n_tokens, MMAP_THRESHOLD=2**20)  # what is freed is given back at once


def _alone(function: Callable[..., _Result], *args: Any, **malloc: int) -> _Result:
    """What a function returns in a process of its own, under settings of the C allocator."""
    settings = {f"MALLOC_{name}_": str(value) for name, value in malloc.items()}
    os.environ.update(settings)  # read when a process begins
    try:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            return pool.apply(function, args)
    finally:
        for name in settings:
            del os.environ[name]


def _peak(way: str, n_tokens: int) -> tuple[float, float]:
    torch.set_num_threads(2)
    model = build()
    runner(way, model, 64)()
    run = runner(way, model, n_tokens)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the kernel forgets the peak so far
    before = _resident("VmRSS")
    kept = run() / 2**20
    return _resident("VmHWM") - before, kept


def _resident(entry: str) -> float:
    """An entry of this process's status, MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(entry)) / 2**10


def main(
    tokens: Annotated[list[int], typer.Option(help="Prompt lengths")] = [1024, 3072],  # noqa: B006
    rounds: Annotated[int, typer.Option(help="Timed rounds")] = 7,
    eager: Annotated[bool, typer.Option(help="Measure eager with output_attentions too")] = True,
) -> None:
    """Print the table."""
    torch.set_num_threads(2)
    ways = WAYS if eager else WAYS[:-1]
    for n_tokens in tokens:
        wall, processor = time_ratios(ways, n_tokens, rounds)
        table = Table(title=f"{n_tokens} tokens, float32, two threads")
        for column in (
            "way",
            "time / plain",
            "CPU time / plain",
            "layers heard / not",
            "inside hooks / outside",
            "peak over idle, MB",
            "kept, MB",
            "peak - plain - kept, MB",
        ):
            table.add_column(column, justify="left" if column == "way" else "right", min_width=8)
        plain_peak = 0.0
        for way in ways:
            peak, kept = peak_memory(way, n_tokens)
            plain_peak = peak if way == "plain" else plain_peak
            extra = f"{peak - plain_peak - kept:.0f}"
            listens = way.startswith(("keep", "mass"))
            inside = f"{share_inside(way, n_tokens, min(rounds, 3)):.1%}" if listens else ""
            layers = f"{layer_ratio(way, n_tokens, rounds):.3f}" if listens else ""
            times = (f"{wall[way]:.3f}", f"{processor[way]:.3f}", layers, inside)
            table.add_row(way, *times, f"{peak:.0f}", f"{kept:.0f}", extra)
        Console(width=120).print(table)


if __name__ == "__main__":
    typer.run(main)
