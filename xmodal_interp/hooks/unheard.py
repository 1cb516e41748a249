"""Attention that ran and is in no recording: what the doctor looks for, taking its time.

1. Every torch function of a forward is listened to: a call of a fused kernel is attention, and so
   are probabilities, the result of a softmax over the last axis, that weigh values in a product.
2. What is computed in another way shows in what it does: of the blocks of a layer stack, one in
   which nothing was heard, while others of its class were, must not mix tokens. The first token
   that it is given is changed; the other tokens that it returns must stay.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree

from xmodal_interp.hooks.bypass import KERNEL, SOFTMAX, along_last
from xmodal_interp.hooks.callers import callers
from xmodal_interp.hooks.modules import weighs_no_tokens
from xmodal_interp.hooks.recording import Recording

_KERNELS = (KERNEL, functional.multi_head_attention_forward)
_PRODUCTS = (
    *(torch.matmul, torch.bmm, torch.baddbmm, torch.einsum),
    *(Tensor.matmul, Tensor.bmm, Tensor.baddbmm, Tensor.__matmul__),
)
_NO_TOKENS = re.compile(r"HyperConnection|Router|Gate$")  # but streams of a residual, experts
_MARK = "_xmodal_interp_probs"  # an attribute of tensors that hold probabilities


def unheard_attention(
    model: nn.Module, run: Callable[[], object], recording: Recording
) -> list[str]:
    """Names of the modules whose attention a recording of the same run does not have.

    Args:
        model: The model.
        run: Runs it once more, as it was run for the recording.
        recording: What was heard of it.
    """
    without_matrix = {each.module for each in recording.without_matrix}
    accounted = {call.module for call in recording.calls} | without_matrix
    with _Everything(model) as everything:
        run()
    missed = {outer[0] for outer in everything.found if accounted.isdisjoint(outer)}
    for path in _silent_blocks(model, accounted):
        if not any(_inside(each, path) for each in missed) and _mixes_tokens(model, path, run):
            missed.add(path)
    return sorted(missed)


class _Everything(TorchFunctionMode):
    """Finds attention of any class: of each, the modules that were running, innermost first."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.paths = {module: path for path, module in model.named_modules()}
        self.found: set[tuple[str, ...]] = set()

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        options: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run the function as it is, and follow probabilities from their softmax to a product."""
        options = options or {}
        output = function(*args, **options)
        given = [t for t in _pytree.tree_leaves((args, options)) if isinstance(t, Tensor)]
        probs = [t for t in given if hasattr(t, _MARK)]
        weighs = probs and any(t.ndim > 2 for t in given if t is not probs[0])
        if function in _KERNELS or (function in _PRODUCTS and weighs):
            self._note()
        elif isinstance(output, Tensor):
            begins = function in SOFTMAX and along_last(output, args, options)
            begins = begins and not self._of_no_tokens()
            if begins or any(t.numel() == output.numel() for t in probs):
                setattr(output, _MARK, True)
        return output

    def _running(self) -> list[nn.Module]:
        modules = (each for each in callers() if isinstance(each, nn.Module))
        return list(dict.fromkeys(each for each in modules if each in self.paths))

    def _of_no_tokens(self) -> bool:
        running = self._running()
        return bool(running) and bool(_NO_TOKENS.search(type(running[0]).__name__))

    def _note(self) -> None:
        running = self._running()
        if running and not weighs_no_tokens(running[0]):
            self.found.add(tuple(self.paths[each] for each in running))


def _inside(path: str, other: str) -> bool:
    return path == other or path.startswith(f"{other}.")


def _silent_blocks(model: nn.Module, accounted: set[str]) -> list[str]:
    """Blocks of a stack without attention, beside others of their class that have some."""
    stacks: dict[tuple[str, type[nn.Module]], list[str]] = defaultdict(list)
    for path, module in model.named_modules():
        place = re.fullmatch(r"(.*?)\.?\d+", path)
        if place:
            stacks[place[1], type(module)].append(path)
    silent = []
    for blocks in stacks.values():
        without = [b for b in blocks if not any(_inside(each, b) for each in accounted)]
        if len(without) < len(blocks):
            silent += without
    return silent


def _mixes_tokens(model: nn.Module, path: str, run: Callable[[], object]) -> bool:
    """Whether a block's other tokens change with its first; False where it can't be told."""
    plain, changed = (_output_of_block(model, path, run, change=change) for change in (False, True))
    if plain is None or changed is None or plain.shape[-2] < 2:
        return False
    noise = 8 * torch.finfo(plain.dtype).eps * float(plain.abs().max())
    return bool(((plain - changed).abs()[..., 1:, :] > noise).any())


def _output_of_block(
    model: nn.Module, path: str, run: Callable[[], object], *, change: bool
) -> Tensor | None:
    """What a block returns, ``[..., token, d_model]``; None if it did not run on such."""
    kept: list[Tensor] = []

    def enter(block: nn.Module, args: Any, options: dict[str, Any]) -> Any:  # noqa: ARG001
        states = args[0] if args else options.get("hidden_states")
        if not (change and _are_states(states)):
            return None
        other = states.clone()
        other[..., 0, :] *= -1
        if args:
            return (other, *args[1:]), options
        return args, {**options, "hidden_states": other}

    def leave(block: nn.Module, args: Any, output: Any) -> None:  # noqa: ARG001
        states = output[0] if isinstance(output, tuple) else output
        if _are_states(states):
            kept.append(states.detach())

    block = model.get_submodule(path)
    with (
        block.register_forward_pre_hook(enter, with_kwargs=True),
        block.register_forward_hook(leave),
    ):
        run()
    return kept[0] if len(kept) == 1 else None


def _are_states(value: Any) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and value.ndim in (2, 3) and value.is_floating_point()
