"""Writing a store: each sample whole or not at all.

1. Take the store's lock, so that no second writer removes what this one is writing.
2. Make the manifest, or compare it with the settings at hand.
3. Write a sample's files to a folder of their own, flush them to the disk, rename the folder.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any

from xmodal_interp.errors import StoreError
from xmodal_interp.sample import Sample
from xmodal_interp.store import files, packing, schema


class StoreWriter:
    """A store that is open for writing; a context manager, for it holds the store's lock.

    Leftovers of an interrupted writer are removed. Full disks and other errors of the file system
    leave the store as it was before the sample that did not fit.

    Attributes:
        path: The store's folder.
        names: Names of the samples that are in it, in the order they were written.
        n_bytes: What this writer has written, bytes.

    Raises:
        StoreError: A folder with other things in it; a store of another version or made with other
            settings; a second writer; a disk that cannot be written to.
    """

    def __init__(
        self, path: str | PathLike[str], settings: Mapping[str, Any], *, images: bool = True
    ) -> None:
        """Open a store, or make one.

        Args:
            path: A store, or a folder that is new or empty.
            settings: What all samples have in common; JSON-ready.
            images: Store the images too, as PNG.
        """
        self.path = Path(path)
        self.names: list[str] = []
        self.n_bytes = 0
        self._folded: dict[str, str] = {}
        self._images = images
        self._lock: int | None = None
        try:
            self._open(json.loads(schema.json_text(settings)))
        except StoreError:
            self.close()
            raise
        except OSError as error:
            self.close()
            raise StoreError(
                f"A store is written to a folder that can be written to. {self.path} cannot: "
                f"{error}."
            ) from error

    def _open(self, settings: Mapping[str, Any]) -> None:
        (self.path / schema.SAMPLES).mkdir(parents=True, exist_ok=True)
        self._lock = _locked(self.path / schema.LOCK, self.path)
        if (self.path / schema.MANIFEST).exists():
            _check_same(self.path, files.read_manifest(self.path)["settings"], settings)
        else:
            self._create(settings)
        for leftover in (self.path / schema.SAMPLES).glob(f"{schema.UNFINISHED}*"):
            shutil.rmtree(leftover)
        self.names = files.sample_names(self.path)
        self._folded = {name.casefold(): name for name in self.names}

    def __contains__(self, name: str) -> bool:
        """Whether a sample of this name is in the store."""
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
        """Give the lock back; what is written stays."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def record(self, name: str) -> dict[str, Any]:
        """What ``sample.json`` says of a sample that is in the store.

        Raises:
            StoreError: It is missing or damaged.
        """
        return files.read_record(self.path / schema.SAMPLES / name)

    def write(self, sample: Sample) -> None:
        """Add a sample.

        Raises:
            InputError: A name that cannot be a folder's, or labels that are not JSON.
            StoreError: A name that is taken, or a disk that is full or failing.
        """
        schema.check_name(sample.name)
        taken = self._folded.get(sample.name.casefold())
        if taken is not None:
            raise StoreError(
                f"A sample is written once, and names differ in more than case. {self.path} has "
                f"{taken!r}; got {sample.name!r}. Choose another name, or another folder."
            )
        unfinished = self.path / schema.SAMPLES / f"{schema.UNFINISHED}{sample.name}"
        shared = schema.SharedTensors()
        record = packing.sample_record(sample, shared, images=self._images)
        record = json.loads(schema.json_text(record))  # refused before anything is written
        try:
            unfinished.mkdir()
            n_bytes = self._fill(unfinished, sample, shared, record)
            unfinished.rename(unfinished.with_name(sample.name))
            self.names.append(sample.name)
            self._folded[sample.name.casefold()] = sample.name
            self.n_bytes += n_bytes
            _sync_folder(unfinished.parent)
            self._append(schema.NAMES, {"name": sample.name})
        except OSError as error:
            raise StoreError(self._failure(sample.name, error)) from error
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)  # gone already, if all went well

    def note_failure(self, failure: Mapping[str, Any]) -> None:
        """Add a line to the list of what could not be captured.

        A ``name`` that is written later counts no more.

        Raises:
            StoreError: A disk that is full or failing.
        """
        try:
            self._append(schema.FAILURES, failure)
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
        for file, content in packing.sample_files(sample, shared, images=self._images):
            write_file(folder / file, content)
            digest = hashlib.sha256(content).hexdigest()
            sums[file] = {"bytes": len(content), "sha256": digest}
        record["digest"] = schema.digest_of(record)
        content = schema.json_text(record).encode()
        write_file(folder / schema.SAMPLE, content)
        _sync_folder(folder)
        return len(content) + sum(int(each["bytes"]) for each in sums.values())

    def _append(self, file: str, line: Mapping[str, Any]) -> None:
        """Add a line of JSON; one that was cut off by a crash is ended first."""
        path = self.path / file
        before = path.read_bytes()[-1:] if path.exists() else b""
        start = "" if before == b"\n" else "\n" if before else schema.json_text(schema.STAMP) + "\n"
        write_file(path, f"{start}{schema.json_text(line)}\n".encode(), append=True)

    def _create(self, settings: Mapping[str, Any]) -> None:
        known = {schema.SAMPLES, schema.LOCK}
        others = [p.name for p in self.path.iterdir() if p.name not in known and p.name[0] != "."]
        others += [p.name for p in (self.path / schema.SAMPLES).iterdir() if p.name[0] != "."]
        if others:
            raise StoreError(
                f"A store is written to a new or empty folder, or added to. {self.path} has no "
                f"{schema.MANIFEST}, but {', '.join(sorted(others)[:5])}."
            )
        content = {
            **schema.STAMP,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "maker": _maker(),
            "settings": settings,
            "digest": schema.digest_of(settings),
        }
        unfinished = self.path / f"{schema.UNFINISHED}{schema.MANIFEST}"
        write_file(unfinished, schema.json_text(content).encode())
        unfinished.replace(self.path / schema.MANIFEST)
        _sync_folder(self.path)

    def _failure(self, name: str, error: OSError) -> str:
        return (
            f"A sample is written whole or not at all. Writing {name!r} to {self.path} failed: "
            f"{error.strerror or error}. Samples that are safe in the store: {len(self.names)}. "
            "Make room, or choose another disk, and run again."
        )


def write_file(path: Path, content: bytes, *, append: bool = False) -> None:
    """Write a file and flush it to the disk."""
    with path.open("ab" if append else "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    """A rename is on the disk only when its folder is; Windows does so by itself."""
    if sys.platform != "win32":
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _locked(path: Path, store: Path) -> int:
    """A lock that ends with the process, however it ends; file systems without locks go without."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT)
    if sys.platform != "win32":
        import fcntl

        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise StoreError(
                f"A store has one writer at a time. Another one is at work on {store}; wait for "
                "it, or write to another folder."
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP):
                os.close(handle)
                raise
    return handle


def _check_same(path: Path, stored: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    before, now = _flat(stored), _flat(settings)
    changed = [
        f"{name} is {_shown(before, name)} in the store and {_shown(now, name)} now"
        for name in sorted({*before, *now})
        if name not in before or name not in now or before[name] != now[name]
    ]
    if changed:
        raise StoreError(
            f"All samples of a store are made by one model with the same settings. In {path}, "
            f"{'; '.join(changed)}. Use the same settings, or another folder."
        )


def _shown(settings: Mapping[str, Any], name: str) -> str:
    return repr(settings[name]) if name in settings else "not set"


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted names, such as ``kept.layers``."""
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
