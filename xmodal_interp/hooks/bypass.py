"""Attention that does not ask the interface for its function, heard all the same.

Three ways lead past the interface:

1. ``torch.nn.MultiheadAttention``: see :mod:`xmodal_interp.hooks.multihead`.
2. ``scaled_dot_product_attention`` called directly: it is given queries and keys.
3. A softmax written out: its result, the probabilities, is kept; what its scores are made of (a
   relative position, chunks of keys) is not known, so the call says so.

A module is listened to in the second and third way until a module of its class has asked the
interface: from then on its operations run undisturbed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import (
    TorchFunctionMode,
    _get_current_function_mode_stack,
    _pop_mode,
    _push_mode,
)

from xmodal_interp.attention.masks import hidden_below
from xmodal_interp.hooks.heads import n_heads_of
from xmodal_interp.hooks.tapping import RawCall

KERNEL = functional.scaled_dot_product_attention  # another stands there while a block is open
SOFTMAX = (functional.softmax, torch.softmax, Tensor.softmax)
_MIXES = (functional.linear, functional.conv1d, functional.conv2d, functional.conv3d)
_FAR_BELOW = 1e3  # the least of a row's scores under its best one that only a mask can lead to
_NO_SCORE = -1e8  # the best score of a row that only a mask can lead to: Gemma 4 hides by -1e9

KERNEL_NOTE = "heard beside transformers' attention interface"
DENSE_NOTE = "probabilities as the module computed them: queries and keys do not carry its scores"
CHUNKED_NOTE = f"{DENSE_NOTE}; keys are counted within the chunk that each query sees"


@dataclass(eq=False)
class DenseCall:
    """Probabilities that a module computed by a softmax of its own.

    Rows that see nothing are NaN.

    Attributes:
        is_mixed: Whether the module's weights were applied to them before the values were weighted.
    """

    probs: Float[Tensor, "sample head query key"]
    visible: Bool[Tensor, "sample head query key"] | None
    note: str
    is_mixed: bool = False


Heard = RawCall | DenseCall


class FunctionMode(TorchFunctionMode):
    """A torch function mode that hooks put on and take off, from ``begin`` to ``end``."""

    def begin(self) -> None:
        """Start, in this thread; nothing changes if it is on already."""
        if all(mode is not self for mode in _get_current_function_mode_stack()):
            self.__enter__()  # type: ignore[no-untyped-call]

    def end(self) -> None:
        """Stop, also where modes that were entered later were never exited."""
        modes = [_pop_mode() for _ in _get_current_function_mode_stack()]
        for mode in reversed(modes):
            if mode is not self:
                _push_mode(mode)


class Bypass(FunctionMode):
    """Listens to the torch functions that a module calls, from ``begin`` to ``end``."""

    def __init__(
        self,
        module: Callable[[], nn.Module | None],
        hear: Callable[[Heard], None],
        fail: Callable[[Exception], None],
    ):
        super().__init__()
        self.module, self.hear, self.fail = module, hear, fail
        self.softmaxes: list[tuple[Tensor, DenseCall]] = []  # held: their memory is not reused

    def end(self) -> None:
        """Stop, and let the results of softmaxes go."""
        super().end()
        self.softmaxes.clear()

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        options: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run the function as it is; then look at what it was given."""
        options = options or {}
        output = function(*args, **options)
        module = self.module()
        if module is None:
            return output
        try:
            self._look(module, function, args, options, output)
        except Exception as error:  # noqa: BLE001  the model's forward goes on
            self.fail(error)
        return output

    def _look(
        self,
        module: nn.Module,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        options: Mapping[str, Any],
        output: Any,
    ) -> None:
        if function is KERNEL:
            self.hear(kernel_call(module, args, options, output))
        elif function in SOFTMAX and isinstance(output, Tensor):
            scores = args[0] if args else options["input"]
            if along_last(output, args, options):
                heard = _of_softmax(module, scores, output)
                self.softmaxes.append((output.detach(), heard))
                self.hear(heard)
        elif function in _MIXES and self.softmaxes:
            given = args[0] if args else options["input"]
            for probs, heard in self.softmaxes:
                same_memory = probs.untyped_storage().data_ptr()
                heard.is_mixed |= same_memory == given.untyped_storage().data_ptr()


def kernel_call(
    module: nn.Module, args: tuple[Any, ...], options: Mapping[str, Any], output: Tensor
) -> RawCall:
    """A call of ``scaled_dot_product_attention`` by a module, by the names it has there."""
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
        q, k, v = (_four_axes(t, module) for t in operands)
        heads_last = _four_axes(output, module).transpose(1, 2)
        if mask is not None:
            mask = _four_axes(mask, module) if mask.ndim > 2 else mask[None, None]
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
    """Operands ``[sample, head, block, position, d_head]``: a query sees the keys of its own block.

    They become ``[sample, head, position, d_head]``, and the other blocks are hidden by a mask.
    The positions are put in the order of the module's input, of which the operands are views: the
    axis with the smaller stride is the one that runs faster there.

    Attributes:
        heads_axis: The axis of the heads, 1 or 2.
        n_blocks: How many blocks there are.
        n_queries: The queries of one block.
        n_keys: The keys of one block.
        blocks_run_faster: Whether neighbouring positions are in different blocks.
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
        """``[sample, head, position, ...]``."""
        split = self._split(t)
        return (split.transpose(2, 3) if self.blocks_run_faster else split).flatten(2, 3)

    def mask(self, mask: Tensor | None, *, causal: bool) -> Tensor:
        """``[sample | 1, head | 1, query, key]``, over all blocks."""
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
        """``[sample, head, block, position, ...]``."""
        if self.heads_axis == 1:
            return t.flatten(2, -3)
        return t.transpose(1, 2).flatten(2, -3)

    def _flat_pairs(self, pairs: Tensor) -> Tensor:
        """From ``[..., block, query, block, key]`` to ``[..., query, key]``."""
        if self.blocks_run_faster:
            pairs = pairs.transpose(-4, -3).transpose(-2, -1)
        return pairs.flatten(-2).flatten(-3, -2)


def _of_softmax(module: nn.Module, scores: Tensor, output: Tensor) -> DenseCall:
    given = scores.detach()
    lowest = hidden_below(given.dtype) if given.is_floating_point() else -torch.inf
    best = given.amax(-1, keepdim=True)
    hidden = (given <= lowest) | (given < best - _FAR_BELOW) | (best < _NO_SCORE)
    visible = None if not hidden.any() else ~hidden
    probs = output.detach().float()
    if visible is not None:
        probs = probs.masked_fill(~visible.any(-1, keepdim=True), torch.nan)
    note = CHUNKED_NOTE if _chunked(output, module).ndim == 5 else DENSE_NOTE
    return DenseCall(
        _four_axes(probs, module).clone(),
        None if visible is None else _four_axes(visible, module),
        note,
    )


def _four_axes(t: Tensor, module: nn.Module) -> Tensor:
    """``[sample, head, query, ...]``: heads folded into the batch come apart, chunks are joined."""
    t = _chunked(t, module)
    if t.ndim == 5:  # [sample, head, chunk, query, ...]
        return t.flatten(2, 3)
    if t.ndim == 3:  # [sample x head, query, ...]
        n_heads = n_heads_of(module) or 1
        n_folded = n_heads if t.shape[0] % n_heads == 0 else 1
        return t.view(-1, n_folded, *t.shape[1:])
    return t[None, None] if t.ndim == 2 else t


def _chunked(t: Tensor, module: nn.Module) -> Tensor:
    """``[sample, head, chunk, query, ...]`` from ``[sample x head, chunk, query, ...]``.

    ``HaloAttn`` of timm 1.0.31 has its operands so. Any other tensor is returned as it is.
    """
    n_heads = getattr(module, "num_heads", None)
    if t.ndim != 4 or not isinstance(n_heads, int) or n_heads < 2:
        return t
    has_its_heads = t.shape[1] in (1, n_heads, 2 * n_heads)
    return t if has_its_heads or t.shape[0] % n_heads else t.unflatten(0, (-1, n_heads))


def along_last(output: Tensor, args: tuple[Any, ...], options: Mapping[str, Any]) -> bool:
    """Whether a softmax with these arguments is over the keys of queries: the last of many axes."""
    dim = options.get("dim", args[1] if len(args) > 1 else None)
    return output.ndim > 2 and dim in (-1, output.ndim - 1)
