"""Digests of Python values: the state of hooks, modules and processors as JSON and SHA-256."""

from __future__ import annotations

import functools
import hashlib
import json
import types
from collections.abc import Iterator, Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from xmodal_interp.store.schema import digest_of

LIBRARIES = ("transformers.", "accelerate.", "xmodal_interp.")
"""Functions of these libraries are described by name; the settings contain their versions."""

_CHUNK = 2**26  # bytes copied from another device at once
_MAX_NODES = 100_000  # limit per value; values beyond it are described by their class only
_ORIGIN = ("_name_or_path", "name_or_path", "base_model_name_or_path", "transformers_version")
_NO_STATE = frozenset(  # attributes that do not affect results
    {
        *(*_ORIGIN, "warnings_issued", "deprecation_warnings", "verbose", "hf_device_map"),
        *("_is_hf_initialized", "_output_capturing_hooks_installed", "_compiled_call_impl"),
        *("_hf_hook", "_old_forward", "_tp_plan", "_ep_plan", "_pp_plan", "_fsdp_plan"),
        *("_weight_conversions", "_no_split_modules", "_skip_keys_device_placement"),
        *("all_tied_weights_keys", "_tied_weights_keys", "_keys_to_ignore_on_save"),
        *("_keys_to_ignore_on_load_unexpected", "_keys_to_ignore_on_load_missing"),
        *("gradient_checkpointing", "_gradient_checkpointing_func", "_caches"),
        *("to", "cuda", "npu", "xpu", "mlu", "musa", "sdaa", "hpu"),  # accelerate replaces these
        *("forward", "config", "generation_config", "init_kwargs", "init_inputs"),
        *("is_training", "compute_dtype", "compute_type_is_set"),  # set by bitsandbytes
        *("files_loaded", "is_local", "local_files_only", "vocab_file", "tokenizer_file"),
    }
)


def described(value: Any) -> Any:
    """Return a JSON description of a Python value that changes when the value changes.

    Tensors and arrays are represented by their digests; functions by their code, defaults and
    closure; modules by their class; other objects by their class and attributes.
    """
    return Describer().describe(value)


class Describer:
    """Traversal of one value; an object that contains itself is described once.

    Args:
        tensors: If given, digests of tensors are added to this set instead of the description, and
            values that are None are left out. Some quantised weights move between attributes while
            the model runs.
    """

    def __init__(self, tensors: set[str] | None = None) -> None:
        self._tensors = tensors
        self._on_path: set[int] = set()
        self._n_nodes = 0

    def describe(self, value: Any) -> Any:
        """Return the description of a value as JSON."""
        self._n_nodes += 1
        if self._tensors is not None and isinstance(value, Tensor):
            self._tensors.add(tensor_digest(value))
            return None
        plain = _plain(value)
        if plain is not None:
            return plain
        if id(value) in self._on_path or self._n_nodes > _MAX_NODES:
            return class_of(value)
        self._on_path.add(id(value))
        try:
            return self._inside(value)
        finally:
            self._on_path.discard(id(value))

    def _inside(self, value: Any) -> Any:
        if isinstance(value, Mapping):
            return self._mapping(value)
        if isinstance(value, (list, tuple)):
            return [self.describe(each) for each in value]
        if isinstance(value, (set, frozenset)):
            return {"set": sorted(json.dumps(self.describe(each)) for each in value)}
        if callable(value):
            return self._callable(value)
        if hasattr(value, "to_json_string"):  # a config, or a part of a processor
            return [class_of(value), portable(json.loads(value.to_json_string()))]
        return self._object(value)

    def _mapping(self, value: Mapping[Any, Any]) -> Any:
        items = [(str(name), self.describe(each)) for name, each in value.items()]
        if self._tensors is not None:
            items = [(name, each) for name, each in items if each not in (None, "None")]
        return {"mapping": sorted(items, key=lambda item: item[0])}

    def _callable(self, value: Any) -> Any:
        if isinstance(value, functools.partial):
            return {"partial": [self.describe(x) for x in (value.func, value.args, value.keywords)]}
        if isinstance(value, types.MethodType):
            return {"method": [self.describe(x) for x in (value.__func__, value.__self__)]}
        if isinstance(value, types.FunctionType):
            return self._function(value)
        return self._object(value)

    def _function(self, function: types.FunctionType) -> Any:
        name = f"{function.__module__}.{function.__qualname__}"
        if name.startswith(LIBRARIES):  # the settings contain their versions
            return name
        cells = [cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell)]
        parts = [function.__defaults__, function.__kwdefaults__, cells]
        return {"function": name, "code": _code(function.__code__), "with": self.describe(parts)}

    def _object(self, value: Any) -> Any:
        held = attributes_of(value)
        if isinstance(value, (nn.Module, type, types.ModuleType)) or not held:
            return class_of(value)
        return {"class": class_of(value), "attributes": self._mapping(held)}


def attributes_of(value: Any) -> dict[str, Any]:
    """Return the attributes of an object, except those that do not affect results."""
    held = getattr(value, "__dict__", {})
    return {
        name: each
        for name, each in held.items()
        if name not in _NO_STATE
        and not isinstance(_of_class(value, name), functools.cached_property)
    }


def _of_class(value: Any, name: str) -> Any:
    """Return the class attribute of this name, or None; used to skip cached properties."""
    return next((vars(kind)[name] for kind in type(value).__mro__ if name in vars(kind)), None)


def _plain(value: Any) -> Any:
    """Return a value that JSON or a digest represents directly; None for any other value."""
    if isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return repr(value)  # not every float is JSON
    if isinstance(value, Tensor):
        return {"tensor": tensor_digest(value)}
    if isinstance(value, (np.ndarray, np.generic)):
        array = np.ascontiguousarray(value)
        held = array.tobytes() if array.dtype != object else repr(array.tolist()).encode()
        about = f"{array.dtype} {array.shape} ".encode()
        return {"array": hashlib.sha256(about + held).hexdigest()}
    if value is None or isinstance(value, (bytes, complex, torch.dtype, slice)):
        return repr(value)
    return None


def class_of(value: Any) -> str:
    """Return the qualified name of a value, or of its class if the value has none."""
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}.{named.__qualname__}"


def _is_filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018  # reading an empty cell raises
    except ValueError:
        return False
    return True


def _code(code: types.CodeType) -> str:
    """Return the SHA-256 of a function's code, including nested functions."""
    constants = [
        _code(each) if isinstance(each, types.CodeType) else described(each)
        for each in code.co_consts
    ]
    return digest_of([code.co_code.hex(), list(code.co_names), constants])


def portable(value: Any) -> Any:
    """Return JSON without paths and origin, so that moving a model does not change its digest."""
    if isinstance(value, dict):
        return {k: portable(v) for k, v in value.items() if k not in _ORIGIN}
    return [portable(v) for v in value] if isinstance(value, list) else value


def tensor_digest(tensor: Tensor) -> str:
    """Return the SHA-256 of a tensor's dtype, shape and bytes, for any layout or subclass."""
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} {tensor.layout}".encode())
    with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
        held = tensor.detach()
    if hasattr(type(held), "__tensor_flatten__"):  # a tensor subclass, such as torchao's
        names, about = cast("Any", held).__tensor_flatten__()
        parts: list[Any] = [getattr(held, name) for name in names]
        digest.update(digest_of([class_of(type(held)), list(names), described(about)]).encode())
    else:
        parts = _quantised(held) if held.is_quantized else _sparse(held)
    for part in parts:
        if part is not held:
            digest.update(tensor_digest(part).encode())
        elif not held.is_meta:
            for chunk in _chunks(held):
                digest.update(chunk.data)
    return digest.hexdigest()


def _quantised(tensor: Tensor) -> list[Tensor]:
    """Return the integers, scales and zero points of a tensor with a quantised dtype."""
    if tensor.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
        about = torch.tensor([tensor.q_scale(), tensor.q_zero_point()], dtype=torch.float64)
        return [tensor.int_repr(), about]
    scales, zeros = tensor.q_per_channel_scales(), tensor.q_per_channel_zero_points()
    return [tensor.int_repr(), scales, zeros]


def _sparse(tensor: Tensor) -> list[Tensor]:
    """Return the parts of a sparse tensor; a dense tensor is returned as its only part."""
    if tensor.layout == torch.strided:
        return [tensor]
    if tensor.is_mkldnn:
        return [tensor.to_dense()]
    whole = tensor.to_sparse_coo().coalesce()
    return [whole.indices(), whole.values()]


def _chunks(tensor: Tensor) -> Iterator[np.ndarray]:
    """Yield the bytes of a dense tensor, in chunks if it is on another device."""
    flat = tensor.resolve_conj().resolve_neg().reshape(-1)
    n_each = len(flat) if flat.device.type == "cpu" else _CHUNK // flat.element_size()
    for chunk in flat.split(max(n_each, 1)):
        yield chunk.cpu().contiguous().view(torch.uint8).numpy()
