"""Who is calling: what the functions on the stack belong to.

A call of torch's fused kernel does not say which module makes it. Hooks on every module would, and
every forward would pay for them; the stack is looked at only where a call can't be told otherwise.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FrameType

from torch import nn


def callers() -> Iterator[object]:
    """The first argument of every function that is running in this thread, innermost first.

    That is ``self`` of a method, the module of a transformers attention function, ...
    """
    return (caller for caller, _ in named_callers())


def named_callers() -> Iterator[tuple[object, str]]:
    """The same, each with the name of the function."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_argcount:
            yield frame.f_locals.get(code.co_varnames[0]), code.co_name
        frame = frame.f_back


def is_running(module: nn.Module) -> bool:
    """Whether the module is being called in this thread."""
    return any(caller is module for caller in callers())


def in_continuous_batching() -> bool:
    """Whether transformers' continuous batching (``generate_batch``) runs in this thread."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if ".continuous_batching" in frame.f_globals.get("__name__", ""):
            return True
        frame = frame.f_back
    return False
