"""Write a store: each sample completely or not at all.

1. Refuse a folder that contains other files, before anything is created in it.
2. Take the store's lock, so that no second writer removes unfinished files of this one.
3. Create the manifest, or compare it with the given settings; a store without samples gets the
   given settings. Repair lists that a crash truncated.
4. Write a sample's files to a temporary folder, flush them to the disk, rename the folder and add
   its name to the list.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout

from xmodal_interp.arguments import user_path
from xmodal_interp.errors import StoreError
from xmodal_interp.sample import Sample
from xmodal_interp.store import encoding, files, schema
from xmodal_interp.store.reader import read_sample

_ORIGIN = ("model", "revision")
"""Settings for a model's origin; they are not compared if digests identify its content."""


class StoreWriter:
    """A store that is open for writing; a context manager that holds the store's lock.

    Leftovers of an interrupted writer are removed. If opening fails, nothing is created. If writing
    a sample fails, for example on a full disk, the store is left as before this sample.

    Attributes:
        path: The store's folder.
        names: Names of the samples in the store, in the order they were written.
        n_bytes: Number of bytes written by this writer.

    Raises:
        StoreError: The folder contains other files or is inside another store; the store has
            another version or other settings, contains symbolic links, or is open in another
            writer; or the disk cannot be written to.
    """

    def __init__(
        self, path: str | PathLike[str], settings: Mapping[str, Any], *, images: bool = True
    ) -> None:
        """Open a store, or create one.

        Args:
            path: A store, or a folder that is new or empty.
            settings: Settings shared by all samples; JSON can represent them.
            images: Whether to store the images, as PNG.
        """
        self.path = user_path(path)
        self.names: list[str] = []
        self.n_bytes = 0
        self._folded: dict[str, str] = {}
        self._numbers: dict[str, int] = {}
        self._listed: set[str] = set()
        self._is_list_whole = True
        self._images = images
        self._lock: FileLock | None = None
        try:
            self._open(json.loads(schema.json_text(settings)))
        except StoreError:
            self.close()
            raise
        except OSError as error:
            self.close()
            raise StoreError(f"Cannot write a store to {self.path}: {error}.") from error

    def _open(self, settings: Mapping[str, Any]) -> None:
        self._check_folder(settings)
        made = _made_folders(self.path / schema.SAMPLES)
        lock = self.path / schema.LOCK
        is_new = not lock.exists()
        try:
            self._lock = _locked(lock, self.path)
            self._check_folder(settings)  # again: with the lock, no other writer can change it
            if self._differs(settings):  # a store without samples: its failures are of its settings
                (self.path / schema.FAILURES).unlink(missing_ok=True)
                self._create(settings)
            elif not (self.path / schema.MANIFEST).exists():
                self._create(settings)
        except (StoreError, OSError):
            with suppress(OSError):  # a folder in which another process created a file stays
                if is_new and self._lock is not None:
                    lock.unlink()
                for folder in reversed(made):
                    folder.rmdir()
            raise
        for leftover in (self.path / schema.SAMPLES).glob(f"{schema.UNFINISHED}*"):
            shutil.rmtree(leftover)
        self.names = files.sample_names(self.path)
        self._folded = {name.casefold(): name for name in self.names}
        self._number(files.sample_numbers(self.path))
        if files.line_problems(self.path / schema.NAMES) or not self._listed >= {*self.names}:
            self._write_names()
        if files.line_problems(self.path / schema.FAILURES):
            lines = map(files.line_text, files.read_lines(self.path / schema.FAILURES))
            self._write_lines(schema.FAILURES, lines)

    def _check_folder(self, settings: Mapping[str, Any]) -> None:
        """Raise StoreError if the folder cannot hold a store with these settings."""
        around = files.store_around(self.path)
        if around is not None:
            raise StoreError(
                f"{self.path} is inside the store {around}. Choose a folder outside of it."
            )
        for name in (schema.SAMPLES, schema.MANIFEST, schema.NAMES, schema.FAILURES, schema.LOCK):
            if (self.path / name).is_symlink():
                raise StoreError(
                    f"{name} in {self.path} is a symbolic link, which a store must not contain. "
                    "Replace it by its target, or write to another folder."
                )
        if (self.path / schema.MANIFEST).exists():
            stored = files.read_manifest(self.path)["settings"]
            if files.sample_names(self.path):  # without samples, nothing was made with them
                _check_same(self.path, stored, settings)
            return
        known = {schema.SAMPLES, schema.LOCK}
        inside = (self.path, self.path / schema.SAMPLES)
        found = [p.name for folder in inside if folder.exists() for p in folder.iterdir()]
        others = [name for name in found if name not in known and name[0] != "."]
        if others:
            raise StoreError(
                f"{self.path} is neither empty nor a store: it has no {schema.MANIFEST}, but "
                f"{', '.join(sorted(others)[:5])}. Choose a new or empty folder."
            )

    def _differs(self, settings: Mapping[str, Any]) -> bool:
        """Return whether this is a store with other settings, and therefore without samples."""
        if not (self.path / schema.MANIFEST).exists():
            return False
        return bool(files.read_manifest(self.path)["settings"] != settings)

    def _number(self, listed: Mapping[str, int]) -> None:
        """Number every sample in the order of writing: its earlier number, or the next free one."""
        self._listed, self._numbers = {*listed}, dict(listed)
        for name in self.names:
            number = listed.get(name)
            if number is None:
                number = files.number_of(self.path / schema.SAMPLES / name)
            self._numbers[name] = self._next_number if number is None else number

    @property
    def _next_number(self) -> int:
        return max(self._numbers.values(), default=-1) + 1

    def __contains__(self, name: str) -> bool:
        """Return whether a sample of this name is in the store."""
        return self._folded.get(name.casefold()) == name

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release the lock."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def record(self, name: str) -> dict[str, Any]:
        """Return the ``sample.json`` of a sample in the store.

        Raises:
            StoreError: The file is missing or damaged.
        """
        return files.read_record(self.path / schema.SAMPLES / name)

    def read(self, name: str) -> Sample:
        """Return a sample in the store.

        Raises:
            StoreError: A file is missing or damaged.
        """
        return read_sample(self.path / schema.SAMPLES / name, verify=True, verified=set())

    def write(self, sample: Sample) -> None:
        """Add a sample.

        Raises:
            InputError: The name is not valid, or JSON cannot represent the labels.
            StoreError: The name is taken, or the disk is full or cannot be written to.
        """
        schema.check_name(sample.name)
        taken = self._folded.get(sample.name.casefold())
        if taken is not None:
            raise StoreError(
                f"{self.path} already has a sample {taken!r}, ignoring case; got {sample.name!r}. "
                "Choose another name, or another folder."
            )
        number = self._numbers.get(sample.name, self._next_number)  # a deleted sample's number
        unfinished = self.path / schema.SAMPLES / f"{schema.UNFINISHED}{sample.name}"
        shared = schema.SharedTensors()
        record = encoding.sample_record(sample, shared, images=self._images) | {"number": number}
        record = json.loads(schema.json_text(record))  # raises before anything is written
        try:
            unfinished.mkdir()
            n_bytes = self._fill(unfinished, sample, shared, record)
            unfinished.rename(unfinished.with_name(sample.name))
            self.names.append(sample.name)
            self._folded[sample.name.casefold()] = sample.name
            self.n_bytes += n_bytes
            self._numbers[sample.name] = number
            _sync_folder(unfinished.parent)
            self._list(sample.name)
        except OSError as error:
            raise StoreError(self._failure(sample.name, error)) from error
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)  # exists only after an error

    def note_failure(self, failure: Mapping[str, Any]) -> None:
        """Add a line to ``failures.jsonl``.

        ``Store.failures`` ignores the line once a sample of this name is written.

        Raises:
            StoreError: The disk is full or cannot be written to.
        """
        try:
            self._append(schema.FAILURES, files.line_text(failure))
        except OSError as error:
            raise StoreError(self._failure(str(failure.get("name")), error)) from error

    def _fill(
        self,
        folder: Path,
        sample: Sample,
        shared: schema.SharedTensors,
        record: dict[str, Any],
    ) -> int:
        sums: dict[str, dict[str, Any]] = {}
        record["files"] = sums
        for file, content in encoding.sample_files(sample, shared, images=self._images):
            write_file(folder / file, content)
            digest = hashlib.sha256(content).hexdigest()
            sums[file] = {"bytes": len(content), "sha256": digest}
        record["digest"] = schema.digest_of(record)
        content = schema.json_text(record).encode()
        write_file(folder / schema.SAMPLE, content)
        _sync_folder(folder)
        return len(content) + sum(int(each["bytes"]) for each in sums.values())

    def _list(self, name: str) -> None:
        """Add a name to ``names.jsonl``; rewrite the list if its last line was truncated."""
        if not self._is_list_whole:
            self._write_names()
        elif name not in self._listed:
            self._is_list_whole = False
            self._append(schema.NAMES, self._line_of(name))
            self._is_list_whole = True
        self._listed.add(name)

    def _line_of(self, name: str) -> str:
        return files.line_text({"name": name, "number": self._numbers[name]})

    def _write_names(self) -> None:
        """Rewrite ``names.jsonl`` with the existing samples and those that were deleted."""
        in_order = sorted(self._numbers, key=self._numbers.__getitem__)
        self._write_lines(schema.NAMES, map(self._line_of, in_order))
        self._listed, self._is_list_whole = {*in_order}, True

    def _write_lines(self, file: str, lines: Iterable[str]) -> None:
        text = "".join(f"{line}\n" for line in (schema.json_text(schema.STAMP), *lines))
        self._replace(file, text)

    def _replace(self, file: str, text: str) -> None:
        """Replace a file of the store atomically."""
        unfinished = self.path / f"{schema.UNFINISHED}{file}"
        try:
            write_file(unfinished, text.encode())
            unfinished.replace(self.path / file)
        finally:
            unfinished.unlink(missing_ok=True)
        _sync_folder(self.path)

    def _append(self, file: str, line: str) -> None:
        """Append a line, after a line break if the last line was truncated."""
        path = self.path / file
        before = path.read_bytes()[-1:] if path.exists() else b""
        start = "" if before == b"\n" else "\n" if before else schema.json_text(schema.STAMP) + "\n"
        write_file(path, f"{start}{line}\n".encode(), append=True)

    def _create(self, settings: Mapping[str, Any]) -> None:
        content = {
            **schema.STAMP,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "maker": _maker(),
            "settings": settings,
            "digest": schema.digest_of(settings),
        }
        content["checksum"] = schema.digest_of(content)
        self._replace(schema.MANIFEST, schema.json_text(content))

    def _failure(self, name: str, error: OSError) -> str:
        return (
            f"Writing sample {name!r} to {self.path} failed: {error.strerror or error}. Free disk "
            "space or choose another disk, and run again; samples already safe in the store: "
            f"{len(self.names)}."
        )


def write_file(path: Path, content: bytes, *, append: bool = False) -> None:
    """Write a file and flush it to the disk; raise OSError if the path is a symbolic link."""
    how = os.O_WRONLY | os.O_CREAT | (os.O_APPEND if append else os.O_TRUNC)
    how |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    with os.fdopen(os.open(path, how, 0o666), "ab" if append else "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _made_folders(path: Path) -> list[Path]:
    """Create a folder and its parents; return those that did not exist, the outermost first."""
    missing = [each for each in (path, *path.parents) if not each.exists()]
    path.mkdir(parents=True, exist_ok=True)
    return missing[::-1]


def _sync_folder(path: Path) -> None:
    """Flush a folder, so that renames in it are on the disk; not required on Windows."""
    if sys.platform != "win32":
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _locked(path: Path, store: Path) -> FileLock | None:
    """Return the lock, which the system releases when the process ends.

    File systems without locks are used without one.
    """
    lock = FileLock(path, blocking=False, thread_local=False)
    try:
        lock.acquire()
    except Timeout:
        raise StoreError(
            f"Another writer has {store} open. Wait until it has finished, or write to another "
            "folder."
        ) from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP):
            raise
        return None
    return lock


def _check_same(path: Path, stored: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    if stored.get("fingerprint") != settings.get("fingerprint"):
        raise StoreError(
            f"{path} can be read, but not extended: it was written by a release that recorded a "
            "model's state differently, so the model cannot be compared. Write to another folder."
        )
    before, now = _flat(stored), _flat(settings)
    if "weights_digest" in before and "weights_digest" in now:  # digests identify the model
        before, now = _without_origin(before), _without_origin(now)
    changed = [
        f"{name} is {_shown(before, name)} in the store and {_shown(now, name)} now"
        for name in sorted({*before, *now})
        if name not in before or name not in now or before[name] != now[name]
    ]
    if changed:
        raise StoreError(
            f"The settings differ from those of the store {path}: {'; '.join(changed)}. Use the "
            "same settings, or another folder."
        )


def _without_origin(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in _ORIGIN}


def _shown(settings: Mapping[str, Any], name: str) -> str:
    return repr(settings[name]) if name in settings else "not set"


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings by dotted names, such as ``kept.layers``."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        nested = isinstance(value, Mapping)
        flat.update(_flat(value, f"{prefix}{name}.") if nested else {f"{prefix}{name}": value})
    return flat


def _maker() -> str:
    try:
        return f"xmodal-interp {version('xmodal-interp')}"
    except PackageNotFoundError:  # run from a checkout
        return "xmodal-interp"
