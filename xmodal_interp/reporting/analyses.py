"""The sections of the analyses: each is run, averaged over samples, drawn and put into words."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from xmodal_interp import analysis, evaluation, figures
from xmodal_interp.errors import XmodalError
from xmodal_interp.figures.style import Figure
from xmodal_interp.reporting.estimates import estimates, over_layers, records, sentence, verdict
from xmodal_interp.reporting.page import Section, Shown, limited, shown_figure
from xmodal_interp.reporting.questions import (
    ELSEWHERE,
    NEED_THE_MODEL,
    QUESTIONS,
    REDUCED,
    REFUSALS,
    Question,
    Samples,
    eight_layers,
    refusal_of,
)
from xmodal_interp.vocabulary import Tower

GROUP = "Analyses"
_GLANCE = ("low", "high", "null", "difference", "difference_low", "difference_high")


@dataclass(frozen=True)
class Analysed:
    """The analyses of some samples.

    Attributes:
        sections: One section per analysis that applies.
        glance: One row per sentence: analysis, tower, what, value, interval, null, verdict.
        left_out: One row per analysis and tower that does not apply: ``analysis, tower, reason``.
        sentences: All sentences, by section.
    """

    sections: list[Section]
    glance: pd.DataFrame
    left_out: pd.DataFrame
    sentences: list[str]


@dataclass
class _Answer:
    """What one question gives, over its towers."""

    sentences: list[str] = field(default_factory=list)
    pictures: list[Shown] = field(default_factory=list)
    overall: list[pd.DataFrame] = field(default_factory=list)
    layers: list[pd.DataFrame] = field(default_factory=list)
    heads: list[pd.DataFrame] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    glance: list[dict[str, Any]] = field(default_factory=list)
    towers: list[Tower] = field(default_factory=list)


def analysed(samples: Samples, clusters: Sequence[int]) -> Analysed:
    """Run every analysis that applies to the samples.

    Args:
        samples: The samples.
        clusters: The cluster of each sample: the same number for the same picture.
    """
    sections: list[Section] = []
    glance: list[dict[str, Any]] = []
    left_out: list[tuple[str, str, str]] = []
    sentences: list[str] = []
    for question in QUESTIONS:
        answer = _Answer()
        for tower in question.towers:
            try:
                table, used, note = _run(question, samples, tower)
            except REFUSALS as error:
                left_out.append((question.analysis, tower, refusal_of(error)))
                continue
            if note:
                answer.notes.append(note)
            chosen = [samples[i] for i in used]
            _add(answer, question, tower, table, chosen, [clusters[i] for i in used])
        if answer.towers:
            sections.append(_section(question, answer, samples))
            glance += answer.glance
            sentences += answer.sentences
    known = {question.analysis for question in QUESTIONS}
    for name in (*analysis.__all__, *evaluation.__all__):
        if name in known or name not in {*NEED_THE_MODEL, *ELSEWHERE}:
            continue
        reason = NEED_THE_MODEL.get(name) or f"Not repeated: see {ELSEWHERE[name]}."
        left_out.append((name, "", reason))
    return Analysed(
        sections,
        pd.DataFrame(glance),
        pd.DataFrame(left_out, columns=["analysis", "tower", "reason"]),
        sentences,
    )


def _run(question: Question, samples: Samples, tower: Tower) -> tuple[pd.DataFrame, list[int], str]:
    """Return the table, the samples that it is of, and a note if some were left out.

    Raises:
        XmodalError: One of ``REFUSALS``: the analysis applies to no sample, or not to all together.
    """
    try:
        return question.table(samples, tower), list(range(len(samples))), ""
    except REFUSALS:
        if len(samples) == 1:
            raise
        used, reasons = [], []
        for number, sample in enumerate(samples):
            try:
                question.table([sample], tower)
            except REFUSALS as error:
                reasons.append(refusal_of(error))
            else:
                used.append(number)
        if not used or not reasons:
            raise
    note = (
        f"Left out of {question.analysis} ({tower} tower): {len(reasons)} of {len(samples)} "
        f"samples. The first reason: {reasons[0]}"
    )
    return question.table([samples[i] for i in used], tower), used, note


def _add(
    answer: _Answer,
    question: Question,
    tower: Tower,
    table: pd.DataFrame,
    samples: Samples,
    clusters: Sequence[int],
) -> None:
    """Add what the table of one tower gives."""
    value = question.value
    table.attrs = {}  # pandas copies them in every operation; provenance makes that slow
    reduce = REDUCED.get(question.analysis)
    reduced = table if reduce is None else reduce(table)
    names = dict.fromkeys(table["sample"])
    of_names = dict(zip(names, clusters, strict=True))
    if "tower" not in reduced:
        reduced = reduced.assign(tower=tower)
    keys = ["tower", *value.series]
    options: dict[str, Any] = {"value_kind": "rate" if value.rate else "mean"}

    def averaged(*more: str) -> pd.DataFrame:
        by = [*keys, *more]
        return estimates(reduced, by, value.column, value.null, of_names, **options)

    overall = averaged()
    if overall.empty:
        answer.notes.append(f"All values of the {tower} tower are missing (NaN).")
        return
    answer.towers.append(tower)
    answer.overall.append(overall)
    by_layer = averaged("layer") if "layer" in reduced else None
    for row in records(overall):
        what = value.what.format(**{name: row[name] for name in keys})
        said = sentence(what, row, value.column, value.null_name, unit=value.unit)
        if by_layer is not None:
            same = (by_layer[keys] == [row[name] for name in keys]).all(axis=1)
            said = f"{said} {over_layers(by_layer[same], value.column)}".rstrip()
        answer.sentences.append(said)
        answer.glance.append(_glance_row(question, what, row))
    answer.sentences += question.words(table) if question.words is not None else []
    if by_layer is not None:
        answer.layers.append(by_layer)
        _draw(
            answer,
            "Mean over heads and samples, with the 95% interval over samples where there "
            "is one; dashed: the null.",
            lambda: _curves(question, tower, by_layer),
        )
    if question.heads:
        of_heads = estimates(
            reduced, [*keys, "layer", "head"], value.column, value.null, of_names, **options
        )
        answer.heads.append(of_heads)
        means = reduced.groupby(["layer", "head"])[question.heads].mean().reset_index()
        _draw(
            answer,
            "Mean over samples.",
            lambda: figures.head_grid(
                means,
                question.heads,
                title=f"{question.heads.replace('_', ' ').capitalize()} of each head, "
                f"{tower} tower",
            ),
        )
    for caption, draw in question.more:
        _draw(answer, caption, partial(draw, table, samples, tower))


def _glance_row(question: Question, what: str, row: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {"what": what, "against_null": verdict(row)}
    found["value"] = row[question.value.column]
    found |= {name: row.get(name, np.nan) for name in _GLANCE}
    return found | {"n": int(row["n"]), "analysis": question.analysis}


def _curves(question: Question, tower: Tower, by_layer: pd.DataFrame) -> Figure:
    value = question.value
    null = value.null if value.null is None or isinstance(value.null, float) else "null"
    unit = f" ({value.unit})" if value.unit else ""
    has_interval = by_layer["low"].notna().any()
    return figures.layer_curves(
        by_layer,
        value.column,
        by=value.series[0] if value.series else None,
        null=null,
        interval=("low", "high") if has_interval else None,
        label=f"{value.column.replace('_', ' ')}{unit}",
        title=f"{question.title}, {tower} tower",
    )


def _draw(answer: _Answer, caption: str, draw: Callable[[], Figure]) -> None:
    """Add a figure, or a note with the reason why it cannot be drawn."""
    try:
        answer.pictures.append(shown_figure(draw(), caption))
    except XmodalError as error:
        answer.notes.append(f"A figure could not be drawn. {refusal_of(error)}")


def _section(question: Question, answer: _Answer, samples: Samples) -> Section:
    tables = []
    if answer.layers:
        tables.append(limited(f"{question.title}, by layer", pd.concat(answer.layers)))
    else:
        tables.append(limited(question.title, pd.concat(answer.overall)))
    if answer.heads:
        by = "difference" if question.value.null is not None else question.value.column
        heads = pd.concat(answer.heads, ignore_index=True)
        tables.append(limited(f"{question.title}, by head", heads, by=by))
    return Section(
        title=question.title,
        anchor=question.analysis.replace("_", "-"),
        about=question.about,
        sentences=answer.sentences,
        pictures=answer.pictures,
        tables=tables,
        notes=[*_small_print(answer), *answer.notes],
        code="\n".join(
            dict.fromkeys(
                question.code.format(tower=tower, layers=eight_layers(samples))
                for tower in answer.towers
            )
        ),
        group=GROUP,
        n_open=0,
    )


def _small_print(answer: _Answer) -> list[str]:
    """Return a note on the number of intervals in the tables."""
    n = sum(len(rows) for rows in (*answer.layers, *answer.heads))
    intervals = [rows["low"].notna().any() for rows in (*answer.layers, *answer.heads)]
    if n < 2 or not any(intervals):
        return []
    return [f"The {n} intervals of layers and heads are not adjusted for their number."]
