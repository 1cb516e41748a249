"""The format of a store, version 2, and the functions between samples and its files.

A store is a folder::

    manifest.json               what all samples share
    names.jsonl                 the names in the order they were written; absent without samples
    failures.jsonl              what could not be captured; MAY be absent
    samples/NAME/               one sample
        sample.json             texts, labels, provenance, grids, calls, checksums
        tokens.parquet          one row per position
        cross_keys.parquet      one row per key of cross-attention; MAY be absent
        grids.npz               places and boxes of each image's tokens; absent without images;
                                ``tiles``, ``patch_boxes`` and those of a ``thumbnail`` only where
                                there are any
        video_grids.npz         the same of each video, and ``times``; absent without videos
        TOWER-KIND-LAYER.safetensors    the tensors of one layer
        shared.safetensors      masks and position biases; absent if there are none
        image-INDEX.png         the images, RGB; MAY be absent
        video-INDEX-FRAME.png   the frames of the videos, RGB; MAY be absent

1. Every file MUST carry the format's name and version: JSON as the members ``format`` and
   ``version`` (in ``.jsonl`` on the first line, alone), safetensors and Parquet in their metadata,
   npz as arrays of length 1, PNG as text chunks. A reader MUST refuse another name or version.
2. ``manifest.json`` MUST hold ``settings``, an object of everything that all samples have in common
   (model, revision, digests of config and weights, dtype, backend, processor, versions, what is
   kept), and ``digest``, the SHA-256 of the settings as canonical JSON. It MAY hold ``checksum``,
   the SHA-256 of all its other members. A writer MUST NOT add a sample made with other settings.
   Of stores whose settings have digests of the model, ``model`` and ``revision`` MAY differ.
3. A sample MUST be written whole to a folder beside the others whose name begins with
   ``.writing-``, flushed to the disk and then renamed to its own name. A reader MUST ignore names
   that begin with a dot; a writer SHOULD remove them, if no other writer is at work (it holds a
   lock on ``.lock``). A folder that is there is a sample that is there, whatever ``names.jsonl``
   says: it gives the order only. Samples that it lacks are ordered by the ``number`` of their
   ``sample.json``; those without one come last, sorted.
4. ``NAME`` MUST obey :func:`check_name`, MUST be unique, also where case is ignored, and MUST NOT
   be written twice.
5. ``sample.json`` MUST list every other file of its folder in ``files`` with ``bytes`` and
   ``sha256``, and hold ``digest``, the SHA-256 of its other members as canonical JSON.
6. Each member of ``calls`` is one attention call: its scalars, the names of its ``tensors`` and, in
   ``shared``, which shared tensors are its ``mask`` and ``bias``. A layer's file MUST hold
   the tensors of that layer only, named ``CALL.NAME``, as the model made them: no rounding.
   A call MUST hold ``q`` and ``k``, or ``dense``; it MAY hold ``v``, ``sinks``, ``rows``,
   ``update_share`` and ``segments``.
7. A causal flag is a flag. A mask or bias that several calls have in common MUST be stored once.
   Boolean ones are packed 8 to a byte, most significant bit first (``packed`` with their
   ``shape``); additive ones are stored as they are.
8. JSON MUST be strict (no NaN). Nothing is ever pickled.
9. ``sample.json`` MAY lack ``video_grids`` and ``videos``: then there are no videos.
10. A line of ``names.jsonl`` MUST hold ``name``, one of ``failures.jsonl`` ``item``, ``name``,
    ``error`` and ``message``. Lines and ``sample.json`` of a release after the first also hold
    ``number`` (names only: the place in the order, from 0) and, in lines, ``digest``, the SHA-256
    of the line's other members. Lines are canonical JSON. A reader MUST leave out other lines; a
    writer SHOULD write the file anew without them.
11. The names in ``files`` MUST be plain: no separators, no ``..``. Every file of a store MUST be a
    regular file. A writer MUST NOT follow symbolic links inside the store. A reader SHOULD compare
    a file with its checksum before it uses it, and MUST refuse content above the limits below.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import unicodedata
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xmodal_interp.attention import AttentionCall
from xmodal_interp.errors import InputError, StoreError
from xmodal_interp.sample import CallKey

FORMAT = "xmodal_interp.store"
VERSION = 2
STAMP: dict[str, Any] = {"format": FORMAT, "version": VERSION}

MANIFEST, NAMES, FAILURES = "manifest.json", "names.jsonl", "failures.jsonl"
SAMPLES, SAMPLE = "samples", "sample.json"
TOKENS, CROSS_KEYS = "tokens.parquet", "cross_keys.parquet"
GRIDS, VIDEO_GRIDS = "grids.npz", "video_grids.npz"
SHARED = "shared.safetensors"
UNFINISHED, LOCK = ".writing-", ".lock"

MAX_JSON_BYTES = 2**28  # of manifest.json or one sample.json
MAX_LINES_BYTES = 2**30  # of a .jsonl file
MAX_ROWS = 2**22  # of a Parquet file
MAX_TABLE_BYTES = 2**30  # of a Parquet file when it is unpacked
MAX_GRID_BYTES = 2**28  # of an npz file when it is unpacked

GRID_ARRAYS = ("places", "boxes", "patch_places")
GRID_NUMBERS = ("width", "height", "rows", "cols", "patch_rows", "patch_cols")
OPTIONAL_GRID_ARRAYS = ("tiles", "patch_boxes")
VIEW_ARRAYS = ("places", "patch_places")
VIEW_NUMBERS = ("rows", "cols", "patch_rows", "patch_cols")
VIDEO_ARRAYS = ("places", "boxes", "times", "patch_places")
OPTIONAL_VIDEO_ARRAYS = ("tiles",)
VIDEO_NUMBERS = (
    *("width", "height", "frames", "rows", "cols"),
    *("patch_frames", "patch_rows", "patch_cols"),
)

_PLAIN_NAME = re.compile(r"(?!\.)[^/\\\0]{1,255}")
_MEMBERS: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("name", "text", "answer"), str),
    **dict.fromkeys(("labels", "provenance", "files", "shared"), dict),
    **dict.fromkeys(("grids", "images", "calls"), list),
    "question": (str, type(None)),
    "n_prompt": int,
}

_SCALARS = ("tower", "kind", "layer", "call", "module", "scaling", "causal", "offset", "note")
_OPTIONAL_SCALARS = ("softcap", "sliding_window")
_OWN = ("q", "k", "v", "sinks", "rows", "dense", "update_share", "segments")
_SHARED = ("mask", "bias")
_FORBIDDEN = set('/\\:*?"<>|')
_DEVICES = frozenset(
    ("CON", "PRN", "AUX", "NUL", *(f"{port}{n}" for port in ("COM", "LPT") for n in range(10)))
)
_MAX_NAME_BYTES = 200  # file systems allow 255, and the folder it is written in has a prefix


@dataclass
class SharedTensors:
    """Masks and biases of one sample, each stored once.

    Attributes:
        tensors: What goes to the file, by name.
        records: ``shape`` and whether it is ``packed``, by name.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    records: dict[str, dict[str, Any]] = field(default_factory=dict)
    _by_memory: dict[tuple[Any, ...], tuple[weakref.ref[Tensor], str]] = field(default_factory=dict)
    _by_content: dict[tuple[Any, ...], str] = field(default_factory=dict)

    def add(self, tensor: Tensor) -> str:
        """Take a tensor in, if it is not held yet, and return its name.

        Layers that share the same memory are found by its address. The address counts as long as
        the tensor exists, because the masks of a stored sample are freed one after the other and
        the next one is read into the same memory. Equal content is found by its hash, because
        stitched decode steps build each layer's mask anew.
        """
        memory = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        known, name = self._by_memory.get(memory, (None, ""))
        if known is not None and known() is not None:
            return name
        is_bool = tensor.dtype == torch.bool
        stored = packed(tensor) if is_bool else plain(tensor)
        digest = hashlib.sha256(stored.view(torch.uint8).numpy().data).digest()
        content = (digest, tensor.dtype, tuple(tensor.shape))
        name = self._by_content.setdefault(content, f"shared-{len(self.tensors)}")
        self._by_memory[memory] = (weakref.ref(tensor), name)
        if name not in self.tensors:
            self.tensors[name] = stored
            self.records[name] = {"shape": list(tensor.shape), "packed": is_bool}
        return name


def call_record(call: AttentionCall, shared: SharedTensors) -> dict[str, Any]:
    """What ``sample.json`` says about a call; its mask and bias go to the shared tensors."""
    held = {name: getattr(call, name) for name in (*_OWN, *_SHARED)}
    record = {name: getattr(call, name) for name in (*_SCALARS, *_OPTIONAL_SCALARS)}
    record["tensors"] = [name for name in _OWN if held[name] is not None]
    record["shared"] = {name: shared.add(held[name]) for name in _SHARED if held[name] is not None}
    return record


def call_tensors(calls: Iterable[AttentionCall]) -> dict[str, Tensor]:
    """The tensors of one layer's file, by ``CALL.NAME``."""
    return {
        f"{call.call}.{name}": plain(tensor)
        for call in calls
        for name in _OWN
        if (tensor := getattr(call, name)) is not None
    }


def stored_call(
    record: Mapping[str, Any], own: Mapping[str, Tensor], shared: Mapping[str, Tensor]
) -> AttentionCall:
    """The call of a record, from its tensors by name (``q``) and its shared ones (``mask``)."""
    fields: dict[str, Any] = {name: record[name] for name in (*_SCALARS, *_OPTIONAL_SCALARS)}
    return AttentionCall(**{**fields, "q": None, "k": None, **own, **shared})


def call_key(record: Mapping[str, Any]) -> CallKey:
    """What the call of a record is kept under."""
    return record["tower"], record["kind"], record["layer"], record["call"]


def layer_file(tower: str, kind: str, layer: int) -> str:
    """Name of the file of one layer, such as ``language-self-003.safetensors``."""
    return f"{tower}-{kind}-{layer:03d}.safetensors"


def plain(tensor: Tensor) -> Tensor:
    """A contiguous copy on the CPU that shares no memory, as safetensors wants it."""
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def packed(mask: Tensor) -> Tensor:
    """A boolean tensor as ``uint8 [ceil(n / 8)]``."""
    return torch.from_numpy(np.packbits(mask.detach().cpu().numpy()))


def unpacked(bits: Tensor, shape: Sequence[int]) -> Tensor:
    """The boolean tensor of a shape that was packed.

    Raises:
        ValueError: There are not as many bits as the shape has elements.
    """
    if len(bits) != -(-math.prod(shape) // 8):
        raise ValueError(f"its mask of shape {list(shape)} has {len(bits)} bytes")
    flat = np.unpackbits(bits.numpy(), count=int(np.prod(shape)))
    return torch.from_numpy(flat.view(np.bool_).reshape(tuple(shape)))


def json_text(value: Any) -> str:
    """Canonical JSON: strict, sorted, one line.

    Numpy numbers and arrays become plain ones, keys become text.

    Raises:
        InputError: Something that JSON has no word for.
    """
    try:
        text = json.dumps(value, allow_nan=False, default=_plain_number)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(
            f"What a store keeps beside tensors must be JSON: text, finite numbers, true, false, "
            f"null, lists and objects; {error}."
        ) from error
    return json.dumps(json.loads(text), sort_keys=True)  # sorted by the keys as they are read


def digest_of(value: Any) -> str:
    """SHA-256 of something as canonical JSON, hexadecimal."""
    return hashlib.sha256(json_text(value).encode()).hexdigest()


def check_name(name: str) -> None:
    """Refuse a sample name that cannot be a folder's name on every file system.

    Raises:
        InputError: What is wrong with it.
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
        (name.partition(".")[0].rstrip().upper() in _DEVICES, "Windows keeps it for a device"),
        (not unicodedata.is_normalized("NFC", name), "it is not in Unicode normal form NFC"),
    )
    problem = next((text for is_so, text in problems if is_so), None)
    if problem:
        raise InputError(
            f"A sample's name is the name of a folder: up to {_MAX_NAME_BYTES} bytes, printable, "
            f"without {' '.join(sorted(_FORBIDDEN))}, and no dot or space at its ends. "
            f"{name!r} cannot be one: {problem}."
        )


def check_record(record: Mapping[str, Any]) -> None:
    """Refuse a ``sample.json`` that does not have the members of one, of their types.

    Raises:
        ValueError: What is wrong with it; KeyError for a member that is missing.
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
    _check_grids(record["grids"], GRID_NUMBERS)
    _check_grids(record.get("video_grids", []), VIDEO_NUMBERS)
    _check_pictures(record)


def _check_grids(grids: Sequence[Mapping[str, Any]], numbers: Sequence[str]) -> None:
    for grid in grids:
        small = grid.get("thumbnail")
        views = [(grid, numbers), *([(small, VIEW_NUMBERS)] if small is not None else [])]
        for view, names in views:
            for name in names:
                _check_type(f"grids.{name}", view[name], int)


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
        raise ValueError(f"its {name} is {str(value)[:40]!r}")


def check_stamp(found: Mapping[str, Any] | None, path: Path) -> None:
    """Refuse what is not of this format and version; numbers may come as text.

    Raises:
        StoreError: Another format, or another version.
    """
    stamp = found if isinstance(found, Mapping) else {}
    if stamp.get("format") != FORMAT:
        raise StoreError(
            f"A file of a store says that its format is {FORMAT}. {path} says "
            f"{stamp.get('format') or 'nothing'}; another program wrote it, or it is damaged."
        )
    if str(stamp.get("version")) != str(VERSION):
        raise StoreError(
            f"This release reads version {VERSION} of the store format. {path} is of version "
            f"{stamp.get('version')}; open it with the release that wrote it, or capture again."
        )


def _plain_number(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    raise TypeError(f"got {value!r} ({type(value).__name__})")
