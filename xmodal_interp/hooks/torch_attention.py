"""Attention that is computed by a function of torch: observe the calls, and read their operands.

Four functions compute attention in torch 2.14:

* ``torch.nn.functional.scaled_dot_product_attention``, which takes queries, keys and values;
* ``torch.nn.functional.multi_head_attention_forward``, which also computes the projections;
* ``torch._native_multi_head_attention`` and ``torch._transformer_encoder_layer_fwd``: the fused
  kernels of ``nn.MultiheadAttention`` and ``nn.TransformerEncoderLayer`` in evaluation mode.

1. Inside a block each function is wrapped so that observers see every call, by any module;
   arguments and results stay the same (:func:`observe_torch_attention`). If one of these functions
   calls another one, only the outer call is observed. Code that imported a function earlier, by
   ``from torch.nn.functional import scaled_dot_product_attention``, is not observed.
2. A call is converted to a :class:`RawCall` (:func:`kernel_call`, :func:`multihead_call`). The last
   three functions take hidden states and the weights of the projections, so queries and keys are
   computed from their arguments.

Two properties of torch 2.14 (``torch/nn/modules/activation.py`` and ``transformer.py``) determine
how torch's own modules are observed:

* In evaluation mode they call fused kernels, unless a ``TorchFunctionMode`` is active or, for an
  encoder layer, one of its modules has a hook. The fused kernels round differently, so these
  modules get no mode and no hook (:func:`unhooked_modules`); their ``forward`` is wrapped instead.
* An encoder in evaluation mode converts a padded batch to a nested tensor, so the attention
  receives samples of different lengths. They are padded here; padding queries have no visible key.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from xmodal_interp.contexts import Observers
from xmodal_interp.hooks.attention_modules import n_heads_of
from xmodal_interp.hooks.raw_calls import RawCall
from xmodal_interp.upstream import (
    FUSED_LAYER,
    FUSED_LAYER_PARAMETERS,
    FUSED_MULTIHEAD,
    FUSED_MULTIHEAD_PARAMETERS,
)

KERNEL = functional.scaled_dot_product_attention  # the original: inside a block it is wrapped
KERNEL_NOTE = "recorded without transformers' attention interface"

SCALED_DOT_PRODUCT = "scaled_dot_product_attention"
MULTIHEAD = "multi_head_attention_forward"
_NAMESPACES: dict[str, Any] = {
    SCALED_DOT_PRODUCT: functional,
    MULTIHEAD: functional,
    FUSED_MULTIHEAD: torch,
    FUSED_LAYER: torch,
}

KernelObserver = Callable[[str, tuple[Any, ...], Mapping[str, Any], Any], None]
"""An observer: takes the function's name, its arguments by position and by name, and its result."""


def observe_torch_attention(observer: KernelObserver, stack: ExitStack) -> None:
    """Call ``observer`` after every call of this thread until the stack is closed."""
    _observers.register(observer, stack)


class _Observed:
    """A function of torch that calls the observers after each call."""

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        functools.update_wrapper(self, function)
        self.name, self.function = name, function

    def __call__(self, *args: Any, **options: Any) -> Any:
        if torch.compiler.is_compiling() or not _observers.active() or _inside.get():
            return self.function(*args, **options)
        try:
            _inside.set(True)  # in the try block, as an interrupt can arrive after it
            output = self.function(*args, **options)
        finally:
            _inside.set(False)
        for observer in _observers.active():
            observer(self.name, args, options, output)
        return output


def _install() -> None:
    for name, home in _NAMESPACES.items():
        function = getattr(home, name)
        if not isinstance(function, _Observed):
            setattr(home, name, _Observed(name, function))


def _remove() -> None:
    for name, home in _NAMESPACES.items():
        function = getattr(home, name)
        if isinstance(function, _Observed):  # not replaced by other code
            setattr(home, name, function.function)


_observers: Observers[KernelObserver] = Observers("torch_attention", _install, _remove)
_inside: ContextVar[bool] = ContextVar("xmodal_interp_in_kernel", default=False)

_TORCH_MODULES = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerEncoder)


def unhooked_modules(modules: Iterable[nn.Module]) -> set[nn.Module]:
    """Return those of a model's modules whose results change if they have hooks.

    These are torch's own attention modules and all modules inside torch's encoder layers.
    """
    found: set[nn.Module] = set()
    for module in modules:
        if is_torch_attention(module):
            found.add(module)
            if isinstance(module, nn.TransformerEncoderLayer):
                found.update(module.modules())
    return found


def is_torch_attention(module: nn.Module) -> bool:
    """Whether a module runs torch's own attention code, which checks for modes and hooks."""
    if not isinstance(module, _TORCH_MODULES):
        return False
    owner = next(kind for kind in _TORCH_MODULES if isinstance(module, kind))
    forward = type(module).forward
    return forward is owner.forward or "super" in forward.__code__.co_names


def kernel_call(
    module: nn.Module, args: tuple[Any, ...], options: Mapping[str, Any], output: Tensor
) -> RawCall:
    """Return a call of ``scaled_dot_product_attention`` by a module as a :class:`RawCall`.

    Args:
        module: The module.
        args: The arguments by position.
        options: The arguments by name.
        output: The result.
    """
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given = {**dict(zip(names, args, strict=False)), **options}
    operands = [given[name] for name in names[:3]]
    mask, causal = given.get("attn_mask"), bool(given.get("is_causal"))
    if max(t.ndim for t in operands) > 4:
        blocks = _Blocks.of(operands, module)
        q, k, v = (blocks.flat(t) for t in operands)
        heads_last = blocks.flat(output).transpose(1, 2)
        mask, causal = blocks.mask(mask, causal=causal), False
    else:
        q, k, v = (four_axes(t, module) for t in operands)
        heads_last = four_axes(output, module).transpose(1, 2)
        if mask is not None:
            mask = four_axes(mask, module) if mask.ndim > 2 else mask[None, None]
            mask = mask.expand(*mask.shape[:2], q.shape[2], k.shape[2])
    kept = {
        "scaling": given.get("scale"),
        "is_causal": causal,
        "dropout": given.get("dropout_p", 0.0),
    }
    return RawCall(
        module, q, k, v, mask, "sdpa", kept, output=heads_last.detach(), note=KERNEL_NOTE
    )


@dataclass(frozen=True)
class _Blocks:
    """Operands ``[sample, head, block, position, d_head]``; queries attend within their block.

    They are converted to ``[sample, head, position, d_head]`` and a mask that hides the other
    blocks. The positions have the order of the module's input. The operands are views of it, so
    their strides give the order: the axis with the smaller stride varies faster.

    Attributes:
        heads_axis: The axis of the heads, 1 or 2.
        n_blocks: How many blocks there are.
        n_queries: The queries of one block.
        n_keys: The keys of one block.
        blocks_run_faster: Whether neighbouring positions of the input are in different blocks.
    """

    heads_axis: int
    n_blocks: int
    n_queries: int
    n_keys: int
    blocks_run_faster: bool

    @classmethod
    def of(cls, operands: Sequence[Tensor], module: nn.Module) -> _Blocks:
        query, key, value = operands
        n_heads = n_heads_of(module)
        heads_axis = 2 if n_heads == query.shape[2] != query.shape[1] else 1
        axis = 3 - heads_axis
        return cls(
            heads_axis,
            query.shape[axis : axis + query.ndim - 4].numel(),
            query.shape[-2],
            key.shape[-2],
            value.ndim == 5 and value.stride(axis) < value.stride(-2),
        )

    def flat(self, t: Tensor) -> Tensor:
        """Return ``[sample, head, position, ...]``."""
        split = self._split(t)
        return (split.transpose(2, 3) if self.blocks_run_faster else split).flatten(2, 3)

    def mask(self, mask: Tensor | None, *, causal: bool) -> Tensor:
        """Return the mask over all blocks, ``[sample | 1, head | 1, query, key]``."""
        own = torch.eye(self.n_blocks, dtype=torch.bool)[:, None, :, None]
        own = own.expand(-1, self.n_queries, -1, self.n_keys)  # [block, query, block, key]
        if causal:
            own = own & torch.ones(self.n_queries, self.n_keys).tril().bool()[:, None]
        if mask is None:
            return self._flat_pairs(own[None, None])
        own = own.to(mask.device)
        whole = self._split(mask) if mask.ndim > 4 else mask[(None,) * (5 - mask.ndim)]
        whole = whole[..., None, :]  # [sample, head, block | 1, query, 1, key]
        hidden = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        return self._flat_pairs(torch.where(own, whole, hidden))

    def _split(self, t: Tensor) -> Tensor:
        """Return ``[sample, head, block, position, ...]``."""
        if self.heads_axis == 1:
            return t.flatten(2, -3)
        return t.transpose(1, 2).flatten(2, -3)

    def _flat_pairs(self, pairs: Tensor) -> Tensor:
        """Convert ``[..., block, query, block, key]`` to ``[..., query, key]``."""
        if self.blocks_run_faster:
            pairs = pairs.transpose(-4, -3).transpose(-2, -1)
        return pairs.flatten(-2).flatten(-3, -2)


def four_axes(t: Tensor, module: nn.Module) -> Tensor:
    """Convert to ``[sample, head, query, ...]``: split heads from the batch axis, join chunks."""
    t = chunked(t, module)
    if t.ndim == 5:  # [sample, head, chunk, query, ...]
        return t.flatten(2, 3)
    if t.ndim == 3:  # [sample x head, query, ...]
        n_heads = n_heads_of(module) or 1
        n_folded = n_heads if t.shape[0] % n_heads == 0 else 1
        return t.view(-1, n_folded, *t.shape[1:])
    return t[None, None] if t.ndim == 2 else t


def chunked(t: Tensor, module: nn.Module) -> Tensor:
    """Convert ``[sample x head, chunk, query, ...]`` to ``[sample, head, chunk, query, ...]``.

    ``HaloAttn`` of timm 1.0.31 has such operands. Any other tensor is returned unchanged.
    """
    n_heads = getattr(module, "num_heads", None)
    if t.ndim != 4 or not isinstance(n_heads, int) or n_heads < 2:
        return t
    has_its_heads = t.shape[1] in (1, n_heads, 2 * n_heads)
    return t if has_its_heads or t.shape[0] % n_heads else t.unflatten(0, (-1, n_heads))


_PARAMETERS = {
    MULTIHEAD: tuple(inspect.signature(functional.multi_head_attention_forward).parameters),
    FUSED_MULTIHEAD: FUSED_MULTIHEAD_PARAMETERS,
    FUSED_LAYER: FUSED_LAYER_PARAMETERS,
}


def multihead_call(
    module: nn.Module, function: str, args: tuple[Any, ...], options: Mapping[str, Any]
) -> RawCall:
    """Return the attention call of one of torch's functions.

    Args:
        module: The attention module.
        function: The name of the function.
        args: Its arguments by position.
        options: Its arguments by name.
    """
    given = {**dict(zip(_PARAMETERS[function], args, strict=False)), **options}
    with torch.no_grad():
        if function == MULTIHEAD:
            return _unfused(module, given)
        return _fused(module, given)


def _fused(module: nn.Module, given: Mapping[str, Any]) -> RawCall:
    query, queries_exist = _padded(given["query"])
    key, keys_exist = _padded(given.get("key", given["query"]))
    value, _ = _padded(given.get("value", given["query"]))
    if given.get("norm_first"):
        norm = given["norm_weight"], given["norm_bias"], given["eps"]
        query = key = value = functional.layer_norm(query, query.shape[-1:], *norm)
    weights, biases = given["in_proj_weight"].chunk(3), given["in_proj_bias"].chunk(3)
    q, k, v = (
        _heads(functional.linear(x, weight, bias), given["num_heads"])
        for x, weight, bias in zip((query, key, value), weights, biases, strict=True)
    )
    mask = None if given.get("mask") is None else ~_hidden(given["mask"], given.get("mask_type"))
    if queries_exist is not None and keys_exist is not None:
        inside = queries_exist[:, None, :, None] & keys_exist[:, None, None]
        mask = inside if mask is None else mask & inside
    return _call(module, q, k, v, mask)


def _padded(states: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return hidden states ``[sample, position, d_model]``, and a mask of existing positions.

    The second result is None for states that are not a nested tensor.
    """
    states = states.detach()
    if not states.is_nested:
        return states, None
    padded = torch.nested.to_padded_tensor(states, 0.0)
    lengths = torch.tensor([len(each) for each in states.unbind()], device=padded.device)
    return padded, torch.arange(padded.shape[1], device=padded.device) < lengths[:, None]


def _hidden(mask: Tensor, mask_type: int | None) -> Tensor:
    """Return True where the fused kernels hide a key; they convert every mask to booleans."""
    hidden = mask.bool()
    if mask_type == 1 and hidden.ndim == 2:  # [sample, key]
        return hidden[:, None, None]
    return hidden[None, None] if hidden.ndim == 2 else hidden


def _unfused(module: nn.Module, given: Mapping[str, Any]) -> RawCall:
    query, key, value = (given[name].detach() for name in ("query", "key", "value"))
    if query.ndim == 2:  # no batch
        query, key, value = (t[:, None] for t in (query, key, value))
    query, key, value = (t.transpose(0, 1) for t in (query, key, value))
    n_heads = given["num_heads"]
    names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
    weights = (
        [given[name] for name in names]
        if given.get("use_separate_proj_weight")
        else given["in_proj_weight"].chunk(3)
    )
    bias = given["in_proj_bias"]
    biases = (None,) * 3 if bias is None else bias.chunk(3)
    flat = [
        functional.linear(x, weight, bias)
        for x, weight, bias in zip((query, key, value), weights, biases, strict=True)
    ]
    for place, name in ((1, "static_k"), (2, "static_v")):
        if given.get(name) is not None:  # [sample * head, key, d_head]
            flat[place] = (
                given[name].detach().unflatten(0, (-1, n_heads)).transpose(1, 2).flatten(2)
            )
    for place, name in ((1, "bias_k"), (2, "bias_v")):
        if given.get(name) is not None:
            flat[place] = torch.cat([flat[place], given[name].expand(len(query), -1, -1)], 1)
    if given.get("add_zero_attn"):
        flat[1:] = [functional.pad(t, (0, 0, 0, 1)) for t in flat[1:]]
    q, k, v = (_heads(t, n_heads) for t in flat)
    unmasked = given.get("key_padding_mask") is None and not given.get("need_weights", True)
    if given.get("is_causal") and unmasked:  # torch ignores the mask in this case
        return _call(module, q, k, v, None, causal=True)
    return _call(module, q, k, v, _mask(given, n_heads, len(q), k.shape[2]))


def _heads(flat: Tensor, n_heads: int) -> Tensor:
    by_head: Tensor = flat.unflatten(-1, (n_heads, -1))
    return by_head.transpose(1, 2)


def _mask(given: Mapping[str, Any], n_heads: int, n_samples: int, n_keys: int) -> Tensor | None:
    """Combine both masks into one, True (or 0) where visible; ``torch.nn`` uses True for hidden."""
    parts: list[Tensor] = []
    hidden, padding = given.get("attn_mask"), given.get("key_padding_mask")
    if hidden is not None:
        whole = hidden[None] if hidden.ndim == 2 else hidden
        parts.append(whole.unflatten(0, (-1, 1 if len(whole) == 1 else n_heads)))
    if padding is not None:
        parts.append(padding.view(n_samples, 1, 1, -1))
    if not parts:
        return None
    missing = n_keys - parts[0].shape[-1]  # keys that the function adds itself are always visible
    if all(part.dtype == torch.bool for part in parts):
        hidden = functools.reduce(torch.logical_or, parts)
        return functional.pad(~hidden, (0, missing), value=True)
    added = [
        torch.zeros(part.shape, dtype=torch.float32, device=part.device).masked_fill(
            part, -torch.inf
        )
        if part.dtype == torch.bool
        else part
        for part in parts
    ]
    return functional.pad(functools.reduce(torch.add, added), (0, missing))


def _call(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, causal: bool = False
) -> RawCall:
    if mask is not None:
        mask = mask.expand(-1, -1, q.shape[2], -1)
    return RawCall(module, q, k, v, mask, "sdpa", {"is_causal": causal}, note=KERNEL_NOTE)
