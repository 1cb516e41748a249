"""The format of a store, version 2 (3 or 4 for some: rule 11), and functions that convert calls.

A store is a folder::

    manifest.json               settings shared by all samples
    names.jsonl                 sample names in the order they were written; absent without samples
    failures.jsonl              items that could not be captured; MAY be absent
    samples/NAME/               one sample
        sample.json             texts, labels, provenance, grids, calls, checksums
        tokens.parquet          one row per position
        cross_keys.parquet      one row per key of cross-attention; MAY be absent
        grids.npz               places and boxes of each image's tokens; absent without images;
                                ``tiles``, ``patch_boxes``, ``patch_names`` and ``thumbnail``
                                arrays only for grids that have them
        video_grids.npz         the same for each video, ``times`` (s) and ``frame_indices`` (MAY be
                                absent: rule 9); absent without videos
        TOWER-KIND-LAYER.safetensors    the tensors of one layer
        shared.safetensors      masks and position biases; absent if no call has any
        image-INDEX.png         the images, RGB; MAY be absent
        video-INDEX-FRAME.png   the frames of the videos, RGB; MAY be absent

1. Every file MUST carry the format's name and version: JSON as the members ``format`` and
   ``version`` (in ``.jsonl`` on the first line, alone), safetensors and Parquet in their metadata,
   npz as arrays of length 1, PNG as text chunks. A reader MUST refuse another name or version.
2. ``manifest.json`` MUST hold ``settings``, an object of everything that all samples have in common
   (model, revision, digests of config and weights, dtype, backend, processor, versions, recorded
   quantities), and ``digest``, the SHA-256 of the settings as canonical JSON. It MAY hold
   ``checksum``, the SHA-256 of all its other members. A writer MUST NOT add a sample made with
   other settings. If the settings contain digests of the model, ``model`` and ``revision`` MAY
   differ.
3. A sample MUST be written completely to a folder in ``samples`` whose name begins with
   ``.writing-``, flushed to the disk and then renamed to its final name. A reader MUST ignore names
   that begin with a dot. A writer MUST hold a lock on ``.lock``, where the file system has locks;
   with the lock, it SHOULD remove names that begin with ``.writing-``. Every other folder is a
   sample, whether ``names.jsonl`` lists it or not: the list only defines the order. Samples that
   are not listed are ordered by the ``number`` in their ``sample.json``; those without one come
   last, sorted by name.
4. ``NAME`` MUST obey :func:`check_name`, MUST be unique, ignoring case, and MUST NOT be written
   twice.
5. ``sample.json`` MUST list every other file of its folder in ``files`` with ``bytes`` and
   ``sha256``, and hold ``digest``, the SHA-256 of its other members as canonical JSON.
6. Each member of ``calls`` is one attention call: its scalars, the names of its ``tensors`` and, in
   ``shared``, the names of the shared tensors that are its ``mask`` and ``bias``. A layer's file
   MUST hold the tensors of that layer only, named ``CALL.NAME``, in the model's dtype and without
   rounding.
   A call MUST hold ``q`` and ``k``, or ``dense``, or statistics: ``groups``, ``counted`` and at
   least one of ``group_mass``, ``row_entropy`` and ``key_received``. It MAY hold ``v``, ``sinks``,
   ``rows``, ``update_share``, ``token_norm`` and ``segments``.
7. A causal mask is stored as a flag, not as a tensor. A mask or bias that several calls share MUST
   be stored once. Boolean masks are packed 8 to a byte, most significant bit first (``packed`` with
   their ``shape``); additive masks are stored unchanged.
8. JSON MUST be strict (no NaN). Pickle MUST NOT be used.
9. ``sample.json`` MAY lack ``video_grids`` and ``videos`` if the sample has no videos. A member of
   ``videos`` holds ``fps`` and ``frames``, and MAY hold what the user passed: ``indices`` and
   ``timestamps`` (s), one per frame, and ``original_size`` (width, height). Samples with videos MAY
   have the columns ``source_frame`` and ``time_s`` in ``tokens.parquet``; samples with an answer
   MAY have ``next_token`` and ``next_probability``. If a picture was resized before the processor
   read it, ``width``, ``height`` and all boxes of its grid, and those in ``tokens.parquet``, are in
   pixels of the original picture; the PNG is the resized one.
10. A line of ``names.jsonl`` MUST hold ``name``, one of ``failures.jsonl`` ``item``, ``name``,
    ``error`` and ``message``. Later writers of version 2 also write ``digest`` (the SHA-256 of the
    other members) in every line, and ``number`` (the index in the order of writing, from 0) in
    lines of ``names.jsonl`` and in ``sample.json``. Lines are canonical JSON. A reader MUST skip
    other lines; a writer SHOULD rewrite the file without them.
11. A ``sample.json`` with a call that holds ``token_norm`` MUST have version 4, another one with a
    call that holds statistics version 3, so that readers that know only lower versions refuse it.
    All other files, and other ``sample.json``, have version 2.
12. The names in ``files`` MUST be plain: no separators, no ``..``. Every file of a store MUST be a
    regular file. A writer MUST NOT follow symbolic links inside the store. A reader SHOULD compare
    a file with its checksum before using it, and MUST refuse content above the limits below.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import unicodedata
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xmodal_interp.attention import AXES, AttentionCall
from xmodal_interp.errors import InputError, StoreError
from xmodal_interp.sample import CallKey

FORMAT = "xmodal_interp.store"
VERSION = 2
WITH_STATISTICS = 3
"""Version of a ``sample.json`` whose calls hold statistics."""
WITH_NORMS = 4
"""Version of a ``sample.json`` whose calls hold token norms."""
VERSIONS = (VERSION, WITH_STATISTICS, WITH_NORMS)
STAMP: dict[str, Any] = {"format": FORMAT, "version": VERSION}

MANIFEST, NAMES, FAILURES = "manifest.json", "names.jsonl", "failures.jsonl"
SAMPLES, SAMPLE = "samples", "sample.json"
TOKENS, CROSS_KEYS = "tokens.parquet", "cross_keys.parquet"
GRIDS, VIDEO_GRIDS = "grids.npz", "video_grids.npz"
SHARED = "shared.safetensors"
UNFINISHED, LOCK = ".writing-", ".lock"

MAX_JSON_BYTES = 2**28  # manifest.json or one sample.json
MAX_LINES_BYTES = 2**30  # a .jsonl file
MAX_ROWS = 2**22  # a Parquet file
MAX_TABLE_BYTES = 2**30  # a Parquet file, uncompressed
MAX_GRID_BYTES = 2**28  # an npz file, uncompressed


@dataclass(frozen=True)
class GridFields:
    """How a grid is stored.

    Attributes:
        numbers: Integers in ``sample.json``.
        arrays: Arrays in the npz file.
        optional_arrays: Arrays in the npz file that may be None.
    """

    numbers: tuple[str, ...]
    arrays: tuple[str, ...]
    optional_arrays: tuple[str, ...] = ()


_PATCHES = ("patch_rows", "patch_cols")
IMAGE_GRID = GridFields(
    ("width", "height", "rows", "cols", *_PATCHES),
    ("places", "boxes", "patch_places"),
    ("tiles", "patch_boxes", "patch_names"),
)
VIDEO_GRID = GridFields(
    ("width", "height", "frames", "rows", "cols", "patch_frames", *_PATCHES),
    ("places", "boxes", "times", "patch_places"),
    ("tiles", "frame_indices"),
)
THUMBNAIL = GridFields(("rows", "cols", *_PATCHES), ("places", "patch_places"))

_PLAIN_NAME = re.compile(r"(?!\.)[^/\\\0]{1,255}")
_MEMBERS: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("name", "text", "answer"), str),
    **dict.fromkeys(("labels", "provenance", "files", "shared"), dict),
    **dict.fromkeys(("grids", "images", "calls"), list),
    "question": (str, type(None)),
    "n_prompt": int,
}

_SHARED = ("mask", "bias")
_OWN = tuple(name for name in AXES if name not in _SHARED)
_SCALARS = tuple(each.name for each in fields(AttentionCall) if each.name not in AXES)
_FORBIDDEN = set('/\\:*?"<>|')
_DEVICES = frozenset(
    ("CON", "PRN", "AUX", "NUL", *(f"{port}{n}" for port in ("COM", "LPT") for n in range(10)))
)
_MAX_NAME_BYTES = 200  # below the usual limit of 255, because the temporary folder adds a prefix


@dataclass
class SharedTensors:
    """Masks and biases of one sample, each stored once.

    Attributes:
        tensors: Tensors as they are stored, by name.
        records: ``shape`` of each, and whether it is ``packed``, by name.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    records: dict[str, dict[str, Any]] = field(default_factory=dict)
    _by_memory: dict[tuple[Any, ...], tuple[weakref.ref[Tensor], str]] = field(default_factory=dict)
    _by_content: dict[tuple[Any, ...], str] = field(default_factory=dict)

    def add(self, tensor: Tensor) -> str:
        """Add a tensor unless an equal one was added before, and return its name.

        A tensor in the same memory is found by its address. An address is compared only while the
        tensor added from it exists, because masks of a stored sample are freed one after the other
        and the next mask may be read into the same memory. Equal content in other memory is found
        by its hash: stitching decode steps creates a new mask for each layer.
        """
        memory = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        known, name = self._by_memory.get(memory, (None, ""))
        if known is not None and known() is not None:
            return name
        is_bool = tensor.dtype == torch.bool
        stored = packed(tensor) if is_bool else cpu_copy(tensor)
        digest = hashlib.sha256(stored.view(torch.uint8).numpy().data).digest()
        content = (digest, tensor.dtype, tuple(tensor.shape))
        name = self._by_content.setdefault(content, f"shared-{len(self.tensors)}")
        self._by_memory[memory] = (weakref.ref(tensor), name)
        if name not in self.tensors:
            self.tensors[name] = stored
            self.records[name] = {"shape": list(tensor.shape), "packed": is_bool}
        return name


def call_record(call: AttentionCall, shared: SharedTensors) -> dict[str, Any]:
    """Return the member of ``sample.json`` for a call; add its mask and bias to ``shared``."""
    held = {name: tensor for name, tensor, _ in call.tensors()}
    return {
        **{name: getattr(call, name) for name in _SCALARS},
        "tensors": [name for name in held if name in _OWN],
        "shared": {name: shared.add(held[name]) for name in held if name in _SHARED},
    }


def call_tensors(calls: Iterable[AttentionCall]) -> dict[str, Tensor]:
    """Return the tensors of one layer's file, by ``CALL.NAME``."""
    return {
        f"{call.call}.{name}": cpu_copy(tensor)
        for call in calls
        for name, tensor, _ in call.tensors()
        if name in _OWN
    }


def record_version(calls: Iterable[Mapping[str, Any]]) -> int:
    """Return the version of ``sample.json`` for these records of calls."""
    calls = list(calls)
    if any("token_norm" in call["tensors"] for call in calls):
        return WITH_NORMS
    hold_statistics = any("groups" in call["tensors"] for call in calls)
    return WITH_STATISTICS if hold_statistics else VERSION


def stored_call(
    record: Mapping[str, Any], own: Mapping[str, Tensor], shared: Mapping[str, Tensor]
) -> AttentionCall:
    """Return the call of a record, given its tensors and shared tensors by name."""
    scalars: dict[str, Any] = {name: record[name] for name in _SCALARS}
    return AttentionCall(**{**scalars, "q": None, "k": None, **own, **shared})


def call_key(record: Mapping[str, Any]) -> CallKey:
    """Return the key of a record's call in ``Sample.calls``."""
    return record["tower"], record["kind"], record["layer"], record["call"]


def layer_file(tower: str, kind: str, layer: int) -> str:
    """Return the file name of one layer, such as ``language-self-003.safetensors``."""
    return f"{tower}-{kind}-{layer:03d}.safetensors"


def cpu_copy(tensor: Tensor) -> Tensor:
    """Return a contiguous copy on the CPU; safetensors refuses tensors that share memory."""
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def packed(mask: Tensor) -> Tensor:
    """Return a boolean tensor packed to ``uint8 [ceil(n / 8)]``."""
    return torch.from_numpy(np.packbits(mask.detach().cpu().numpy()))


def unpacked(bits: Tensor, shape: Sequence[int]) -> Tensor:
    """Return the boolean tensor of this shape from its packed bits.

    Raises:
        ValueError: The number of bytes does not fit the shape.
    """
    if len(bits) != -(-math.prod(shape) // 8):
        raise ValueError(f"its packed mask of shape {list(shape)} has {len(bits)} bytes")
    flat = np.unpackbits(bits.numpy(), count=int(np.prod(shape)))
    return torch.from_numpy(flat.view(np.bool_).reshape(tuple(shape)))


def json_text(value: Any) -> str:
    """Return canonical JSON: strict, sorted by key, on one line.

    NumPy numbers and arrays are converted to numbers and lists, keys to strings.

    Raises:
        InputError: JSON cannot represent the value.
    """
    try:
        text = json.dumps(value, allow_nan=False, default=_python_number)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(
            f"JSON cannot represent a value that the store must keep: {error}. Use strings, finite "
            "numbers, booleans, None, lists and dicts."
        ) from error
    return json.dumps(json.loads(text), sort_keys=True)  # sort after keys are converted to strings


def digest_of(value: Any) -> str:
    """Return the SHA-256 of a value's canonical JSON as a hexadecimal string."""
    return hashlib.sha256(json_text(value).encode()).hexdigest()


def check_name(name: str) -> None:
    """Check that a sample name is a valid folder name on every common file system.

    Raises:
        InputError: The name is not valid.
    """
    size = len(name.encode(errors="replace"))
    forbidden = sorted(_FORBIDDEN & set(name))
    problems = (
        (not name, "it is empty"),
        (size > _MAX_NAME_BYTES, f"it has {size} bytes"),
        (name[:1] in (".", " "), "it begins with a dot or a space"),
        (name[-1:] in (".", " "), "it ends with a dot or a space"),
        (bool(forbidden), f"it contains {', '.join(map(repr, forbidden))}"),
        (not name.isprintable(), "it contains characters that cannot be printed"),
        (name.partition(".")[0].rstrip().upper() in _DEVICES, "Windows reserves it for a device"),
        (not unicodedata.is_normalized("NFC", name), "it is not in Unicode normal form NFC"),
    )
    problem = next((text for is_so, text in problems if is_so), None)
    if problem:
        raise InputError(
            f"{name!r} is not a valid sample name: {problem}. Use up to {_MAX_NAME_BYTES} bytes of "
            f"printable characters without {' '.join(sorted(_FORBIDDEN))}, and no dot or space at "
            "either end."
        )


def check_record(record: Mapping[str, Any]) -> None:
    """Check that a ``sample.json`` has all required members with the right types.

    Raises:
        ValueError: A member has a wrong value.
        KeyError: A member is missing.
    """
    files, shared = record["files"], record["shared"]
    for file, about in files.items():
        if not _PLAIN_NAME.fullmatch(file) or file == SAMPLE:
            raise ValueError(f"it lists the file {file!r}, which is not a plain name")
        _check_type(f"files.{file}.bytes", about["bytes"], int)
        _check_type(f"files.{file}.sha256", about["sha256"], str)
    for name, kind in _MEMBERS.items():
        _check_type(name, record[name], kind)
    for call in record["calls"]:
        for name in ("layer", "call"):
            _check_type(f"calls.{name}", call[name], int)
        if layer_file(*call_key(call)[:3]) not in files:
            raise ValueError(f"it lists no file for the call {call_key(call)}")
        if not {*call["shared"].values()} <= {*shared} or not {*call["tensors"]} <= {*_OWN}:
            raise ValueError(f"the tensors of the call {call_key(call)} are not in its files")
    _check_grids(record["grids"], IMAGE_GRID)
    _check_grids(record.get("video_grids", []), VIDEO_GRID)
    _check_pictures(record)


def _check_grids(grids: Sequence[Mapping[str, Any]], fields_of_grid: GridFields) -> None:
    for grid in grids:
        for name in fields_of_grid.numbers:
            _check_type(f"grids.{name}", grid[name], int)
        if grid.get("thumbnail") is not None:
            for name in THUMBNAIL.numbers:
                _check_type(f"grids.{name}", grid["thumbnail"][name], int)


def _check_pictures(record: Mapping[str, Any]) -> None:
    frames = [frame for video in record.get("videos", []) for frame in video["frames"]]
    for picture in (*record["images"], *frames):
        if picture["file"] is not None and picture["file"] not in record["files"]:
            raise ValueError(f"it does not list the picture {picture['file']!r}")
        for name in ("width", "height"):
            _check_type(f"images.{name}", picture[name], int)


def _check_type(name: str, value: Any, kind: type | tuple[type, ...]) -> None:
    wrong = isinstance(value, bool) or (isinstance(value, int) and value < 0)
    if not isinstance(value, kind) or wrong:
        raise ValueError(f"its member {name} has the invalid value {str(value)[:40]!r}")


def check_stamp(
    found: Mapping[str, Any] | None, path: Path, versions: Sequence[int] | None = None
) -> None:
    """Check format and version of a file; the version may be a number or a string.

    Args:
        found: The format and version in the file.
        path: The file.
        versions: The versions that are read; ``VERSION`` if not given.

    Raises:
        StoreError: The format or the version differs.
    """
    stamp = found if isinstance(found, Mapping) else {}
    if stamp.get("format") != FORMAT:
        raise StoreError(
            f"{path} is not a file of a store, or is damaged: its format is "
            f"{stamp.get('format') or 'not stated'} instead of {FORMAT}."
        )
    read = [str(each) for each in versions or (VERSION,)]
    if str(stamp.get("version")) not in read:
        raise StoreError(
            f"{path} has version {stamp.get('version')} of the store format, but this release "
            f"reads version {' or '.join(read)}. Open it with the release that wrote it, or "
            "capture again."
        )


def _python_number(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    raise TypeError(f"got {value!r} ({type(value).__name__})")
