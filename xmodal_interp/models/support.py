"""The support matrix: measurements and geometry rules of each model type.

``support.json`` holds the measurements and the versions of the libraries. Geometry rules and
reasons are read from the family records when the table is built.
"""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

import pandas as pd

from xmodal_interp.models.records import FAMILIES

COLUMNS = (
    *("model_type", "layers", "without_matrix", "as_probabilities", "worst_error", "generation"),
    *("geometry", "videos", "processor", "note"),
)
_INTRODUCTION = """\
# Model types

Measured on tiny random models in float32 (torch {torch}, transformers {transformers}); no
pretrained checkpoint was tested. For comparison, every softmax attention was also observed at the
level of torch's functions. The outputs of {n_same} of {n} types are bit-identical to those without
recording. This page is written by `python -m tests.conformance.matrix` and printed by
`xmodal families`.

* **layers**: attention modules of the tiny model, by tower and attention kind.
* **without matrix**: layers that mix tokens but are not softmax attention (linear attention, state
  spaces, convolutions), so that no probabilities exist.
* **as probabilities**: layers whose probabilities are stored, because their scores cannot be
  computed from queries and keys.
* **worst error**: the largest difference between recorded and actual probabilities, or between
  `P V` and the backend's output relative to its largest value.
* **generation**: whether a cached generation returned the same ids while recorded; `-`: the model
  did not generate from these inputs.
* **geometry**: the rule that gives image tokens their row, column and box, or `none` (the note
  gives the reason).
* **videos**: the rule that gives video tokens their frame, row, column and box; empty if none.
"""


def families() -> pd.DataFrame:
    """Return one row per image-text model type that transformers registers.

    Returns:
        ``model_type``; ``layers``, ``without_matrix``, ``as_probabilities`` (counts by
        ``tower.kind``, empty if zero); ``worst_error`` of a probability (0 to 1); ``generation``
        (``same``, ``differs`` or ``-``); ``geometry`` (name of a rule, or ``none``);
        ``videos`` (name of a rule, or empty); ``processor`` (a class of transformers, or ``-``);
        ``note``. The versions are in ``attrs``.
    """
    stored = _stored()
    rows = [_row(name, about) for name, about in sorted(stored["types"].items())]
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    table.attrs = dict(stored["versions"])
    return table


def markdown() -> str:
    """Return the table of :func:`families` as a Markdown page."""
    table, stored = families(), _stored()
    n_same = sum(about["outputs_same"] for about in stored["types"].values())
    lines = [
        _INTRODUCTION.format(n=len(table), n_same=n_same, **stored["versions"]),
        "| " + " | ".join(column.replace("_", " ") for column in COLUMNS) + " |",
        "|" + "---|" * len(COLUMNS),
    ]
    for row in table.itertuples(index=False):
        cells = (f"{cell:.0e}" if isinstance(cell, float) else str(cell) for cell in row)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _stored() -> dict[str, Any]:
    path = files("xmodal_interp") / "models" / "support.json"
    stored: dict[str, Any] = json.loads(path.read_text())
    return stored


def _row(name: str, about: dict[str, Any]) -> tuple[Any, ...]:
    family = FAMILIES[name]
    idle = f"did not run in this test: {_counts(about['idle'])}" if about["idle"] else ""
    notes = (family.reason or "", idle, *about["notes"])
    same = {True: "same", False: "differs", None: "-"}[about["generation"]]
    return (
        name,
        *(_counts(about[part]) for part in ("layers", "without_matrix", "as_probabilities")),
        about["worst_error"],
        same,
        family.rule,
        family.video_rule,
        about["processor"] or "-",
        "; ".join(note.rstrip(".") for note in notes if note),
    )


def _counts(by_role: dict[str, int]) -> str:
    return ", ".join(f"{role}: {n}" for role, n in by_role.items())
