"""Measure the support matrix: ``python -m tests.conformance.matrix``.

This writes ``xmodal_interp/models/support.json`` and ``docs/families.md`` from measurements on tiny
models of all types. Neither file is edited manually.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

from tests.conformance.measuring import Measured, measured
from tests.helpers.families import RECORDS
from tests.helpers.model_types import reads_videos, tiny, types
from xmodal_interp.hooks import Identity
from xmodal_interp.models import support

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "xmodal_interp" / "models" / "support.json"
DOCUMENT = ROOT / "docs" / "families.md"
STORED = json.loads(TABLE.read_text())
STALE = "is stale: run python -m tests.conformance.matrix"


def row_of(model_type: str, found: Measured) -> dict[str, Any]:
    """Return the row of one type in the matrix."""
    recordings = [run.recording for run in found.runs]
    calls = [call for recording in recordings for call in recording.calls]
    ran = {call.module for call in calls}
    dense = {call.module for call in calls if call.dense is not None}
    modules = {each.module: each for r in recordings for each in r.modules}.values()
    return {
        "layers": _by_role(modules),
        "without_matrix": _by_role(recordings[0].without_matrix),
        "as_probabilities": _by_role(each for each in modules if each.module in dense),
        "idle": _by_role(each for each in modules if each.module not in ran),
        "outputs_same": all(run.same for run in (found.forward, *found.others)),
        "worst_error": float(f"{found.error:.0e}"),
        "generation": None if found.generation is None else found.generation.same,
        "processor": _processor(model_type),
        "notes": sorted({f"not square: {why}" for why in RECORDS[model_type].not_square.values()}),
    }


def with_videos(model_type: str, found: Measured) -> Measured:
    """Return a measurement on images, with runs on videos added if the type reads them."""
    if not reads_videos(model_type):
        return found
    videos = measured(tiny(model_type, video=True))
    return replace(found, others=(*found.others, *videos.runs))


def versions() -> dict[str, str]:
    """Return the versions of the libraries, without the device suffix of torch."""
    return {"torch": torch.__version__.split("+")[0], "transformers": transformers.__version__}


def main() -> None:
    """Measure all types and write both files."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    rows = {name: row_of(name, with_videos(name, measured(tiny(name)))) for name in types()}
    whole = {"versions": versions(), "types": rows}
    TABLE.write_text(json.dumps(whole, indent=1) + "\n")
    DOCUMENT.write_text(support.markdown())


def _by_role(modules: Iterable[Identity]) -> dict[str, int]:
    return dict(Counter(f"{each.tower}.{each.kind}" for each in modules))


def _processor(model_type: str) -> str | None:
    return RECORDS[model_type].processor_class or PROCESSOR_MAPPING_NAMES.get(model_type)


if __name__ == "__main__":
    main()
