"""Report of the demo: ``report.html`` with the findings and the report of its store.

``report.md`` holds the findings, the pictures and the main tables. The findings are sentences, each
with its number and a baseline.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd

from xmodal_interp import figures
from xmodal_interp.escaping import markdown_escaped
from xmodal_interp.models import VLM
from xmodal_interp.reporting.page import Page, Section, limited, shown_file, write_page
from xmodal_interp.reporting.writing import (
    MAX_SAMPLES,
    chosen_samples,
    introduction,
    report_sections,
)
from xmodal_interp.store import Store

Tables = dict[str, pd.DataFrame]

Captioned = tuple[Path, str, str]
"""A picture, its title and its caption."""

_GROUP = "Demo"
_SHOWN = ("accuracy", "best_head", "best_head_untrained", "ratio")


def write_report(
    folder: Path,
    vlm: VLM,
    tables: Tables,
    pictures: list[Captioned],
    lines: list[str],
    store: Store,
) -> None:
    """Write both pages to ``folder``.

    ``report.html`` is the report of the store (:func:`xmodal_interp.report`) after the demo's own
    findings, pictures and tables; everything is in the file. Links of ``report.md`` to pictures are
    relative to the folder.
    """
    model = vlm.name.rsplit("/", 1)[-1]
    n_weights = sum(weight.numel() for weight in vlm.model.parameters())
    n_asked = int(tables["accuracy"]["n"].sum())
    samples, chosen = chosen_samples(store, MAX_SAMPLES)
    _, sections = report_sections(samples, chosen, store=store)
    about = (
        f"{type(vlm.model).__name__}, {n_weights:,} weights, {n_asked:,} questions about held-out "
        "scenes. The model ran with its own attention backend; all probabilities were computed "
        "from recorded queries and keys."
    )
    first = [
        Section("Findings of the demo", "findings", about, lines, group=_GROUP),
        Section(
            "Pictures of the demo",
            "pictures",
            pictures=[shown_file(path, f"{title}. {text}") for path, title, text in pictures],
            group=_GROUP,
        ),
        Section(
            "Tables of the demo",
            "tables",
            "Whole tables, as CSV and Parquet, are in the folder tables beside this page.",
            tables=[limited(name, table) for name, table in tables.items()],
            group=_GROUP,
            n_open=0,
        ),
    ]
    title = f"How {model} attends to an image"
    page = Page(title, introduction(samples, chosen), [*first, *sections])
    write_page(page, folder / "report.html")
    content = {
        "model": model,
        "model_class": type(vlm.model).__name__,
        "n_weights": n_weights,
        "n_asked": n_asked,
        "lines": lines,
        "pictures": [
            (path.relative_to(folder).as_posix(), title, caption)
            for path, title, caption in pictures
        ],
        "tables": {name: _rounded(tables[name]) for name in _SHOWN},
    }
    markdown = jinja2.Environment(loader=jinja2.FunctionLoader(_template), trim_blocks=True)
    markdown.filters["md"] = lambda value: markdown_escaped(str(value))
    (folder / "report.md").write_text(markdown.get_template("report.md").render(content), "utf-8")


def _template(name: str) -> str:
    return (files("xmodal_interp.demo") / f"{name}.jinja").read_text("utf-8")


def _rounded(table: pd.DataFrame) -> dict[str, Any]:
    rows = [
        [f"{value:.3f}" if isinstance(value, float) else str(value) for value in row]
        for row in table.itertuples(index=False)
    ]
    return {"columns": [str(column) for column in table.columns], "rows": rows}


def sentences(tables: Tables, n_scenes: int) -> list[str]:
    """Return one line per finding of the tables; ``n_scenes`` is the number of scenes."""
    return [
        _answers(tables["accuracy"], n_scenes),
        _pointing(tables),
        *_ratio(tables["ratio"]),
        *_heads(tables["pruning"]),
        _curve(tables["pruning_curve"]),
    ]


def _answers(table: pd.DataFrame, n_scenes: int) -> str:
    parts = [f"{row.question_kind} {row.accuracy:.1%} of {row.n}" for row in table.itertuples()]
    return f"Right answers on {n_scenes} held-out scenes: {', '.join(parts)}."


def _pointing(tables: Tables) -> str:
    best, random = tables["best_head"].iloc[0], tables["best_head_untrained"].iloc[0]
    heads = tables["pointing"].set_index(["layer", "head"])
    other = heads.loc[(best["layer"], best["head"]), "other_object"]
    return (
        f"In colour questions, the peak of layer {best['layer']} head {best['head']} is on the "
        f"object asked about in {best['hit']:.1%} of the scenes ({best['hit_low']:.1%} to "
        f"{best['hit_high']:.1%}), and on a given other object in {other:.1%}. "
        f"Best head of the untrained model: {random['hit']:.1%}; random place: "
        f"{heads['hit_chance'].mean():.1%}. (The head was chosen on one half of the scenes and "
        f"scored on the other, n = {best['n']}.)"
    )


def _ratio(table: pd.DataFrame) -> list[str]:
    null = table["null"].mean()
    ratios = ", ".join(f"{value:.2f}" for value in table["ratio"])
    below = table.loc[table["lift"] < 1, "layer"].tolist()
    lines = [
        f"Share of the last token's attention on the image, by layer: {ratios}; with uniform "
        f"attention: {null:.2f}."
    ]
    if below:
        named = f"Layer {below[0]} has" if len(below) == 1 else f"Layers {_listed(below)} have"
        lines.append(f"{named} less attention on the image than uniform attention.")
    return lines


def _listed(layers: list[int]) -> str:
    """Return layers as text, such as ``"0, 1 and 3"``."""
    return " and ".join([", ".join(map(str, layers[:-1])), str(layers[-1])])


def _heads(table: pd.DataFrame) -> list[str]:
    """Return a line per ``question_kind``: the heads with a loss whose interval excludes 0."""
    lines = []
    for kind, rows in table[table["question_kind"] != "all"].groupby("question_kind", sort=False):
        sure = rows[rows["accuracy_drop_low"] > 0].nlargest(3, "accuracy_drop")
        if sure.empty:
            lines.append(f"No single head is required for {kind} questions.")
            continue
        columns = ["layer", "head", "accuracy_drop", "accuracy_drop_low", "accuracy_drop_high"]
        named = [
            f"layer {layer:.0f} head {head:.0f} ({100 * drop:.0f} points, {100 * low:.0f} to "
            f"{100 * high:.0f})"
            for layer, head, drop, low, high in sure[columns].to_numpy(float)
        ]
        lines.append(
            "Accuracy lost when a head's attention is made uniform, "
            f"{kind} questions: {'; '.join(named)}."
        )
    return lines


def _curve(table: pd.DataFrame) -> str:
    summary = pd.DataFrame(table.attrs["summary"])
    shares = summary.groupby("order", sort=False)["share_at_95"].mean()
    parts = [f"{100 * share:.0f}% in {order} order" for order, share in shares.items()]
    return (
        "Share of heads that can be removed before accuracy falls below 95% of its initial value: "
        f"{', '.join(parts)}."
    )


_Planned = tuple[str, str, str, Callable[..., object]]
"""File name, title, caption, and the function that draws the picture to ``path``."""


def draw_all(
    shown: dict[str, Any], tables: dict[str, pd.DataFrame], store: Store, folder: Path
) -> list[Captioned]:
    """Draw all pictures to a folder, and return them with their captions."""
    folder.mkdir(exist_ok=True)
    best = tables["best_head"].iloc[0]
    layer, head = int(best["layer"]), int(best["head"])
    made: list[Captioned] = []
    for name, title, caption, draw in (
        *_of_samples(shown, tables["rollout"], store, layer, head),
        *_of_tables(tables),
    ):
        path = folder / f"{name}.png"
        draw(path=path)
        made.append((path, title, caption))
    return made


def _of_samples(
    shown: dict[str, Any], rollout: pd.DataFrame, store: Store, layer: int, head: int
) -> list[_Planned]:
    """Return the pictures of single samples; those of one head use ``layer`` and ``head``."""
    after, phrase = shown["after"], shown["phrase"]
    pointed = store[0]
    box = tuple(pointed.labels["box"])
    return [
        (
            "pointing",
            f"Layer {layer}, head {head} attends to the object asked about",
            "Attention of the last token of the prompt, just before the answer. The box is the "
            "true box of the object.",
            partial(figures.overlay, pointed, [pointed.last], layer, head, boxes=[box]),
        ),
        (
            "layers",
            f"“{phrase}”, layer by layer",
            "Mean of all heads, with one colour scale for all panels.",
            partial(figures.layer_overlays, after, phrase),
        ),
        (
            "heads",
            f"“{phrase}” in the heads of layer 0",
            "Heads differ: some attend to the object already in the first layer.",
            partial(figures.head_overlays, after, phrase, 0),
        ),
        (
            "before_after",
            "Before and after training",
            "Attention of the last token of the prompt in both models, for the same head, question "
            "and image.",
            partial(
                figures.before_after,
                shown["pointed_before"],
                pointed,
                [pointed.last],
                layer,
                head,
                boxes=[box],
            ),
        ),
        (
            "rollout",
            "Attention rollout",
            "All layers combined. In a causal model, rollout mostly shows the mask: all later "
            "tokens can attend to the top rows of the image.",
            partial(figures.rollout_overlay, rollout, after),
        ),
        (
            "rollout_lift",
            "Attention rollout divided by that of uniform attention",
            "The same rollout divided by the rollout of uniform attention, which removes the "
            "effect of the mask.",
            partial(figures.rollout_overlay, rollout, after, "log2_ratio"),
        ),
        (
            "matrix",
            "The whole matrix, with its blocks",
            "Grey cells are hidden by the mask: image tokens cannot attend to the text after them.",
            partial(figures.attention_matrix, after, layer, head),
        ),
        (
            "token_patch",
            "Text tokens by image tokens",
            "Columns are the image tokens, ordered by rows of the image.",
            partial(figures.token_patch_matrix, after, layer, head),
        ),
    ]


def _of_tables(tables: dict[str, pd.DataFrame]) -> list[_Planned]:
    """Return the pictures of the tables, over all samples."""
    pruning = tables["pruning"]
    return [
        (
            "pointing_heads",
            "Heads that attend to the object asked about",
            "Share of scenes in which a head's peak is on the object.",
            partial(
                figures.head_grid,
                tables["pointing"],
                "hit",
                label="share of scenes",
                title="Peak on the object asked about, by head",
            ),
        ),
        (
            "ratio",
            "Share of attention on the image",
            "Attention of the last token of the prompt. The dashed line is uniform attention over "
            "its visible keys.",
            partial(
                figures.layer_curves,
                tables["ratio"],
                "ratio",
                null="null",
                label="share of attention on the image",
                title="Attention of the last token on the image",
            ),
        ),
        (
            "pruning",
            "Importance of each head",
            "Loss of the answer's log-probability when the head's attention is made uniform.",
            partial(
                figures.head_grid,
                pruning[pruning["question_kind"] == "all"],
                "log_prob_drop",
                label="log-probability lost (nats)",
                title="Loss when a head is made uniform",
            ),
        ),
        (
            "pruning_curve",
            "Removing more and more heads",
            "Accuracy as heads are removed: least important first, most important first, and in "
            "random order.",
            partial(figures.pruning_curve_plot, tables["pruning_curve"]),
        ),
        (
            "positions",
            "Attention by distance",
            "Lift over uniform attention, which is 1.",
            partial(figures.positional_profiles, tables["positions"]),
        ),
        (
            "raster",
            "Rows and columns of the image",
            "Dotted lines are a blank image: attention that remains without content is a bias of "
            "position.",
            partial(figures.raster_profiles, tables["raster_profile"]),
        ),
    ]
