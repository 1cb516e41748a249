"""Call public functions with random arguments: only errors of this package may be raised.

``python -m tests.helpers.fuzzing 10000`` makes 10,000 calls and lists all other ("raw") exceptions.
"""

from __future__ import annotations

import inspect
import random
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image

import xmodal_interp as xi
from tests.helpers.figure_samples import fake
from tests.helpers.store_samples import SETTINGS
from tests.helpers.store_samples import sample as stored
from tests.helpers.tiny import QUESTION, picture
from xmodal_interp import evaluation, figures
from xmodal_interp.errors import XmodalError
from xmodal_interp.store import StoreWriter


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


VALUES: dict[str, Callable[[], Any]] = {
    repr(value): (lambda value=value: value)
    for value in (
        *(None, True, False, 0, 1, -1, 2, 3, 99, -99, 10**9, 10**20, -(10**20)),
        *(0.0, 0.5, -0.5, 1.5, float("nan"), float("inf"), -float("inf"), 1e300, 1j),
        *("", "zzz", "last", "text", "red", "uniform", "\ud800", "a\0b", "x" * 10_000, b"x"),
        *((), [], [[]], {}, set(), [0], [0, 1], [-1], [0.5], [True], [None], ["a"], [99], [""]),
        *({"a": 1}, {0: [0]}, {0: 1}, {"a": [0]}, (0, 1), (1, 0), (None, None), range(3)),
        *([0, 0, 10, 10], [10, 10, 0, 0], [[0, 0, 5, 5]], [float("nan")] * 4, ["language"]),
    )
} | {
    "deep": lambda: nested(5000),
    "function": lambda: lambda _: 0,
    "object": object,
    "slice": lambda: slice(0, 2),
    "slice of fractions": lambda: slice(0.5, None),
    "slice by 0": lambda: slice(None, None, 0),
    "mask": lambda: np.array([True, False]),
    "array": lambda: np.zeros((2, 2)),
    "no array": lambda: np.zeros(0),
    "tensor": lambda: torch.zeros(3),
    "image": lambda: Image.new("RGB", (4, 4)),
    "no image": lambda: Image.new("RGB", (0, 0)),
    "sample": fake,
    "samples": lambda: [fake(), fake()],
}


def targets(folder: Path) -> dict[str, tuple[Callable[..., Any], dict[str, Any]]]:
    """Return the functions to call, each with valid arguments."""
    vlm = xi.load()
    sample = xi.capture(vlm, picture(), QUESTION)
    ratio = xi.cross_modal_ratio(sample)
    rollout = xi.attention_rollout(sample, [150])
    hits = evaluation.pointing_hits(sample, [(0, 0, 30, 30)])
    with StoreWriter(folder / "store", SETTINGS, images=False) as writer:
        writer.write(stored())
    store = xi.open_store(folder / "store")
    of_sample = (
        *(xi.cross_modal_ratio, xi.token_ratio, xi.block_statistics, xi.cross_modal_summary),
        *(xi.attention_allocation, xi.attention_rollout, xi.positional_bias, xi.recency_index),
        *(xi.attention_sinks, xi.sink_rate, xi.raster_bias, xi.raster_profile, xi.raster_map),
        *(xi.attention_entropy, xi.rollout_matrix),
    )
    drawn = (
        *(figures.overlays, figures.token_head_grid, figures.attention_matrix),
        *(figures.token_patch_matrix, figures.mask_structure),
    )
    of_queries = (figures.overlay, figures.head_overlays, figures.layer_overlays)
    found: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
        **{each.__name__: (each, {_first(each): sample}) for each in (*of_sample, *drawn)},
        **{each.__name__: (each, {"sample": sample, "queries": [150]}) for each in of_queries},
        "head_grid": (figures.head_grid, {"table": ratio, "value": "ratio"}),
        "layer_curves": (figures.layer_curves, {"table": ratio, "value": "ratio"}),
        "rollout_overlay": (figures.rollout_overlay, {"table": rollout, "sample": sample}),
        "map_overlays": (
            figures.map_overlays,
            {"sample": sample, "maps": {"a": np.zeros(144)}, "label": "x"},
        ),
        "before_after": (
            figures.before_after,
            {"before": sample, "after": sample, "queries": [150]},
        ),
        "pointing_game": (
            evaluation.pointing_game,
            {"samples": sample, "boxes": [(0, 0, 30, 30)], "n_bootstrap": 3},
        ),
        "best_head": (evaluation.best_head, {"hits": hits}),
        "bootstrap_interval": (evaluation.bootstrap_interval, {"values": [0.0, 1.0], "n": 10}),
        "holm_adjusted": (evaluation.holm_adjusted, {"p_values": [0.5]}),
        "where": (sample.where, {}),
        "find": (sample.find, {"phrase": "red"}),
        "positions": (sample.positions, {"selector": [150]}),
        "call": (sample.call, {"layer": 0}),
        "probs": (sample.probs, {}),
        "grid": (sample.grid, {"values": np.zeros(144)}),
        "Keep": (xi.Keep, {}),
        "ablate_heads": (xi.ablate_heads, {"heads": {0: [0]}}),
        "knock_out_attention": (xi.knock_out_attention, {"queries": [5], "keys": [1]}),
        "open_store": (xi.open_store, {"path": folder / "store"}),
        "check_store": (xi.check_store, {"path": folder / "store"}),
        "store[]": (store.__getitem__, {"index": 0}),
        "load": (xi.load, {"name": "llava"}),
        "VLM": (xi.VLM, {"model": vlm.model, "processor": vlm.processor}),
        "Video": (xi.Video, {"frames": [Image.new("RGB", (32, 32))] * 2, "fps": 1.0}),
    }
    return found


def _first(function: Callable[..., Any]) -> str:
    return next(iter(inspect.signature(function).parameters))


def raw_errors(n: int, seed: int) -> Counter[str]:
    """Make ``n`` calls with one or two random arguments; count results, errors and raw exceptions.

    Raw exceptions are counted by function, arguments and line.
    """
    rng, found = random.Random(seed), Counter[str]()
    with TemporaryDirectory() as name:
        folder = Path(name)
        calls = targets(folder)
        names = list(calls)
        for _ in range(n):
            chosen = rng.choice(names)
            function, given = calls[chosen]
            parameters = [
                each.name
                for each in inspect.signature(function).parameters.values()
                if each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL)
                and each.name not in ("path", "progress")
            ] or list(given)
            options = dict(given)
            changed = rng.sample(parameters, k=min(len(parameters), rng.choice([1, 1, 2])))
            values = [rng.choice(list(VALUES)) for _ in changed]
            options |= {name: VALUES[value]() for name, value in zip(changed, values, strict=True)}
            try:
                function(**options)
            except XmodalError:
                found["refused"] += 1
            except Exception as error:  # noqa: BLE001  # any exception that is not an XmodalError
                frame = traceback.extract_tb(error.__traceback__)[-1]
                ours = [
                    each
                    for each in traceback.extract_tb(error.__traceback__)
                    if "xmodal_interp" in each.filename
                ]
                at = ours[-1] if ours else frame
                asked = ", ".join(f"{k}={v[:30]}" for k, v in zip(changed, values, strict=True))
                where = f"{Path(at.filename).name}:{at.lineno}"
                found[
                    f"raw {chosen}({asked}): {type(error).__name__} at {where}: {error}"[:260]
                ] += 1
            else:
                found["results"] += 1
    return found


if __name__ == "__main__":
    counted = raw_errors(int(sys.argv[1]), seed=int(sys.argv[2]) if len(sys.argv) > 2 else 0)
    raw = {what: n for what, n in counted.items() if what.startswith("raw ")}
    report = [
        f"{counted['results']} results, {counted['refused']} refused, {sum(raw.values())} raw"
    ]
    report += [f"{n:4} {what}" for what, n in sorted(raw.items(), key=lambda each: -each[1])]
    sys.stdout.write("\n".join(report) + "\n")
