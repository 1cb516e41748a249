"""Reading one file of a store, whole and of this version, or a refusal that names it."""

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
from xmodal_interp.models import ImageGrid, VideoGrid
from xmodal_interp.store import packing, schema
from xmodal_interp.vocabulary import TOKEN_COLUMNS

_T = TypeVar("_T")
_DAMAGED = (
    *(ValueError, KeyError, IndexError, TypeError, AttributeError, EOFError, OverflowError),
    *(RecursionError, MemoryError, zipfile.BadZipFile, zlib.error),
    *(SafetensorError, pa.ArrowException),
)
"""What the readers of JSON, npz, Parquet and safetensors raise on content they cannot make out."""

_OTHER_CHECKSUM = "its checksum is not the one it was written with"
_LINES: dict[str, dict[str, type | tuple[type, ...]]] = {
    schema.NAMES: {"name": str},
    schema.FAILURES: {"item": int, "name": (str, type(None)), "error": str, "message": str},
}
_WITH_DIGEST: dict[str, dict[str, type]] = {schema.NAMES: {"number": int}, schema.FAILURES: {}}


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

    def checked() -> dict[str, Any]:
        if manifest.get("digest") != schema.digest_of(manifest.get("settings")):
            raise ValueError("its digest is not that of its settings")
        checksum = manifest.pop("checksum", None)
        if checksum not in (None, schema.digest_of(manifest)) or not _is_manifest(manifest):
            raise ValueError("its checksum is not that of its content")
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
    """The store that a path lies in, links followed; None if it is in none."""
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
    """The ``sample.json`` of a sample's folder, checked against its own digest.

    Raises:
        StoreError: It is missing, damaged or of another version.
    """
    path = folder / schema.SAMPLE
    record = _read_json(path)

    def checked() -> dict[str, Any]:
        if record.pop("digest", None) != schema.digest_of(record):
            raise ValueError("its digest is not that of its content")
        schema.check_record(record)
        return record

    return _whole(path, checked)


def sample_names(path: Path) -> list[str]:
    """Names of the samples that are there, in the order they were written."""
    folder = path / schema.SAMPLES
    inside = folder.iterdir() if folder.is_dir() else ()
    there = {each.name for each in inside if each.name[0] != "." and each.is_dir()}
    numbers = sample_numbers(path)
    for name in there - numbers.keys():
        number = _number_of(folder / name)
        if number is not None:
            numbers[name] = number
    return sorted(there, key=lambda name: (name not in numbers, numbers.get(name, 0), name))


def sample_numbers(path: Path) -> dict[str, int]:
    """The place in the order of each sample that ``names.jsonl`` lists."""
    lines = read_lines(path / schema.NAMES)
    numbers: dict[str, int] = {}
    for i, line in enumerate(lines):
        numbers.setdefault(line["name"], line.get("number", i))
    return numbers


def _number_of(folder: Path) -> int | None:
    """The place in the order that a sample itself has kept, if it can be read."""
    try:
        number = read_record(folder).get("number")
    except StoreError:  # what is wrong with it is said when the sample is read
        return None
    return number if isinstance(number, int) else None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a ``.jsonl`` file; damaged ones are left out.

    Raises:
        StoreError: The file is of another format or version, or cannot be read.
    """
    return [line for line in _lines(path) if isinstance(line, dict)]


def line_problems(path: Path) -> list[str]:
    """What is wrong with the lines of a ``.jsonl`` file; empty if nothing is.

    Raises:
        StoreError: The file is of another format or version, or cannot be read.
    """
    return [line for line in _lines(path) if isinstance(line, str)]


def line_text(line: Mapping[str, Any]) -> str:
    """A line of a ``.jsonl`` file, with its digest."""
    return schema.json_text({**line, "digest": schema.digest_of(line)})


def _lines(path: Path) -> Iterator[dict[str, Any] | str]:
    """Each line without its digest, or what is wrong with it."""
    if not path.is_symlink() and not path.exists():
        return
    first, *texts = _whole(path, lambda: _text(path, schema.MAX_LINES_BYTES)).split("\n")
    if first != schema.json_text(schema.STAMP):
        stamp = _json_object(first)
        if "format" in stamp:
            schema.check_stamp(stamp, path)
        yield "line 1 is not the format and version"
        texts = [first, *texts] if "format" not in stamp else texts
    if texts[-1:] == [""]:  # behind the end of the last line
        texts.pop()
    for number, text in enumerate(texts, 2):
        yield _checked_line(text, path.name) or f"line {number} is damaged"


def _checked_line(text: str, file: str) -> dict[str, Any] | None:
    """A line as it was written, with a digest or, in the first release, without; else None."""
    line = _json_object(text)
    try:
        if schema.json_text(line) != text:
            return None
        digest = line.pop("digest", None)
        if digest not in (None, schema.digest_of(line)):
            return None
    except InputError:  # an infinite number
        return None
    kinds = {**_LINES[file], **(_WITH_DIGEST[file] if digest else {})}
    fits = line.keys() == kinds.keys() and all(isinstance(line[n], k) for n, k in kinds.items())
    return line if fits else None


def _json_object(text: str) -> dict[str, Any]:
    """An object of JSON; empty if the text is none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


@dataclass(eq=False)
class SampleFiles:
    """The files of one sample: each is compared with its checksum when it is first read.

    Attributes:
        folder: The sample's folder.
        sums: ``bytes`` and ``sha256`` by file, as ``sample.json`` has them.
        verify: Whether checksums are compared; sizes always are.
        verified: Files that were compared, as they were then; shared by the samples of a store.
    """

    folder: Path
    sums: Mapping[str, Mapping[str, Any]]
    verify: bool = True
    verified: set[tuple[Path, int, int]] = field(default_factory=set)

    def read_table(self, file: str) -> pd.DataFrame:
        """A Parquet file.

        Raises:
            StoreError: It is missing, damaged or of another version.
        """
        path = self.folder / file
        table, stamp = self._read(file, lambda: packing.table_from(path.read_bytes()))
        schema.check_stamp(stamp, path)
        return table

    def read_tokens(self) -> pd.DataFrame:
        """The table of positions.

        Raises:
            StoreError: It is missing, damaged or of another version.
        """
        table = self.read_table(schema.TOKENS)
        missing = [name for name in TOKEN_COLUMNS if name not in table]
        if missing:
            raise _damaged(
                self.folder / schema.TOKENS, f"it lacks the columns {', '.join(missing)}"
            )
        return table

    def read_grids(self, numbers: Sequence[Mapping[str, Any]]) -> tuple[ImageGrid, ...]:
        """The grids of the images, from their arrays and their numbers.

        Raises:
            StoreError: The file is missing, damaged or of another version.
        """
        path = self.folder / schema.GRIDS
        grids, stamp = self._read(
            schema.GRIDS, lambda: packing.grids_from(path.read_bytes(), numbers)
        )
        schema.check_stamp(stamp, path)
        return grids

    def read_video_grids(self, numbers: Sequence[Mapping[str, Any]]) -> tuple[VideoGrid, ...]:
        """The grids of the videos, likewise.

        Raises:
            StoreError: The file is missing, damaged or of another version.
        """
        path = self.folder / schema.VIDEO_GRIDS
        grids, stamp = self._read(
            schema.VIDEO_GRIDS, lambda: packing.video_grids_from(path.read_bytes(), numbers)
        )
        schema.check_stamp(stamp, path)
        return grids

    def read_tensors(self, file: str, names: Sequence[str]) -> dict[str, Tensor]:
        """Some tensors of a safetensors file, by their names.

        Raises:
            StoreError: It is missing, not of its size, damaged or of another version.
        """
        path = self.folder / file

        def read() -> dict[str, Tensor]:
            with safe_open(path, framework="pt") as tensors:
                schema.check_stamp(tensors.metadata(), path)
                return {name: tensors.get_tensor(name) for name in names}

        return self._read(file, read)

    def parsed(self, file: str, parse: Callable[[], _T]) -> _T:
        """What ``parse`` makes of the content of a file that was read.

        Raises:
            StoreError: It does not fit the rest of the sample.
        """
        return _whole(self.folder / file, parse)

    def check(self, file: str) -> None:
        """Compare a file with its size and checksum.

        Raises:
            StoreError: It is missing or damaged.
        """
        self._read(file, lambda: None)

    def _read(self, file: str, read: Callable[[], _T]) -> _T:
        path, about = self.folder / file, self.sums.get(file)

        def checked() -> _T:
            if about is None:
                raise ValueError(f"{schema.SAMPLE} does not list it")
            found = _regular(path)
            if found.st_size != about["bytes"]:
                raise ValueError(f"it has {found.st_size} bytes, not {about['bytes']}")
            as_it_is = (path, found.st_size, found.st_mtime_ns)
            if self.verify and as_it_is not in self.verified:
                if sha256_of(path) != about["sha256"]:
                    raise ValueError(_OTHER_CHECKSUM)
                self.verified.add(as_it_is)
            return read()

        return _whole(path, checked)


def file_problem(path: Path, n_bytes: int, digest: str) -> str:
    """What is wrong with a file of a sample; empty if nothing is."""
    try:
        found = _regular(path)
        if found.st_size != n_bytes:
            return f"it has {found.st_size} bytes, not {n_bytes}"
        return "" if sha256_of(path) == digest else _OTHER_CHECKSUM
    except FileNotFoundError:
        return "it is missing"
    except (OSError, ValueError) as error:
        return f"it cannot be read: {error}"


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _regular(path: Path) -> Any:
    """The size and times of a regular file: opening a pipe would wait for its other end.

    Raises:
        ValueError: It is something else.
    """
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise ValueError("it is no regular file")
    return found


def _text(path: Path, limit: int) -> str:
    """A text file that is not above a size."""
    size = _regular(path).st_size
    if size > limit:
        raise ValueError(f"it has {size} bytes, and at most {limit} are read")
    return path.read_text("utf-8", errors="replace")


def _read_json(path: Path) -> dict[str, Any]:
    record: dict[str, Any] = _whole(path, lambda: json.loads(_text(path, schema.MAX_JSON_BYTES)))
    schema.check_stamp(record, path)
    return record


def _whole(path: Path, read: Callable[[], _T]) -> _T:
    """What ``read`` returns; what it raises is said with file and sample."""
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
        f"A store is read as it was written. {path.name} of {whose} in {path.parent} is damaged: "
        f"{problem}. Run `xmodal check` on the store to see what else is; delete a damaged "
        "sample's folder and capture it again."
    )
