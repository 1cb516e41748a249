"""Which model made a store, and in which state: digests that change when its numbers would.

1. Weights and buffers: SHA-256 of all bytes of every parameter and buffer, those that an offload
   hook holds and the scales of quantised ones included.
2. The modules: their classes and plain attributes (scalings, adapters that are switched off), which
   of them are in training mode, which have a replaced ``forward``.
3. The configs, the generation settings, the processor and its tokenizer.
4. What acts on the model from outside: forward hooks, interventions, autocast.

Where the files are, on which device the weights are, and how many threads compute are left out:
they don't make another model.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from xmodal_interp.hooks import active_interventions, registered_function
from xmodal_interp.models import VLM
from xmodal_interp.store import digest_of
from xmodal_interp.store.value_digests import (
    LIBRARIES,
    Describer,
    attributes_of,
    class_of,
    described,
    portable,
    tensor_digest,
)

FINGERPRINT = 2
"""Raised when digests of the same model change; a store of another number is only read."""

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_OF_LAST_RUN = ("_cached",)
"""How the names of attributes end that a module sets when it runs."""
_BY_LENGTH = ("dynamic", "longrope")
"""Rotary embeddings of transformers that compute their frequencies anew for a long prompt."""


def fingerprint(vlm: VLM) -> dict[str, Any]:
    """Digests of a model, its processor and everything that changes what the model computes.

    Reads every byte of the weights once, about 1.2 GB/s for each core. Weights that are not in
    memory are read from where an offload hook keeps them.

    Returns:
        JSON-ready: ``fingerprint`` (the version of this function), SHA-256 by ``config_digest``,
        ``processor_digest``, ``tokenizer_digest``, ``generation_digest``, ``weights_digest``,
        ``buffers_digest`` and ``modules_digest``; ``training``, the modules in training mode;
        ``hooks``, ``interventions``, ``autocast`` and ``matmul_precision``, empty or off for a
        model that runs as it was loaded.
    """
    model = vlm.model
    generation = getattr(model, "generation_config", None)
    return {
        "fingerprint": FINGERPRINT,
        "config_digest": digest_of(_config(model.config)),
        "generation_digest": digest_of(None if generation is None else _config(generation)),
        "processor_digest": digest_of(_processor(vlm.processor)),
        "tokenizer_digest": digest_of(_tokenizer(vlm.tokenizer)),
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
    """A config without its origin; the attention backends of its parts are no part of its JSON."""
    subs = getattr(config, "sub_configs", {})
    parts = {name: getattr(config, name, None) for name in subs}
    backends = {
        name: getattr(each, "_attn_implementation", None)
        for name, each in {"": config, **parts}.items()
        if each is not None
    }
    return [portable(json.loads(config.to_json_string(use_diff=False))), backends]


def _processor(processor: Any) -> Any:
    """The settings of a processor and of its parts, without the tokenizer.

    Its private attributes are what some processors keep from one step of a call to the next.
    """
    held = {n: v for n, v in attributes_of(processor).items() if n != "tokenizer" and n[0] != "_"}
    settings = portable(json.loads(processor.to_json_string()))
    return [class_of(processor), settings, described(held)]


def _tokenizer(tokenizer: Any) -> Any:
    """Vocabulary, rules and settings of a tokenizer."""
    rules = ("_tokenizer", "sp_model")
    held = {name: each for name, each in attributes_of(tokenizer).items() if name not in rules}
    fast: Any = getattr(tokenizer, "_tokenizer", None)
    sentencepiece: Any = getattr(tokenizer, "sp_model", None)
    made_of: Any = None
    if hasattr(fast, "to_str"):
        of_last_call = ("truncation", "padding")
        made_of = {k: v for k, v in json.loads(fast.to_str()).items() if k not in of_last_call}
    elif hasattr(sentencepiece, "serialized_model_proto"):
        made_of = hashlib.sha256(sentencepiece.serialized_model_proto()).hexdigest()
    elif hasattr(tokenizer, "get_vocab"):
        made_of = tokenizer.get_vocab()
    return [class_of(tokenizer), described(held), made_of]


def _intervention(intervention: Any) -> str:
    """Its class, the settings of it that are words, and a digest of all of them."""
    words = [f"{k}={v!r}" for k, v in attributes_of(intervention).items() if isinstance(v, str)]
    digest = digest_of(described(intervention))
    return f"{type(intervention).__name__}({', '.join(words)}) {digest[:16]}"


def _training(model: nn.Module) -> list[str]:
    """The modules in training mode; those inside of one that is are left out."""
    found: list[str] = []
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{other}.") or not other for other in found)
        if module.training and not inside:
            found.append(path)
    return [path or type(model).__name__ for path in found]


def _autocast(model: nn.Module) -> list[str]:
    """Where autocast is on, and the type that it computes in."""
    kinds = {"cpu", next(model.parameters()).device.type} - {"meta"}
    return [
        f"{kind} {str(torch.get_autocast_dtype(kind)).removeprefix('torch.')}"
        for kind in sorted(kinds)
        if torch.is_autocast_enabled(kind)
    ]


_HOOKS = ("_forward_pre_hooks", "_forward_hooks")


def _hooks(model: nn.Module) -> list[str]:
    """Hooks, replaced forwards and attention functions of users: where, what, and a digest."""
    found = [
        (name.removeprefix("_global_"), each)
        for name in ("_global_forward_pre_hooks", "_global_forward_hooks")
        for each in getattr(torch_module, name).values()
    ]
    for path, module in model.named_modules():
        found += [(f"{path}.{name}", h) for name in _HOOKS for h in getattr(module, name).values()]
        forward = _replaced_forward(module)
        found += [(f"{path}.forward", forward)] if forward is not None else []
    parts = {"": model.config} | {n: getattr(model.config, n, None) for n in _sub_configs(model)}
    for backend in sorted({str(getattr(p, "_attn_implementation", "")) for p in parts.values()}):
        function = registered_function(backend)
        found += [(f"attention {backend!r}", function)] if function is not None else []
    return [
        f"{at}: {_title(hook)} {digest_of(described(hook))[:16]}"
        for at, hook in found
        if _acts(hook)
    ]


def _sub_configs(model: Any) -> list[str]:
    return list(getattr(model.config, "sub_configs", {}))


def _replaced_forward(module: nn.Module) -> Any:
    """What was set in the place of a module's ``forward``; an offload hook's keeps the original."""
    held = vars(module)
    forward = held.get("_old_forward" if "_hf_hook" in held else "forward")
    own = getattr(forward, "__func__", None)
    return None if own is not None and own is type(module).forward else forward


def _acts(hook: Any) -> bool:
    """Whether a hook is not one that a library puts on every model it runs."""
    function = hook.func if isinstance(hook, functools.partial) else hook
    where = getattr(function, "__module__", None) or type(function).__module__
    return not str(where).startswith(LIBRARIES)


def _title(hook: Any) -> str:
    return str(getattr(hook, "__qualname__", None) or type(hook).__qualname__)


def _modules(model: nn.Module) -> list[Any]:
    """Class and attributes of every module by its path, and the digests of tensors among them."""
    rows = []
    for path, module in model.named_modules():
        held = {n: v for n, v in attributes_of(module).items() if n not in _OF_EVERY_MODULE}
        held = {n: v for n, v in held.items() if not n.endswith(_OF_LAST_RUN)}
        if hasattr(module, "config"):  # the tensors that a whole model keeps are of its last run
            held = {n: v for n, v in held.items() if not isinstance(v, Tensor)}
        weights = [each for each in module._parameters.values() if each is not None]
        tensors: set[str] = set()
        describe = Describer(tensors).describe
        parts = [describe(x) for x in (held, [attributes_of(w) for w in weights], _packed(module))]
        rows.append([path, class_of(type(module)), module.training, parts, sorted(tensors)])
    return rows


def _packed(module: nn.Module) -> dict[str, Any]:
    """What a module writes to a state dict beside its parameters and buffers."""
    if type(module)._save_to_state_dict is nn.Module._save_to_state_dict:
        return {}
    state: dict[str, Any] = {}
    module._save_to_state_dict(state, "", keep_vars=True)
    own = {*module._parameters, *module._buffers}
    return {name: value for name, value in state.items() if name not in own}


def _weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for path, module, name, tensor in _held(model, "_parameters"):
        yield f"{path}.{name}", _offloaded(module, name, tensor)


def _buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Buffers. Of rotary frequencies that follow the length of the prompt, the original ones."""
    for path, module, name, tensor in _held(model, "_buffers"):
        by_length = any(kind in str(getattr(module, "rope_type", "")) for kind in _BY_LENGTH)
        if not by_length or not name.endswith("inv_freq") or name.endswith("original_inv_freq"):
            yield f"{path}.{name}", _offloaded(module, name, tensor)


def _held(model: nn.Module, where: str) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """Path and module of every parameter or buffer; one that has several names comes once."""
    seen: set[int] = set()
    for path, module in model.named_modules():
        for name, tensor in getattr(module, where).items():
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                yield path, module, name, tensor


def _offloaded(module: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """A tensor, or the one that accelerate brings when the module runs."""
    if not tensor.is_meta:
        return tensor
    hook = getattr(module, "_hf_hook", None)
    for each in getattr(hook, "hooks", (hook,)):
        weights = getattr(each, "weights_map", None)
        if weights is not None and name in weights:
            found: Tensor = weights[name]
            return found
    return tensor


def _digests(tensors: Iterator[tuple[str, Tensor]]) -> list[tuple[str, str]]:
    """Names and digests, hashed on several cores: hashing releases Python's lock."""
    named = list(tensors)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        digests = pool.map(tensor_digest, [tensor for _, tensor in named])
    return list(zip([name for name, _ in named], digests, strict=True))
