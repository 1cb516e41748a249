"""Observe calls of torch's attention functions by any module.

Four functions compute attention in torch 2.14:

* ``torch.nn.functional.scaled_dot_product_attention``, which takes queries, keys and values;
* ``torch.nn.functional.multi_head_attention_forward``, which also computes the projections;
* ``torch._native_multi_head_attention`` and ``torch._transformer_encoder_layer_fwd``: the fused
  kernels of ``nn.MultiheadAttention`` and ``nn.TransformerEncoderLayer`` in evaluation mode.

Inside a block each function is wrapped so that observers see every call; arguments and results stay
the same. If one of these functions calls another one, only the outer call is observed. Code that
imported a function earlier, by ``from torch.nn.functional import scaled_dot_product_attention``, is
not observed.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch.nn import functional

from xmodal_interp.restoring import Block

SCALED_DOT_PRODUCT = "scaled_dot_product_attention"
MULTIHEAD = "multi_head_attention_forward"
FUSED_MULTIHEAD = "_native_multi_head_attention"
FUSED_LAYER = "_transformer_encoder_layer_fwd"

HearKernel = Callable[[str, tuple[Any, ...], Mapping[str, Any], Any], None]
"""An observer: takes the function's name, its arguments by position and by name, and its result."""

_HOMES: dict[str, Any] = {
    SCALED_DOT_PRODUCT: functional,
    MULTIHEAD: functional,
    FUSED_MULTIHEAD: torch,
    FUSED_LAYER: torch,
}
_listeners: ContextVar[tuple[HearKernel, ...]] = ContextVar("xmodal_interp_kernel", default=())
_inside: ContextVar[bool] = ContextVar("xmodal_interp_in_kernel", default=False)
_lock = threading.Lock()
_open = 0
_originals: dict[str, Callable[..., Any]] = {}


def kernel_calls(hear: HearKernel) -> Block[None]:
    """Call ``hear`` after every call made inside the ``with`` block, in this thread."""
    return Block(partial(_kernel_calls, hear))


def _kernel_calls(hear: HearKernel, stack: ExitStack) -> None:
    _listeners.set((*_listeners.get(), hear))
    stack.callback(_forget, hear)
    _install()
    stack.callback(_remove)


def _forget(hear: HearKernel) -> None:
    """Remove an observer; the previous tuple is not restored, as blocks may exit in any order."""
    _listeners.set(tuple(each for each in _listeners.get() if each is not hear))


def _install() -> None:
    global _open
    with _lock:
        if _open == 0:
            for name, home in _HOMES.items():
                function = getattr(home, name)
                if not isinstance(function, _Observed):
                    _originals[name] = function
                    setattr(home, name, _Observed(name, function))
        _open += 1


def _remove() -> None:
    global _open
    with _lock:
        _open -= 1
        if _open == 0:
            for name, home in _HOMES.items():
                if isinstance(getattr(home, name), _Observed):  # not replaced by other code
                    setattr(home, name, _originals[name])


class _Observed:
    """A function of torch that calls the observers after each call."""

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        functools.update_wrapper(self, function)
        self.name, self.function = name, function

    def __call__(self, *args: Any, **options: Any) -> Any:
        if torch.compiler.is_compiling() or not _listeners.get() or _inside.get():
            return self.function(*args, **options)
        token = _inside.set(True)
        try:
            output = self.function(*args, **options)
        finally:
            _inside.reset(token)
        for hear in _listeners.get():
            hear(self.name, args, options, output)
        return output
