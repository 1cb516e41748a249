"""Record attention that does not use transformers' attention interface.

A module can bypass the interface in three ways:

1. ``torch.nn.MultiheadAttention``: see :mod:`xmodal_interp.hooks.torch_attention`.
2. A direct call of ``scaled_dot_product_attention``: its queries and keys are recorded.
3. An inline softmax: its result, the probabilities, is recorded. Its scores may contain more than
   ``q k^T`` (a relative position, chunks of keys), so the call has no queries and keys, and a note.

For the second and third way, the torch functions that a module calls are observed until a module of
its class has used the interface. After that, modules of this class run unobserved.
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
from xmodal_interp.hooks.attention_modules import n_heads_of
from xmodal_interp.hooks.tap import RawCall

KERNEL = functional.scaled_dot_product_attention  # the original: inside a block it is wrapped
SOFTMAX = (functional.softmax, torch.softmax, Tensor.softmax)
_MIXES = (functional.linear, functional.conv1d, functional.conv2d, functional.conv3d)
_FAR_BELOW = 1e3  # a score this far below the largest of its row is masked
_NO_SCORE = -1e8  # a row whose largest score is below this is masked: Gemma 4 masks with -1e9

KERNEL_NOTE = "recorded without transformers' attention interface"
DENSE_NOTE = "probabilities as the module computed them; queries and keys were not recorded"
CHUNKED_NOTE = f"{DENSE_NOTE}; keys are numbered within the chunk that each query sees"


@dataclass(eq=False)
class DenseCall:
    """Probabilities that a module computed by an inline softmax.

    Rows without a visible key are NaN.

    Attributes:
        is_mixed: Whether a layer with weights mixed the probabilities before the product with the
            values.
    """

    probs: Float[Tensor, "sample head query key"]
    visible: Bool[Tensor, "sample head query key"] | None
    note: str
    is_mixed: bool = False


Heard = RawCall | DenseCall


class FunctionMode(TorchFunctionMode):
    """A torch function mode that hooks can enter and exit, by ``begin`` and ``end``."""

    def begin(self) -> None:
        """Enter the mode in this thread; do nothing if it is already active."""
        if all(mode is not self for mode in _get_current_function_mode_stack()):
            self.__enter__()  # type: ignore[no-untyped-call]

    def end(self) -> None:
        """Exit the mode, even if modes that were entered later are still active."""
        modes = [_pop_mode() for _ in _get_current_function_mode_stack()]
        for mode in reversed(modes):
            if mode is not self:
                _push_mode(mode)


class Bypass(FunctionMode):
    """Observes the torch functions that a module calls, from ``begin`` to ``end``.

    Args:
        module: Returns the module to observe, or None while none is to be observed.
        hear: Called with each attention call or softmax.
        fail: Called with an error of the observer; the model's forward continues.
    """

    def __init__(
        self,
        module: Callable[[], nn.Module | None],
        hear: Callable[[Heard], None],
        fail: Callable[[Exception], None],
    ):
        super().__init__()
        self.module, self.hear, self.fail = module, hear, fail
        self.softmaxes: list[tuple[Tensor, DenseCall]] = []  # kept so that memory is not reused

    def end(self) -> None:
        """Exit the mode, and release the results of softmaxes."""
        super().end()
        self.softmaxes.clear()

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        options: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run the function unchanged, then record its arguments and output."""
        options = options or {}
        output = function(*args, **options)
        module = self.module()
        if module is None:
            return output
        try:
            self._look(module, function, args, options, output)
        except Exception as error:  # noqa: BLE001  the model's forward continues
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

    They are converted to ``[sample, head, position, d_head]`` and a mask that hides the other
    blocks. The positions follow the order of the module's input, which is read from the strides:
    the operands are views of it, and the axis with the smaller stride varies faster.

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
    """Return ``[sample, head, query, ...]``: unfold heads from the batch axis, and join chunks."""
    t = _chunked(t, module)
    if t.ndim == 5:  # [sample, head, chunk, query, ...]
        return t.flatten(2, 3)
    if t.ndim == 3:  # [sample x head, query, ...]
        n_heads = n_heads_of(module) or 1
        n_folded = n_heads if t.shape[0] % n_heads == 0 else 1
        return t.view(-1, n_folded, *t.shape[1:])
    return t[None, None] if t.ndim == 2 else t


def _chunked(t: Tensor, module: nn.Module) -> Tensor:
    """Convert ``[sample x head, chunk, query, ...]`` to ``[sample, head, chunk, query, ...]``.

    ``HaloAttn`` of timm 1.0.31 has such operands. Any other tensor is returned unchanged.
    """
    n_heads = getattr(module, "num_heads", None)
    if t.ndim != 4 or not isinstance(n_heads, int) or n_heads < 2:
        return t
    has_its_heads = t.shape[1] in (1, n_heads, 2 * n_heads)
    return t if has_its_heads or t.shape[0] % n_heads else t.unflatten(0, (-1, n_heads))


def along_last(output: Tensor, args: tuple[Any, ...], options: Mapping[str, Any]) -> bool:
    """Whether a softmax with these arguments is over the last axis, of at least three."""
    dim = options.get("dim", args[1] if len(args) > 1 else None)
    return output.ndim > 2 and dim in (-1, output.ndim - 1)
