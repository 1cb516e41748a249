"""Is a store whole: every file there, every checksum right."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from os import PathLike
from pathlib import Path

import pandas as pd

from xmodal_interp.errors import StoreError
from xmodal_interp.store import files, schema

_Row = tuple[str, str, bool, str]


def check_store(path: str | PathLike[str]) -> pd.DataFrame:
    """Read every file of a store and compare it with its checksum.

    Args:
        path: The store.

    Returns:
        One row per file: ``sample`` (empty for the manifest), ``file``, ``ok``, and ``problem``,
        empty if there is none. Samples that ``names.jsonl`` has and the store has not are a row
        too. Leftovers of interrupted writes are no part of a store.

    Raises:
        StoreError: There is no store, or it is of another format or version.
    """
    folder = Path(path)
    files.read_manifest(folder)
    rows: list[_Row] = [("", schema.MANIFEST, True, "")]
    names = files.sample_names(folder)
    for name in names:
        rows += _sample_rows(folder / schema.SAMPLES / name)
    written = dict.fromkeys(line["name"] for line in files.read_lines(folder / schema.NAMES))
    gone = "the sample was written, and its folder is not there"
    rows += [(name, schema.SAMPLE, False, gone) for name in written if name not in set(names)]
    return pd.DataFrame(rows, columns=["sample", "file", "ok", "problem"])


def _sample_rows(folder: Path) -> Iterator[_Row]:
    try:
        record = files.read_record(folder)
    except StoreError as error:
        yield folder.name, schema.SAMPLE, False, str(error)
        return
    problem = "" if record["name"] == folder.name else f"it is of sample {record['name']!r}"
    yield folder.name, schema.SAMPLE, not problem, problem
    for file, expected in record["files"].items():
        problem = _problem(folder / file, expected["bytes"], expected["sha256"])
        yield folder.name, file, not problem, problem
    for extra in sorted(
        {each.name for each in folder.iterdir()} - {schema.SAMPLE, *record["files"]}
    ):
        yield folder.name, extra, False, "it is no part of the sample"


def _problem(path: Path, n_bytes: int, digest: str) -> str:
    """What is wrong with a file, or nothing."""
    if not path.is_file():
        return "it is missing"
    if path.stat().st_size != n_bytes:
        return f"it has {path.stat().st_size} bytes, not {n_bytes}"
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    return "" if found == digest else "its checksum is not the one it was written with"
