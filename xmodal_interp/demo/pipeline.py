"""Run the demo: answers, store, tables, pictures, report.

1. Draw scenes that were held out of training, and create one question of every kind about each.
2. Capture the shipped model on the colour questions into a store, and the untrained model on some
   of them.
3. Generate answers to other questions.
4. Measure which heads attend to the object asked about, the share of attention on the image, the
   loss of accuracy when heads are removed, and the bias of attention by position.
5. Draw the pictures and write the report.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from xmodal_interp import at
from xmodal_interp.analysis import (
    answer_accuracy,
    attention_rollout,
    attention_sinks,
    block_statistics,
    cross_modal_ratio,
    head_pruning,
    positional_bias,
    pruning_curve,
    raster_bias,
    raster_profile,
)
from xmodal_interp.arguments import user_path
from xmodal_interp.capturing.dataset import capture_dataset
from xmodal_interp.capturing.run import Keep, capture, capture_batch
from xmodal_interp.demo.output_folder import staging_folder
from xmodal_interp.demo.report import draw_all, sentences, write_report
from xmodal_interp.escaping import for_spreadsheets
from xmodal_interp.evaluation import best_head, pointing_hits
from xmodal_interp.models import VLM, load
from xmodal_interp.sample import Sample
from xmodal_interp.shapes import KINDS, Scene, ask_all, sample_scene
from xmodal_interp.shapes.tiny_models import untrained
from xmodal_interp.store import Store
from xmodal_interp.text_search import same_answer

_HELD_OUT = 2**40  # first part of the seed; training uses (seed, step), which is never this large
_BATCH = 32
_MEASURED = 12  # number of samples over which ratios are averaged
_ABLATED = 8  # number of questions of each kind for head removal
_SCALE = 4  # images have 4 times the size of the model's input, so that pictures are sharp
_THREADS = 4  # more do not speed up a model this small, and slow down other users of the machine
_DESCRIBED = 24  # number of description questions; their long answers are slow
_ROWS = Keep(towers=("language",), queries="text")


@dataclass(frozen=True)
class Findings:
    """Results of the demo.

    Attributes:
        folder: Folder with all files.
        tables: Tables by name; ``tables/`` contains each as CSV and Parquet.
        lines: The findings as sentences.
    """

    folder: Path
    tables: dict[str, pd.DataFrame]
    lines: list[str] = field(default_factory=list)


def run_demo(folder: Path, *, n_scenes: int = 200, force: bool = False) -> Findings:
    """Run the demo on the shipped LLaVA, offline, in about a minute on two cores.

    At most four threads of torch compute.

    Args:
        folder: A new or empty folder, or one of an earlier demo, whose files are replaced. Other
            files in it are not changed.
        n_scenes: Number of held-out scenes.
        force: Overwrite files of the same names that the demo did not write, or that were changed.

    Raises:
        InputError: The folder holds such files and ``force`` is False, or is inside a store.
    """
    folder = user_path(folder)
    with staging_folder(folder, force=force) as hidden, _at_most_threads(_THREADS):
        tables, lines = _run(hidden, n_scenes)
    return Findings(folder, tables, lines)


def _run(folder: Path, n_scenes: int) -> tuple[dict[str, pd.DataFrame], list[str]]:
    """Write all files to a folder; return the tables and the findings as sentences."""
    vlm = load()
    items = questions_about(held_out_scenes(n_scenes))
    tables: dict[str, pd.DataFrame] = {}
    with _progress() as step:
        step("capturing attention")
        store = _store(vlm, items, folder)
        samples = list(store)
        step("answering more held-out questions")
        tables["accuracy"] = _accuracy(
            samples, answer_accuracy(vlm, _other_questions(items), batch_size=_BATCH)
        )
        step("capturing the untrained model")
        before = VLM(untrained("llava"), vlm.processor)
        untrained_samples = _capture_all(before, of_kind(items, "color")[: n_scenes // 3])
        step("measuring attention to the object asked about")
        tables |= _pointing(samples, untrained_samples)
        tables |= _ratio(samples, untrained_samples)
        step("measuring blocks, positions and sinks")
        tables |= _positions(vlm, samples, items)
        step("removing heads, one by one")
        tables |= _removals(vlm, items)
        step("drawing pictures")
        shown = _samples_for_pictures(vlm, before, items)
        tables["rollout"] = attention_rollout(shown["after"], shown["phrase"], baseline="uniform")
        pictures = draw_all(shown, tables, store, folder / "pictures")
        step("writing the report")
        _write_tables(tables, folder / "tables")
        lines = sentences(tables, n_scenes)
        write_report(folder, vlm, tables, pictures, lines, store)
    return tables, lines


@contextmanager
def _at_most_threads(n_threads: int) -> Iterator[None]:
    """Limit the threads that torch computes with, inside a ``with`` block."""
    before = torch.get_num_threads()
    torch.set_num_threads(min(before, n_threads))
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _progress() -> Iterator[Any]:
    """Show the current step and the elapsed time; yield a function that sets the step."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, transient=True) as progress:
        task = progress.add_task("loading", total=None)
        yield lambda text: progress.update(task, description=text)


def held_out_scenes(n_scenes: int) -> list[Scene]:
    """Return scenes not used in training, each of which allows a question of every kind."""
    scenes: list[Scene] = []
    number = 0
    while len(scenes) < n_scenes:
        rng = np.random.default_rng((_HELD_OUT, number))
        scene = sample_scene(rng)
        number += 1
        if len(ask_all(scene, rng)) == len(KINDS):
            scenes.append(scene)
    return scenes


def questions_about(scenes: list[Scene]) -> list[dict[str, Any]]:
    """Return items for the analyses: image, prompt, answer, question kind and boxes.

    Images have four times the width and height of the canvas of their scene. ``box`` is the box of
    the object asked about, ``other_boxes`` are those of the other objects, in pixels of the image.
    Questions about the whole scene have neither.
    """
    items = []
    for number, scene in enumerate(scenes):
        image = scene.image(_SCALE)
        rng = np.random.default_rng((_HELD_OUT, number, 1))
        for question in ask_all(scene, rng):
            item: dict[str, Any] = {
                "name": f"scene-{number:03d}-{question.kind}",
                "image": image,
                "prompt": question.text,
                "answer": question.answer,
                "kind": question.kind,
                "subject": question.subject,
            }
            if question.thing is not None:
                boxes = [[_SCALE * edge for edge in thing.box] for thing in scene.things]
                item["box"] = boxes.pop(question.thing)
                item["other_boxes"] = boxes
            items.append(item)
    return items


def of_kind(items: list[dict[str, Any]], *kinds: str) -> list[dict[str, Any]]:
    """Return the items of some question kinds."""
    return [item for item in items if item["kind"] in kinds]


def _other_questions(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one question per scene besides its colour question, and some descriptions.

    The kinds of the questions alternate over the scenes.
    """
    others = [kind for kind in KINDS if kind not in ("color", "description")]
    asked = [
        item
        for place, kind in enumerate(others)
        for item in of_kind(items, kind)
        if _number(item) % len(others) == place
    ]
    return [*asked, *of_kind(items, "description")[:_DESCRIBED]]


def _number(item: dict[str, Any]) -> int:
    return int(item["name"].split("-")[1])


def _accuracy(samples: list[Sample], answers: pd.DataFrame) -> pd.DataFrame:
    """Return the accuracy by ``question_kind``; colour answers are taken from the samples."""
    captured = [same_answer(sample.labels["answer"], sample.answer) for sample in samples]
    correct = pd.concat([pd.DataFrame({"question_kind": "color", "correct": captured}), answers])
    table = correct.groupby("question_kind", sort=False)["correct"].agg(["mean", "size"])
    return table.rename(columns={"mean": "accuracy", "size": "n"}).reset_index()


def _store(vlm: VLM, items: list[dict[str, Any]], folder: Path) -> Store:
    """Capture the colour questions into a store: text queries of the language tower."""
    labels = ("name", "image", "prompt", "answer", "kind", "subject", "box", "other_boxes")
    chosen = [{key: item[key] for key in labels} for item in of_kind(items, "color")]
    return capture_dataset(
        vlm,
        chosen,
        folder / "store",
        max_new_tokens=2,
        batch_size=_BATCH,
        keep=_ROWS,
        progress=False,
    )


def _capture_all(vlm: VLM, items: list[dict[str, Any]]) -> list[Sample]:
    samples: list[Sample] = []
    for start in range(0, len(items), _BATCH):
        part = items[start : start + _BATCH]
        images, prompts = [[item["image"]] for item in part], [item["prompt"] for item in part]
        for item, sample in zip(part, capture_batch(vlm, images, prompts, keep=_ROWS), strict=True):
            sample.labels.update(item)
            samples.append(sample)
    return samples


def _pointing(samples: list[Sample], untrained_samples: list[Sample]) -> dict[str, pd.DataFrame]:
    trained, random = pointing_hits(samples), pointing_hits(untrained_samples)
    return {
        "pointing": _rates(trained),
        "pointing_untrained": _rates(random),
        "best_head": best_head(trained),
        "best_head_untrained": best_head(random),
    }


def _rates(hits: pd.DataFrame) -> pd.DataFrame:
    return (
        hits.drop(columns="picture")
        .groupby(["layer", "head"])
        .mean(numeric_only=True)
        .reset_index()
    )


def _ratio(samples: list[Sample], untrained_samples: list[Sample]) -> dict[str, pd.DataFrame]:
    values = ["ratio", "null", "lift", "sink_free_lift"]

    def by_layer(these: list[Sample]) -> pd.DataFrame:
        table = cross_modal_ratio(these, queries=at.last, by=("layer",))
        return table.groupby("layer")[values].mean().reset_index()

    untrained_table = by_layer(untrained_samples[:_MEASURED])
    table = by_layer(samples[:_MEASURED]).merge(
        untrained_table, on="layer", suffixes=("", "_untrained")
    )
    return {"ratio": table}


def _positions(
    vlm: VLM, samples: list[Sample], items: list[dict[str, Any]]
) -> dict[str, pd.DataFrame]:
    few = samples[:16]
    full = [
        capture(vlm, item["image"], item["prompt"], max_new_tokens=2)
        for item in of_kind(items, "color")[:4]
    ]
    blank = [{**item, "image": item["image"].copy()} for item in of_kind(items, "color")[:16]]
    for item in blank:
        item["image"].paste((60, 60, 60), (0, 0, *item["image"].size))
    control = _capture_all(vlm, blank)
    return {
        "blocks": block_statistics(full),
        "positions": positional_bias(full),
        "sinks": attention_sinks(full),
        "raster": raster_bias(few, control=control),
        "raster_profile": raster_profile(few, control=control),
    }


def _removals(vlm: VLM, items: list[dict[str, Any]]) -> dict[str, pd.DataFrame]:
    half = min(_ABLATED, len(of_kind(items, "count")) // 2)
    asked = [item for kind in KINDS[:-1] for item in of_kind(items, kind)[:half]]
    others = [item for kind in KINDS[:-1] for item in of_kind(items, kind)[half : 2 * half]]
    pruning = head_pruning(vlm, asked, batch_size=_BATCH, progress=False)
    curve = pruning_curve(
        vlm, others, pruning, steps=5, n_random=2, batch_size=_BATCH, progress=False
    )
    return {"pruning": pruning, "pruning_curve": curve}


def _samples_for_pictures(vlm: VLM, before: VLM, items: list[dict[str, Any]]) -> dict[str, Any]:
    """Return samples for the pictures.

    These are a place question with all towers and queries, and a colour question on the untrained
    model.
    """
    item = of_kind(items, "place")[3]
    after = capture(vlm, item["image"], item["prompt"], max_new_tokens=4)
    pointed = of_kind(items, "color")[0]  # the first sample of the store
    untrained_sample = capture(before, pointed["image"], pointed["prompt"], max_new_tokens=2)
    return {"after": after, "pointed_before": untrained_sample, "phrase": item["subject"]}


def _write_tables(tables: dict[str, pd.DataFrame], folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for name, table in tables.items():
        for_spreadsheets(table).to_csv(folder / f"{name}.csv", index=False)
        table.to_parquet(folder / f"{name}.parquet", index=False)
