"""Read a store lazily.

Opening a store reads the list of names. Reading a sample reads its texts. Its tables, its grids and
the file of each layer are read when they are accessed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsIndex, cast, overload
from weakref import WeakValueDictionary

import pandas as pd
from PIL import Image
from torch import Tensor

from xmodal_interp.arguments import user_path
from xmodal_interp.attention import AttentionCall, number, resolve, whole_slice
from xmodal_interp.errors import (
    InputError,
    NoSampleError,
    NotRecordedError,
    StoreError,
    counted,
    first_of,
)
from xmodal_interp.html_summary import html_summary
from xmodal_interp.models import ImageGrid, Video, VideoGrid, open_image
from xmodal_interp.sample import CallKey, Sample
from xmodal_interp.store import schema
from xmodal_interp.store.datasets_export import as_dataset
from xmodal_interp.store.files import (
    SampleFiles,
    read_lines,
    read_manifest,
    read_record,
    sample_names,
    sha256_of,
)
from xmodal_interp.vocabulary import VIDEO_DETAILS

if TYPE_CHECKING:
    from datasets import Dataset


def open_store(path: str | PathLike[str], *, verify: bool = True) -> Store:
    """Open a store for reading; samples are read when they are accessed.

    Args:
        path: The store's folder.
        verify: Compare each file with its checksum when it is first read (about 1 GB/s), and raise
            StoreError for a damaged one. If False, damage may go unnoticed and change results.

    Raises:
        StoreError: The store does not exist, or has another format or version.
    """
    return Store(path, verify=verify)


class Store(Sequence[Sample]):
    """Samples on disk, in the order they were written. Analyses accept it like a list of samples.

    Supports ``store[0]``, ``store[-1]``, ``store["name"]``, ``store[:10]``, ``store[[0, 2]]``,
    ``store[mask]``, ``len(store)`` and iteration. Samples that are written after the store was
    opened are not included.

    Attributes:
        path: The store's folder.
        manifest: Format, version and the settings shared by all samples.
        names: The names of the samples.
    """

    def __init__(self, path: str | PathLike[str], *, verify: bool = True) -> None:
        self.path = user_path(path)
        self._verify = verify
        self._verified: set[tuple[Path, int, int]] = set()
        self.manifest = read_manifest(self.path)
        self.names: tuple[str, ...] = tuple(sample_names(self.path))
        self._known = frozenset(self.names)

    def __repr__(self) -> str:
        """Return a line with path, number of samples and settings."""
        settings = self.manifest["settings"]
        made = ", ".join(str(settings[n]) for n in ("model", "dtype", "backend") if n in settings)
        kept = settings.get("kept", {})
        what = ", ".join(f"{name}: {value}" for name, value in kept.items() if value is not None)
        about = "; ".join(part for part in (made, what) if part)
        n_samples = counted(len(self), "sample")
        return f"Store({str(self.path)!r}: {n_samples}{f'; {about}' if about else ''})"

    def _repr_html_(self) -> str:
        """Return a summary for notebooks: path, samples and settings."""
        settings = self.manifest["settings"]
        kept = settings.get("kept", {})
        names = ", ".join(self.names[:5]) + (", ..." if len(self) > 5 else "")
        return html_summary(
            f"Store {self.path}",
            {
                "samples": f"{len(self)}: {names}" if self.names else "0",
                **{name: str(settings.get(name, "")) for name in ("model", "dtype", "backend")},
                "kept": ", ".join(f"{name}: {value}" for name, value in kept.items() if value),
            },
        )

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[Sample]:
        return (self._read(name) for name in self.names)

    def __contains__(self, item: object) -> bool:
        """Return whether the store has a sample of this name; ``item`` is a name or a sample."""
        return (item.name if isinstance(item, Sample) else item) in self._known

    @overload
    def __getitem__(self, index: SupportsIndex | str) -> Sample: ...
    @overload
    def __getitem__(self, index: slice | Collection[Any]) -> list[Sample]: ...
    def __getitem__(
        self, index: SupportsIndex | str | slice | Collection[Any]
    ) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self._read(name) for name in self.names[whole_slice(index, "sample")]]
        if isinstance(index, str):
            if index not in self._known:
                there = first_of([repr(name) for name in self.names]) or "no samples"
                raise NotRecordedError(f"{self.path} has no sample {index!r}. It has {there}.")
            return self._read(index)
        if isinstance(index, (list, tuple)) and any(isinstance(one, str) for one in index):
            return [self[one] for one in index]
        several = isinstance(index, Collection) and getattr(index, "ndim", 1) > 0
        if several:
            return [
                self._read(self.names[i])
                for i in resolve(cast("Any", index), len(self), "sample").tolist()
            ]
        place = number(index, "sample")
        if not -len(self) <= place < len(self):
            raise NoSampleError(f"{self.path} has no sample {place}: it has {len(self)} samples.")
        return self._read(self.names[place])

    @property
    def n_bytes(self) -> int:
        """Size on disk, bytes."""
        return sum(file.stat().st_size for file in self.path.rglob("*") if file.is_file())

    @property
    def failures(self) -> pd.DataFrame:
        """Items that failed and are still missing: columns ``item, name, error, message``."""
        lines = {
            (line["name"] if line["name"] is not None else line["item"]): line
            for line in read_lines(self.path / schema.FAILURES)
            if line["name"] not in self._known
        }
        return pd.DataFrame(list(lines.values()), columns=["item", "name", "error", "message"])

    def to_dataset(self) -> Dataset:
        """Return a ``datasets.Dataset`` with one row per sample, for the Hub or other tools.

        Columns: ``name``, ``images`` (a list, as PNG), ``prompt`` (the question, without the chat
        template), ``captured_answer`` (the generated or given tokens) and one column per label,
        None where a sample lacks it. :func:`capture_dataset` accepts the data set as items.
        Attention is not included. All images are in memory.

        Raises:
            InputError: The package ``datasets`` is missing; a label has the name of another column
                or values of several types; a sample has videos, or its images are not available.
        """
        return as_dataset(self)

    def readers(self) -> Iterator[Callable[[], Sample]]:
        """Yield a function per sample that reads it, in a process to which it is sent by pickle."""
        folder = self.path / schema.SAMPLES
        for name in self.names:
            yield partial(read_sample, folder / name, verify=self._verify, verified=set())

    def _read(self, name: str) -> Sample:
        folder = self.path / schema.SAMPLES / name
        return read_sample(folder, verify=self._verify, verified=self._verified)


class StoredCalls(Mapping[CallKey, AttentionCall]):
    """The calls of one stored sample, by key; a call is read when it is accessed.

    Calls and masks are cached only while other references to them exist. Iterating over the layers
    of a sample therefore keeps one layer in memory. The small results that analyses share
    (:attr:`AttentionCall.memo`) are kept for as long as this mapping.
    """

    def __init__(self, files: SampleFiles, record: Mapping[str, Any]) -> None:
        self._files, self._record = files, record
        self._records = {schema.call_key(each): each for each in record["calls"]}
        self._shared_records: Mapping[str, Any] = record["shared"]
        self._calls: WeakValueDictionary[CallKey, AttentionCall] = WeakValueDictionary()
        self._masks: WeakValueDictionary[str, Tensor] = WeakValueDictionary()
        self._memos: dict[CallKey, dict[str, Any]] = {}

    def __reduce__(self) -> tuple[type[StoredCalls], tuple[SampleFiles, Mapping[str, Any]]]:
        return StoredCalls, (self._files, self._record)  # weak references cannot be pickled

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[CallKey]:
        return iter(self._records)

    def __contains__(self, key: object) -> bool:
        """Return whether the sample has a call of this key, without reading the call."""
        return key in self._records

    def __getitem__(self, key: CallKey) -> AttentionCall:
        call = self._calls.get(key)
        if call is None:
            call = self._calls[key] = self._read(self._records[key])
            vars(call)["memo"] = self._memos.setdefault(key, {})
        return call

    def _read(self, record: Mapping[str, Any]) -> AttentionCall:
        file = schema.layer_file(record["tower"], record["kind"], record["layer"])
        names = {name: f"{record['call']}.{name}" for name in record["tensors"]}
        tensors = self._files.read_tensors(file, list(names.values()))
        own = {name: tensors[stored] for name, stored in names.items()}
        shared = {name: self._shared(of) for name, of in record["shared"].items()}
        return self._files.parsed(file, lambda: schema.stored_call(record, own, shared))

    def _shared(self, name: str) -> Tensor:
        tensor = self._masks.get(name)
        if tensor is None:
            stored = self._files.read_tensors(schema.SHARED, [name])[name]
            tensor = self._files.parsed(schema.SHARED, lambda: self._unpacked(name, stored))
            self._masks[name] = tensor
        return tensor

    def _unpacked(self, name: str, stored: Tensor) -> Tensor:
        about = self._shared_records[name]
        return schema.unpacked(stored, about["shape"]) if about["packed"] else stored


class StoredImage(Image.Image):
    """An RGB image whose pixels are read when they are accessed.

    Args:
        path: The image file.
        size: Width and height, px.
        check: Called before the file is read; raises StoreError if the file has changed.
    """

    _check: Callable[[], None] | None = None  # None once the pixels are read, and in a copy

    def __init__(self, path: Path, size: tuple[int, int], check: Callable[[], None]) -> None:
        super().__init__()
        self._mode, self._size, self._path, self._check = "RGB", size, path, check

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        """Copy and pickle an image that was not read yet without its pixels."""
        if self._check is None:
            return super().__reduce_ex__(protocol)
        return StoredImage, (self._path, self._size, self._check)

    def load(self) -> Any:
        """Read the pixels on the first call; Pillow calls this before it uses them."""
        if self._check is not None:
            self._check()
            try:
                picture = open_image(self._path)
            except (InputError, Image.DecompressionBombError) as error:
                raise StoreError(f"Cannot read an image of a stored sample. {error}") from error
            if picture.size != self._size:
                raise StoreError(
                    f"{self._path} has {' x '.join(map(str, picture.size))} px, but had "
                    f"{' x '.join(map(str, self._size))} px when it was captured. Restore the "
                    "original image, or capture the sample again."
                )
            self.im, self._check = picture.im, None
        return super().load()


def read_sample(folder: Path, *, verify: bool, verified: set[tuple[Path, int, int]]) -> Sample:
    """Return a stored sample; its tables, grids, tensors and pixels are read when accessed.

    Args:
        folder: The sample's folder.
        verify: Compare files with their checksums.
        verified: Files already compared, as in ``SampleFiles``; updated in place.

    Raises:
        StoreError: ``sample.json`` is missing, damaged or of another version. Reading an attribute
            raises it for the file of that attribute.
    """
    record = read_record(folder)
    files = SampleFiles(folder, record["files"], verify, verified)
    later: dict[str, Callable[[], Any]] = {
        "tokens": files.read_tokens,
        "grids": partial(files.read_grids, schema.GRIDS, ImageGrid, record["grids"]),
        "video_grids": partial(  # stores of releases without videos lack the record
            files.read_grids, schema.VIDEO_GRIDS, VideoGrid, record.get("video_grids", [])
        ),
    }
    if schema.CROSS_KEYS in record["files"]:
        later["cross_keys"] = partial(files.read_table, schema.CROSS_KEYS)
    return Sample.with_later(
        later,
        name=record["name"],
        text=record["text"],
        question=record["question"],
        answer=record["answer"],
        n_prompt=record["n_prompt"],
        images=_images(files, record["images"]),
        calls=StoredCalls(files, record),
        labels=record["labels"],
        provenance=record["provenance"],
        videos=_videos(files, record.get("videos", [])),
    )


def _images(files: SampleFiles, records: Sequence[Mapping[str, Any]]) -> tuple[StoredImage, ...]:
    """Return the images, from the store or their source; an empty tuple if one has neither."""
    if not all(record["file"] or record["source"] for record in records):
        return ()
    return tuple(_image(files, record) for record in records)


def _image(files: SampleFiles, record: Mapping[str, Any]) -> StoredImage:
    size = (record["width"], record["height"])
    if record["file"]:
        return StoredImage(
            files.folder / record["file"], size, partial(files.check, record["file"])
        )
    source, digest = Path(record["source"]), record.get("sha256")
    return StoredImage(
        source, size, partial(_check_source, source, digest if files.verify else None)
    )


def _check_source(path: Path, digest: str | None) -> None:
    """Raise StoreError if an image outside the store has changed since it was captured."""
    if path.exists() and not path.is_file():
        raise StoreError(
            f"{path}, an image of a stored sample, is not a regular file. Restore the original "
            "image, or capture the sample again."
        )
    if digest is not None and path.exists() and sha256_of(path) != digest:
        raise StoreError(
            f"{path}, an image of a stored sample, has changed since it was captured. Restore the "
            "original image, or capture the sample again."
        )


def _videos(files: SampleFiles, records: Sequence[Mapping[str, Any]]) -> tuple[Video, ...]:
    """Return the videos; an empty tuple if the frames of one are not available."""
    videos = [
        Video(frames, r["fps"], **{name: r[name] for name in VIDEO_DETAILS if name in r})
        for r in records
        if (frames := _images(files, r["frames"]))
    ]
    return tuple(videos) if len(videos) == len(records) else ()
