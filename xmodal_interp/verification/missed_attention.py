"""Find attention that ran but was not recorded; used by the doctor, because it is slow.

1. All torch functions of a forward are observed. Two count as attention: a call of a fused kernel,
   and the product of values with the result of a softmax over the last axis.
2. Other implementations are found by their effect. If some blocks of a layer stack were recorded, a
   block of the same class without a recorded call must not mix tokens. To test this, its first
   input token is changed; if other output tokens change too, its attention was missed.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional

from xmodal_interp.contexts import Block
from xmodal_interp.hooks.attention_modules import weighs_no_tokens
from xmodal_interp.hooks.inline_attention import SOFTMAX, FunctionMode, along_last
from xmodal_interp.hooks.known_modules import callers
from xmodal_interp.hooks.recorder import Recording
from xmodal_interp.hooks.torch_attention import KERNEL
from xmodal_interp.upstream import leaves_of

_KERNELS = (KERNEL, functional.multi_head_attention_forward)
_PRODUCTS = (
    *(torch.matmul, torch.bmm, torch.baddbmm, torch.einsum),
    *(Tensor.matmul, Tensor.bmm, Tensor.baddbmm, Tensor.__matmul__),
)
_NO_TOKENS = re.compile(r"HyperConnection|Router|Gate$")  # softmax over streams or experts
_MARK = "_xmodal_interp_probs"  # an attribute of tensors that hold probabilities


def missed_modules(model: nn.Module, run: Callable[[], object], recording: Recording) -> list[str]:
    """Return the names of modules whose attention is missing in a recording.

    Args:
        model: The model.
        run: Runs the model again on the same inputs.
        recording: The recording of the first run.
    """
    without_matrix = {each.module for each in recording.without_matrix}
    accounted = {call.module for call in recording.calls} | without_matrix
    finder = _AttentionFinder(model)
    with Block(finder.register):
        run()
    missed = {outer[0] for outer in finder.found if accounted.isdisjoint(outer)}
    for path in _blocks_without_calls(model, accounted):
        if not any(_inside(each, path) for each in missed) and _mixes_tokens(model, path, run):
            missed.add(path)
    return sorted(missed)


class _AttentionFinder(FunctionMode):
    """Finds attention in modules of any class.

    Attributes:
        found: For each attention call, the paths of the running modules, innermost first.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(after=self._follow)
        self.paths = {module: path for path, module in model.named_modules()}
        self.found: set[tuple[str, ...]] = set()

    def _follow(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        options: Mapping[str, Any],
        output: Any,
    ) -> None:
        """Mark probabilities, and note their products; called after every torch function."""
        given = [t for t in leaves_of((args, options)) if isinstance(t, Tensor)]
        probs = [t for t in given if hasattr(t, _MARK)]
        multiplies_probs = probs and any(t.ndim > 2 for t in given if t is not probs[0])
        if function in _KERNELS or (function in _PRODUCTS and multiplies_probs):
            self._note()
        elif isinstance(output, Tensor):
            is_softmax = function in SOFTMAX and along_last(output, args, options)
            is_softmax = is_softmax and self._is_softmax_over_tokens()
            if is_softmax or any(t.numel() == output.numel() for t in probs):
                setattr(output, _MARK, True)

    def _running(self) -> list[nn.Module]:
        modules = (each for each in callers() if isinstance(each, nn.Module))
        return list(dict.fromkeys(each for each in modules if each in self.paths))

    def _is_softmax_over_tokens(self) -> bool:
        """Return whether the running module's softmax may be over tokens, by its class name."""
        running = self._running()
        return not (running and _NO_TOKENS.search(type(running[0]).__name__))

    def _note(self) -> None:
        running = self._running()
        if running and not weighs_no_tokens(running[0]):
            self.found.add(tuple(self.paths[each] for each in running))


def _inside(path: str, other: str) -> bool:
    return path == other or path.startswith(f"{other}.")


def _blocks_without_calls(model: nn.Module, accounted: set[str]) -> list[str]:
    """Return blocks without recorded attention in stacks where blocks of the same class have it."""
    stacks: dict[tuple[str, type[nn.Module]], list[str]] = defaultdict(list)
    for path, module in model.named_modules():
        place = re.fullmatch(r"(.*?)\.?\d+", path)
        if place:
            stacks[place[1], type(module)].append(path)
    without_calls = []
    for blocks in stacks.values():
        without = [b for b in blocks if not any(_inside(each, b) for each in accounted)]
        if len(without) < len(blocks):
            without_calls += without
    return without_calls


def _mixes_tokens(model: nn.Module, path: str, run: Callable[[], object]) -> bool:
    """Return whether other output tokens of a block change with its first input token.

    False if this cannot be measured.
    """
    plain, changed = (_output_of_block(model, path, run, change=change) for change in (False, True))
    if plain is None or changed is None or plain.shape[-2] < 2:
        return False
    noise = 8 * torch.finfo(plain.dtype).eps * float(plain.abs().max())
    return bool(((plain - changed).abs()[..., 1:, :] > noise).any())


def _output_of_block(
    model: nn.Module, path: str, run: Callable[[], object], *, change: bool
) -> Tensor | None:
    """Return the output of a block, ``[..., token, d_model]``.

    None if it did not run exactly once with such an output.
    """
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
