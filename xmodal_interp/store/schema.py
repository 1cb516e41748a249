"""The format of a store, version 2, and the functions between samples and its files.

A store is a folder::

    manifest.json               what all samples share
    names.jsonl                 the names in the order they were written
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
   kept), and ``digest``, the SHA-256 of the settings as canonical JSON. A writer MUST NOT add a
   sample made with other settings.
3. A sample MUST be written whole to a folder beside the others whose name begins with
   ``.writing-``, flushed to the disk and then renamed to its own name. A reader MUST ignore names
   that begin with a dot; a writer SHOULD remove them, if no other writer is at work (it holds a
   lock on ``.lock``). A folder that is there is a sample that is there, whatever ``names.jsonl``
   says: it gives the order only, and names it lacks come last, sorted.
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
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
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

_SCALARS = ("tower", "kind", "layer", "call", "module", "scaling", "causal", "offset", "note")
_OPTIONAL_SCALARS = ("softcap", "sliding_window")
_OWN = ("q", "k", "v", "sinks", "rows", "dense", "update_share", "segments")
_SHARED = ("mask", "bias")
_FORBIDDEN = set('/\\:*?"<>|')
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
    _by_memory: dict[tuple[Any, ...], str] = field(default_factory=dict)
    _by_content: dict[tuple[Any, ...], str] = field(default_factory=dict)

    def add(self, tensor: Tensor) -> str:
        """Take a tensor in, if it is not held yet, and return its name.

        Layers that were given the same memory are seen at once; equal content is found by its hash,
        since stitched decode steps build each layer's mask anew.
        """
        memory = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if memory in self._by_memory:
            return self._by_memory[memory]
        is_bool = tensor.dtype == torch.bool
        stored = packed(tensor) if is_bool else plain(tensor)
        digest = hashlib.sha256(stored.view(torch.uint8).numpy().data).digest()
        content = (digest, tensor.dtype, tuple(tensor.shape))
        name = self._by_content.setdefault(content, f"shared-{len(self.tensors)}")
        self._by_memory[memory] = name
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
    """The boolean tensor of a shape that was packed."""
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
    except (TypeError, ValueError) as error:
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
        (not unicodedata.is_normalized("NFC", name), "it is not in Unicode normal form NFC"),
    )
    problem = next((text for is_so, text in problems if is_so), None)
    if problem:
        raise InputError(
            f"A sample's name is the name of a folder: up to {_MAX_NAME_BYTES} bytes, printable, "
            f"without {' '.join(sorted(_FORBIDDEN))}, and no dot or space at its ends. "
            f"{name!r} cannot be one: {problem}."
        )


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
