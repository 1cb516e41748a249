"""Measure token norms, and the share of attention in the update of each token's residual stream.

The norm of a token is the Euclidean norm of its hidden state after a block, in float32.

The share of a token is ``|u| / (|u| + |x|)`` (Euclidean norms, float32). ``x`` is the residual
stream and ``u`` the vector that attention adds to it: the output of the attention module, after
every norm, multiplier, layer scale or gate between the module and the addition. A similar measure
is GlobEnc (Modarressi et al. 2022, arXiv 2205.03286).

1. The residual stream is the argument of a block of the layer stack. In blocks with norms after the
   additions, it is also the argument of the attention module.
2. While the block runs, a torch function mode observes the operations outside of its attention
   modules, and marks tensors that are computed from the attention's output.
3. The first addition of such a tensor to the residual stream is the update. After that, sums and
   products of the stream with other tensors are the stream.

In a parallel block, the attention output is first added to the MLP's output. It is the update if
that sum is added to the stream unchanged. If no update is found by these rules, the call has no
share, and an error is raised at the end of the recording.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from xmodal_interp.contexts import own_context
from xmodal_interp.errors import CaptureError
from xmodal_interp.hooks.attention_modules import Identity, block_of
from xmodal_interp.hooks.inline_attention import FunctionMode
from xmodal_interp.hooks.key_cache import KeptCall
from xmodal_interp.upstream import is_recomputing, leaves_of
from xmodal_interp.vocabulary import TOWERS

_ADDITIONS = ("add", "add_", "__add__", "__radd__", "__iadd__")
_PRODUCTS = ("mul", "__mul__", "__rmul__")
_SAME_VALUES = (
    *("to", "type", "type_as", "float", "half", "bfloat16", "double", "clone", "contiguous"),
    *("detach", "view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze"),
)


class UpdateShares:
    """Finds the vectors that attention adds to the residual stream, during one recording."""

    def __init__(self, model: nn.Module, known: Mapping[nn.Module, Identity]) -> None:
        self.known = dict(known)
        self.blocks = {module: block_of(model, identity) for module, identity in known.items()}
        self.running: list[_BlockRun] = []
        self.found: set[Identity] = set()
        self.missed: dict[Identity, None] = {}

    def register(self, stack: ExitStack) -> None:
        """Register hooks on the blocks until the stack is closed."""
        stack.callback(self._stop)
        own = stack.enter_context(own_context())
        enter, leave = own(self._enter), own(self._leave)
        for block in {block for block in self.blocks.values() if block is not None}:
            stack.callback(block.register_forward_pre_hook(enter, with_kwargs=True).remove)
            stack.callback(block.register_forward_hook(leave, always_call=True).remove)

    def pause(self) -> None:
        """Stop observing while an attention module runs."""
        for run in self.running:
            run.mode.end()

    def resume(
        self, module: nn.Module, given: Sequence[Any], output: Any, kept: Sequence[KeptCall]
    ) -> None:
        """Resume observing after an attention module has run.

        Args:
            module: The module.
            given: Its arguments.
            output: Its output.
            kept: The calls of this run that were kept; their shares are set when they are found.
        """
        if kept:
            identity, block = self.known.get(module), self.blocks.get(module)
            run = next((run for run in reversed(self.running) if run.block is block), None)
            outputs = _tensors(output[0] if isinstance(output, (tuple, list)) else output)
            if identity is None or run is None or not outputs:
                self._miss(kept)
            else:
                self._close(run)
                run.given += _tensors(given)
                run.follow(outputs[0], kept)
                run.calls += kept
        for run in self.running:
            run.mode.begin()

    def check(self) -> None:
        """Raise CaptureError if a recorded call has no share."""
        if not self.missed:
            return
        towers = {identity.tower for identity in self.missed}
        whole = [
            tower
            for tower in TOWERS
            if tower not in towers and any(each.tower == tower for each in self.found)
        ]
        advice = "Leave out norms."
        if whole:
            advice = f"Record the other towers alone: Keep(norms=True, towers={tuple(whole)!r})."
        first = next(iter(self.missed))
        raise CaptureError(
            "norms=True requires that the output of attention is added to the residual stream, but "
            f"no addition was found for {first.module}, the first of {len(self.missed)} such "
            f"layers ({', '.join(sorted(towers))}). {advice}"
        )

    def _enter(self, block: nn.Module, args: Any, options: dict[str, Any]) -> None:
        if is_recomputing():  # a recomputation for gradients
            return
        run = _BlockRun(block, _tensors([*args, *options.values()]))
        self.running.append(run)
        run.mode.begin()

    def _leave(self, block: nn.Module, args: Any, output: Any) -> None:  # noqa: ARG002
        """End the runs of a block; ``output`` is None if its forward raised an error."""
        while any(run.block is block for run in self.running):
            run = self.running[-1]
            run.mode.end()  # before the run is forgotten, as an interrupt can arrive in between
            self.running.pop()
            self._close(run)
            if run.block is block:
                run.note_norms(output)

    def _close(self, run: _BlockRun) -> None:
        """Note whether the update of a block's last attention module was found."""
        if run.kept and not run.done:
            self._miss(run.kept)
        self.found |= {_identity(kept) for kept in run.kept if run.done}

    def _miss(self, kept: Sequence[KeptCall]) -> None:
        self.missed |= dict.fromkeys(map(_identity, kept))

    def _stop(self) -> None:
        while self.running:
            self.running.pop().mode.end()


@dataclass(eq=False)
class _BlockRun:
    """One run of a block.

    Attributes:
        block: The block.
        given: Tensor arguments of the block and of the attention modules in it.
        calls: All calls that were kept during the run.
        kept: The calls whose update is searched for.
        done: Whether the update was found.
        rows: The shape of the attention's output, without the last axis and axes of length 1.
        stream: Tensors that are the residual stream, by id.
        derived: Tensors computed from the attention's output, by id.
        mixed: Sums of a derived tensor and another tensor: the sum and the derived tensor, by the
            id of the sum.
    """

    block: nn.Module
    given: list[Tensor]
    calls: list[KeptCall] = field(default_factory=list)
    kept: Sequence[KeptCall] = ()
    done: bool = False
    rows: tuple[int, ...] = ()
    stream: dict[int, Tensor] = field(default_factory=dict)
    derived: dict[int, Tensor] = field(default_factory=dict)
    mixed: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.mode = FunctionMode(self._before, self._after)

    def follow(self, output: Tensor, kept: Sequence[KeptCall]) -> None:
        """Start to search for the update that is computed from an attention module's output."""
        self.kept, self.done, self.rows = kept, False, _rows(output)
        self.derived, self.mixed = {id(output): output}, {}

    def note_norms(self, output: Any) -> None:
        """Set the token norms ``[sample, query]`` of the calls, from the output of the block."""
        by_module: dict[str, list[KeptCall]] = {}
        for kept in self.calls:
            by_module.setdefault(kept.call.module, []).append(kept)
        widths = {each.shape[-1] for each in self.given}
        states = [each for each in _tensors(output) if each.ndim and each.shape[-1] in widths]
        for of_module in by_module.values():
            sizes = [kept.call.n_samples * kept.call.n_queries for kept in of_module]
            if not states or math.prod(states[0].shape[:-1]) != sum(sizes):
                continue
            parts = states[0].detach().float().norm(dim=-1).flatten().split(sizes)
            for kept, part in zip(of_module, parts, strict=True):
                norm = part.view(kept.call.n_samples, kept.call.n_queries)
                kept.call = replace(kept.call, token_norm=norm)

    def _before(
        self, function: Callable[..., Any], args: Sequence[Any], options: Mapping[str, Any]
    ) -> None:
        """Find the update; called before the operation, because it may be in place."""
        if self.done or not self.kept or _name(function) not in _ADDITIONS:
            return
        for one, other in _pairs(args, options):
            update = self.derived.get(id(one))
            update = self.mixed[id(one)][1] if id(one) in self.mixed else update
            if update is not None and _alike(update, other) and self._is_stream(other):
                scale = options.get("alpha", 1) if one is not args[0] else 1
                self._found(scale * update.detach(), other.detach())
                return

    def _after(
        self,
        function: Callable[..., Any],
        args: Sequence[Any],
        options: Mapping[str, Any],
        output: Any,
    ) -> None:
        """Note which tensors are the stream, or are computed from the attention's output."""
        name, results = _name(function), _tensors(output)
        if not results:
            return
        if name in _ADDITIONS:
            pairs = list(_pairs(args, options))
            if any(self._is_stream(one) and one.numel() == results[0].numel() for one, _ in pairs):
                self.stream[id(results[0])] = results[0]
                return
            for one, other in pairs:
                whole = one.shape == other.shape
                if id(one) in self.derived and id(other) not in self.derived and whole:
                    self.mixed[id(results[0])] = (results[0], one)
                    self.derived.pop(id(results[0]), None)
                    return
        if name in (*_PRODUCTS, *_SAME_VALUES) and self._carries_on(args, results[0]):
            self.stream[id(results[0])] = results[0]
        elif not self.done and self.kept:
            given = _tensors([*args, *options.values()])
            if any(id(each) in self.derived for each in given):
                self.derived |= {id(each): each for each in results}

    def _carries_on(self, args: Sequence[Any], result: Tensor) -> bool:
        """Return whether a product, copy, cast or view has all elements of the residual stream."""
        return any(
            isinstance(each, Tensor)
            and each.numel() == result.numel()
            and id(each) not in self.derived
            and self._is_stream(each)
            for each in args
        )

    def _is_stream(self, tensor: Tensor) -> bool:
        """Return whether a tensor is the residual stream, a view or a copy on another device."""
        if id(tensor) in self.stream or any(each is tensor for each in self.given):
            return True
        for each in self.given:
            moved = each.device != tensor.device and each.shape == tensor.shape
            if moved and torch.equal(each.to(tensor), tensor):
                return True
            if each.numel() == tensor.numel() and each.data_ptr() == tensor.data_ptr():
                return each.is_contiguous() and tensor.is_contiguous()
        return False

    def _found(self, update: Tensor, stream: Tensor) -> None:
        """Set the shares ``[sample, query]`` of the calls that one run of a module made."""
        sizes = [kept.call.n_samples * kept.call.n_queries for kept in self.kept]
        if _rows(update) != self.rows or math.prod(self.rows) != sum(sizes):
            return
        added, carried = (each.float().norm(dim=-1).flatten() for each in (update, stream))
        tiny = torch.finfo(torch.float32).tiny
        parts = (added / (added + carried).clamp(min=tiny)).split(sizes)
        for kept, part in zip(self.kept, parts, strict=True):
            share = part.view(kept.call.n_samples, kept.call.n_queries)
            kept.call = replace(kept.call, update_share=share)
        self.done = True
        self.derived, self.mixed = {}, {}


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", "")


def _pairs(args: Sequence[Any], options: Mapping[str, Any]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the two tensors of an addition, in both orders."""
    both = [*args, *(options[name] for name in ("input", "other") if name in options)]
    if len(both) >= 2 and all(isinstance(each, Tensor) for each in both[:2]):
        yield both[0], both[1]
        yield both[1], both[0]


def _tensors(value: Any) -> list[Tensor]:
    """Return the floating point tensors in a value, in order."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    leaves = leaves_of(value)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _rows(tensor: Tensor) -> tuple[int, ...]:
    """Return the lengths of all axes except the last, without those of length 1."""
    return tuple(n for n in tensor.shape[:-1] if n != 1)


def _alike(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors have the same rows of the same width."""
    return _rows(one) == _rows(other) and one.shape[-1] == other.shape[-1]


def _identity(kept: KeptCall) -> Identity:
    call = kept.call
    return Identity(call.module, call.tower, call.kind, call.layer)
