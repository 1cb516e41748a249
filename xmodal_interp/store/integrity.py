"""Check that every file of a store exists and matches its checksum."""

from __future__ import annotations

import json
from collections.abc import Iterator
from os import PathLike
from pathlib import Path

import pandas as pd

from xmodal_interp.arguments import user_path
from xmodal_interp.errors import StoreError
from xmodal_interp.store import files, schema

_Row = tuple[str, str, bool, str]


def check_store(path: str | PathLike[str]) -> pd.DataFrame:
    """Read every file of a store and compare it with its checksum.

    Args:
        path: The store.

    Returns:
        One row per file: ``sample`` (empty for the files of the store itself), ``file``, ``ok``,
        and ``problem``, which is empty for intact files. A sample that ``names.jsonl`` lists but
        the store lacks also has a row. Leftovers of interrupted writes are ignored.

    Raises:
        StoreError: The store does not exist, or has another format or version.
    """
    folder = user_path(path)
    if not (folder / schema.MANIFEST).is_file() or _is_of_another_version(folder):
        files.read_manifest(folder)
    rows = list(_store_rows(folder))
    names = _folders(folder / schema.SAMPLES)
    for name in names:
        try:
            rows += _sample_rows(folder / schema.SAMPLES / name)
        except OSError as error:  # no permission to list the folder
            rows.append((name, schema.SAMPLE, False, f"it cannot be read: {error}"))
    gone = "the sample was written, but its folder does not exist"
    listed = _listed(folder)
    rows += [(name, schema.SAMPLE, False, gone) for name in listed if name not in set(names)]
    return pd.DataFrame(rows, columns=["sample", "file", "ok", "problem"])


def _is_of_another_version(folder: Path) -> bool:
    """Return whether a readable manifest states another version; False if it is damaged."""
    try:
        stamp = json.loads((folder / schema.MANIFEST).read_text("utf-8"))
        is_one = isinstance(stamp, dict) and stamp.get("format") == schema.FORMAT
        return is_one and stamp.get("version") != schema.VERSION
    except (OSError, ValueError, RecursionError):
        return False


def _store_rows(folder: Path) -> Iterator[_Row]:
    """Yield the rows of the manifest and of the ``.jsonl`` files."""
    try:
        files.read_manifest(folder)
        yield "", schema.MANIFEST, True, ""
    except StoreError as error:
        yield "", schema.MANIFEST, False, str(error)
    for name in (schema.NAMES, schema.FAILURES):
        try:
            problems = files.line_problems(folder / name)
        except StoreError as error:
            problems = [str(error)]
        if problems or (folder / name).exists():
            yield "", name, not problems, "; ".join(problems)


def _listed(folder: Path) -> list[str]:
    """Return the names in ``names.jsonl``; an empty list if it cannot be read."""
    try:
        return list(files.sample_numbers(folder))
    except StoreError:  # _store_rows reports it
        return []


def _folders(samples: Path) -> list[str]:
    """Return the names of existing samples, in writing order if that can be read."""
    try:
        return files.sample_names(samples.parent)
    except (OSError, StoreError):  # _store_rows reports what is wrong with the list
        inside = samples.iterdir() if samples.is_dir() else ()
        return sorted(each.name for each in inside if each.name[0] != "." and each.is_dir())


def _sample_rows(folder: Path) -> Iterator[_Row]:
    try:
        record = files.read_record(folder)
    except StoreError as error:
        yield folder.name, schema.SAMPLE, False, str(error)
        return
    problem = "" if record["name"] == folder.name else f"it belongs to sample {record['name']!r}"
    yield folder.name, schema.SAMPLE, not problem, problem
    for file, expected in record["files"].items():
        problem = files.file_problem(folder / file, expected["bytes"], expected["sha256"])
        yield folder.name, file, not problem, problem
    for extra in sorted(
        {each.name for each in folder.iterdir()} - {schema.SAMPLE, *record["files"]}
    ):
        yield folder.name, extra, False, "it is not part of the sample"
