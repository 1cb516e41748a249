"""Find the module that makes a call, by inspecting the Python call stack.

The arguments of torch's fused kernel do not contain the calling module. Hooks on every module would
slow down every forward, so the stack is inspected instead, and only for calls whose module is not
known otherwise.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FrameType

from torch import nn


def callers() -> Iterator[object]:
    """Yield the first argument of every running function of this thread, innermost first.

    This is ``self`` in a method, and the module in an attention function of transformers.
    """
    return (caller for caller, _ in named_callers())


def named_callers() -> Iterator[tuple[object, str]]:
    """Yield the same as :func:`callers`, each with the name of the function."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_argcount:
            yield frame.f_locals.get(code.co_varnames[0]), code.co_name
        frame = frame.f_back


def is_running(module: nn.Module) -> bool:
    """Whether a function with this module as first argument is running in this thread."""
    return any(caller is module for caller in callers())


def in_continuous_batching() -> bool:
    """Whether transformers' continuous batching (``generate_batch``) is running in this thread."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if ".continuous_batching" in frame.f_globals.get("__name__", ""):
            return True
        frame = frame.f_back
    return False
