"""Compiled code is refused: before the block if the model shows it, else when it comes to run.

``torch.compile`` makes code that asks for no attention function and calls no hook that came after
it, so it would be heard in part or not at all, without a word. What it was made of can't be told
from the outside: a compiled function may call the model, and ``generate`` compiles by itself for
a static cache. So, for the time of a block, every attention module is given a ``forward`` of its
own: the same one, but torch's guards see another and trace the code again, hooks included, and
the hooks can tell that they are traced.
"""

from __future__ import annotations

import copy
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

from xmodal_interp.errors import CaptureError
from xmodal_interp.hooks.multihead import is_torchs, quiet_modules
from xmodal_interp.hooks.own_context import in_a_block, own_context
from xmodal_interp.restoring import Block

_RULE = "Compiled code runs without asking for its attention functions, so nothing could be heard. "
_observers: ContextVar[tuple[QuietCalls, ...]] = ContextVar("xmodal_interp_quiet", default=())
_lock = threading.Lock()
_shadowed: dict[nn.Module, tuple[int, Any]] = {}  # blocks that are open, and the forward before


def refuse_compiled(model: nn.Module) -> None:
    """Raise CaptureError for a model of which all or a part is compiled by ``torch.compile``."""
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
            f"{_RULE}{subject} is compiled. Record the model as it was before {before}."
        )


def refuse_when_compiled_code_runs(
    model: nn.Module, known: Iterable[nn.Module], stack: ExitStack
) -> None:
    """Raise CaptureError from inside the model where compiled code reaches it.

    A graph that must be whole (``fullgraph=True``) raises torch's own error with the same reason.

    Args:
        model: The model; call this before other hooks are put on it.
        known: Its attention modules.
        stack: It takes everything off again.
    """
    raise_here = stack.enter_context(own_context())(_raise)

    @torch.compiler.disable(reason=_RUNNING)  # type: ignore[untyped-decorator]
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
    """What is called around the ``forward`` of modules that must not have hooks.

    Attributes:
        enter: Before the forward, with the module and its positional arguments.
        leave: After it, with the module, its arguments, and what it returned, None if it failed.
    """

    enter: Callable[[nn.Module, Any], None]
    leave: Callable[[nn.Module, Any, dict[str, Any], Any], None]


def quiet_calls(calls: QuietCalls) -> Block[None]:
    """Observe the modules without hooks (``quiet_modules``) inside the ``with`` block.

    It is for models that :func:`refuse_when_compiled_code_runs` was called with.
    """
    return Block(partial(_quiet_calls, calls))


def _quiet_calls(calls: QuietCalls, stack: ExitStack) -> None:
    _observers.set((*_observers.get(), calls))
    stack.callback(_forget, calls)


def _forget(calls: QuietCalls) -> None:
    _observers.set(tuple(each for each in _observers.get() if each is not calls))


_RUNNING = (
    f"{_RULE}The model was called from compiled code. Call it as it was before torch.compile; "
    "generate compiles by itself for a static cache, unless it is told disable_compile=True."
)


def _raise() -> None:
    raise CaptureError(_RUNNING)


@torch.compiler.disable(reason=_RUNNING)  # type: ignore[untyped-decorator]
def _refuse_in_a_block() -> None:
    if in_a_block():
        _raise()


def replaced_forward(module: nn.Module) -> bool:
    """Whether a module has a forward of its own: not that of its class, nor one from here."""
    with _lock:
        _, before = _shadowed.get(module, (0, vars(module).get("forward")))
    return before is not None


def _is_compiled(forward: Any) -> bool:
    return hasattr(forward, "_torchdynamo_orig_callable") and not getattr(
        forward, "_torchdynamo_disable", False
    )


class _Shadow(partial[Any]):
    """The forward of a module as another object; copies of the module get one of their own."""

    copies: list[weakref.ref[nn.Module]]

    of: weakref.ref[nn.Module] | None = None  # for a module without hooks

    def __call__(self, /, *args: Any, **options: Any) -> Any:
        """Run the forward, and call the observers of a module without hooks."""
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
        if isinstance(of, nn.Module):  # else the module had a forward of its own before
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
    """Take the shadow off a module, and off the copies that were made of it."""
    shadow = vars(module).get("forward")
    if isinstance(shadow, _Shadow):
        del module.forward
        for copied in filter(None, (each() for each in shadow.copies)):
            _reveal(copied)
