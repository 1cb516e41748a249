"""The analyses of a report: how each is called, averaged, drawn and put into words.

An analysis applies to samples if its function returns a table. If it raises an error that says why
it cannot (:data:`REFUSALS`), the error is its reason. Damaged files are no such reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from xmodal_interp import analysis, evaluation, figures
from xmodal_interp.analysis.sinks import MIN_QUERIES, THRESHOLD
from xmodal_interp.errors import (
    GeometryError,
    InputError,
    LayerError,
    NotRecordedError,
    PhraseError,
    PositionError,
    UnsupportedModelError,
    counted,
)
from xmodal_interp.figures.style import Figure
from xmodal_interp.sample import Sample
from xmodal_interp.text_search import same_answer
from xmodal_interp.vocabulary import VISUAL_KINDS, Tower

REFUSALS = (
    GeometryError,
    InputError,
    LayerError,
    NotRecordedError,
    PhraseError,
    PositionError,
    UnsupportedModelError,
)

Samples = Sequence[Sample]

NEED_THE_MODEL: Mapping[str, str] = {
    "answer_accuracy": "It generates answers, so it requires the model: "
    "xi.answer_accuracy(vlm, items).",
    "head_pruning": "It removes heads and runs the model again: xmodal pruning ITEMS, or "
    "xi.head_pruning(vlm, items).",
    "pruning_curve": "It removes heads and runs the model again: xi.pruning_curve(vlm, items, "
    "table).",
    "insertion_curve": "It changes the image and runs the model again: "
    "xi.evaluation.insertion_curve.",
    "deletion_curve": "It changes the image and runs the model again: "
    "xi.evaluation.deletion_curve.",
    "known_heads": "It compares tables of heads with a list of known heads, which you pass: "
    "xi.evaluation.known_heads.",
    "time_alignment": "It requires recorded calls of a speech model and the rows of its words.",
    "token_times": "It requires recorded calls of a speech model and the rows of its words.",
}
"""Analyses that a report cannot run, and what they require."""

ELSEWHERE: Mapping[str, str] = {
    "cross_modal_summary": "block_statistics and cross_modal_ratio",
    "raster_map": "raster_bias",
    "raster_profile": "raster_bias",
    "rollout_matrix": "attention_rollout",
    "on_patches": "query_patches",
    "sink_rate": "attention_sinks",
    "pointing_hits": "pointing_game",
    "best_head": "pointing_game",
}
"""Analyses whose numbers or figures are in the section of another."""


@dataclass(frozen=True)
class Value:
    """A column of a table, its null model and its name in sentences.

    Attributes:
        column: Column of the value.
        null: Column of the null model, its value, or None.
        what: Subject of the sentence; ``{tower}`` and the columns of ``series`` are filled in.
        null_name: What the null is, in the sentence.
        unit: Unit of the value; empty for shares.
        series: Columns whose entries have one sentence each.
        rate: Whether the values per sample are 0 or 1.
    """

    column: str
    null: str | float | None
    what: str
    null_name: str = "under uniform attention"
    unit: str = ""
    series: tuple[str, ...] = ()
    rate: bool = False


@dataclass(frozen=True)
class Question:
    """An analysis of the report.

    Attributes:
        analysis: Name of the public function.
        title: Heading.
        about: What it measures, and what the null is.
        table: Returns the table of some samples; its arguments are the samples and the tower.
        value: What is averaged and put into words.
        towers: Towers that are asked for; the sample's own tower if it is the only one.
        heads: Column that is drawn by layer and head; empty for none.
        more: Further figures of a table: caption, and function of the table, samples and tower.
        words: Returns further sentences from the table.
        code: Python whose last line gives the values per sample; ``{tower}`` and ``{layers}``
            (:func:`eight_layers`) are filled in.
    """

    analysis: str
    title: str
    about: str
    table: Callable[[Samples, Tower], pd.DataFrame]
    value: Value
    code: str
    towers: tuple[Tower, ...] = ("language",)
    heads: str = ""
    more: tuple[tuple[str, Callable[[pd.DataFrame, Samples, Tower], Figure]], ...] = ()
    words: Callable[[pd.DataFrame], list[str]] | None = None


def _tokens(samples: Samples, tower: Tower) -> pd.DataFrame:  # noqa: ARG001
    table = analysis.token_ratio(samples, sink_threshold=None)
    prompts = [sample.n_prompt for sample in samples]
    n_prompt = np.asarray(prompts)[pd.factorize(table["sample"])[0]]
    read = table["query"].to_numpy() >= n_prompt
    return table.assign(tokens=np.where(read, "answer", "prompt"))


def _sinks(samples: Samples, tower: Tower) -> pd.DataFrame:
    """Return the rows of the first position, with the share of heads for which it is a sink."""
    table = analysis.attention_sinks(samples, tower=tower)
    keys = table.groupby(["sample", "layer", "head"])["key"].transform("min")
    return table[table["key"] == keys].reset_index(drop=True)


def eight_layers(samples: Samples) -> list[int] | None:
    """Return at most eight kept language layers, evenly spaced; None if none was kept."""
    kept = samples[0].layers("language")
    places = np.linspace(0, len(kept) - 1, 8).round().astype(int).tolist() if kept else []
    return sorted({kept[i] for i in places}) or None


def _positions(samples: Samples, tower: Tower) -> pd.DataFrame:  # noqa: ARG001
    """Return the profiles of the blocks that all samples have, of at most eight layers."""
    return analysis.positional_bias(samples, layers=eight_layers(samples), n_bins=16)


def _nearest(table: pd.DataFrame) -> pd.DataFrame:
    """Return the bins of the shortest distance in each block, averaged over heads by cells."""
    back = table[(table["axis"] == "distance") & (table["start"] >= 0)]
    first = back.groupby(["sample", "block"])["start"].transform("min")
    near = back[back["start"] == first]
    keys = ["sample", "tower", "layer", "block"]
    sums = near.assign(weighted=near["lift"] * near["n_cells"]).groupby(keys, sort=False)
    return (sums["weighted"].sum() / sums["n_cells"].sum()).rename("lift").reset_index()


def _raster(samples: Samples, tower: Tower) -> pd.DataFrame:
    table = analysis.raster_bias(samples, tower=tower, per_sample=True)
    names = {"row_slope": "top to bottom", "col_slope": "left to right"}
    names["edge_slope"] = "centre to edge"
    keys = ["sample", "tower", "layer", "head"]
    long = table.rename(columns=names).melt(
        keys, list(names.values()), var_name="direction", value_name="slope"
    )
    if long["slope"].isna().all():
        raise InputError(
            "No slope can be fitted: a cell gets no attention, no query sees the whole image, or "
            "the grid is too small."
        )
    return long


def _rollout(samples: Samples, tower: Tower) -> pd.DataFrame:
    """Return the rollout of the last prompt token or the class token, one row per key."""
    return analysis.attention_rollout(samples, tower=tower, baseline="uniform")


def _on_image(table: pd.DataFrame) -> pd.DataFrame:
    on = table[table["token_kind"].isin(VISUAL_KINDS)]
    keys = ["sample", "tower", "query"]
    return on.groupby(keys, sort=False)[["rollout", "null"]].sum().reset_index()


def _norms(samples: Samples, tower: Tower) -> pd.DataFrame:
    table = analysis.token_norms(samples, tower=tower)
    return table.groupby(["sample", "tower", "layer"], sort=False)["ratio"].max().reset_index()


def _patches(samples: Samples, tower: Tower) -> pd.DataFrame:  # noqa: ARG001
    """Return the largest share of a patch in each learned-query token of the first image."""
    rows = []
    for number, sample in enumerate(samples):
        shares = analysis.query_patches(sample).nan_to_num()
        largest = shares.amax(1).mean().item()
        rows.append((number, "connector", largest, 1 / shares.shape[1]))
    table = pd.DataFrame(rows, columns=["sample", "tower", "largest_share", "null"])
    return table.assign(sample=table["sample"].map("sample {}".format))


def _hits(samples: Samples, tower: Tower) -> pd.DataFrame:  # noqa: ARG001
    return evaluation.pointing_hits(samples)


def _answers(samples: Samples, tower: Tower) -> pd.DataFrame:  # noqa: ARG001
    """Return whether each answer is the known one, with the most frequent known answer as null."""
    known = [sample.labels.get("answer") for sample in samples]
    if not all(isinstance(answer, str) and answer for answer in known):
        raise InputError(
            "Samples have no label 'answer' with the known answer. Capture items that have one."
        )
    if not all(sample.answer for sample in samples):
        raise InputError("Some samples have no generated answer: max_new_tokens was 0.")
    normal = [" ".join(str(answer).casefold().split()) for answer in known]
    counts = pd.Series(normal).value_counts()
    rows = [
        (f"sample {i}", "language", float(same_answer(str(one), sample.answer)))
        for i, (one, sample) in enumerate(zip(known, samples, strict=True))
    ]
    table = pd.DataFrame(rows, columns=["sample", "tower", "correct"])
    return table.assign(null=[float(answer == counts.index[0]) for answer in normal])


def _best(hits: pd.DataFrame) -> list[str]:
    """Return a sentence on the best head, chosen on one half of the pictures."""
    try:
        best = evaluation.best_head(hits).iloc[0]
    except InputError as error:
        return [f"No head was chosen. {refusal_of(error)}"]
    layer, head = int(best["layer"]), int(best["head"])
    of_head = hits[(hits["layer"] == layer) & (hits["head"] == head)]
    others = of_head["other_object"].mean()
    n = counted(int(best["n"]), "sample")
    elsewhere = "" if np.isnan(others) else f", on a given other object in {others:.1%}"
    return [
        f"Layer {layer} head {head}, chosen on one half of the pictures, has its peak in the box "
        f"in {best['hit']:.1%} of the other half, {n} (95% interval "
        f"{best['hit_low']:.1%} to {best['hit_high']:.1%}){elsewhere}; a random token in "
        f"{of_head['hit_chance'].mean():.1%}."
    ]


BOTH: tuple[Tower, ...] = ("language", "vision")

REDUCED: Mapping[str, Callable[[pd.DataFrame], pd.DataFrame]] = {
    "positional_bias": _nearest,
    "attention_rollout": _on_image,
}
"""How the table of an analysis becomes one with the value per sample, where it is not one yet."""


def _rollout_picture(table: pd.DataFrame, samples: Samples, tower: Tower) -> Figure:
    """Draw the first query of the first sample."""
    del tower
    first = table[table["sample"] == table["sample"].iloc[0]]
    first = first[first["query"] == first["query"].iloc[0]]
    return figures.rollout_overlay(first.assign(sample=samples[0].name), samples[0], "log2_ratio")


def _raster_picture(table: pd.DataFrame, samples: Samples, tower: Tower) -> Figure:
    del table
    profile = analysis.raster_profile(samples, tower=tower)
    return figures.raster_profiles(profile, title=f"Share of rows and columns, {tower} tower")


def _position_picture(table: pd.DataFrame, samples: Samples, tower: Tower) -> Figure:
    del samples, tower
    return figures.positional_profiles(table)


def _sink_share(table: pd.DataFrame) -> list[str]:
    """Return a sentence on the share of heads for which the first position is a sink."""
    tower = table["tower"].iloc[0]
    uniform = (table["null"] > THRESHOLD) & (table["n_queries"] >= MIN_QUERIES)
    return [
        f"The first position is a sink in {table['sink'].mean():.1%} of the heads of the {tower} "
        f"tower (mean over layers and samples); with uniform attention, in {uniform.mean():.1%}."
    ]


QUESTIONS: tuple[Question, ...] = (
    Question(
        "answers",
        "Right answers",
        "Share of answers that equal the known answer, except for case and white space. The null "
        "is the most frequent known answer, given every time.",
        _answers,
        Value(
            "correct", "null", "Share of right answers", "for the most frequent answer", rate=True
        ),
        "[(sample.labels['answer'], sample.answer) for sample in samples]",
    ),
    Question(
        "cross_modal_ratio",
        "Text attends to the image",
        "Share of the attention of text tokens after the image that goes to image tokens. The null "
        "is attention uniform over the keys that each token sees.",
        lambda samples, _: analysis.cross_modal_ratio(samples, sink_threshold=None),
        Value("ratio", "null", "Share of text attention on the image"),
        "xi.cross_modal_ratio(samples, sink_threshold=None)",
        heads="lift",
    ),
    Question(
        "token_ratio",
        "Prompt tokens and answer tokens",
        "The same share, for text tokens of the prompt and for generated tokens separately.",
        _tokens,
        Value("ratio", "null", "Share on the image, {tokens} tokens", series=("tokens",)),
        "xi.token_ratio(samples, sink_threshold=None)",
    ),
    Question(
        "attention_allocation",
        "Attention of the answer by segment",
        "Share of the attention on system prompt, image, instruction and answer, of the positions "
        "that predict the answer (Chen et al. 2024). The null is uniform attention.",
        lambda samples, _: analysis.attention_allocation(samples),
        Value("allocation_mean", "null", "Share on the {segment}", series=("segment",)),
        "xi.attention_allocation(samples)",
    ),
    Question(
        "block_statistics",
        "Blocks of the attention matrix",
        "Probability that queries of a kind put on keys of a kind: image or patches (V), text (T), "
        "special tokens of the vision tower (S); the query is named first. The null is uniform "
        "attention.",
        lambda samples, tower: analysis.block_statistics(samples, tower=tower),
        Value("mass", "null", "Mass of {block}, {tower} tower", series=("block",)),
        "xi.block_statistics(samples, tower={tower!r})",
        BOTH,
    ),
    Question(
        "attention_entropy",
        "Focus of the heads: entropy",
        "Mean entropy of attention rows in nats. The null is uniform attention, whose entropy is "
        "the largest possible one: a lower entropy is expected from any head with a preference.",
        lambda samples, tower: analysis.attention_entropy(samples, tower=tower),
        Value("entropy", "null", "Entropy, {tower} tower", unit="nats"),
        "xi.attention_entropy(samples, tower={tower!r})",
        BOTH,
        "relative_entropy",
    ),
    Question(
        "attention_sinks",
        "Attention sinks",
        "Mean attention that the first position receives from the queries that see it. It is a "
        f"sink of a head if it receives more than {THRESHOLD} (Gu et al. 2025). The null is what "
        "it receives from uniform attention.",
        _sinks,
        Value("received", "null", "Attention received by the first position, {tower} tower"),
        "table = xi.attention_sinks(samples, tower={tower!r})\n"
        "first = table.groupby(['sample', 'layer', 'head'])['key'].transform('min')\n"
        "table[table['key'] == first]",
        BOTH,
        words=_sink_share,
    ),
    Question(
        "recency_index",
        "Recent tokens",
        "Share of the attention of text tokens on the last 16 positions, their own included. The "
        "null is uniform attention.",
        lambda samples, _: analysis.recency_index(samples),
        Value("mass", "null", "Share on the last 16 positions"),
        "xi.recency_index(samples)",
    ),
    Question(
        "positional_bias",
        "Attention by distance",
        "Probability times the number of visible keys (lift), by distance and by position of the "
        "key. It is 1 for uniform attention. At most eight layers, evenly spaced.",
        _positions,
        Value("lift", 1.0, "Lift at the shortest distances, {block}", series=("block",)),
        "xi.positional_bias(samples, layers={layers}, n_bins=16)",
        more=(
            (
                "Mean over heads and samples; the dashed line is uniform attention.",
                _position_picture,
            ),
        ),
    ),
    Question(
        "raster_bias",
        "Places of the image",
        "Slopes of the log attention over the image grid: 0.7 is a factor of 2 from the centre to "
        "the edge. The null is 0, no preference for a place. Slopes of few samples also contain "
        "the image content; a blank image separates the two (control=).",
        _raster,
        Value(
            "slope",
            0.0,
            "Slope {direction}, {tower} tower",
            "without preference",
            series=("direction",),
        ),
        "xi.raster_bias(samples, tower={tower!r}, per_sample=True)",
        BOTH,
        more=(
            ("Mean over heads and samples; the dashed line is uniform attention.", _raster_picture),
        ),
    ),
    Question(
        "attention_rollout",
        "Rollout through all layers",
        "Share of the image in the last prompt token, or of the patches in the class token, after "
        "all layers (Abnar and Zuidema 2020). The null is the rollout of uniform attention.",
        _rollout,
        Value("rollout", "null", "Share of the image in the rollout, {tower} tower"),
        "xi.attention_rollout(samples, tower={tower!r}, baseline='uniform')",
        BOTH,
        more=(
            (
                "First sample: log2 of the rollout divided by that of uniform attention.",
                _rollout_picture,
            ),
        ),
    ),
    Question(
        "attention_distance",
        "Distance on the image",
        "Mean distance between a patch and the patches that it attends to, in pixels of the "
        "original image (Dosovitskiy et al. 2021). The null is uniform attention.",
        lambda samples, tower: analysis.attention_distance(samples, tower=tower),
        Value("distance_px", "null_px", "Attention distance, {tower} tower", unit="px"),
        "xi.attention_distance(samples, tower={tower!r})",
        ("vision", "language"),
    ),
    Question(
        "token_norms",
        "Norms of hidden states",
        "Largest norm of a token's hidden state, divided by the median norm of the layer. About 10 "
        "and more indicate tokens with artefacts (Darcet et al. 2023). The maximum is always at "
        "least 1, so 1 is a bound and no null.",
        _norms,
        Value("ratio", None, "Largest norm in units of the median, {tower} tower"),
        "xi.token_norms(samples, tower={tower!r})",
        BOTH,
    ),
    Question(
        "query_patches",
        "Patches in learned-query tokens",
        "Largest share of a patch in an image token that is a learned query. The null is the same "
        "share of every patch; any preference makes the largest share larger.",
        _patches,
        Value("largest_share", "null", "Largest share of a patch", "if all shares are equal"),
        "[xi.query_patches(sample).nan_to_num().amax(1).mean() for sample in samples]",
    ),
    Question(
        "pointing_game",
        "Attention on the labelled object",
        "Share of samples in which a head's peak on the image is in the box of the object (label "
        "'box'). The null is a random token.",
        _hits,
        Value("hit", "hit_chance", "Peaks in the box, mean of all heads", "for a random token"),
        "xi.evaluation.pointing_hits(samples)",
        heads="hit",
        words=_best,
    ),
)


def refusal_of(error: Exception) -> str:
    """Return the reason that an error gives, in one line."""
    return " ".join(str(error).split())
