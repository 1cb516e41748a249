"""Refuse compiled code: before the block if the model is compiled, else when compiled code runs.

Code made by ``torch.compile`` does not look up attention functions and does not call hooks that
were registered later. A recording would silently miss some or all of its attention.

Some compiled code cannot be found in advance: a compiled function may call the model, and
``generate`` compiles by itself for a static cache. Inside a block, the ``forward`` of every
attention module is therefore replaced by an equivalent object. The guards of torch then fail, the
code is traced again with the hooks, and a hook that is traced raises the error.
"""

from __future__ import annotations

import copy
import inspect
import threading
import weakref
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from xmodal_interp.contexts import Block, in_a_block, own_context
from xmodal_interp.errors import CaptureError
from xmodal_interp.hooks.torch_attention import is_torchs, quiet_modules

_observers: ContextVar[tuple[QuietCalls, ...]] = ContextVar("xmodal_interp_quiet", default=())
_lock = threading.Lock()
_shadowed: dict[nn.Module, tuple[int, Any]] = {}  # number of open blocks, and the forward before
_RUNNING = (
    "The model was called from compiled code, where attention cannot be recorded or edited. Call "
    "it as it was before torch.compile; pass disable_compile=True to generate with a static cache."
)
# torch before 2.8 takes no reason; its own error with fullgraph=True then lacks this message
_EXPLAINED = "reason" in inspect.signature(torch.compiler.disable).parameters
_not_compiled = partial(torch.compiler.disable, **({"reason": _RUNNING} if _EXPLAINED else {}))


def refuse_compiled(model: nn.Module) -> None:
    """Raise CaptureError if the model or a part of it is compiled by ``torch.compile``."""
    for path, module in model.named_modules():
        named = f"{path} ({type(module).__name__})" if path else "this model"
        if isinstance(module, torch._dynamo.eval_frame.OptimizedModule):
            subject, before = named, "torch.compile (model._orig_mod)"
        elif getattr(module, "_compiled_call_impl", None):
            subject, before = named, "model.compile()"
        elif _is_compiled(vars(module).get("forward")):
            subject, before = (
                f"the forward of {named}",
                "its forward was replaced (del model.forward)",
            )
        else:
            continue
        subject = subject if subject is named and path else subject[0].upper() + subject[1:]
        raise CaptureError(
            f"{subject} is compiled, and attention in compiled code cannot be recorded or edited. "
            f"Use the model as it was before {before}."
        )


def refuse_when_compiled_code_runs(
    model: nn.Module, known: Iterable[nn.Module], stack: ExitStack
) -> None:
    """Raise CaptureError from inside the model when compiled code calls it.

    With ``fullgraph=True``, torch raises its own error, which contains the same message.

    Args:
        model: The model. Call this function before other hooks are registered on it.
        known: Its attention modules.
        stack: Removes all changes when it is closed.
    """
    raise_here = stack.enter_context(own_context())(_raise)

    @_not_compiled()  # type: ignore[untyped-decorator]
    def refuse() -> None:
        raise_here()

    def look(module: nn.Module, args: Any) -> None:  # noqa: ARG001
        if torch.compiler.is_compiling():
            refuse()

    quiet, known = set(quiet_modules(model)), tuple(known)
    for module in dict.fromkeys((model, *known)):
        if module not in quiet:
            stack.callback(module.register_forward_pre_hook(look, prepend=True).remove)
    for module in dict.fromkeys((*known, *filter(is_torchs, quiet))):
        _shadow(module, quiet=module in quiet)
        stack.callback(_unshadow, module)


@dataclass(frozen=True)
class QuietCalls:
    """Functions to call around the ``forward`` of modules that must not have hooks.

    Attributes:
        enter: Called before the forward, with the module and its positional arguments.
        leave: Called after it, with the module, its arguments and its output (None if it failed).
    """

    enter: Callable[[nn.Module, Any], None]
    leave: Callable[[nn.Module, Any, dict[str, Any], Any], None]


def quiet_calls(calls: QuietCalls) -> Block[None]:
    """Observe the modules without hooks (``quiet_modules``) inside the ``with`` block.

    :func:`refuse_when_compiled_code_runs` must have been called with the model before.
    """
    return Block(partial(_quiet_calls, calls))


def _quiet_calls(calls: QuietCalls, stack: ExitStack) -> None:
    _observers.set((*_observers.get(), calls))
    stack.callback(_forget, calls)


def _forget(calls: QuietCalls) -> None:
    _observers.set(tuple(each for each in _observers.get() if each is not calls))


def _raise() -> None:
    raise CaptureError(_RUNNING)


@_not_compiled()  # type: ignore[untyped-decorator]
def _refuse_in_a_block() -> None:
    if in_a_block():
        _raise()


def replaced_forward(module: nn.Module) -> bool:
    """Whether the forward of a module instance was replaced by code outside of this file."""
    with _lock:
        _, before = _shadowed.get(module, (0, vars(module).get("forward")))
    return before is not None


def _is_compiled(forward: Any) -> bool:
    return hasattr(forward, "_torchdynamo_orig_callable") and not getattr(
        forward, "_torchdynamo_disable", False
    )


class _Shadow(partial[Any]):
    """The forward of a module, wrapped in another object; a copy of the module gets its own one."""

    copies: list[weakref.ref[nn.Module]]

    of: weakref.ref[nn.Module] | None = None  # the module, if it must not have hooks

    def __call__(self, /, *args: Any, **options: Any) -> Any:
        """Run the forward; for a module without hooks, call the observers before and after it."""
        module = None if self.of is None else self.of()
        if module is None:
            return self.func(*args, **options)
        if torch.compiler.is_compiling():
            _refuse_in_a_block()
            return self.func(*args, **options)
        observers, output = _observers.get(), None
        for each in observers:
            each.enter(module, args)
        try:
            output = self.func(*args, **options)
        finally:
            for each in reversed(observers):
                each.leave(module, args, options, output)
        return output

    def __deepcopy__(self, memo: dict[int, Any]) -> _Shadow:
        forward = copy.deepcopy(self.func, memo)
        of = getattr(forward, "__self__", None)
        if isinstance(of, nn.Module):  # otherwise the module's forward had been replaced before
            self.copies.append(weakref.ref(of))
        return _shadow_of(forward)


def _shadow_of(forward: Any) -> _Shadow:
    shadow = _Shadow(forward)
    shadow.copies = []
    return shadow


def _shadow(module: nn.Module, *, quiet: bool) -> None:
    with _lock:
        n_open, before = _shadowed.get(module, (0, vars(module).get("forward")))
        _shadowed[module] = (n_open + 1, before)
        if n_open == 0:
            shadow = _shadow_of(module.forward)
            shadow.of = weakref.ref(module) if quiet else None
            module.forward = shadow


def _unshadow(module: nn.Module) -> None:
    with _lock:
        n_open, before = _shadowed.pop(module)
        if n_open > 1:
            _shadowed[module] = (n_open - 1, before)
        elif before is None:
            _reveal(module)
        else:
            module.forward = before


def _reveal(module: nn.Module) -> None:
    """Restore the class's forward on a module, and on the copies that were made of it."""
    shadow = vars(module).get("forward")
    if isinstance(shadow, _Shadow):
        del module.forward
        for copied in filter(None, (each() for each in shadow.copies)):
            _reveal(copied)
