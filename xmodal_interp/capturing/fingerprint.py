"""Fingerprint of a model: digests that change if anything changes that affects its outputs.

1. Weights and buffers: SHA-256 of all bytes of every parameter and buffer, including offloaded
   weights and the scales of quantised weights.
2. Modules: their classes and plain attributes (scalings, disabled adapters), their training mode,
   replaced ``forward`` methods.
3. The configs, the generation settings, the processor and its tokenizer.
4. External state: forward hooks, interventions, autocast.

The location of the files, the device of the weights and the number of threads are left out, because
they do not change the model.

The state of modules, hooks and processors is described as JSON (``described``); tensors, arrays and
code in it are represented by their SHA-256 digests.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import os
import types
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from xmodal_interp.hooks import active_interventions, registered_function
from xmodal_interp.models import VLM
from xmodal_interp.store.schema import digest_of
from xmodal_interp.upstream import (
    TOKENIZER_RULES,
    attention_backend,
    buffers_of,
    extra_state_of,
    fast_tokenizer,
    global_hooks,
    module_hooks,
    offload_hooks,
    own_forward,
    parameters_of,
    without_tensor_subclasses,
)

FINGERPRINT = 2
"""Version of the fingerprint, incremented when the digests of an unchanged model change. A store of
another version is read-only."""

LIBRARIES = ("transformers.", "accelerate.", "xmodal_interp.")
"""Functions of these libraries are described by name; the settings contain their versions."""

_CHUNK = 2**26  # bytes copied from another device at once
_MAX_NODES = 100_000  # parts of one value; any further part is described by its class only
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
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_OF_LAST_RUN = ("_cached",)
"""Suffixes of the attributes that a module sets when it runs."""
_BY_LENGTH = ("dynamic", "longrope")
"""Types of rotary embeddings in transformers that recompute their frequencies for long prompts."""


def fingerprint(vlm: VLM) -> dict[str, Any]:
    """Return digests of a model, its processor and all state that changes the model's outputs.

    Reads every byte of the weights once, at about 1.2 GB/s for each core. Offloaded weights are
    read from the storage of their offload hook.

    Returns:
        A JSON-serialisable dict: ``fingerprint``, the version of this function; the SHA-256 digests
        ``config_digest``, ``processor_digest``, ``tokenizer_digest``, ``generation_digest``,
        ``weights_digest``, ``buffers_digest`` and ``modules_digest``; ``training``, the modules in
        training mode; and ``hooks``, ``interventions``, ``autocast`` and ``matmul_precision``,
        which are empty or at their defaults for a model that was loaded and not modified.
    """
    model = vlm.model
    generation = getattr(model, "generation_config", None)
    return {
        "fingerprint": FINGERPRINT,
        "config_digest": digest_of(_config(model.config)),
        "generation_digest": digest_of(None if generation is None else _config(generation)),
        "processor_digest": digest_of(_processor(vlm.processor)),
        "tokenizer_digest": digest_of(
            _tokenizer(vlm.tokenizer) if vlm.tokenizer is not None else None
        ),
        "weights_digest": digest_of(_digests(_weights(model))),
        "buffers_digest": digest_of(_digests(_buffers(model))),
        "modules_digest": digest_of(_modules(model)),
        "training": _training(model),
        "hooks": _hooks(model),
        "interventions": [_intervention(each) for each in active_interventions()],
        "autocast": _autocast(model),
        "matmul_precision": torch.get_float32_matmul_precision(),
    }


def _config(config: Any) -> Any:
    """Return a config without its path, and the attention backends, which are not in its JSON."""
    backends = {name: attention_backend(each) for name, each in _parts(config).items()}
    return [portable(json.loads(config.to_json_string(use_diff=False))), backends]


def _parts(config: Any) -> dict[str, Any]:
    """Return a config under the empty name, and the configs in it by attribute."""
    names = getattr(config, "sub_configs", {})
    inside = {name: getattr(config, name, None) for name in names}
    return {"": config} | {name: each for name, each in inside.items() if each is not None}


def _processor(processor: Any) -> Any:
    """Return the settings of a processor and its parts, without the tokenizer.

    Private attributes are left out: some processors use them for temporary state.
    """
    attributes = {
        n: v for n, v in attributes_of(processor).items() if n != "tokenizer" and n[0] != "_"
    }
    settings = portable(json.loads(processor.to_json_string()))
    return [class_of(processor), settings, described(attributes)]


def _tokenizer(tokenizer: Any) -> Any:
    """Return the vocabulary, rules and settings of a tokenizer.

    The rules are those of a fast tokenizer: prompts are not labelled without its offsets.
    """
    attributes = {
        name: each for name, each in attributes_of(tokenizer).items() if name != TOKENIZER_RULES
    }
    fast: Any = fast_tokenizer(tokenizer)
    rules: Any = None
    if hasattr(fast, "to_str"):
        of_last_call = ("truncation", "padding")
        rules = {k: v for k, v in json.loads(fast.to_str()).items() if k not in of_last_call}
    return [class_of(tokenizer), described(attributes), rules]


def _intervention(intervention: Any) -> str:
    """Return the class of an intervention, its string settings, and a digest of all settings."""
    settings_shown = [
        f"{k}={v!r}" for k, v in attributes_of(intervention).items() if isinstance(v, str)
    ]
    digest = digest_of(described(intervention))
    return f"{type(intervention).__name__}({', '.join(settings_shown)}) {digest[:16]}"


def _training(model: nn.Module) -> list[str]:
    """Return the outermost modules in training mode."""
    found: list[str] = []
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{other}.") or not other for other in found)
        if module.training and not inside:
            found.append(path)
    return [path or type(model).__name__ for path in found]


def _autocast(model: nn.Module) -> list[str]:
    """Return device type and dtype of each enabled autocast."""
    kinds = {"cpu", next(model.parameters()).device.type} - {"meta"}
    return [
        f"{kind} {str(torch.get_autocast_dtype(kind)).removeprefix('torch.')}"
        for kind in sorted(kinds)
        if torch.is_autocast_enabled(kind)
    ]


def _hooks(model: nn.Module) -> list[str]:
    """Describe the hooks, replaced forwards and attention functions that were set by users.

    Each entry has the place, the name and a digest.
    """
    found = global_hooks()
    for path, module in model.named_modules():
        found += [(f"{path}.{name}", hook) for name, hook in module_hooks(module)]
        forward = _replaced_forward(module)
        found += [(f"{path}.forward", forward)] if forward is not None else []
    for backend in sorted({str(attention_backend(p)) for p in _parts(model.config).values()}):
        function = registered_function(backend)
        found += [(f"attention {backend!r}", function)] if function is not None else []
    return [
        f"{at}: {_name_of_hook(hook)} {digest_of(described(hook))[:16]}"
        for at, hook in found
        if _set_by_user(hook)
    ]


def _replaced_forward(module: nn.Module) -> Any:
    """Return the function that replaces a module's ``forward``, or None.

    The wrapper that an offload hook of accelerate sets is not such a function.
    """
    forward = own_forward(module)
    own = getattr(forward, "__func__", None)
    return None if own is not None and own is type(module).forward else forward


def _set_by_user(hook: Any) -> bool:
    """Return whether a hook was set by the user, not by a library such as accelerate."""
    function = hook.func if isinstance(hook, functools.partial) else hook
    where = getattr(function, "__module__", None) or type(function).__module__
    return not str(where).startswith(LIBRARIES)


def _name_of_hook(hook: Any) -> str:
    return str(getattr(hook, "__qualname__", None) or type(hook).__qualname__)


def _modules(model: nn.Module) -> list[Any]:
    """Return path, class, attributes and the digests of tensor attributes of every module."""
    rows = []
    for path, module in model.named_modules():
        attributes = {n: v for n, v in attributes_of(module).items() if n not in _OF_EVERY_MODULE}
        attributes = {n: v for n, v in attributes.items() if not n.endswith(_OF_LAST_RUN)}
        if hasattr(module, "config"):  # tensors kept by a whole model are from its last run
            attributes = {n: v for n, v in attributes.items() if not isinstance(v, Tensor)}
        weights = [each for each in parameters_of(module).values() if each is not None]
        tensors: set[str] = set()
        describe = _Description(tensors).describe
        parts = [
            describe(x)
            for x in (attributes, [attributes_of(w) for w in weights], extra_state_of(module))
        ]
        rows.append([path, class_of(type(module)), module.training, parts, sorted(tensors)])
    return rows


def _weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for path, module, name, tensor in _tensors_of(model, parameters_of):
        yield f"{path}.{name}", _offloaded(module, name, tensor)


def _buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the buffers, except rotary frequencies that depend on the length of the last prompt."""
    for path, module, name, tensor in _tensors_of(model, buffers_of):
        by_length = any(kind in str(getattr(module, "rope_type", "")) for kind in _BY_LENGTH)
        if not by_length or not name.endswith("inv_freq") or name.endswith("original_inv_freq"):
            yield f"{path}.{name}", _offloaded(module, name, tensor)


def _tensors_of(
    model: nn.Module, tensors_of: Callable[[nn.Module], Mapping[str, Tensor | None]]
) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """Yield path, module, name and tensor of every parameter or buffer; shared tensors once."""
    seen: set[int] = set()
    for path, module in model.named_modules():
        for name, tensor in tensors_of(module).items():
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                yield path, module, name, tensor


def _offloaded(module: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """Return a tensor; for an offloaded one, the tensor that accelerate loads for a run."""
    if not tensor.is_meta:
        return tensor
    for each in offload_hooks(module):
        weights = getattr(each, "weights_map", None)
        if weights is not None and name in weights:
            found: Tensor = weights[name]
            return found
    return tensor


def _digests(tensors: Iterator[tuple[str, Tensor]]) -> list[tuple[str, str]]:
    """Return names and digests, computed in threads: hashing releases the GIL."""
    named = list(tensors)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        digests = pool.map(tensor_digest, [tensor for _, tensor in named])
    return list(zip([name for name, _ in named], digests, strict=True))


def tensor_digest(tensor: Tensor) -> str:
    """Return the SHA-256 of a tensor's dtype, shape and bytes, for any layout or subclass."""
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} {tensor.layout}".encode())
    with torch.no_grad(), without_tensor_subclasses():
        bare = tensor.detach()
    if hasattr(type(bare), "__tensor_flatten__"):  # a tensor subclass, such as torchao's
        names, about = cast("Any", bare).__tensor_flatten__()
        parts: list[Any] = [getattr(bare, name) for name in names]
        digest.update(digest_of([class_of(type(bare)), list(names), described(about)]).encode())
    else:
        parts = _quantised(bare) if bare.is_quantized else _sparse(bare)
    for part in parts:
        if part is not bare:
            digest.update(tensor_digest(part).encode())
        elif not bare.is_meta:
            for chunk in _chunks(bare):
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


def described(value: Any) -> Any:
    """Return a JSON description of a Python value that changes when the value changes.

    Tensors and arrays are represented by their digests; functions by their code, defaults and
    closure; modules by their class; other objects by their class and attributes.
    """
    return _Description().describe(value)


class _Description:
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
        leaf = _leaf(value)
        if leaf is not None:
            return leaf
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
        attributes = attributes_of(value)
        if isinstance(value, (nn.Module, type, types.ModuleType)) or not attributes:
            return class_of(value)
        return {"class": class_of(value), "attributes": self._mapping(attributes)}


def attributes_of(value: Any) -> dict[str, Any]:
    """Return the attributes of an object, except those that do not affect results."""
    attributes = getattr(value, "__dict__", {})
    return {
        name: each
        for name, each in attributes.items()
        if name not in _NO_STATE
        and not isinstance(
            inspect.getattr_static(type(value), name, None), functools.cached_property
        )
    }


def _leaf(value: Any) -> Any:
    """Return a value that JSON or a digest represents directly; None for any other value."""
    if isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return repr(value)  # not every float is JSON
    if isinstance(value, Tensor):
        return {"tensor": tensor_digest(value)}
    if isinstance(value, (np.ndarray, np.generic)):
        array = np.ascontiguousarray(value)
        content = array.tobytes() if array.dtype != object else repr(array.tolist()).encode()
        about = f"{array.dtype} {array.shape} ".encode()
        return {"array": hashlib.sha256(about + content).hexdigest()}
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
