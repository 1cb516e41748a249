"""Measure the works of one package on one scene; every function returns rows of the result."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from costs import MB, Meter, median_ratio
from PIL import Image
from random_models import (
    PATCH,
    PICTURE,
    SHORT_QUESTION,
    Scene,
    learned_query_model,
    new_copy,
    package,
    shipped_vlm,
    small_sample,
)
from torch.nn import functional
from works import CAPTURE, LEARNED_QUERIES, Work, works

Record = dict[str, Any]
"""A row of the result: the work, the number of tokens, and numbers."""

LONG = 4.0, 1.0  # plain forwards and seconds; what takes longer than both is timed once
N_SAMPLES = {"cross_modal_ratio": 40}  # of the shipped model; 10 for the others


def share_of_attention(scene: Scene) -> float:
    """Return the share of a plain forward that its fused attention kernels take."""
    meter, inside = Meter(scene.shape.device), [0.0]
    kernel = functional.scaled_dot_product_attention

    def timed(*args: Any, **options: Any) -> Any:
        took, result = meter.timed(lambda: kernel(*args, **options))
        inside[0] += took
        return result

    functional.scaled_dot_product_attention = timed
    try:
        whole = meter.seconds(scene.forward)
    finally:
        functional.scaled_dot_product_attention = kernel
    return inside[0] / whole


def times(scene: Scene, chosen: Sequence[str], rounds: int) -> list[Record]:
    """Return for each work the time of capture and analysis over a plain forward."""
    meter = Meter(scene.shape.device)
    todo = [work for work in works() if not chosen or work.name in chosen]
    towers = list(dict.fromkeys([("language",), *(work.towers for work in todo)]))
    _warm_up(scene, todo)
    share = share_of_attention(scene)
    plain: list[tuple[float, float]] = []
    captures: dict[tuple[str, ...], list[float]] = {of: [] for of in towers}
    took: dict[str, list[float]] = {work.name: [] for work in todo}
    for number in range(rounds):
        samples = {}
        order: list[Any] = ["plain", "plain again", *towers]
        pair = []
        for part in random.Random(number).sample(order, len(order)):
            if isinstance(part, str):
                pair.append(meter.seconds(scene.forward))
            else:
                seconds, samples[part] = meter.timed(partial(scene.capture, part))
                captures[part].append(seconds)
        plain.append((pair[0], pair[1]))
        for work in random.Random(number).sample(todo, len(todo)):
            of_one = took[work.name]
            if not of_one or not _is_long(of_one[0], statistics.mean(plain[0])):
                sample = new_copy(samples[work.towers])
                of_one.append(meter.seconds(partial(work.run, sample)))
    first, again = zip(*plain, strict=True)
    about = {"tokens": scene.n_tokens, "plain_s": statistics.median(first), "sdpa_share": share}
    noise = statistics.median(abs(a / b - 1) for a, b in plain)

    def record(name: str, whole: Sequence[float], seconds: Sequence[float]) -> Record:
        n = len(whole)
        ratio, spread = median_ratio(whole, first[:n], again[:n])
        found = {"work": name, "time": ratio, "spread": spread if n > 1 else np.nan, **about}
        return found | {
            "analysis_s": statistics.median(seconds) if seconds else np.nan,
            "noise": noise,
        }

    rows = [] if chosen and CAPTURE not in chosen else [record(CAPTURE, captures[towers[0]], [])]
    for work in todo:
        seconds = took[work.name]
        whole = [a + b for a, b in zip(captures[work.towers], seconds, strict=False)]
        rows.append(record(work.name, whole, seconds))
    return rows


def _warm_up(scene: Scene, todo: Sequence[Work]) -> None:
    """Run the model, and every work on a small sample: imports and caches are not measured."""
    sample = small_sample()
    for work in todo:
        work.run(sample)
    scene.capture()


def _is_long(seconds: float, plain: float) -> bool:
    return seconds > max(LONG[0] * plain, LONG[1])


def memory(scene: Scene, chosen: Sequence[str], *, eager: bool) -> list[Record]:
    """Return for each work the growth of memory, in MB."""
    meter = Meter(scene.shape.device)
    todo = [work for work in works() if not chosen or work.name in chosen]
    _warm_up(scene, todo)
    plain, _ = meter.growth(scene.forward)
    rows, about = [], {"tokens": scene.n_tokens}
    samples, peaks, kept = {}, {}, {}
    for towers in dict.fromkeys([("language",), *(work.towers for work in todo)]):
        peaks[towers], samples[towers] = meter.growth(partial(scene.capture, towers))
        kept[towers] = sum(call.n_bytes for call in samples[towers].calls.values()) / MB
    if not chosen or CAPTURE in chosen:
        of_capture = {"work": CAPTURE, "kept_mb": kept["language",]}
        rows.append(
            of_capture | {"beyond_mb": peaks["language",] - kept["language",] - plain} | about
        )
    for work in todo:
        sample = new_copy(samples[work.towers])
        growth, _ = meter.growth(partial(work.run, sample))
        peak = max(peaks[work.towers] - kept[work.towers], growth)
        found = {"alone_mb": growth, "beyond_mb": peak - plain, "kept_mb": kept[work.towers]}
        rows.append({"work": work.name, **found, **about})
    if eager and scene.eager_fits():
        layout = scene.layout()
        peak, attentions = meter.growth(scene.attentions)
        held = sum(a.nbytes for a in attentions) / MB
        if not chosen or CAPTURE in chosen:
            rows.append({"work": CAPTURE, "eager_mb": peak - plain, **about})
        for work in todo:
            if work.numpy is not None:
                growth, _ = meter.growth(partial(work.numpy, attentions, layout))
                whole = max(peak, held + growth) - plain
                rows.append({"work": work.name, "eager_mb": whole, **about})
    return rows


def eager_times(scene: Scene, chosen: Sequence[str], rounds: int) -> list[Record]:
    """Return the time of an eager forward and the same statistic by numpy, over a plain forward."""
    if not scene.eager_fits():
        return []
    meter, layout = Meter(scene.shape.device), scene.layout()
    todo = [w for w in works() if w.numpy is not None and (not chosen or w.name in chosen)]
    plain: list[tuple[float, float]] = []
    forwards: list[float] = []
    took: dict[str, list[float]] = {work.name: [] for work in todo}
    scene.forward()
    for _ in range(rounds):
        pair = meter.seconds(scene.forward)
        seconds, attentions = meter.timed(scene.attentions)
        forwards.append(seconds)
        plain.append((pair, meter.seconds(scene.forward)))
        for work in todo:
            of_one = took[work.name]
            if not of_one or not _is_long(of_one[0], pair):
                of_one.append(meter.seconds(partial(work.numpy, attentions, layout)))
        del attentions
    first, again = zip(*plain, strict=True)

    def ratio(whole: Sequence[float]) -> float:
        return median_ratio(whole, first[: len(whole)], again[: len(whole)])[0]

    about = {"tokens": scene.n_tokens}
    rows = [{"work": CAPTURE, "eager_time": ratio(forwards), **about}]
    rows = [] if chosen and CAPTURE not in chosen else rows
    for work in todo:
        whole = [a + b for a, b in zip(forwards, took[work.name], strict=False)]
        rows.append({"work": work.name, "eager_time": ratio(whole), **about})
    return rows


def shipped_times(chosen: Sequence[str], rounds: int) -> list[Record]:
    """Return times of the shipped model, in plain forwards of one sample, on one thread.

    The time of an analysis is that of the analysis alone, over several samples.
    """
    torch.set_num_threads(1)
    meter, vlm = Meter("cpu"), shipped_vlm()
    inputs, _ = vlm.prepare([[Image.new("RGB", (PICTURE, PICTURE))]], [SHORT_QUESTION])

    def plain() -> None:
        with torch.no_grad():
            vlm.model(**inputs, use_cache=False)

    def forward() -> float:
        return statistics.median(meter.seconds(plain) for _ in range(15))

    def record(name: str, n: int, ratios: Sequence[float]) -> Record:
        spread = (max(ratios) - min(ratios)) / 2 if len(ratios) > 1 else np.nan
        about = {"work": name, "samples": n, "tokens": inputs["input_ids"].shape[1]}
        return about | {"time": statistics.median(ratios), "spread": spread, "plain_s": forward()}

    forward()
    rows = []
    if not chosen or CAPTURE in chosen:
        seconds = [meter.seconds(small_sample) for _ in range(15)]
        rows.append(record(CAPTURE, 1, [each / forward() for each in seconds[1:]]))
    for work in works():
        if chosen and work.name not in chosen:
            continue
        n, ratios = N_SAMPLES.get(work.name, 10), []
        for _ in range(rounds + 1):
            samples = [small_sample(i) for i in range(n)]
            ratios.append(meter.seconds(partial(work.run_many, samples)) / forward())
        rows.append(record(work.name, n, ratios[1:]))
    return rows


def learned_queries(chosen: Sequence[str], rounds: int) -> list[Record]:
    """Return times of analyses of a Q-Former: 6 layers of 12 heads, 32 queries, 1,024 patches."""
    xi, meter = package(), Meter("cpu")
    todo = [n for n in LEARNED_QUERIES if hasattr(xi, n) and (not chosen or n in chosen)]
    if not todo:
        return []
    vlm, image = learned_query_model(), Image.new("RGB", (32 * PATCH,) * 2)
    inputs, _ = vlm.prepare([[image]], [SHORT_QUESTION])

    def plain() -> None:
        with torch.no_grad():
            vlm.model(**inputs, use_cache=False)

    def capture() -> Any:
        return xi.capture(vlm, image, SHORT_QUESTION, keep=xi.Keep(towers=("connector",)))

    def run(name: str, sample: Any) -> object:
        values = [np.ones(32)] if name == "on_patches" else []
        return getattr(xi, name)(sample, *values)

    rounds_of: dict[str, list[float]] = {CAPTURE: [], **{name: [] for name in todo}}
    first, again = [], []
    for _ in range(rounds + 1):
        first.append(meter.seconds(plain))
        taken, sample = meter.timed(capture)
        again.append(meter.seconds(plain))
        rounds_of[CAPTURE].append(taken)
        for name in todo:
            copy = new_copy(sample)
            rounds_of[name].append(taken + meter.seconds(partial(run, name, copy)))
    rows = []
    for name, whole in rounds_of.items():
        ratio, spread = median_ratio(whole[1:], first[1:], again[1:])
        row = {"work": name, "tokens": 32 * 32 + 1, "time": ratio, "spread": spread}
        rows.append(row | {"plain_s": statistics.median(first)})
    return rows
