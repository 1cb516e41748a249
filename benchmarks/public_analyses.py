"""Measure every public analysis of a sample, as ratios to a plain forward of the same model.

python benchmarks/public_analyses.py --tokens 1024 2048

A LLaVA with 142M random weights runs on a prompt with four images. In each round, two plain
forwards, the capture and every analysis run once, in random order. A row of the table has the time
of the capture plus that of the analysis, divided by the mean of the two plain forwards of the same
round: the median over rounds, and half the range. Each analysis is given a new copy of the sample,
so that it finds no values that another analysis computed; "all of these on one sample" is given one
copy for all. What takes longer than four plain forwards is timed once. Time is processor time,
which includes the page faults of the default memory allocator, as users have it; ``--steady`` sets
an allocator that keeps freed memory, which has less noise and hides these.

Memory is measured in a separate process, as the growth of the resident set: that of capture and
analysis beyond the plain forward and the kept tensors, and that of the analysis alone.

The last columns show what is usual today: a forward with ``attn_implementation="eager"`` and
``output_attentions=True``, and the same statistic by numpy (``numpy_statistics.py``), at sizes at
which its matrices fit in memory.

Three more models are measured: one with 16 layers of 32 heads (``positional_bias`` of 640 tokens),
the shipped one (analyses of many samples, in plain forwards of one sample, on one thread), and one
whose image tokens are learned queries.

``--package`` measures the package in another folder by the same script, for example a checkout of
an earlier commit. It can be given several times; each package gets its columns. The cell of a name
that a package does not have is empty. ``--csv`` writes the numbers, ``--plot`` draws them, and
``--read`` shows the numbers of earlier runs.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # no busy waiting; set before torch imports
import numpy as np
import pandas as pd
import torch
from costs import LEAN, STEADY, alone
from measurements import Record, eager_times, learned_queries, memory, shipped_times, times
from random_models import MANY_HEADS, MANY_HEADS_TOKENS, PACKAGE, Scene, Shape, package

MODELS = {
    "large": "",
    "many heads": ", 16 layers of 32 heads",
    "shipped": ", shipped model",
    "learned queries": ", learned queries",
}
"""The measured models, and what the name of a work says about each."""

KEYS = ["package", "model", "asked", "work"]


def measure(
    packages: Mapping[str, str],
    tokens: Sequence[int],
    rounds: int,
    chosen: Sequence[str] = (),
    *,
    eager: bool = True,
    steady: bool = False,
    save: Path | None = None,
) -> pd.DataFrame:
    """Measure all works with every package.

    Args:
        packages: Folder of each package, by its label.
        tokens: Lengths of the prompt. The number of image tokens is a square, so the lengths in the
            table differ a little.
        rounds: Timed rounds.
        chosen: Names of works; all if empty.
        eager: Whether eager attention is measured too, with the last package.
        steady: Whether the allocator keeps freed memory while time is measured.
        save: A CSV file that is written after each part.

    Returns:
        One row per package, model, length and work, with the numbers that were measured.
    """
    found: list[Record] = []
    malloc = STEADY if steady else {}
    for model, asked, label, part in _parts(packages, tokens, rounds, chosen, malloc, eager=eager):
        rows = part()
        found.extend({"package": label, "model": model, "asked": asked, **row} for row in rows)
        print(f"measured: {label}, {model} {asked or ''}", file=sys.stderr, flush=True)
        if save is not None:
            combined(found).to_csv(save, index=False)
    return combined(found)


def combined(found: Sequence[Record]) -> pd.DataFrame:
    """Join the rows of one work, which have its time, its memory and that of eager attention."""
    return pd.DataFrame(found).groupby(KEYS, sort=False).first().reset_index()


def _parts(
    packages: Mapping[str, str],
    tokens: Sequence[int],
    rounds: int,
    chosen: Sequence[str],
    malloc: Mapping[str, int],
    *,
    eager: bool,
) -> Iterator[tuple[str, int, str, Callable[[], list[Record]]]]:
    """Yield model, length, package and a function that measures them in a separate process."""
    bias, many = ["positional_bias"], Scene.of(MANY_HEADS, MANY_HEADS_TOKENS)
    for label, folder in packages.items():
        here = partial(_measured, folder, malloc)
        if not chosen or set(bias) <= set(chosen):
            yield "many heads", 0, label, partial(here, times, many, bias, rounds)
        yield "shipped", 0, label, partial(here, shipped_times, chosen, rounds)
        yield "learned queries", 0, label, partial(here, learned_queries, chosen, rounds)
    for asked in tokens:
        scene = Scene.of(Shape(), asked)
        for label, folder in packages.items():
            here = partial(_measured, folder)
            with_eager = eager and folder == list(packages.values())[-1]
            remember = partial(memory, eager=with_eager)
            yield "large", asked, label, partial(here, malloc, times, scene, chosen, rounds)
            yield "large", asked, label, partial(here, LEAN, remember, scene, chosen)
            if with_eager:
                of_eager = partial(here, malloc, eager_times, scene, chosen, min(rounds, 2))
                yield "large", asked, label, of_eager


def _measured(
    folder: str, malloc: Mapping[str, int], function: Callable[..., list[Record]], *args: Any
) -> list[Record]:
    """Call a function in a separate process that imports the package from a folder."""
    sys.path.insert(0, folder)  # a spawned process begins with this path
    try:
        return alone(_with_package, folder, function, args, **malloc)
    finally:
        sys.path.remove(folder)


def _with_package(
    folder: str, function: Callable[..., list[Record]], args: tuple[Any, ...]
) -> list[Record]:
    imported = Path(package().__file__).resolve()
    if not imported.is_relative_to(Path(folder).resolve()):
        raise RuntimeError(f"Python imports {imported} instead of the package in {folder}.")
    torch.set_num_threads(2)
    return function(*args)


def printed(result: pd.DataFrame) -> str:
    """Return the result as a Markdown table, with notes on the plain forwards."""
    labels = list(dict.fromkeys(result["package"]))
    tag = {label: f", {label}" if len(labels) > 1 else "" for label in labels}
    head = ["work", "tokens"]
    for label in labels:
        head += [f"time / plain{tag[label]}", "±"]
    head += ["growth", *(f"MB beyond plain and kept{tag[label]}" for label in labels)]
    head += [
        "MB of the analysis",
        "MB / 1,000 tokens",
        "eager, numpy: time / plain",
        "MB beyond plain",
    ]
    lines = [_line(result, labels, *key) for key in _row_keys(result)]
    widths = [max(len(row[i]) for row in [head, *lines]) for i in range(len(head))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    table = []
    for first, *others in [head, rule, *lines]:
        cells = (cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))
        table.append(f"| {' | '.join([first.ljust(widths[0]), *cells])} |")
    return "\n".join([*table, "", *_notes(result)])


def _row_keys(result: pd.DataFrame) -> list[tuple[str, str, int]]:
    """Return model, work and length of each row: works in their order, then lengths."""
    keys = result[["model", "work", "asked"]].drop_duplicates()
    works = list(dict.fromkeys(keys["work"]))
    found: list[tuple[str, str, int]] = list(keys.itertuples(index=False, name=None))
    return sorted(found, key=lambda key: (list(MODELS).index(key[0]), works.index(key[1]), key[2]))


def _line(
    result: pd.DataFrame, labels: Sequence[str], model: str, work: str, asked: int
) -> list[str]:
    of_work = result[(result["model"] == model) & (result["work"] == work)]
    here = of_work[of_work["asked"] == asked]
    rows = {label: here[here["package"] == label] for label in labels}

    def number(label: str, column: str, digits: int) -> str:
        of = rows[label]
        return _number(of[column].iloc[0] if len(of) and column in of else np.nan, digits)

    n = here["samples"].max() if "samples" in here else np.nan
    many = f", {n:.0f} samples" if n > 1 else ""
    line = [f"{work}{many}{MODELS[model]}", f"{here['tokens'].iloc[0]:,.0f}"]
    for label in labels:
        line += [number(label, "time", 2), number(label, "spread", 2)]
    last = labels[-1]
    growth, slope = _growth(of_work[of_work["package"] == last], asked)
    line += [_number(growth, 2), *(number(label, "beyond_mb", 0) for label in labels)]
    line += [number(last, "alone_mb", 0), _number(slope, 1)]
    return [*line, number(last, "eager_time", 2), number(last, "eager_mb", 0)]


def _number(value: float, digits: int) -> str:
    return "" if np.isnan(value) else f"{round(value, digits) + 0.0:,.{digits}f}"  # no "-0"


def _growth(of_work: pd.DataFrame, asked: int) -> tuple[float, float]:
    """Return the time at this length over that at the shortest, and the slope of the memory.

    Both are NaN at the shortest length. The slope is that of the memory of the analysis, in MB per
    1,000 tokens.
    """
    shortest = of_work[of_work["asked"] == of_work["asked"].min()]
    here = of_work[of_work["asked"] == asked]
    if not len(here) or asked == of_work["asked"].min():
        return np.nan, np.nan
    low, high = shortest.iloc[0], here.iloc[0]
    more_mb = high.get("alone_mb", np.nan) - low.get("alone_mb", np.nan)
    slope = more_mb / (high["tokens"] - low["tokens"]) * 1000
    return high["time"] / low["time"], slope


def _notes(result: pd.DataFrame) -> list[str]:
    large = result[(result["model"] == "large") & result["plain_s"].notna()]
    return [
        f"{row.package}, {row.tokens:,.0f} tokens: a plain forward takes {row.plain_s:.3g} s, "
        f"{row.sdpa_share:.0%} of it in fused attention; two of them differ by {row.noise:.1%}."
        for row in large.drop_duplicates(["package", "asked"]).itertuples()
    ]


def packages_of(given: Sequence[str]) -> dict[str, str]:
    """Return the folder of each package by its label; by default, of the one that is imported."""
    if not given:
        found = importlib.util.find_spec(PACKAGE)
        if found is None or found.origin is None:
            sys.exit(f"{PACKAGE} is not installed. Install it, or pass --package FOLDER.")
        return {"now": str(Path(found.origin).parent.parent)}
    packages = {}
    for each in given:
        label, equals, folder = each.rpartition("=")
        path = Path(folder).resolve()
        if not (path / PACKAGE / "__init__.py").exists():
            sys.exit(f"{path} does not contain {PACKAGE}. Pass the folder of a checkout.")
        packages[label if equals else path.name] = str(path)
    return packages


def main() -> None:
    """Measure and print what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    more: dict[str, Any] = {"nargs": "+", "action": "extend", "default": []}
    parser.add_argument("--tokens", type=int, help="prompt lengths (default 1024 2048)", **more)
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds (default 3)")
    parser.add_argument("--works", help="rows to measure (default all)", **more)
    parser.add_argument("--package", help="[LABEL=]FOLDER, the checkouts to measure", **more)
    parser.add_argument("--no-eager", action="store_true", help="leave out eager attention")
    parser.add_argument("--steady", action="store_true", help="an allocator that keeps memory")
    parser.add_argument("--read", type=Path, help="show these results instead of measuring", **more)
    parser.add_argument("--csv", type=Path, help="write the numbers to this file")
    parser.add_argument("--plot", type=Path, help="draw the ratios into this file")
    given = parser.parse_args()
    if given.read:
        result = pd.concat([pd.read_csv(path) for path in given.read])
    else:
        tokens, packages = given.tokens or [1024, 2048], packages_of(given.package)
        result = measure(
            packages,
            tokens,
            given.rounds,
            given.works,
            eager=not given.no_eager,
            steady=given.steady,
            save=given.csv,
        )
    print(printed(result))
    if given.plot:
        from cost_plot import draw  # imports matplotlib

        draw(result, given.plot)


if __name__ == "__main__":
    main()
