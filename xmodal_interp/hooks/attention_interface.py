"""The tap: observe and edit every attention call that goes through transformers' interface.

Attention modules look up the function of their backend in ``AttentionInterface``. While a tap is
active, the functions that the interface returns are wrapped. A wrapper calls the original function
with the same arguments and returns its output. Observers can edit both; without edits, the outputs
of the model are bit-identical. No config is changed and no name is registered, because some
models compare the *name* of their backend and behave differently with another one.

Observers belong to a thread or task (:class:`xmodal_interp.contexts.Observers`), so other threads
are not observed, and taps can be nested.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from xmodal_interp.contexts import Observers
from xmodal_interp.hooks.raw_calls import AttentionFunction, RawCall, changed


@runtime_checkable  # the tests check types at run time
class InterfaceObserver(Protocol):
    """An observer of the calls that go through the interface, which can edit them."""

    def before(self, call: RawCall) -> RawCall:
        """Return the call to make; return the same object to leave it unchanged."""

    def after(self, call: RawCall, output: Tensor) -> Tensor:
        """Return the output for the model, ``[sample, query, head, d_value]``.

        Return the same object to leave it unchanged.
        """


def tap(observer: InterfaceObserver, stack: ExitStack) -> None:
    """Call ``observer`` for every attention call of this thread until the stack is closed."""
    _observers.register(observer, stack)


def active_observers() -> tuple[InterfaceObserver, ...]:
    """Return the observers of the active taps of this thread or task, the outermost first."""
    return _observers.active()


def registered_function(backend: str) -> AttentionFunction | None:
    """Return the function registered for a backend; None if the modeling code defines it."""
    if backend not in ALL_ATTENTION_FUNCTIONS:
        return None
    function: AttentionFunction = _original_getitem(ALL_ATTENTION_FUNCTIONS, backend)  # type: ignore[no-untyped-call]
    return function


@dataclass(frozen=True, eq=False)
class WrappedFunction:
    """An attention function that calls observers before and after it runs."""

    function: AttentionFunction
    backend: str
    eager: AttentionFunction | None
    observers: tuple[InterfaceObserver, ...]

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Call the function, and return its output as edited by the observers."""
        call = RawCall(
            module,
            query,
            key,
            value,
            attention_mask,
            self.backend,
            options,
            self.eager,
            function=self.function,
        )
        for observer in self.observers:
            call = observer.before(call)
        output, *rest = self.function(
            module, call.query, call.key, call.value, call.mask, **call.options
        )
        call = changed(call, output=output.detach())
        for observer in reversed(self.observers):
            output = observer.after(call, output)
        return (output, *rest)  # type: ignore[return-value]


_original_get_interface = AttentionInterface.get_interface
_original_getitem = AttentionInterface.__getitem__


def _install() -> None:
    type.__setattr__(AttentionInterface, "get_interface", _get_interface)
    type.__setattr__(AttentionInterface, "__getitem__", _getitem)


def _remove() -> None:
    type.__setattr__(AttentionInterface, "get_interface", _original_get_interface)
    type.__delattr__(AttentionInterface, "__getitem__")  # the original one is inherited


_observers: Observers[InterfaceObserver] = Observers("interface", _install, _remove)


def _get_interface(
    self: AttentionInterface, attn_implementation: str, default: AttentionFunction
) -> AttentionFunction:
    function = _original_get_interface(self, attn_implementation, default)
    return _wrapped(function, attn_implementation, default)


def _getitem(self: AttentionInterface, key: str) -> AttentionFunction:
    return _wrapped(_original_getitem(self, key), key)  # type: ignore[no-untyped-call]


def _wrapped(
    function: AttentionFunction, backend: str | None, eager: AttentionFunction | None = None
) -> AttentionFunction:
    observers = _observers.active()
    if not observers:
        return function
    if isinstance(function, WrappedFunction):  # ``get_interface`` calls ``__getitem__``
        return WrappedFunction(function.function, function.backend, eager, function.observers)
    return WrappedFunction(function, backend or "eager", eager, observers)
