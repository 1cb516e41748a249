"""Reading one file of a store, whole and of this version, or a refusal that names it."""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
import pyarrow as pa
from safetensors import SafetensorError, safe_open
from torch import Tensor

from xmodal_interp.errors import StoreError
from xmodal_interp.models import ImageGrid, VideoGrid
from xmodal_interp.store import packing, schema

_T = TypeVar("_T")
_DAMAGED = (
    *(ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error),
    *(SafetensorError, pa.ArrowException),
)
"""What the readers of JSON, npz, Parquet and safetensors raise on content they cannot make out."""


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a store.

    Raises:
        StoreError: There is none, or it is damaged or of another format or version.
    """
    file = path / schema.MANIFEST
    if not file.is_file():
        what = "no such folder" if not path.exists() else f"no {schema.MANIFEST} in it"
        raise StoreError(
            f"A store is a folder that capture_dataset has written; {path} is not one: there is "
            f"{what}."
        )
    manifest = _read_json(file)
    if manifest.get("digest") != schema.digest_of(manifest.get("settings")):
        raise _damaged(file, "its digest is not that of its settings")
    return manifest


def read_record(folder: Path) -> dict[str, Any]:
    """The ``sample.json`` of a sample's folder, checked against its own digest.

    Raises:
        StoreError: It is missing, damaged or of another version.
    """
    path = folder / schema.SAMPLE
    record = _read_json(path)
    digest = record.pop("digest", None)
    if digest != schema.digest_of(record):
        raise _damaged(path, "its digest is not that of its content")
    return record


def sample_names(path: Path) -> list[str]:
    """Names of the samples that are there, in the order they were written."""
    folder = path / schema.SAMPLES
    inside = folder.iterdir() if folder.is_dir() else ()
    there = {each.name for each in inside if each.name[0] != "." and each.is_dir()}
    ordered = dict.fromkeys(str(line.get("name")) for line in read_lines(path / schema.NAMES))
    return [name for name in ordered if name in there] + sorted(there - set(ordered))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a ``.jsonl`` file; one that a crash has cut off is left out.

    Raises:
        StoreError: The file is of another format or version.
    """
    lines = []
    for text in path.read_text("utf-8", errors="replace").splitlines() if path.exists() else []:
        try:
            line: dict[str, Any] = json.loads(text)
        except ValueError:
            continue
        if "format" in line:
            schema.check_stamp(line, path)
        else:
            lines.append(line)
    return lines


def read_table(path: Path) -> pd.DataFrame:
    """A Parquet file of a sample.

    Raises:
        StoreError: It is missing, damaged or of another version.
    """
    table, stamp = _whole(path, lambda: packing.table_from(path.read_bytes()))
    schema.check_stamp(stamp, path)
    return table


def read_grids(path: Path, numbers: Sequence[Mapping[str, Any]]) -> tuple[ImageGrid, ...]:
    """The grids of a sample's images, from their arrays and their numbers.

    Raises:
        StoreError: The file is missing, damaged or of another version.
    """
    grids, stamp = _whole(path, lambda: packing.grids_from(path.read_bytes(), numbers))
    schema.check_stamp(stamp, path)
    return grids


def read_video_grids(path: Path, numbers: Sequence[Mapping[str, Any]]) -> tuple[VideoGrid, ...]:
    """The grids of a sample's videos, likewise.

    Raises:
        StoreError: The file is missing, damaged or of another version.
    """
    grids, stamp = _whole(path, lambda: packing.video_grids_from(path.read_bytes(), numbers))
    schema.check_stamp(stamp, path)
    return grids


def read_tensors(path: Path, names: Sequence[str], n_bytes: int) -> dict[str, Tensor]:
    """Some tensors of a safetensors file, by their names; the others are not read.

    Raises:
        StoreError: It is missing, not of its size, damaged or of another version.
    """

    def read() -> dict[str, Tensor]:
        if path.stat().st_size != n_bytes:
            raise ValueError(f"it has {path.stat().st_size} bytes, not {n_bytes}")
        with safe_open(path, framework="pt") as tensors:
            schema.check_stamp(tensors.metadata(), path)
            return {name: tensors.get_tensor(name) for name in names}

    return _whole(path, read)


def _read_json(path: Path) -> dict[str, Any]:
    record: dict[str, Any] = _whole(path, lambda: json.loads(path.read_text("utf-8")))
    schema.check_stamp(record, path)
    return record


def _whole(path: Path, read: Callable[[], _T]) -> _T:
    """What ``read`` returns; what it stumbles over is said with file and sample."""
    try:
        return read()
    except StoreError:
        raise
    except FileNotFoundError:
        raise _damaged(path, "it is missing") from None
    except (OSError, *_DAMAGED) as error:
        raise _damaged(path, str(error)) from error


def _damaged(path: Path, problem: str) -> StoreError:
    of_sample = path.parent.parent.name == schema.SAMPLES
    whose = f"sample {path.parent.name!r}" if of_sample else "the store"
    return StoreError(
        f"A store is read as it was written. {path.name} of {whose} in {path.parent} is damaged: "
        f"{problem}. Run `xmodal check` on the store to see what else is; delete a damaged "
        "sample's folder and capture it again."
    )
