"""Check the exactness of recording and of every statistic on a GPU, and measure time and memory.

python benchmarks/on_gpu.py                  # CUDA, a model of 1B weights, under 8 minutes
python benchmarks/on_gpu.py --device cpu     # a tiny model, in seconds

1. Recording, in float32, float16 and bfloat16, with each kernel of torch's fused attention and
   with flex attention: the logits are bit-identical to those without recording, the recorded
   operands reproduce the output of the attention in float64, and ``probs`` equals their float64
   softmax.
2. Statistics: every method of ``AttentionCall`` that computes from probabilities, for every form of
   mask, compared with float64 replicas, which are written here from the equations.
3. The table of ``public_analyses.py``: wall time and allocated memory. Works whose time would
   exceed the rest of the time limit are left out, and named.

The exit code is 1 if a check fails.
"""

from __future__ import annotations

import argparse
import inspect
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # no busy waiting; set before torch imports
import pandas as pd
import torch
from measurements import Record, memory, times
from public_analyses import combined, printed
from random_models import Scene, Shape
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from xmodal_interp.attention import AttentionCall
from xmodal_interp.hooks import record

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
FLEX = "flex"
LIMIT = 1e-5  # of a statistic, relative to its largest value; of an entropy, in nats
ROUNDINGS = 8  # of an attention output, in roundings of its largest value
LEAST = 1e-4  # limit of an attention output in float32

LARGE = Shape(layers=16, heads=32, kv_heads=8, width=2048, mlp=8192, device="cuda")
SMALL = Shape(layers=2, heads=8, kv_heads=2, width=256, mlp=512)
TINY = Shape(layers=2, heads=4, kv_heads=2, width=64, mlp=128, d_head=16, images=2)


@dataclass(frozen=True)
class Check:
    """One comparison: what was compared, how large the error is, and the largest that passes."""

    what: str
    dtype: torch.dtype
    error: float
    limit: float
    note: str = ""

    @property
    def passes(self) -> bool:
        """Whether the error is at most the limit; NaN fails."""
        return self.error <= self.limit


# 1. Recording


def recording_checks(shape: Shape, side: int, ways: Sequence[str]) -> Iterator[Check]:
    """Yield the checks of recording, for each dtype and each way to compute attention."""
    for dtype in DTYPES:
        grouped = Scene(replace(shape, dtype=dtype), side)
        single = Scene(replace(shape, dtype=dtype, kv_heads=shape.heads), side)
        for way in ways:  # on CUDA, the efficient kernel does not take grouped heads
            scene = single if way == "efficient" else grouped
            if way == FLEX:
                scene.vlm.model.set_attn_implementation("flex_attention")
                yield from _recorded(scene, way, may_lack=True)
                scene.vlm.model.set_attn_implementation("sdpa")
            else:
                with sdpa_kernel(KERNELS[way]):
                    yield from _recorded(scene, way, may_lack=_lacks(way, dtype, shape.device))


def _lacks(kernel: str, dtype: torch.dtype, device: str) -> bool:
    """Return whether torch has no such kernel."""
    if device.startswith("cuda"):
        return kernel == "flash" and dtype == torch.float32
    return kernel == "efficient"


def _recorded(scene: Scene, name: str, *, may_lack: bool) -> Iterator[Check]:
    dtype, model = scene.shape.dtype, scene.vlm.model
    try:
        bare = scene.forward().logits
    except (RuntimeError, ValueError, ImportError) as error:
        reason = str(error).strip().splitlines()[0][:80]
        yield Check(f"{name}: runs", dtype, 0.0 if may_lack else torch.nan, 0.0, f"no: {reason}")
        return
    outputs: list[Tensor] = []
    projections = [m for n, m in model.named_modules() if n.endswith("self_attn.o_proj")]
    hooks = [
        m.register_forward_pre_hook(lambda _, args: outputs.append(args[0])) for m in projections
    ]
    try:
        with record(model, towers=["language"], values=True) as recording:
            logits = scene.forward().logits
    finally:
        for hook in hooks:
            hook.remove()
    changed = (logits != bare).sum().item()
    yield Check(f"{name}: logits that recording changes", dtype, float(changed), 0.0)
    n_missing = abs(len(recording.calls) - len(projections)) + abs(len(outputs) - len(projections))
    yield Check(f"{name}: layers without a call", dtype, float(n_missing), 0.0)
    of_output, of_probs = [], []
    for call, output in zip(recording.calls, outputs, strict=False):
        expected = replica_probs(call, visible_cells(call))
        heads = _per_query_head(call.v, call.n_heads).double()
        made = (expected @ heads).transpose(1, 2).flatten(2)
        of_output.append(((output.double() - made).abs().max() / made.abs().max()).item())
        of_probs.append((call.probs().double() - expected).abs().max().item())
    limit = max(ROUNDINGS * torch.finfo(dtype).eps, LEAST)
    yield Check(f"{name}: output of attention", dtype, max(of_output), limit)
    yield Check(f"{name}: probs", dtype, max(of_probs), LIMIT)


# 2. Statistics


def random_calls(n: int, d_head: int, device: str, dtype: torch.dtype) -> dict[str, AttentionCall]:
    """Return a call of each form, with ``n`` queries and 8 heads that share 2 key heads."""
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random).to(device, dtype)

    def call(
        n_queries: int = n, n_keys: int = n, spread: float = 2.0, **more: Any
    ) -> AttentionCall:
        q, k = normal(1, 8, n_queries, d_head) * spread, normal(1, 2, n_keys, d_head)
        given = {"tower": "language", "kind": "self", "layer": 0, "module": "m", "call": 0}
        return AttentionCall(**given, q=q, k=k, scaling=d_head**-0.5, **more)

    hidden = torch.rand(1, 1, n, n, generator=random).to(device) < 0.3
    hidden[..., 0] = False  # every query sees the first key
    padded = torch.ones(n, n, dtype=torch.bool, device=device).tril()
    padded[:, : n // 5] = False  # the first queries see no key
    additive = torch.zeros(1, 1, n, n, device=device, dtype=dtype)
    additive.masked_fill_(hidden, torch.finfo(dtype).min)
    third = n // 3
    rows = torch.arange(n - third, n, 2, device=device)
    causal = call(causal=True)
    return {
        "causal": causal,
        "causal, large scores": call(spread=20.0, causal=True),
        "causal, after a cache": call(n_queries=third, causal=True, offset=n - third),
        "causal, some rows kept": causal.select_rows(rows),
        "bidirectional": call(),
        "cross": call(n_queries=third, n_keys=n),
        "sliding window": call(causal=True, sliding_window=third),
        "segments": call(segments=torch.arange(n, device=device) // third),
        "padding": call(mask=padded[None, None]),
        "boolean mask": call(mask=~hidden),
        "mask of each head": call(mask=torch.cat([~hidden, padded[None, None]] * 4, 1)),
        "additive mask": call(mask=additive),
        "position bias": call(bias=normal(1, 8, n, n), causal=True),
        "soft-cap": call(softcap=5.0, causal=True),
        "sinks": call(sinks=normal(8), causal=True),
        "sinks of each query": call(sinks=normal(1, 8, n), causal=True),
    }


def visible_cells(call: AttentionCall) -> Tensor:
    """Return which keys each query sees, ``[1 | sample, 1 | head, query, key]``."""
    rows, keys = call.query_positions[:, None], torch.arange(call.n_keys, device=call.device)
    seen = torch.ones(len(rows), call.n_keys, dtype=torch.bool, device=call.device)
    if call.mask is not None:
        of_rows = call.mask
        lowest = torch.finfo(of_rows.dtype).min if of_rows.dtype != torch.bool else 0
        return of_rows.clone() if of_rows.dtype == torch.bool else of_rows > lowest / 2
    if call.causal:
        seen &= keys <= rows + call.offset
    if call.sliding_window is not None:
        seen &= keys > rows + call.offset - call.sliding_window
    if call.segments is not None:
        seen &= call.segments[rows[:, 0]][:, None] == call.segments
    return seen[None, None]


def replica_probs(call: AttentionCall, seen: Tensor) -> Tensor:
    """Return the softmax of the scores in float64; rows without a visible key are NaN."""
    keys = _per_query_head(call.k, call.n_heads).double()
    scores = call.scaling * call.q.double() @ keys.transpose(-1, -2)
    if call.softcap is not None:
        scores = call.softcap * (scores / call.softcap).tanh()
    if call.bias is not None:
        scores = scores + call.bias.double()
    scores = scores.masked_fill(~seen, -torch.inf)
    if call.sinks is None:
        return scores.softmax(-1)
    sinks = call.sinks.double()
    sinks = sinks[None, :, None] if sinks.ndim == 1 else sinks
    weights = torch.cat([scores, sinks[..., None].expand(*scores.shape[:3], 1)], -1).softmax(-1)
    return weights[..., :-1].masked_fill(~seen.any(-1, keepdim=True), torch.nan)


def _per_query_head(tensor: Tensor, n_heads: int) -> Tensor:
    return tensor.repeat_interleave(n_heads // tensor.shape[1], 1)


@dataclass(frozen=True)
class Statistic:
    """A method of a call, and its replica.

    Attributes:
        of_call: The method, given a call and the inputs.
        of_probs: The replica, given probabilities and visible cells in float64 and the inputs.
        in_nats: Whether the limit is absolute instead of relative to the largest value.
    """

    of_call: Callable[[AttentionCall, Inputs], Tensor]
    of_probs: Callable[[Tensor, Tensor, Inputs], Tensor]
    in_nats: bool = False


@dataclass(frozen=True)
class Inputs:
    """What the methods are given: key groups, values, and weights of the queries that see a key.

    ``apart`` is the distance from each query to each key, for the places of the keys.
    """

    groups: Tensor
    values: Tensor
    weights: Tensor
    places: Tensor
    apart: Tensor
    heads: list[int]

    @classmethod
    def of(cls, call: AttentionCall, seen: Tensor) -> Inputs:
        """Return random inputs for a call; rows that see no key have weight 0."""
        random = torch.Generator().manual_seed(1)
        groups = torch.rand(5, call.n_keys, generator=random) < 0.3
        values = torch.randn(call.n_keys, 3, generator=random)
        sees = seen.any(-1).all(1).cpu()
        weights = torch.rand(33, call.n_queries, generator=random) * sees
        places = 100 * torch.rand(call.n_keys, 2, generator=random)
        at = (call.query_positions + call.offset).cpu()
        apart = torch.linalg.vector_norm(places[at][:, None].double() - places.double(), dim=-1)
        made = (each.to(call.device) for each in (groups, values, weights, places, apart))
        return cls(*made, [5, 0, 2])


def _weighted(probs: Tensor, weights: Tensor) -> Tensor:
    return torch.einsum("sq,hqk->shk", weights.double(), probs[0].nan_to_num())


STATISTICS = {
    "probs": Statistic(lambda c, _: c.probs(), lambda p, _, __: p),
    "mass": Statistic(lambda c, i: c.mass(i.groups), lambda p, _, i: p @ i.groups.double().T),
    "average": Statistic(lambda c, i: c.average(i.values), lambda p, _, i: p @ i.values.double()),
    "null_mass": Statistic(
        lambda c, i: c.null_mass(i.groups),
        lambda _, seen, i: seen @ i.groups.double().T / seen.sum(-1, keepdim=True),
    ),
    "visible": Statistic(lambda c, _: c.visible().double(), lambda _, seen, __: seen),
    "n_visible": Statistic(lambda c, _: c.n_visible().double(), lambda _, seen, __: seen.sum(-1)),
    "visible_sums": Statistic(
        lambda c, i: c.visible_sums(i.weights[:1, None].double()),
        lambda _, seen, i: (i.weights[:1, None, None].double() @ seen)[:, :, 0],
    ),
    "distance": Statistic(lambda c, i: c.distance(i.places), lambda p, _, i: (p * i.apart).sum(-1)),
    "top_keys": Statistic(lambda c, _: c.top_keys(5)[0], lambda p, _, __: p.topk(5, -1).values),
    "entropy": Statistic(
        lambda c, _: c.entropy(), lambda p, _, __: torch.special.entr(p).sum(-1), in_nats=True
    ),
    "propagate": Statistic(
        lambda c, i: c.propagate(i.weights), lambda p, _, i: _weighted(p, i.weights).mean(1)
    ),
    "received": Statistic(
        lambda c, i: c.received(i.weights[:1]), lambda p, _, i: _weighted(p, i.weights[:1])
    ),
}
"""The methods by name; those that this version of the package lacks are not checked."""

OTHERS = {
    "tensors",
    "row_index",
    "kv_head_of",
    "sinks_of",
    "visible_rows",
    "to",
    "on_float64_device",
    "take",
    "select_sample",
    "select_rows",
}
"""Methods that select or move operands."""


def methods() -> set[str]:
    """Return the names of the public methods of a call that compute from its probabilities."""
    functions = inspect.getmembers(AttentionCall, inspect.isfunction)
    return {name for name, _ in functions if not name.startswith("_")} - OTHERS


def statistic_checks(n: int, d_head: int, device: str) -> Iterator[Check]:
    """Yield the largest error of each statistic over all forms of calls, for each dtype."""
    for dtype in DTYPES:
        worst: dict[str, tuple[float, str]] = {}
        for form, call in random_calls(n, d_head, device, dtype).items():
            seen = visible_cells(call)
            probs, inputs = replica_probs(call, seen), Inputs.of(call, seen)
            some = call.query_positions[call.n_queries // 4 :: 3]
            for name in sorted(methods() & STATISTICS.keys()):
                statistic = STATISTICS[name]
                expected = statistic.of_probs(probs, seen.double(), inputs)
                error = error_of(statistic.of_call(call, inputs), expected, statistic.in_nats)
                worst[name] = max(worst.get(name, (0.0, "")), (error, form))
            of_some = "mass and entropy of some heads and rows"
            at = torch.arange(call.n_queries // 4, call.n_queries, 3, device=call.device)
            part = probs[:, inputs.heads][:, :, at]
            mass = call.mass(inputs.groups, inputs.heads, some)
            error = error_of(mass, part @ inputs.groups.double().T, in_nats=False)
            entropy = call.entropy(inputs.heads, some)
            other = error_of(entropy, torch.special.entr(part).sum(-1), in_nats=True)
            worst[of_some] = max(worst.get(of_some, (0.0, "")), (max(error, other), form))
        for name, (error, form) in worst.items():
            yield Check(name, dtype, error, LIMIT, f"largest: {form}" if error else "")


def error_of(found: Tensor, expected: Tensor, in_nats: bool) -> float:
    """Return the largest error; infinite if the shapes or the NaN differ.

    The error is relative to the largest value, or absolute.
    """
    expected = expected.expand(torch.broadcast_shapes(found.shape, expected.shape))
    if found.shape != expected.shape or not torch.equal(found.isnan(), expected.isnan()):
        return torch.inf
    error = (found.double() - expected).abs().nan_to_num().max()
    scale = 1.0 if in_nats else expected.abs().nan_to_num().max().clamp(min=1e-30)
    return float(error / scale)


# 3. Time and memory


def table(
    shape: Shape, tokens: Sequence[int], rounds: int, chosen: Sequence[str], ends: float
) -> tuple[pd.DataFrame, list[str]]:
    """Return the result of ``public_analyses.py``, and what was left out to end in time.

    Args:
        shape: Sizes of the model.
        tokens: Lengths of the prompt, ascending.
        rounds: Timed rounds.
        chosen: Names of works; all if empty.
        ends: Time of ``time.monotonic`` at which the measurement ends.
    """
    rows: list[Record] = []
    left_out: list[str] = []
    for n, asked in enumerate(tokens):
        about = {"package": "now", "model": "large", "asked": asked}
        start = time.monotonic()
        scene = Scene.of(shape, asked)
        found = times(scene, chosen, rounds)
        found += memory(scene, chosen, eager=False)
        rows += [about | row for row in found]
        took = time.monotonic() - start
        if n + 1 == len(tokens):
            break
        growth = (tokens[n + 1] / asked) ** 2
        seconds = {row["work"]: row.get("analysis_s", 0.0) for row in found if "time" in row}
        rest = (ends - time.monotonic()) / (2 * len(tokens[n + 1 :]))
        fits = [name for name, s in seconds.items() if not s * growth * (rounds + 2) > rest / 4]
        left_out += [f"{name}, {tokens[n + 1]:,} tokens" for name in seconds if name not in fits]
        chosen = fits
        if took * growth / 4 > ends - time.monotonic():
            left_out += [f"everything, {length:,} tokens" for length in tokens[n + 1 :]]
            break
    return combined(rows), left_out


def markdown(checks: Sequence[Check]) -> str:
    """Return the checks as a table: a row per comparison, a column per dtype."""
    dtypes = {dtype: str(dtype).removeprefix("torch.") for dtype in DTYPES}
    lines = [
        f"| check | {' | '.join(dtypes.values())} | limit | |",
        "|---|---:|---:|---:|---:|---|",
    ]
    for what in dict.fromkeys(check.what for check in checks):
        of = {check.dtype: check for check in checks if check.what == what}
        errors = [_error(of[dtype]) if dtype in of else "" for dtype in dtypes]
        limit = ", ".join(dict.fromkeys(f"{check.limit:.2g}" for check in of.values()))
        notes = "; ".join(dict.fromkeys(check.note for check in of.values() if check.note))
        lines.append(f"| {what} | {' | '.join(errors)} | {limit} | {notes} |")
    return "\n".join(lines)


def _error(check: Check) -> str:
    shown = "does not run" if check.note.startswith("no: ") else f"{check.error:.1e}"
    return shown if check.passes else f"**{shown}: FAILS**"


def main() -> int:
    """Run all parts, print their tables and return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", help="cuda (default), cuda:1, ... or cpu")
    parser.add_argument("--tokens", type=int, nargs="+", help="prompt lengths of part 3")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds of part 3")
    ways = [*KERNELS, FLEX]
    parser.add_argument("--ways", nargs="+", choices=ways, default=ways, help="attention of part 1")
    parser.add_argument("--works", nargs="+", default=(), help="rows of part 3 (default all)")
    parser.add_argument("--minutes", type=float, default=7.5, help="time limit")
    parser.add_argument("--csv", type=Path, help="write the numbers of part 3 to this file")
    given = parser.parse_args()
    start = time.monotonic()
    on_gpu = given.device != "cpu"
    if on_gpu and not torch.cuda.is_available():
        sys.exit("There is no CUDA device. Pass --device cpu to run a tiny model on the CPU.")
    name = torch.cuda.get_device_name(given.device) if on_gpu else "CPU"
    print(f"torch {torch.__version__}, {name}\n\n## Recording\n")
    shape = replace(SMALL if on_gpu else TINY, device=given.device)
    recorded = list(recording_checks(shape, 16 if on_gpu else 4, given.ways))
    print(markdown(recorded))
    print("\n## Statistics of a call against float64\n")
    sizes = (1500, 64) if on_gpu else (60, 16)
    computed = list(statistic_checks(*sizes, given.device))
    print(markdown(computed))
    for unknown in sorted(methods() - STATISTICS.keys()):
        print(f"\nNot checked, because there is no replica here: AttentionCall.{unknown}")
    print(f"\n{time.monotonic() - start:.0f} s so far\n\n## Time and memory\n", flush=True)
    large = replace(LARGE, device=given.device, dtype=torch.bfloat16) if on_gpu else TINY
    lengths = sorted(given.tokens or ([512, 2048, 8192] if on_gpu else [32, 72]))
    ends = start + 60 * given.minutes
    result, left_out = table(large, lengths, given.rounds, given.works, ends)
    if given.csv:
        result.to_csv(given.csv, index=False)
    print(printed(result))
    for each in left_out:
        print(f"\nLeft out, because of the time limit: {each}")
    failed = [check for check in [*recorded, *computed] if not check.passes]
    print(f"\n{len(recorded) + len(computed)} checks, {len(failed)} failed")
    print(f"{time.monotonic() - start:.0f} s in all")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
