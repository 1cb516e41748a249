"""The tap: observe and edit every attention call that goes through transformers' interface.

Attention modules look up the function of their backend in ``AttentionInterface``. While a tap is
active, the functions that the interface returns are wrapped. A wrapper calls the original function
with the same arguments and returns its output, unless an observer edits them; without edits, the
results of the model are bit-identical. No config is changed and no name is registered, because some
models compare the *name* of their backend and behave differently with another one.

Observers are held by a context variable, so other threads are not observed and taps can be nested.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from xmodal_interp.contexts import Block

AttentionFunction = Callable[..., tuple[Tensor, Tensor | None]]


@dataclass(frozen=True, eq=False)
class RawCall:
    """The arguments of one attention call, as the model passed them.

    Attributes:
        module: The attention module.
        query: ``[sample, head, query, d_head]``.
        key: ``[sample, kv_head, key, d_head]``.
        value: ``[sample, kv_head, key, d_head]``.
        mask: The attention mask.
        backend: The name of the backend, such as ``"sdpa"``.
        options: Every further keyword argument.
        eager: The eager function of the modeling code, if it passed one to the interface.
        output: ``[sample, query, head, d_head]``, the output before any observer edited it; None
            before the call.
        note: How the call was recorded, if it did not go through the interface.
        function: The attention function that is called.
    """

    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Any  # a tensor or None; a BlockMask of flex attention until the call is recorded
    backend: str
    options: dict[str, Any]
    eager: AttentionFunction | None = None
    output: Tensor | None = None
    note: str = ""
    function: AttentionFunction | None = None

    @property
    def scaling(self) -> float:
        """Factor of the scores; the default of the backends is ``d_head ** -0.5``."""
        scaling = self.options.get("scaling")
        return float(self.query.shape[-1] ** -0.5 if scaling is None else scaling)

    @property
    def values_by_head(self) -> Float[Tensor, "sample head key d_value"]:
        """``value`` in float32, with one copy per query head."""
        return self.value.float().repeat_interleave(self.query.shape[1] // self.value.shape[1], 1)

    @property
    def causal(self) -> bool:
        """Whether the backend hides later keys by itself.

        Eager functions never do: their mask hides them. With a mask of keys only (``[sample,
        key]``, for flash kernels), the mask hides padding and the backend hides later keys.
        """
        complete = self.mask is not None and self.mask.ndim > 2
        if complete or self.query.shape[2] == 1 or self.backend == "eager":
            return False
        flag = self.options.get("is_causal")
        return bool(getattr(self.module, "is_causal", True) if flag is None else flag)


@runtime_checkable
class Listener(Protocol):
    """An observer of attention calls, which can edit them."""

    def before(self, call: RawCall) -> RawCall:
        """Return the call to make; return the same object to leave it unchanged."""

    def after(self, call: RawCall, output: Tensor) -> Tensor:
        """Return the output for the model, ``[sample, query, head, d_head]``.

        Return the same object to leave it unchanged.
        """


_listeners: ContextVar[tuple[Listener, ...]] = ContextVar("xmodal_interp_listeners", default=())
_lock = threading.Lock()
_open = 0


def tap(listener: Listener) -> Block[None]:
    """Call ``listener`` for every attention call inside the ``with`` block, in this thread."""
    return Block(partial(_tap, listener))


def _tap(listener: Listener, stack: ExitStack) -> None:
    _listeners.set((*_listeners.get(), listener))
    stack.callback(_forget, listener)
    _install()
    stack.callback(_remove)


def listeners() -> tuple[Listener, ...]:
    """Return the observers of the active taps of this thread or task, the outermost first."""
    return _listeners.get()


def registered_function(backend: str) -> AttentionFunction | None:
    """Return the function registered for a backend; None if the modeling code defines it."""
    if backend not in ALL_ATTENTION_FUNCTIONS:
        return None
    function: AttentionFunction = _original_getitem(ALL_ATTENTION_FUNCTIONS, backend)  # type: ignore[no-untyped-call]
    return function


def _forget(listener: Listener) -> None:
    """Remove an observer; the previous tuple is not restored, as blocks may exit in any order."""
    _listeners.set(tuple(each for each in _listeners.get() if each is not listener))


def _install() -> None:
    global _open
    with _lock:
        if _open == 0:
            type.__setattr__(AttentionInterface, "get_interface", _get_interface)
            type.__setattr__(AttentionInterface, "__getitem__", _getitem)
        _open += 1


def _remove() -> None:
    global _open
    with _lock:
        _open -= 1
        if _open == 0:
            type.__setattr__(AttentionInterface, "get_interface", _original_get_interface)
            type.__delattr__(AttentionInterface, "__getitem__")  # the original one is inherited


_original_get_interface = AttentionInterface.get_interface
_original_getitem = AttentionInterface.__getitem__


def _get_interface(
    self: AttentionInterface, attn_implementation: str, default: AttentionFunction
) -> AttentionFunction:
    given = _original_get_interface(self, attn_implementation, default)
    return _wrap(given, attn_implementation, default)


def _getitem(self: AttentionInterface, key: str) -> AttentionFunction:
    return _wrap(_original_getitem(self, key), key)  # type: ignore[no-untyped-call]


def _wrap(
    function: AttentionFunction, backend: str | None, eager: AttentionFunction | None = None
) -> AttentionFunction:
    listeners = _listeners.get()
    if not listeners:
        return function
    if isinstance(function, WrappedFunction):  # ``get_interface`` calls ``__getitem__``
        return replace(function, eager=eager)
    return WrappedFunction(function, backend or "eager", eager, listeners)


@dataclass(frozen=True, eq=False)
class WrappedFunction:
    """An attention function that calls observers before and after it runs."""

    function: AttentionFunction
    backend: str
    eager: AttentionFunction | None
    listeners: tuple[Listener, ...]

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
        for listener in self.listeners:
            call = listener.before(call)
        output, *rest = self.function(
            module, call.query, call.key, call.value, call.mask, **call.options
        )
        call = replace(call, output=output.detach())
        for listener in reversed(self.listeners):
            output = listener.after(call, output)
        return (output, *rest)  # type: ignore[return-value]
