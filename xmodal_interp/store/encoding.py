"""Convert a sample to the bytes of its files, and these bytes to tables and grids."""

from __future__ import annotations

import io
import math
import zipfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import pyarrow as pa
from PIL import Image, PngImagePlugin
from pyarrow import parquet
from safetensors.torch import save
from torch import Tensor

from xmodal_interp.attention import AttentionCall
from xmodal_interp.models import ImageGrid, Thumbnail, Video, VideoGrid, open_image
from xmodal_interp.sample import Sample
from xmodal_interp.store import schema
from xmodal_interp.vocabulary import VIDEO_DETAILS

_TEXT_STAMP = {name: str(value) for name, value in schema.STAMP.items()}
_FIELDS = {ImageGrid: schema.IMAGE_GRID, VideoGrid: schema.VIDEO_GRID}

Grid = TypeVar("Grid", ImageGrid, VideoGrid)


def sample_record(sample: Sample, shared: schema.SharedTensors, *, images: bool) -> dict[str, Any]:
    """Return ``sample.json`` without its checksums; add masks and biases to ``shared``."""
    sources = sample.provenance.get("images") or [None] * len(sample.images)
    digests = sample.provenance.get("image_digests") or [None] * len(sample.images)
    nothing: list[list[None]] = [[None] * len(each) for each in sample.videos]
    frames = sample.provenance.get("videos") or nothing
    of_frames = sample.provenance.get("video_digests") or nothing
    calls = [schema.call_record(call, shared) for call in sample.calls.values()]
    return {
        **schema.STAMP,
        "version": schema.record_version(calls),
        "name": sample.name,
        "question": sample.question,
        "answer": sample.answer,
        "text": sample.text,
        "n_prompt": sample.n_prompt,
        "labels": sample.labels,
        "provenance": sample.provenance,
        "grids": [_grid_numbers(grid) for grid in sample.grids],
        "images": _pictures("image", sample.images, sources, digests, stored=images),
        "video_grids": [_grid_numbers(grid) for grid in sample.video_grids],
        "videos": [
            {
                "fps": video.fps,
                **{name: value for name in VIDEO_DETAILS if (value := getattr(video, name))},
                "frames": _pictures(f"video-{i}", _frames(video), *of_video, stored=images),
            }
            for i, (video, *of_video) in enumerate(
                zip(sample.videos, frames, of_frames, strict=True)
            )
        ],
        "calls": calls,
        "shared": shared.records,
    }


def _pictures(
    kind: str,
    pictures: Sequence[Image.Image],
    sources: Sequence[str | None],
    digests: Sequence[str | None],
    *,
    stored: bool,
) -> list[dict[str, Any]]:
    """Return file or source of each picture, its size, and the digest of a source file."""
    return [
        {
            "file": f"{kind}-{i}.png" if stored else None,
            "source": source,
            **({} if stored or digest is None else {"sha256": digest}),
            "width": picture.width,
            "height": picture.height,
        }
        for i, (picture, source, digest) in enumerate(zip(pictures, sources, digests, strict=True))
    ]


def _frames(video: Video) -> tuple[Image.Image, ...]:
    return tuple(open_image(frame) for frame in video.frames)


def sample_files(
    sample: Sample, shared: schema.SharedTensors, *, images: bool
) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of every file except ``sample.json``.

    Only one file is in memory at a time, because the tensors of a layer are large.
    """
    yield schema.TOKENS, table_bytes(sample.tokens)
    if sample.cross_keys is not None:
        yield schema.CROSS_KEYS, table_bytes(sample.cross_keys)
    if sample.grids:
        yield schema.GRIDS, grid_bytes(sample.grids)
    if sample.video_grids:
        yield schema.VIDEO_GRIDS, grid_bytes(sample.video_grids)
    if images:
        shown = {"image": sample.images}
        shown |= {f"video-{i}": _frames(video) for i, video in enumerate(sample.videos)}
        for kind, pictures in shown.items():
            yield from ((f"{kind}-{i}.png", image_bytes(each)) for i, each in enumerate(pictures))
    layers: dict[str, list[Any]] = defaultdict(list)
    for key in sample.calls:
        layers[schema.layer_file(*key[:3])].append(key)
    for file, keys in layers.items():
        calls: list[AttentionCall] = [sample.calls[key] for key in keys]
        yield file, tensor_bytes(schema.call_tensors(calls))
    if shared.tensors:
        yield schema.SHARED, tensor_bytes(shared.tensors)


def tensor_bytes(tensors: dict[str, Tensor]) -> bytes:
    """Return the bytes of a safetensors file."""
    return save(tensors, metadata=_TEXT_STAMP)


def table_bytes(table: pd.DataFrame) -> bytes:
    """Return the bytes of a Parquet file that preserves column types and index."""
    arrow = pa.Table.from_pandas(table)
    sink = io.BytesIO()
    stamped = arrow.replace_schema_metadata({**(arrow.schema.metadata or {}), **_TEXT_STAMP})
    parquet.write_table(stamped, sink, compression="zstd")
    return sink.getvalue()


def table_from(content: bytes) -> tuple[pd.DataFrame, dict[str, str]]:
    """Return the table of a Parquet file, and the format and version in its metadata.

    Raises:
        ValueError: The table exceeds ``MAX_ROWS`` or ``MAX_TABLE_BYTES``. For invalid files, the
            exceptions of pyarrow.
    """
    file = parquet.ParquetFile(io.BytesIO(content))
    about = file.metadata
    n_bytes = sum(about.row_group(i).total_byte_size for i in range(about.num_row_groups))
    if about.num_rows > schema.MAX_ROWS or n_bytes > schema.MAX_TABLE_BYTES:
        raise ValueError(
            f"it has {about.num_rows} rows and {n_bytes} bytes, more than the limits of "
            f"{schema.MAX_ROWS} and {schema.MAX_TABLE_BYTES}"
        )
    arrow = file.read()
    metadata = arrow.schema.metadata or {}
    stamp = {name: metadata.get(name.encode(), b"").decode() for name in _TEXT_STAMP}
    return arrow.to_pandas(), stamp


def _grid_numbers(grid: ImageGrid | VideoGrid) -> dict[str, Any]:
    names = _FIELDS[type(grid)].numbers
    numbers: dict[str, Any] = {name: int(getattr(grid, name)) for name in names}
    if grid.thumbnail is not None:
        numbers["thumbnail"] = {
            name: int(getattr(grid.thumbnail, name)) for name in schema.THUMBNAIL.numbers
        }
    if isinstance(grid, ImageGrid) and grid.reason is not None:
        numbers["reason"] = grid.reason
    return numbers


def grid_bytes(grids: Sequence[ImageGrid | VideoGrid]) -> bytes:
    """Return the bytes of an npz file with the arrays ``INDEX.NAME`` of each grid.

    ``NAME`` is one of the arrays of ``schema.IMAGE_GRID`` or ``VIDEO_GRID``, or, for grids with a
    thumbnail, ``thumbnail.places`` or ``thumbnail.patch_places``.
    """
    arrays: dict[str, np.ndarray] = {}
    for i, grid in enumerate(grids):
        stored = _FIELDS[type(grid)]
        present = [name for name in stored.optional_arrays if getattr(grid, name) is not None]
        arrays |= {f"{i}.{name}": getattr(grid, name) for name in (*stored.arrays, *present)}
        if grid.thumbnail is not None:
            for name in schema.THUMBNAIL.arrays:
                arrays[f"{i}.thumbnail.{name}"] = getattr(grid.thumbnail, name)
    sink = io.BytesIO()
    stamp = {name: np.array([value]) for name, value in schema.STAMP.items()}
    np.savez_compressed(sink, allow_pickle=False, **stamp, **arrays)
    return sink.getvalue()


def grids_from(
    content: bytes, kind: type[Grid], numbers: Sequence[Mapping[str, Any]]
) -> tuple[tuple[Grid, ...], dict[str, Any]]:
    """Return the grids of an npz file, and the format and version stored in it.

    Args:
        content: The bytes of the file.
        kind: ``ImageGrid`` or ``VideoGrid``.
        numbers: The members of ``grids`` or ``video_grids`` in ``sample.json``.

    Raises:
        ValueError: The arrays exceed ``MAX_GRID_BYTES``. For invalid files, the exceptions of NumPy
            and zipfile.
    """
    with _loaded(content) as arrays:
        grids = tuple(
            kind(**_fields(_FIELDS[kind], each, arrays, f"{i}.")) for i, each in enumerate(numbers)
        )
        stamp = {name: arrays[name][0].item() for name in schema.STAMP if name in arrays}
        return grids, stamp


def _loaded(content: bytes) -> np.lib.npyio.NpzFile:
    """Return the arrays of an npz file, after comparing their sizes with headers and limit."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        n_bytes = sum(member.file_size for member in archive.infolist())
        if n_bytes > schema.MAX_GRID_BYTES:
            raise ValueError(
                f"its arrays have {n_bytes} bytes, more than the limit of {schema.MAX_GRID_BYTES}"
            )
        for member in archive.infolist():
            with archive.open(member) as file:
                version = np.lib.format.read_magic(file)
                if version != (1, 0):
                    raise ValueError(
                        f"its arrays have NumPy's format version {version} instead of (1, 0)"
                    )
                shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            if math.prod(shape) * dtype.itemsize > member.file_size:
                raise ValueError(f"{member.filename} has too few bytes for its shape {shape}")
    loaded: np.lib.npyio.NpzFile = np.load(io.BytesIO(content), allow_pickle=False)
    return loaded


def _fields(
    stored: schema.GridFields,
    numbers: Mapping[str, Any],
    arrays: Mapping[str, np.ndarray],
    prefix: str,
) -> dict[str, Any]:
    """Return the constructor arguments of a grid, from the arrays whose names have the prefix."""
    own: dict[str, Any] = {name: numbers[name] for name in stored.numbers}
    own |= {name: arrays[prefix + name] for name in stored.arrays}
    own |= {name: arrays.get(prefix + name) for name in stored.optional_arrays}
    if "reason" in numbers:
        own["reason"] = numbers["reason"]
    if "thumbnail" in numbers:
        small = {name: arrays[f"{prefix}thumbnail.{name}"] for name in schema.THUMBNAIL.arrays}
        own["thumbnail"] = Thumbnail(**{**numbers["thumbnail"], **small})
    return own


def image_bytes(image: Image.Image) -> bytes:
    """Return the bytes of a PNG file."""
    sink = io.BytesIO()
    text = PngImagePlugin.PngInfo()
    for name, value in _TEXT_STAMP.items():
        text.add_text(name, value)
    image.save(sink, format="PNG", pnginfo=text)
    return sink.getvalue()
