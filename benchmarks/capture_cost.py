"""Measure the cost of capturing, as ratios to a plain forward in the same run.

python benchmarks/capture_cost.py --tokens 1024 --tokens 3072

A Llama with 136M random weights runs on a prompt in which nine tenths of the tokens represent image
tokens. In each round every variant runs once, in random order, so that other load on the machine
affects all variants equally. The table has the median ratio to the mean of two plain forwards of
the same round, in wall time and in CPU time. CPU time does not count waiting for other processes.
The ratio between the two plain forwards shows the noise.

Two comparisons within the same forward have less noise: recorded layers with unrecorded ones, and
time inside the recorder's hooks with time outside of them. Peak memory is measured in a separate
process per variant, as the growth of the resident set during the forward.
"""

from __future__ import annotations

import os
import random
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # no busy waiting; set before torch imports
import torch
import typer
from costs import LEAN, MB, STEADY, Meter, alone, median_ratio
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from xmodal_interp.attention import AttentionCall
from xmodal_interp.hooks import record
from xmodal_interp.hooks.recorder import _Recorder

WAYS = (
    *("plain", "plain again"),
    *("keep q and k", "mass of text rows", "mass of all rows"),
    "eager with attentions",
)


def build() -> LlamaForCausalLM:
    """Build a Llama with 136M weights: 8 layers, width 1024, 16 query and 4 key heads."""
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
    """Return a function that runs one forward and returns the number of bytes kept.

    Args:
        way: Variant, one of ``WAYS``.
        model: The model to run.
        n_tokens: Length of the prompt.
        layers: Layers to record, all if not given.
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
    """Return each variant's median ratio to the mean plain forward: wall time, CPU time."""
    return alone(_time_ratios, ways, n_tokens, rounds, **STEADY)


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
            if number > 0:  # the first round is a warm-up
                for times, clock, began in zip(took[way], clocks, start, strict=True):
                    times.append(clock() - began)
    wall, processor = (
        {
            way: median_ratio(took[way][i], took["plain"][i], took["plain again"][i])[0]
            for way in ways
        }
        for i in range(2)
    )
    return wall, processor


def layer_ratio(way: str, n_tokens: int, rounds: int) -> float:
    """Return the time of recorded layers divided by that of the other layers in the same forward.

    Of two forwards, one records the even layers and the other the odd ones. The geometric mean of
    both ratios cancels differences between layers. Returns the median over pairs of forwards.
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
    """Return the time inside the recorder's hooks divided by the time outside of them."""
    run, inside = runner(way, build(), n_tokens), [0.0]

    def timed(method: Callable[..., Any]) -> Callable[..., Any]:
        def around(*args: Any) -> Any:
            start = time.perf_counter()
            try:
                return method(*args)
            finally:
                inside[0] += time.perf_counter() - start

        return around

    names = ("enter", "exit", "after", "finish")
    originals = {name: getattr(_Recorder, name) for name in names}
    try:
        for name, method in originals.items():
            setattr(_Recorder, name, timed(method))
        run()  # warm-up
        inside[0], start = 0.0, time.perf_counter()
        for _ in range(rounds):
            run()
        total = time.perf_counter() - start
    finally:
        for name, method in originals.items():
            setattr(_Recorder, name, method)
    return inside[0] / (total - inside[0])


def peak_memory(way: str, n_tokens: int) -> tuple[float, float]:
    """Return the peak growth of the resident set in a forward, and the kept part, in MB."""
    return alone(_peak, way, n_tokens, **LEAN)


def _peak(way: str, n_tokens: int) -> tuple[float, float]:
    torch.set_num_threads(2)
    model = build()
    runner(way, model, 64)()
    growth, kept = Meter("cpu").growth(runner(way, model, n_tokens))
    return growth, kept / MB


def main(
    tokens: Annotated[list[int], typer.Option(help="Prompt lengths")] = [1024, 3072],  # noqa: B006
    rounds: Annotated[int, typer.Option(help="Timed rounds")] = 7,
    eager: Annotated[bool, typer.Option(help="Measure eager with output_attentions too")] = True,
) -> None:
    """Print the table of costs for each prompt length."""
    torch.set_num_threads(2)
    ways = WAYS if eager else WAYS[:-1]
    for n_tokens in tokens:
        wall, processor = time_ratios(ways, n_tokens, rounds)
        table = Table(title=f"{n_tokens} tokens, float32, two threads")
        for column in (
            "way",
            "time / plain",
            "CPU time / plain",
            "recorded / other layers",
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
            records = way.startswith(("keep", "mass"))
            inside = f"{share_inside(way, n_tokens, min(rounds, 3)):.1%}" if records else ""
            layers = f"{layer_ratio(way, n_tokens, rounds):.3f}" if records else ""
            times = (f"{wall[way]:.3f}", f"{processor[way]:.3f}", layers, inside)
            table.add_row(way, *times, f"{peak:.0f}", f"{kept:.0f}", extra)
        Console(width=120).print(table)


if __name__ == "__main__":
    typer.run(main)
