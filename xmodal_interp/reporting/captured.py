"""The sections on what was captured: model, kept parts, samples, token layout, provenance."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pandas as pd

from xmodal_interp.analysis.tables import add_provenance
from xmodal_interp.attention import AttentionCall
from xmodal_interp.errors import StoreError, counted
from xmodal_interp.escaping import portable
from xmodal_interp.models import open_image
from xmodal_interp.reporting.estimates import records
from xmodal_interp.reporting.page import Card, Section, Shown, Stretch, Table, limited, shown_image
from xmodal_interp.reporting.questions import refusal_of
from xmodal_interp.sample import Sample
from xmodal_interp.vocabulary import TOKEN_KINDS

N_CARDS = 8
_FRAMES = 4  # frames of a video on a card
_MOST_STRETCHES = 200
_TEXTS = ("system", "samples")  # settings that are never paths
_STATISTICS = {
    "group_mass": "mass of key groups",
    "row_entropy": "entropy",
    "key_received": "received attention",
}


@runtime_checkable
class Checkup(Protocol):
    """The result of :func:`xmodal_interp.doctor`."""

    @property
    def table(self) -> pd.DataFrame:
        """One row per check."""

    @property
    def layers(self) -> pd.DataFrame:
        """One row per attention layer."""

    @property
    def ok(self) -> bool:
        """Whether no check failed."""

    @property
    def summary(self) -> str:
        """The result in one line."""


def model_section(samples: Sequence[Sample]) -> Section:
    """Return the model and the kept parts of the attention."""
    first = samples[0]
    rows = _kept(first)
    about = first.provenance
    others = [sample.name for sample in samples if _layout(sample) != _layout(first)]
    sentences = []
    model = about.get("model_class") or about.get("model")
    if model:
        parts = [str(about[name]) for name in ("dtype", "backend") if about.get(name)]
        with_these = f" ({', '.join(parts)} attention)" if len(parts) == 2 else ""
        sentences.append(f"The model is {model}{with_these}; {_named(about)}.")
    sentences += [
        "Kept of the {tower} tower: {kept} ({kind}-attention layers: {layers}).".format(**row)
        for row in records(rows)
    ]
    notes = (
        []
        if not others
        else [
            "The table is of the first sample. Samples with other layers or towers: "
            f"{len(others)} of {len(samples)}, {others[0]} among them."
        ]
    )
    return Section(
        "What was captured",
        "captured",
        sentences=sentences,
        tables=[Table("Kept attention of the first sample", rows)],
        notes=notes,
    )


def _named(about: Mapping[str, Any]) -> str:
    name = str(about.get("model", "")).rstrip("/").rsplit("/", 1)[-1] or "without a name"
    revision = about.get("revision")
    return f"its name is {name}" + (f", revision {revision}" if revision else "")


def _layout(sample: Sample) -> set[tuple[str, str, int]]:
    return {key[:3] for key in sample.calls}


def _kept(sample: Sample) -> pd.DataFrame:
    """Return one row per tower and attention kind with the parts that were kept."""
    rows = []
    existing = sample.provenance.get("layers", {})
    for tower, kind in dict.fromkeys(sorted((key[0], key[1]) for key in sample.calls)):
        layers = sample.layers(tower, kind)
        key = min(key for key in sample.calls if key[:2] == (tower, kind))
        call = sample.calls[key]
        of = existing.get(f"{tower}.{kind}")
        n_rows = "all" if call.rows is None else counted(len(call.rows), "position")
        n_layers = (
            str(len(layers))
            if of is None or len(of) == len(layers)
            else (f"{len(layers)} of {len(of)}")
        )
        rows.append((tower, kind, n_layers, _heads(call), _parts(call), n_rows))
    columns = ["tower", "kind", "layers", "heads", "kept", "query_rows"]
    return pd.DataFrame(rows, columns=columns)


def _heads(call: AttentionCall) -> str:
    if call.q is not None and call.k is not None and call.k.shape[1] != call.q.shape[1]:
        return f"{call.q.shape[1]} ({call.k.shape[1]} for keys)"
    return str(call.n_heads)


def _parts(call: AttentionCall) -> str:
    parts = ["queries and keys"] if call.q is not None else []
    parts += ["values"] if call.v is not None else []
    parts += ["probabilities"] if call.dense is not None else []
    statistics = [text for name, text in _STATISTICS.items() if getattr(call, name) is not None]
    parts += [f"statistics ({', '.join(statistics)})"] if statistics else []
    parts += ["norms"] if call.token_norm is not None or call.update_share is not None else []
    return ", ".join(parts) or "no tensors"


def samples_section(samples: Sequence[Sample], chosen: str) -> Section:
    """Return the prompts and answers: cards of the first samples, and a table of all.

    Args:
        samples: The samples of the report.
        chosen: How they were chosen.
    """
    notes: list[str] = []
    cards = [_card(sample, notes) for sample in samples[:N_CARDS]]
    rows = []
    for sample in samples:
        counts = pd.Series(sample.kinds).value_counts()
        row: dict[str, Any] = {"sample": sample.name, "question": sample.question}
        row |= {"answer": sample.answer}
        known = sample.labels.get("answer")
        row |= {"known_answer": None if known is None else str(known)}
        row |= {"positions": len(sample)}
        rows.append(row | {kind: int(counts.get(kind, 0)) for kind in TOKEN_KINDS})
    table = pd.DataFrame(rows)
    empty = [name for name in ("question", "answer", "known_answer") if not table[name].any()]
    empty += [kind for kind in TOKEN_KINDS if not table[kind].any()]
    shown = "" if len(samples) <= N_CARDS else f" The first {N_CARDS} are shown."
    return Section(
        "Samples",
        "samples",
        about=f"{chosen}{shown}",
        cards=cards,
        tables=[limited("Prompts and answers", table.drop(columns=empty))],
        notes=notes,
        n_open=0,
    )


def _card(sample: Sample, notes: list[str]) -> Card:
    pictures: list[Shown] = []
    try:
        pictures = [shown_image(image, f"image {i}") for i, image in enumerate(sample.images)]
        for number, video in enumerate(sample.videos):
            places = np.linspace(0, len(video.frames) - 1, min(_FRAMES, len(video.frames)))
            for i in dict.fromkeys(places.round().astype(int).tolist()):
                caption = f"video {number}, frame {i}"
                pictures.append(shown_image(open_image(video.frames[i]), caption, side=200))
    except (StoreError, OSError) as error:
        notes.append(f"An image of sample {sample.name} cannot be shown. {refusal_of(error)}")
    lines = [
        f"{number} x {size} px" if number > 1 else f"{size} px"
        for size, number in pd.Series(
            [f"{grid.width} x {grid.height}" for grid in sample.grids], dtype=object
        )
        .value_counts()
        .items()
    ]
    known = sample.labels.get("answer")
    if known is not None:
        lines.append(f"known answer: {known}")
    return Card(sample.name, sample.question, sample.answer, lines, pictures)


def layout_section(samples: Sequence[Sample]) -> Section:
    """Return the number of tokens of each kind, and the order of kinds in the first sample."""
    of_samples = [pd.Series(sample.kinds).value_counts() for sample in samples]
    counts = pd.DataFrame(of_samples).fillna(0)
    n_positions = np.array([len(sample) for sample in samples])
    kinds = [kind for kind in TOKEN_KINDS if kind in counts]
    table = pd.DataFrame(
        {
            "token_kind": kinds,
            "mean": [float(counts[kind].mean()) for kind in kinds],
            "smallest": [int(counts[kind].min()) for kind in kinds],
            "largest": [int(counts[kind].max()) for kind in kinds],
            "share": [float((counts[kind].to_numpy() / n_positions).mean()) for kind in kinds],
        }
    )
    first = samples[0]
    runs = _runs(first)
    parts = ["{mean:g} {token_kind}".format(**row) for row in records(table.round(1))]
    total = f"{n_positions.mean():.1f}".removesuffix(".0")
    sentences = [f"A sample has {total} positions on average: {', '.join(parts)}."]
    where = "vision tower" if first.tower == "vision" else "sequence"
    return Section(
        "Token layout",
        "layout",
        about=f"Positions of the {where} by kind. The strip is the first sample, {first.name}, "
        "from its first position to its last.",
        sentences=sentences,
        strip=[_stretch(run) for run in records(runs)] if len(runs) <= _MOST_STRETCHES else (),
        tables=[Table("Tokens by kind", table), limited("Order in the first sample", runs)],
    )


def _stretch(run: Mapping[str, Any]) -> Stretch:
    length = run["stop"] - run["start"]
    where = f"positions {run['start']} to {run['stop'] - 1}: {run['role']}"
    return Stretch(f"{length} {run['token_kind']}", length, str(run["token_kind"]), where)


def _runs(sample: Sample) -> pd.DataFrame:
    """Return the stretches of one kind, role and image; ``stop`` is excluded."""
    tokens = sample.tokens
    names = [name for name in ("kind", "role", "image", "video") if name in tokens]
    keys = tokens[names].astype(object).where(tokens[names].notna(), "")
    new = (keys != keys.shift()).any(axis=1).to_numpy()
    starts = np.flatnonzero(new)
    stops = np.append(starts[1:], len(tokens))
    runs = keys.iloc[starts].reset_index(drop=True).rename(columns={"kind": "token_kind"})
    runs.insert(0, "start", starts)
    runs.insert(1, "stop", stops)
    empty = [name for name in runs.columns[2:] if (runs[name] == "").all()]
    runs = runs.drop(columns=empty)
    if "role" not in runs:
        runs["role"] = ""
    texts = [
        " ".join(str(token) for token in tokens["token"].iloc[start:stop])
        if kind in ("text", "special") and stop - start <= 60
        else ""
        for start, stop, kind in zip(starts, stops, runs["token_kind"], strict=True)
    ]
    return runs.assign(tokens=texts)


def doctor_section(checkup: Checkup | None, samples: Sequence[Sample]) -> Section:
    """Return the doctor's verdict, or how to get it."""
    if checkup is not None:
        word = "PASS" if checkup.ok else "FAIL"
        tables = [Table("Checks", checkup.table)]
        if len(checkup.layers):
            tables.append(limited("Errors by layer", checkup.layers))
        return Section(
            "Can the recordings be trusted?",
            "doctor",
            about="The verdict of xi.doctor on the model, as it was passed to this report.",
            sentences=[f"{word}: {checkup.summary}"],
            tables=tables,
            n_open=0,
        )
    model = str(samples[0].provenance.get("model") or "MODEL")
    if portable(model) != model:
        model = "MODEL"  # a folder of the machine of the capture
    return Section(
        "Can the recordings be trusted?",
        "doctor",
        sentences=[
            "Unknown: no verdict of the doctor was passed to this report, and samples do not hold "
            "one. To get it and to have it on this page:"
        ],
        code=f"xmodal doctor {model}\nxmodal report STORE --doctor\n"
        "xi.report(store, path, checkup=xi.doctor(vlm))  # in Python",
    )


def provenance_section(
    samples: Sequence[Sample], manifest: Mapping[str, Any] | None, made: Mapping[str, Any]
) -> Section:
    """Return model, versions and settings of the capture, and how this page was made.

    Args:
        samples: The samples of the report.
        manifest: The manifest of their store.
        made: How the page was made.
    """
    origins: list[Mapping[str, Any]] = []
    for sample in samples:
        add_provenance(origins, sample.provenance)
    tables = [_settings("This page", made)]
    if manifest is not None:
        tables.append(_settings("Store", manifest))
    for number, origin in enumerate(origins[:5]):
        name = "Capture" if len(origins) == 1 else f"Capture {number + 1} of {len(origins)}"
        tables.append(_settings(name, origin))
    about = "" if len(origins) == 1 else f"The samples have {len(origins)} origins."
    return Section("Provenance", "provenance", about=about, tables=tables, n_open=1)


def _settings(name: str, values: Mapping[str, Any]) -> Table:
    rows = list(_flat(values))
    return Table(name, pd.DataFrame(rows, columns=["setting", "value"], dtype=object))


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", _shown(value if name in _TEXTS else portable(value))


def _shown(value: Any) -> str:
    if value is None or value in ([], {}, ()):
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        text = ", ".join(map(str, value))
        return text if len(text) <= 600 else f"{text[:600]} ..."
    return str(value)
