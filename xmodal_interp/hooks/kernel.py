"""Calls of ``torch.nn.functional.scaled_dot_product_attention``, whoever makes them.

For the time of a block the function is replaced by itself and a word to the listeners. What is
called, with what, and what it returns stay the same. Code that took the function before, by
``from torch.nn.functional import scaled_dot_product_attention``, is not heard here.
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
from torch import Tensor
from torch.nn import functional

from xmodal_interp.restoring import Block

HearKernel = Callable[[tuple[Any, ...], Mapping[str, Any], Tensor], None]
"""Is given the arguments of a call by position and by name, and what it returned."""

_listeners: ContextVar[tuple[HearKernel, ...]] = ContextVar("xmodal_interp_kernel", default=())
_lock = threading.Lock()
_open = 0
_original = functional.scaled_dot_product_attention


def kernel_calls(hear: HearKernel) -> Block[None]:
    """Let ``hear`` know of every call made inside the ``with`` block, in this thread."""
    return Block(partial(_kernel_calls, hear))


def _kernel_calls(hear: HearKernel, stack: ExitStack) -> None:
    stack.callback(_listeners.reset, _listeners.set((*_listeners.get(), hear)))
    _install()
    stack.callback(_remove)


def _install() -> None:
    global _open, _original
    with _lock:
        if _open == 0 and functional.scaled_dot_product_attention is not _heard:
            _original = functional.scaled_dot_product_attention
            functional.scaled_dot_product_attention = _heard
        _open += 1


def _remove() -> None:
    global _open
    with _lock:
        _open -= 1
        if _open == 0 and functional.scaled_dot_product_attention is _heard:  # else it is another's
            functional.scaled_dot_product_attention = _original


@functools.wraps(_original)
def _heard(*args: Any, **options: Any) -> Tensor:
    output = _original(*args, **options)
    if not torch.compiler.is_compiling():
        for hear in _listeners.get():
            hear(args, options, output)
    return output
