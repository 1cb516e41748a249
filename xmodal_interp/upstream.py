"""Private parts of torch, transformers and accelerate that this package uses.

They have no public equivalent in the versions that were tested. They are used only here, so that a
release that moves one of them is seen in one place: ``tests/test_upstream.py`` names each part and
its users, and fails with its name.
"""

from __future__ import annotations

import gc
import inspect
from collections.abc import Mapping
from contextlib import AbstractContextManager
from types import GeneratorType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.overrides import (
    TorchFunctionMode,
    _get_current_function_mode_stack,
    _pop_mode,
    _pop_mode_temporarily,
    _push_mode,
)
from torch.utils import _pytree

# Attention in torch

FUSED_MULTIHEAD = "_native_multi_head_attention"
FUSED_MULTIHEAD_PARAMETERS = (
    *("query", "key", "value", "embed_dim", "num_heads", "in_proj_weight", "in_proj_bias"),
    *("out_proj_weight", "out_proj_bias", "mask", "need_weights", "average_attn_weights"),
    "mask_type",
)
"""The fused kernel of ``nn.MultiheadAttention``, and its parameters, which are positional."""

FUSED_LAYER = "_transformer_encoder_layer_fwd"
FUSED_LAYER_PARAMETERS = (
    *("query", "embed_dim", "num_heads", "in_proj_weight", "in_proj_bias", "out_proj_weight"),
    *("out_proj_bias", "use_gelu", "norm_first", "eps", "norm_weight", "norm_bias"),
    *("norm_weight_2", "norm_bias_2", "weight_1", "bias_1", "weight_2", "bias_2"),
    *("mask", "mask_type"),
)
"""The fused kernel of ``nn.TransformerEncoderLayer``, and its parameters."""


def attention_with_logsumexp(
    q: Float[Tensor, "sample head query d_head"],
    k: Float[Tensor, "sample head key d_head"],
    v: Float[Tensor, "sample head key d_value"],
    *,
    mask: Tensor | None,
    causal: bool,
    scaling: float,
) -> tuple[Float[Tensor, "sample head query d_value"], Tensor]:
    """Return the output of the fused kernel on CPU, and the log-sum-exp of the scores of each row.

    The axes of the second result have another order in some versions; its memory is contiguous in
    ``[sample, head, query]``. The sample and head axes of ``mask`` may have length 1.
    """
    # else the results are wrong: with torch 2.6 for all four, 2.8 for q, k and v, 2.14 for q
    q, k, v = (_with_adjacent_entries(t) for t in (q, k, v))
    if mask is not None:
        mask = _with_adjacent_entries(mask).expand(q.shape[0], -1, -1, -1)
    output, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, causal, attn_mask=mask, scale=scaling
    )
    return output, logsumexp


def _with_adjacent_entries(t: Tensor) -> Tensor:
    """Return the tensor, copied if the entries of its last axis are not adjacent in memory."""
    return t if t.stride(-1) == 1 else t.contiguous()


# What torch runs

FORWARD_FUNCTIONS = ("forward", "_call_impl")
"""Names of the functions that run during a call of a module, as found on the call stack."""


def is_recomputing() -> bool:
    """Return whether a backward pass runs in this thread, so that a forward is a recomputation."""
    return torch._C._current_graph_task_id() != -1


def is_in_vmap() -> bool:
    """Return whether ``torch.func.vmap`` is the innermost transformation that runs."""
    level = torch._C._functorch.peek_interpreter_stack()
    return level is not None and level.key() == torch._C._functorch.TransformType.Vmap


def active_function_modes() -> list[TorchFunctionMode]:
    """Return the torch function modes of this thread, the outermost first."""
    modes: list[TorchFunctionMode] = _get_current_function_mode_stack()
    return modes


def remove_function_mode(mode: TorchFunctionMode) -> None:
    """Exit an active torch function mode, even if modes that were entered later are active."""
    later = []
    while (popped := _pop_mode()) is not mode:
        later.append(popped)
    for each in reversed(later):
        _push_mode(each)


def restore_popped_mode(mode: TorchFunctionMode) -> None:
    """Put back a torch function mode that an interrupt kept off the stack.

    While the ``__torch_function__`` of a mode runs, the mode is off the stack, and a generator of
    torch puts it back. After a ``KeyboardInterrupt`` in ``contextlib``, which runs the generator,
    this happens only when the traceback of the exception is released. This function ends the
    generator, so that it does not put the mode back later.
    """
    code = inspect.unwrap(_pop_mode_temporarily).__code__
    for each in gc.get_referrers(mode):
        if isinstance(each, GeneratorType) and each.gi_code is code:
            each.close()


def is_optimized_module(module: nn.Module) -> bool:
    """Return whether a module is the result of ``torch.compile(module)``."""
    return isinstance(module, torch._dynamo.eval_frame.OptimizedModule)


def is_compiled_in_place(module: nn.Module) -> bool:
    """Return whether ``module.compile()`` was called."""
    return bool(vars(module).get("_compiled_call_impl"))


def is_compiled_function(function: Any) -> bool:
    """Return whether a function is the result of ``torch.compile(function)``."""
    disabled = getattr(function, "_torchdynamo_disable", False)
    return hasattr(function, "_torchdynamo_orig_callable") and not disabled


def is_replica(module: nn.Module) -> bool:
    """Return whether a module is a copy that ``nn.DataParallel`` made for one of its devices."""
    return bool(vars(module).get("_is_replica", False))


# Parameters, hooks and nested values in torch

MODULE_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
GLOBAL_HOOKS = ("_global_forward_pre_hooks", "_global_forward_hooks")
"""Attributes of a module, and of torch, that hold forward hooks by number."""


def global_hooks() -> list[tuple[str, Any]]:
    """Return the forward hooks that fire for every module, with the name of their kind."""
    return [
        (name.removeprefix("_global_"), hook)
        for name in GLOBAL_HOOKS
        for hook in getattr(torch_module, name).values()
    ]


def module_hooks(module: nn.Module) -> list[tuple[str, Any]]:
    """Return the forward hooks of a module, with the name of their kind."""
    return [(name, hook) for name in MODULE_HOOKS for hook in getattr(module, name).values()]


def module_tree(model: nn.Module) -> tuple[list[nn.Module], list[Any]]:
    """Return the modules of a model, breadth first, and a list that describes how they are nested.

    The list holds the class of each module, followed by the name and the index of each of its
    children. A module that several others share has one index. For the modules of a small model,
    this takes a third of the time of ``named_modules``.
    """
    found, index = [model], {model: 0}
    structure: list[Any] = []
    for module in found:  # grows in the loop
        structure.append(module.__class__)
        for name, child in module._modules.items():
            if child is None:
                continue
            at = index.get(child)
            if at is None:
                at = index[child] = len(found)
                found.append(child)
            structure.append(name)
            structure.append(at)
    return found, structure


def parameters_of(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """Return a module's own parameters by name; shared ones under each name."""
    return module._parameters


def buffers_of(module: nn.Module) -> dict[str, Tensor | None]:
    """Return a module's own buffers by name, including those that are not saved."""
    return module._buffers


def extra_state_of(module: nn.Module) -> dict[str, Any]:
    """Return the entries of a module's state dict that are not its own parameters or buffers."""
    if type(module)._save_to_state_dict is nn.Module._save_to_state_dict:
        return {}
    state: dict[str, Any] = {}
    module._save_to_state_dict(state, "", keep_vars=True)
    own = {*parameters_of(module), *buffers_of(module)}
    return {name: value for name, value in state.items() if name not in own}


def without_tensor_subclasses() -> AbstractContextManager[None]:
    """Return a context in which functions treat tensor subclasses as plain tensors."""
    context: AbstractContextManager[None] = torch._C.DisableTorchFunctionSubclass()
    return context


def leaves_of(value: Any) -> list[Any]:
    """Return the leaves of nested lists, tuples, dicts and registered types, in order."""
    return _pytree.tree_leaves(value)


# Parts of transformers

CONTINUOUS_BATCHING = ".continuous_batching"
"""A part of the names of the modules that run ``generate_batch``."""


def attention_backend(config: Any) -> str | None:
    """Return the attention implementation of a configuration; None if it has none."""
    backend: str | None = getattr(config, "_attn_implementation", None)
    return backend


def attention_setting(config: Any) -> Any:
    """Return the stored attention implementation, for :func:`restore_attention_setting`."""
    return config._attn_implementation_internal


def restore_attention_setting(config: Any, setting: Any) -> None:
    """Set the stored attention implementation, without the checks of transformers."""
    config._attn_implementation_internal = setting


def unregister_attention(interface: Any, name: str) -> None:
    """Remove a function that was registered with ``AttentionInterface.register``."""
    del interface._global_mapping[name]


def commit_of(config: Any) -> str | None:
    """Return the commit of the Hub repository that a configuration comes from."""
    commit: str | None = getattr(config, "_commit_hash", None)
    return commit


def tensor_parallel_size(module: nn.Module) -> int:
    """Return the number of processes over which a layer is split by ``tp_plan``; 1 if it is not."""
    size = vars(module).get("_tp_size")
    return size if isinstance(size, int) else 1


TOKENIZER_RULES = "_tokenizer"


def fast_tokenizer(tokenizer: Any) -> Any:
    """Return the ``tokenizers`` object of a transformers tokenizer; None if it has none."""
    return getattr(tokenizer, TOKENIZER_RULES, None)


def grown_argument(model: Any, name: str, value: Any) -> Any:
    """Return an argument of the forward as ``generate`` grows it by one position."""
    update = getattr(model, "_update_model_kwargs_for_generation", None)
    return value if update is None else update({}, {name: value})[name]


def processor_defaults(processor: Any) -> Mapping[str, Mapping[str, Any]]:
    """Return the options that the class of a processor sets at each call, by modality."""
    kinds = getattr(processor, "valid_processor_kwargs", None)
    return getattr(kinds, "_defaults", None) or {}


# Parts of accelerate


def offload_hooks(module: nn.Module) -> tuple[Any, ...]:
    """Return the hooks that accelerate put on a module."""
    hook = getattr(module, "_hf_hook", None)
    return () if hook is None else tuple(getattr(hook, "hooks", (hook,)))


def own_forward(module: nn.Module) -> Any:
    """Return the ``forward`` that was set on a module below accelerate's wrapper, or None."""
    attributes = vars(module)
    return attributes.get("_old_forward" if "_hf_hook" in attributes else "forward")
