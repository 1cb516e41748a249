"""Blocks that leave everything as it was, whenever they are interrupted.

``contextlib.ExitStack`` restores what was registered with it, but an interrupt (Ctrl-C raises
``KeyboardInterrupt`` between two bytecodes) may arrive between a change and its registration, or
while the stack is closing. A :class:`Block` therefore makes its changes and takes them back with
signals deferred: a signal that arrives meanwhile is handled directly afterwards, when the block is
either entered as a whole or restored as a whole.

Python calls signal handlers in the main thread only; in other threads nothing has to be deferred.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from types import FrameType, TracebackType
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Block(AbstractContextManager[T], Generic[T]):
    """A ``with`` block around changes to a model or to torch.

    Args:
        change: Makes the changes and registers with the stack how each is taken back. What it
            returns is the value of the block. A function that it gives to ``stack.push`` is called
            with the exception of the block, None if it had none, after what was registered later.
    """

    _is_open = False

    def __init__(self, change: Callable[[ExitStack], T]) -> None:
        self._change = change
        self._stack = ExitStack()

    def __enter__(self) -> T:
        """Make the changes; take them back if making them fails."""
        entered = False
        self._is_open = True
        try:
            with DeferredSignals():
                value = self._change(self._stack)
            entered = True
            return value
        finally:
            if not entered:
                self._restore(*sys.exc_info())

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Take the changes back; an exception of the block goes on."""
        self._restore(kind, error, traceback)

    def __del__(self) -> None:
        """Take the changes back if a signal arrived at the first bytecode of ``__exit__``.

        Python drops a ``KeyboardInterrupt`` that is raised here, so there is no work for a block
        that was left.
        """
        if self._is_open:
            self._restore(GeneratorExit, None, None)

    def _restore(self, *failure: Any) -> None:
        restored = False
        try:
            with DeferredSignals():
                stack, self._stack = self._stack, ExitStack()
                stack.__exit__(*failure)
                restored = True
        finally:
            if not restored:  # a signal arrived before it could be deferred
                self._stack.__exit__(*failure)
            self._is_open = False


class DeferredSignals:
    """Handle signals of the main thread at the end of a ``with`` block."""

    _is_open = False

    def __enter__(self) -> None:
        """Put a handler that waits in the place of each handler that is a Python function."""
        self.handlers: dict[int, Callable[[int, FrameType | None], Any]] = {}
        self.arrived: list[int] = []
        self.defers = not DeferredSignals._is_open and _in_main_thread()
        if not self.defers:
            return
        complete = False
        try:
            DeferredSignals._is_open = True
            for number in map(int, signal.valid_signals()):
                handler = signal.getsignal(number)
                if callable(handler):
                    self.handlers[number] = handler
                    signal.signal(number, self._arrive)
            complete = True
        finally:
            if not complete:
                self._put_back(list(self.handlers.items()))

    def __exit__(self, *failure: object) -> None:
        """Put the handlers back, and call those whose signal arrived."""
        if self.defers:
            self._put_back(list(self.handlers.items()))
            for number in dict.fromkeys(self.arrived):
                self.handlers[number](number, None)

    def _arrive(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        self.arrived.append(number)

    def _put_back(self, handlers: list[tuple[int, Any]]) -> None:
        DeferredSignals._is_open = False
        try:
            while handlers:
                signal.signal(*handlers[-1])
                handlers.pop()
        finally:
            if handlers:  # a signal whose handler was back arrived
                self._put_back(handlers)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
