"""Write a report of a store or of samples: one HTML file that can be mailed.

1. At most ``max_samples`` samples are used, evenly spaced in the order given.
2. The first sections are what was captured: model, kept parts, samples, token layout, and the
   doctor's verdict if it is passed.
3. Each analysis that applies to the samples has a section with sentences, figures and tables
   (:mod:`.analyses`); the others are listed with their reason.
4. The last section is the provenance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from xmodal_interp import at, figures
from xmodal_interp.analysis.resampling import cluster_numbers, pictures_of
from xmodal_interp.analysis.tables import samples_of
from xmodal_interp.arguments import strings, whole_number
from xmodal_interp.errors import InputError, XmodalError
from xmodal_interp.escaping import portable
from xmodal_interp.figures.style import Figure
from xmodal_interp.reporting.analyses import Analysed, analysed
from xmodal_interp.reporting.captured import (
    Checkup,
    doctor_section,
    layout_section,
    model_section,
    provenance_section,
    samples_section,
)
from xmodal_interp.reporting.page import (
    Page,
    Section,
    Shown,
    Table,
    checked_path,
    limited,
    shown_figure,
    write_page,
)
from xmodal_interp.reporting.questions import refusal_of
from xmodal_interp.sample import Sample
from xmodal_interp.store import Store

MAX_SAMPLES = 32


@dataclass(frozen=True)
class Report:
    """A report that was written.

    Attributes:
        path: The HTML file.
        sentences: The sentences of the analyses.
        glance: One row per comparison: ``what, against_null`` (``"higher"``, ``"lower"``, ``"not
            distinguished"``, ``"no interval"`` or ``"no null"``), ``value, low, high, null,
            difference, difference_low, difference_high, n, analysis``.
        left_out: Analyses that do not apply: ``analysis, tower, reason``.
        names: The samples that were used.
    """

    path: Path
    sentences: list[str]
    glance: pd.DataFrame
    left_out: pd.DataFrame
    names: list[str]


def report(
    samples: Sample | Iterable[Sample],
    path: str | PathLike[str] = "report.html",
    *,
    names: Sequence[str] | None = None,
    max_samples: int = MAX_SAMPLES,
    checkup: Checkup | None = None,
    force: bool = False,
) -> Report:
    """Write one HTML file with everything that the samples tell without the model.

    The file has no links to other files and makes no request. It holds what was captured, the
    doctor's verdict, every analysis that applies with figure, null, interval and a sentence, the
    analyses that do not apply with their reason, and the provenance. Intervals are over samples;
    samples of the same picture count as one cluster.

    Args:
        samples: One sample, several, or an open store.
        path: The file, which must end in .html.
        names: Names of the samples of a store to use; all if not given.
        max_samples: The largest number of samples that are used. If there are more, they are evenly
            spaced in the order given, first and last included.
        checkup: The result of ``xi.doctor`` on the model, for the report; it is not run here.
        force: Overwrite an existing file.

    Returns:
        The path, the sentences and the tables of the report.

    Raises:
        InputError: There are no samples, or ``names`` are passed without a store; or the path does
            not end in .html, is inside a store, or exists and ``force`` is False.
        NotRecordedError: The store has no sample of a name.
        StoreError: A file of the store is damaged.

    Example::

        store = xi.open_store("runs/shapes")
        xi.report(store, "report.html").path
    """
    whole_number(max_samples, "max_samples", 1)
    target = checked_path(path, force=force)
    store = samples if isinstance(samples, Store) else None
    used, chosen = chosen_samples(_named(samples, names), max_samples)
    found, sections = report_sections(used, chosen, store=store, checkup=checkup)
    model = str(used[0].provenance.get("model", "")).rstrip("/").rsplit("/", 1)[-1]
    title = f"How {model} attends" if model else "Attention of a vision-language model"
    write_page(Page(title, introduction(used, chosen), sections), target)
    names = [sample.name for sample in used]
    return Report(target, found.sentences, found.glance, found.left_out, names)


def _named(
    samples: Sample | Iterable[Sample], names: Sequence[str] | None
) -> Sample | Iterable[Sample]:
    """Return the samples of some names, in the order of the names."""
    if names is None:
        return samples
    if not isinstance(samples, Store):
        raise InputError(
            "names= requires an open store (xi.open_store(path)). Pass the samples themselves."
        )
    strings(names, "names")
    return samples[[names] if isinstance(names, str) else list(names)]


def chosen_samples(
    samples: Sample | Iterable[Sample], max_samples: int
) -> tuple[list[Sample], str]:
    """Return the samples of a report, and a sentence on how they were chosen.

    Raises:
        InputError: There are no samples.
    """
    given = samples_of(samples)
    n = len(given)
    if not n:
        raise InputError("A report requires at least one sample; got none.")
    if n <= max_samples:
        return [given[i] for i in range(n)], "1 sample." if n == 1 else f"All {n} samples."
    places = np.unique(np.linspace(0, n - 1, max_samples).round().astype(int)).tolist()
    how = "the first" if max_samples == 1 else "evenly spaced in their order"
    return [given[i] for i in places], f"{len(places)} of {n} samples: {how}."


def introduction(samples: Sequence[Sample], chosen: str) -> list[str]:
    """Return the lines below the title."""
    pictures = len(set(_clusters(samples)))
    interval = (
        "With one picture there are no intervals, and nothing here says how it is with others."
        if pictures < 2
        else f"Intervals are 95% intervals over {len(samples)} samples of {pictures} pictures, "
        "never over tokens or heads."
    )
    return [
        f"{chosen} {interval}",
        "Attention shows where a head reads from. It does not show that the answer depends on it: "
        "for that, change the attention and run the model (xi.intervene, xi.head_pruning).",
    ]


def report_sections(
    samples: Sequence[Sample],
    chosen: str,
    *,
    store: Store | None = None,
    checkup: Checkup | None = None,
) -> tuple[Analysed, list[Section]]:
    """Return the analyses and all sections of a report.

    Args:
        samples: The samples of the report.
        chosen: How they were chosen.
        store: Their store, for its manifest and failures.
        checkup: The doctor's verdict.
    """
    found = analysed(samples, _clusters(samples))
    before = [model_section(samples), samples_section(samples, chosen), layout_section(samples)]
    before.append(doctor_section(checkup, samples))
    if store is not None and len(store.failures):
        failures = limited("Items that could not be captured", store.failures)
        before[1] = _with_tables(before[1], failures)
    made: dict[str, Any] = {
        "made_by": f"xmodal-interp {version('xmodal-interp')}",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "samples": chosen,
        "sample_names": [sample.name for sample in samples],
        "store": None if store is None else str(store.path),
    }
    manifest = None if store is None else store.manifest
    sections = [
        replace(glance_section(found), code=_opening(samples, store)),
        *before,
        _look_section(samples[0]),
        *found.sections,
        left_out_section(found),
        provenance_section(samples, manifest, made),
    ]
    return found, sections


def glance_section(found: Analysed) -> Section:
    """Return the section with one row per comparison."""
    if found.glance.empty:
        return Section("At a glance", "glance", sentences=["No analysis applies to what was kept."])
    compared = found.glance["against_null"]
    n_compared = int(compared.isin(["higher", "lower", "not distinguished"]).sum())
    higher, lower = (int((compared == word).sum()) for word in ("higher", "lower"))
    without = int((compared == "no interval").sum())
    sentences = []
    if n_compared:
        sentences.append(
            f"Values with a null and an interval: {n_compared}. Higher than their null: "
            f"{higher}; lower: {lower}; not distinguished from it: {n_compared - higher - lower}. "
            "The intervals are not adjusted for the number of comparisons: about 1 in 20 of those "
            "without a difference would be called higher or lower."
        )
    if without:
        sentences.append(
            f"Values with a null but without an interval, because their samples show one picture: "
            f"{without}."
        )
    return Section(
        "At a glance",
        "glance",
        about="One row per sentence of the analyses. higher and lower: the 95% interval of the "
        "difference from the null excludes 0.",
        sentences=sentences,
        tables=[limited("All values and their nulls", found.glance)],
    )


def left_out_section(found: Analysed) -> Section:
    """Return the analyses that do not apply, with their reasons."""
    return Section(
        "What was left out",
        "left-out",
        about="Analyses that do not apply to what was kept, or that require more than samples.",
        tables=[Table("Analyses left out", found.left_out)],
    )


def _look_section(sample: Sample) -> Section:
    """Return pictures of the first sample."""
    pictures: list[Shown] = []
    notes: list[str] = []
    vision = sample.tower == "vision"
    queries = None if vision else at.last
    of = "the class token" if vision else "the last token of the prompt"
    planned: list[tuple[str, Callable[[], Figure]]] = [
        (
            f"Attention of {of}, layer by layer, mean of all heads.",
            lambda: figures.layer_overlays(sample, queries),
        ),
        (
            "The last layer, mean of all heads: queries in rows, keys in columns; grey cells are "
            "hidden by the mask.",
            lambda: figures.attention_matrix(sample),
        ),
    ]
    for caption, draw in planned:
        try:
            pictures.append(shown_figure(draw(), caption))
        except XmodalError as error:
            notes.append(f"A figure could not be drawn. {refusal_of(error)}")
    return Section(
        "One sample to look at",
        "look",
        about=f"The first sample, {sample.name}. It is an example and no evidence for others.",
        pictures=pictures,
        notes=notes,
    )


def _with_tables(section: Section, table: Table) -> Section:
    return replace(section, tables=[*section.tables, table])


def _opening(samples: Sequence[Sample], store: Store | None) -> str:
    """Return the Python lines before the calls that the sections show; empty without a store."""
    if store is None:
        return ""
    which = "" if len(samples) == len(store) else "[sample_names]  # listed under Provenance"
    path = portable(str(store.path))
    return f"import xmodal_interp as xi\n\nsamples = xi.open_store({path!r}){which}"


def _clusters(samples: Sequence[Sample]) -> list[int]:
    clusters: list[int] = cluster_numbers(
        [pictures_of(*pair) for pair in enumerate(samples)]
    ).tolist()
    return clusters
