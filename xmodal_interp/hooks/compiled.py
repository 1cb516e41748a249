"""Wrap the ``forward`` of attention modules, to refuse compiled code and to observe without hooks.

Code made by ``torch.compile`` does not look up attention functions and does not call hooks that
were registered later. A recording would silently miss some or all of its attention.

1. :func:`refuse_compiled` is called before the block is entered, and raises an error if a part of
   the model is compiled.
2. Some compiled code cannot be found in advance: a compiled function may call the model, and
   ``generate`` compiles by itself for a static cache. Inside a block, the ``forward`` of every
   attention module is therefore replaced by an equivalent object. This makes torch trace the code
   again, now with the hooks, and a hook that is traced raises the error
   (:func:`refuse_when_compiled_code_runs`).
3. The same object calls observers for torch's own attention modules, whose results would change
   with a hook (:func:`observe_unhooked`).
"""

from __future__ import annotations

import copy
import inspect
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import nn

from xmodal_interp.contexts import Observers, in_a_block, own_context
from xmodal_interp.errors import CaptureError
from xmodal_interp.hooks.torch_attention import is_torch_attention
from xmodal_interp.upstream import (
    is_compiled_function,
    is_compiled_in_place,
    is_optimized_module,
)

Enter = Callable[[nn.Module, Any], None]
Exit = Callable[[nn.Module, Any, dict[str, Any], Any], None]

_observers: Observers[tuple[Enter, Exit]] = Observers("unhooked")
_lock = threading.Lock()
_forwards: dict[nn.Module, tuple[int, Any]] = {}  # number of open blocks, and the forward before
_CALLED_FROM_COMPILED = (
    "The model was called from compiled code, where attention cannot be recorded or edited. Call "
    "it as it was before torch.compile; pass disable_compile=True to generate with a static cache."
)
# torch before 2.8 takes no reason; its own error with fullgraph=True then lacks this message
_TAKES_REASON = "reason" in inspect.signature(torch.compiler.disable).parameters
_not_compiled = partial(
    torch.compiler.disable, **({"reason": _CALLED_FROM_COMPILED} if _TAKES_REASON else {})
)


def refuse_compiled(modules: Mapping[str, nn.Module]) -> None:
    """Raise CaptureError if one of these modules, by path, is compiled by ``torch.compile``."""
    for path, module in modules.items():
        if not is_compiled(module):
            continue
        named = f"{path} ({type(module).__name__})" if path else "this model"
        if is_optimized_module(module):
            subject, before = named, "torch.compile (model._orig_mod)"
        elif is_compiled_in_place(module):
            subject, before = named, "model.compile()"
        else:
            subject, before = (
                f"the forward of {named}",
                "its forward was replaced (del model.forward)",
            )
        subject = subject if subject is named and path else subject[0].upper() + subject[1:]
        raise CaptureError(
            f"{subject} is compiled, and attention in compiled code cannot be recorded or edited. "
            f"Use the model as it was before {before}."
        )


def is_compiled(module: nn.Module) -> bool:
    """Return whether a module or its forward is compiled."""
    forward = vars(module).get("forward")
    return (
        is_compiled_in_place(module)
        or is_optimized_module(module)
        or (forward is not None and is_compiled_function(forward))
    )


def refuse_when_compiled_code_runs(
    model: nn.Module, known: Iterable[nn.Module], unhooked: set[nn.Module], stack: ExitStack
) -> None:
    """Raise CaptureError from inside the model when compiled code calls it.

    With ``fullgraph=True``, torch raises its own error, which contains the same message.

    Args:
        model: The model. Call this function before other hooks are registered on it.
        known: Its attention modules.
        unhooked: Its modules that must not have hooks (:func:`unhooked_modules`).
        stack: Removes all changes when it is closed.
    """
    raise_here = stack.enter_context(own_context())(_raise)

    @_not_compiled()  # type: ignore[untyped-decorator]
    def refuse() -> None:
        raise_here()

    def refuse_if_traced(module: nn.Module, args: Any) -> None:  # noqa: ARG001
        if torch.compiler.is_compiling():
            refuse()

    known = tuple(known)
    for module in dict.fromkeys((model, *known)):
        if module not in unhooked:
            stack.callback(module.register_forward_pre_hook(refuse_if_traced, prepend=True).remove)
    for module in dict.fromkeys((*known, *filter(is_torch_attention, unhooked))):
        _wrap(module, observed=module in unhooked)
        stack.callback(_unwrap, module)


def observe_unhooked(enter: Enter, exit_: Exit, stack: ExitStack) -> None:
    """Call functions around the ``forward`` of modules that must not have hooks.

    :func:`refuse_when_compiled_code_runs` must have been called with the model before.

    Args:
        enter: Called before the forward, with the module and its positional arguments.
        exit_: Called after it, with the module, its arguments and its output (None if it failed).
        stack: Removes both when it is closed.
    """
    _observers.register((enter, exit_), stack)


def replaced_forward(module: nn.Module) -> bool:
    """Return whether other code replaced the ``forward`` of this module instance."""
    with _lock:
        _, before = _forwards.get(module, (0, vars(module).get("forward")))
    return before is not None


def _raise() -> None:
    raise CaptureError(_CALLED_FROM_COMPILED)


@_not_compiled()  # type: ignore[untyped-decorator]
def _refuse_in_a_block() -> None:
    if in_a_block():
        _raise()


class _WrappedForward(partial[Any]):
    """The forward of a module, wrapped; a copy of the module gets a separate wrapper."""

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
        observers, output = _observers.active(), None
        for enter, _ in observers:
            enter(module, args)
        try:
            output = self.func(*args, **options)
        finally:
            for _, exit_ in reversed(observers):
                exit_(module, args, options, output)
        return output

    def __deepcopy__(self, memo: dict[int, Any]) -> _WrappedForward:
        forward = copy.deepcopy(self.func, memo)
        of = getattr(forward, "__self__", None)
        if isinstance(of, nn.Module):  # else other code had replaced the module's forward
            self.copies.append(weakref.ref(of))
        return _wrapper_of(forward)


def _wrapper_of(forward: Any) -> _WrappedForward:
    wrapper = _WrappedForward(forward)
    wrapper.copies = []
    return wrapper


def _wrap(module: nn.Module, *, observed: bool) -> None:
    with _lock:
        n_open, before = _forwards.get(module, (0, vars(module).get("forward")))
        _forwards[module] = (n_open + 1, before)
        if n_open == 0:
            wrapper = _wrapper_of(module.forward)
            wrapper.of = weakref.ref(module) if observed else None
            module.forward = wrapper


def _unwrap(module: nn.Module) -> None:
    with _lock:
        n_open, before = _forwards.pop(module)
        if n_open > 1:
            _forwards[module] = (n_open - 1, before)
        elif before is None:
            _restore(module)
        else:
            module.forward = before


def _restore(module: nn.Module) -> None:
    """Restore the class's forward on a module, and on the copies that were made of it."""
    wrapper = vars(module).get("forward")
    if isinstance(wrapper, _WrappedForward):
        del module.forward
        for copied in filter(None, (each() for each in wrapper.copies)):
            _restore(copied)
