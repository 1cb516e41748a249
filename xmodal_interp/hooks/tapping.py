"""The tap: where every attention call of transformers passes by, seen and, if wished, edited.

Attention modules ask ``AttentionInterface`` for the function of the backend they are configured
with. While a tap is open, what the interface hands out is wrapped: the original function is called
with the arguments it was given, and its output returned, unless a listener edits them; without such
a listener, the model computes bit for bit what it computes alone. No config is touched, and no name
is registered: some models test the *name* of their backend, and answer differently under another
one.

Listeners live in a context variable: other threads are not listened to, and taps nest.
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

from xmodal_interp.restoring import Block

AttentionFunction = Callable[..., tuple[Tensor, Tensor | None]]


@dataclass(frozen=True, eq=False)
class RawCall:
    """The arguments of one attention call, as the model gave them.

    ``query`` is ``[sample, head, query, d_head]``, ``key`` and ``value`` ``[sample, kv_head, key,
    d_head]``; ``backend`` is the name the model asked for, such as ``"sdpa"``; ``options`` holds
    every further keyword; ``eager`` is the function that the modeling code would use by itself, if
    it named one; ``function`` is the one that is called; ``output`` ``[sample, query, head,
    d_head]``, there after the call, is what it returned, before any listener edited it; ``note``
    says how a call was heard that did not ask the interface.
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
        """Factor of the scores; the backends' default is ``d_head ** -0.5``."""
        scaling = self.options.get("scaling")
        return float(self.query.shape[-1] ** -0.5 if scaling is None else scaling)

    @property
    def values_by_head(self) -> Float[Tensor, "sample head key d_value"]:
        """``value`` in float32, repeated for the query heads that share it."""
        return self.value.float().repeat_interleave(self.query.shape[1] // self.value.shape[1], 1)

    @property
    def causal(self) -> bool:
        """Whether the backend hides later keys by itself.

        Eager functions never do, they are given a mask; a mask of keys only (``[sample, key]``, as
        flash kernels take it) hides padding and leaves that to the backend.
        """
        complete = self.mask is not None and self.mask.ndim > 2
        if complete or self.query.shape[2] == 1 or self.backend == "eager":
            return False
        flag = self.options.get("is_causal")
        return bool(getattr(self.module, "is_causal", True) if flag is None else flag)


@runtime_checkable
class Listener(Protocol):
    """What hears and may change calls."""

    def before(self, call: RawCall) -> RawCall:
        """Return the call as it shall be made; the same object leaves it alone."""

    def after(self, call: RawCall, output: Tensor) -> Tensor:
        """Return the output, ``[sample, query, head, d_head]``, as the model shall see it.

        The same object leaves it alone.
        """


_listeners: ContextVar[tuple[Listener, ...]] = ContextVar("xmodal_interp_listeners", default=())
_lock = threading.Lock()
_open = 0


def tap(listener: Listener) -> Block[None]:
    """Let ``listener`` hear every attention call made inside the ``with`` block, in this thread."""
    return Block(partial(_tap, listener))


def _tap(listener: Listener, stack: ExitStack) -> None:
    _listeners.set((*_listeners.get(), listener))
    stack.callback(_forget, listener)
    _install()
    stack.callback(_remove)


def listeners() -> tuple[Listener, ...]:
    """The listeners of the taps that are open in this context, the outermost first."""
    return _listeners.get()


def registered_function(backend: str) -> AttentionFunction | None:
    """The function that transformers calls for a backend; None for one of the modeling code."""
    if backend not in ALL_ATTENTION_FUNCTIONS:
        return None
    function: AttentionFunction = _original_getitem(ALL_ATTENTION_FUNCTIONS, backend)  # type: ignore[no-untyped-call]
    return function


def _forget(listener: Listener) -> None:
    """Blocks may be exited in any order, so an older state is not put back."""
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
            type.__delattr__(AttentionInterface, "__getitem__")  # it is inherited


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
    if isinstance(function, WrappedFunction):  # ``get_interface`` looks the function up as an item
        return replace(function, eager=eager)
    return WrappedFunction(function, backend or "eager", eager, listeners)


@dataclass(frozen=True, eq=False)
class WrappedFunction:
    """An attention function with listeners around it."""

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
        """What the function returns, as the listeners let it."""
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
