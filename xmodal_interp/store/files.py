"""Read and verify single files of a store; a damaged file raises StoreError with its name."""

from __future__ import annotations

import hashlib
import json
import stat
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
import pyarrow as pa
from safetensors import SafetensorError, safe_open
from torch import Tensor

from xmodal_interp.errors import InputError, StoreError
from xmodal_interp.store import encoding, schema
from xmodal_interp.vocabulary import TOKEN_COLUMNS

_T = TypeVar("_T")
_DAMAGED = (
    *(ValueError, KeyError, IndexError, TypeError, AttributeError, EOFError, OverflowError),
    *(RecursionError, MemoryError, zipfile.BadZipFile, zlib.error),
    *(SafetensorError, pa.ArrowException),
)
"""Exceptions that readers of JSON, npz, Parquet and safetensors raise for invalid content."""

_OTHER_CHECKSUM = "its checksum differs from the recorded one"
_LINES: dict[str, dict[str, type | tuple[type, ...]]] = {
    schema.NAMES: {"name": str},
    schema.FAILURES: {"item": int, "name": (str, type(None)), "error": str, "message": str},
}
_WITH_DIGEST: dict[str, dict[str, type]] = {schema.NAMES: {"number": int}, schema.FAILURES: {}}


def read_manifest(path: Path) -> dict[str, Any]:
    """Return the manifest of a store.

    Raises:
        StoreError: The manifest does not exist, is damaged, or has another format or version.
    """
    file = path / schema.MANIFEST
    if not file.is_file():
        what = (
            "it does not exist" if not path.exists() else f"it contains no file {schema.MANIFEST}"
        )
        raise StoreError(
            f"{path} is not a store: {what}. Pass a folder that capture_dataset has written."
        )
    manifest = _read_json(file)

    def checked() -> dict[str, Any]:
        if manifest.get("digest") != schema.digest_of(manifest.get("settings")):
            raise ValueError("its digest does not match its settings")
        checksum = manifest.pop("checksum", None)
        if checksum not in (None, schema.digest_of(manifest)) or not _is_manifest(manifest):
            raise ValueError("its checksum does not match its content")
        return manifest

    return _whole(file, checked)


def _is_manifest(manifest: Mapping[str, Any]) -> bool:
    members = {*schema.STAMP, "created", "maker", "settings", "digest"}
    settings = manifest["settings"]
    return (
        manifest.keys() <= members
        and isinstance(settings, dict)
        and isinstance(settings.get("kept", {}), dict)
    )


def store_around(path: Path) -> Path | None:
    """Return the store that contains a path, following links; None if no store contains it."""
    for folder in path.resolve().parents:
        manifest = folder / schema.MANIFEST
        try:
            stamp = json.loads(_text(manifest, schema.MAX_JSON_BYTES)) if manifest.exists() else {}
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(stamp, dict) and stamp.get("format") == schema.FORMAT:
            return folder
    return None


def read_record(folder: Path) -> dict[str, Any]:
    """Return the ``sample.json`` of a sample's folder, after comparing it with its digest.

    Raises:
        StoreError: The file is missing, damaged or of another version.
    """
    path = folder / schema.SAMPLE
    record = _read_json(path, schema.VERSIONS)

    def checked() -> dict[str, Any]:
        if record.pop("digest", None) != schema.digest_of(record):
            raise ValueError("its digest does not match its content")
        schema.check_record(record)
        return record

    return _whole(path, checked)


def sample_names(path: Path) -> list[str]:
    """Return the names of the existing samples, in the order they were written."""
    folder = path / schema.SAMPLES
    inside = folder.iterdir() if folder.is_dir() else ()
    there = {each.name for each in inside if each.name[0] != "." and each.is_dir()}
    numbers = sample_numbers(path)
    for name in there - numbers.keys():
        number = number_of(folder / name)
        if number is not None:
            numbers[name] = number
    return sorted(there, key=lambda name: (name not in numbers, numbers.get(name, 0), name))


def sample_numbers(path: Path) -> dict[str, int]:
    """Return the order number of each sample in ``names.jsonl``."""
    lines = read_lines(path / schema.NAMES)
    numbers: dict[str, int] = {}
    for i, line in enumerate(lines):
        numbers.setdefault(line["name"], line.get("number", i))
    return numbers


def number_of(folder: Path) -> int | None:
    """Return the order number in a sample's ``sample.json``, or None if it cannot be read."""
    try:
        number = read_record(folder).get("number")
    except StoreError:  # reading the sample reports the damage
        return None
    return number if isinstance(number, int) else None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a ``.jsonl`` file, without damaged ones.

    Raises:
        StoreError: The file has another format or version, or cannot be read.
    """
    return [line for line in _lines(path) if isinstance(line, dict)]


def line_problems(path: Path) -> list[str]:
    """Return the problems of a ``.jsonl`` file's lines; an empty list if it is intact.

    Raises:
        StoreError: The file has another format or version, or cannot be read.
    """
    return [line for line in _lines(path) if isinstance(line, str)]


def line_text(line: Mapping[str, Any]) -> str:
    """Return a line of a ``.jsonl`` file, with its digest."""
    return schema.json_text({**line, "digest": schema.digest_of(line)})


def _lines(path: Path) -> Iterator[dict[str, Any] | str]:
    """Yield each line without its digest, or a string that describes its damage."""
    if not path.is_symlink() and not path.exists():
        return
    first, *texts = _whole(path, lambda: _text(path, schema.MAX_LINES_BYTES)).split("\n")
    if first != schema.json_text(schema.STAMP):
        stamp = _json_object(first)
        if "format" in stamp:
            schema.check_stamp(stamp, path)
        yield "line 1 does not state format and version"
        texts = [first, *texts] if "format" not in stamp else texts
    if texts[-1:] == [""]:  # after the newline of the last line
        texts.pop()
    for number, text in enumerate(texts, 2):
        yield _checked_line(text, path.name) or f"line {number} is damaged"


def _checked_line(text: str, file: str) -> dict[str, Any] | None:
    """Return an intact line without its digest, or None; the first release wrote no digests."""
    line = _json_object(text)
    try:
        if schema.json_text(line) != text:
            return None
        digest = line.pop("digest", None)
        if digest not in (None, schema.digest_of(line)):
            return None
    except InputError:  # the line contains an infinite number
        return None
    kinds = {**_LINES[file], **(_WITH_DIGEST[file] if digest else {})}
    fits = line.keys() == kinds.keys() and all(isinstance(line[n], k) for n, k in kinds.items())
    return line if fits else None


def _json_object(text: str) -> dict[str, Any]:
    """Return a JSON object as a dict; an empty dict if the text is not a JSON object."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


@dataclass(eq=False)
class SampleFiles:
    """The files of one sample; each is compared with its checksum when it is first read.

    Attributes:
        folder: The sample's folder.
        sums: ``bytes`` and ``sha256`` by file, from ``sample.json``.
        verify: Whether checksums are compared; sizes always are.
        verified: Path, size and modification time of files already compared; shared by the samples
            of a store.
    """

    folder: Path
    sums: Mapping[str, Mapping[str, Any]]
    verify: bool = True
    verified: set[tuple[Path, int, int]] = field(default_factory=set)

    def __reduce__(self) -> tuple[type[SampleFiles], tuple[Path, Mapping[str, Any], bool]]:
        return SampleFiles, (self.folder, self.sums, self.verify)  # the set is that of a store

    def read_table(self, file: str) -> pd.DataFrame:
        """Return the table of a Parquet file.

        Raises:
            StoreError: The file is missing, damaged or of another version.
        """
        path = self.folder / file
        table, stamp = self._read(file, lambda: encoding.table_from(path.read_bytes()))
        schema.check_stamp(stamp, path)
        return table

    def read_tokens(self) -> pd.DataFrame:
        """Return the token table.

        Raises:
            StoreError: The file is missing, damaged or of another version.
        """
        table = self.read_table(schema.TOKENS)
        missing = [name for name in TOKEN_COLUMNS if name not in table]
        if missing:
            raise _damaged(
                self.folder / schema.TOKENS, f"it lacks the columns {', '.join(missing)}"
            )
        return table

    def read_grids(
        self, file: str, kind: type[encoding.Grid], numbers: Sequence[Mapping[str, Any]]
    ) -> tuple[encoding.Grid, ...]:
        """Return the grids of images or videos, from the arrays in the file and from ``numbers``.

        Without numbers, there are no grids and no file.

        Raises:
            StoreError: The file is missing, damaged or of another version.
        """
        if not numbers:
            return ()
        path = self.folder / file
        grids, stamp = self._read(
            file, lambda: encoding.grids_from(path.read_bytes(), kind, numbers)
        )
        schema.check_stamp(stamp, path)
        return grids

    def read_tensors(self, file: str, names: Sequence[str]) -> dict[str, Tensor]:
        """Return some tensors of a safetensors file, by name.

        Raises:
            StoreError: The file is missing, damaged or of another version.
        """
        path = self.folder / file

        def read() -> dict[str, Tensor]:
            with safe_open(path, framework="pt") as tensors:
                schema.check_stamp(tensors.metadata(), path)
                return {name: tensors.get_tensor(name) for name in names}

        return self._read(file, read)

    def parsed(self, file: str, parse: Callable[[], _T]) -> _T:
        """Call ``parse``, which converts the content of ``file``, and return its result.

        Raises:
            StoreError: The content does not fit the rest of the sample.
        """
        return _whole(self.folder / file, parse)

    def check(self, file: str) -> None:
        """Compare a file with its size and checksum.

        Raises:
            StoreError: The file is missing or damaged.
        """
        self._read(file, lambda: None)

    def _read(self, file: str, read: Callable[[], _T]) -> _T:
        path, about = self.folder / file, self.sums.get(file)

        def checked() -> _T:
            if about is None:
                raise ValueError(f"{schema.SAMPLE} does not list it")
            found = _regular(path)
            if found.st_size != about["bytes"]:
                raise ValueError(f"it has {found.st_size} bytes instead of {about['bytes']}")
            as_it_is = (path, found.st_size, found.st_mtime_ns)
            if self.verify and as_it_is not in self.verified:
                if sha256_of(path) != about["sha256"]:
                    raise ValueError(_OTHER_CHECKSUM)
                self.verified.add(as_it_is)
            return read()

        return _whole(path, checked)


def file_problem(path: Path, n_bytes: int, digest: str) -> str:
    """Return the problem of a sample's file; an empty string if it is intact."""
    try:
        found = _regular(path)
        if found.st_size != n_bytes:
            return f"it has {found.st_size} bytes instead of {n_bytes}"
        return "" if sha256_of(path) == digest else _OTHER_CHECKSUM
    except FileNotFoundError:
        return "it is missing"
    except (OSError, ValueError) as error:
        return f"it cannot be read: {error}"


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file as a hexadecimal string."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _regular(path: Path) -> Any:
    """Return size and times of a regular file; others are refused, as a pipe would block.

    Raises:
        ValueError: The path is not a regular file.
    """
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise ValueError("it is not a regular file")
    return found


def _text(path: Path, limit: int) -> str:
    """Return the content of a text file; raise ValueError if it is larger than ``limit`` bytes."""
    size = _regular(path).st_size
    if size > limit:
        raise ValueError(f"it has {size} bytes, more than the limit of {limit}")
    return path.read_text("utf-8", errors="replace")


def _read_json(path: Path, versions: Sequence[int] | None = None) -> dict[str, Any]:
    record: dict[str, Any] = _whole(path, lambda: json.loads(_text(path, schema.MAX_JSON_BYTES)))
    schema.check_stamp(record, path, versions)
    return record


def _whole(path: Path, read: Callable[[], _T]) -> _T:
    """Call ``read`` and return its result; convert exceptions to a StoreError about the file."""
    try:
        return read()
    except StoreError:
        raise
    except FileNotFoundError:
        raise _damaged(path, "it is missing") from None
    except (OSError, *_DAMAGED) as error:
        raise _damaged(path, str(error) or type(error).__name__) from error


def _damaged(path: Path, problem: str) -> StoreError:
    of_sample = path.parent.parent.name == schema.SAMPLES
    whose = f"sample {path.parent.name!r}" if of_sample else "the store"
    return StoreError(
        f"{path.name} of {whose} in {path.parent} is damaged: {problem}. Run `xmodal check` on the "
        "store to list all damaged files; delete a damaged sample's folder and capture the sample "
        "again."
    )
