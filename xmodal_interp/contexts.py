"""``with`` blocks that always undo their changes, and observers that are called in their own block.

**Interrupts.** ``contextlib.ExitStack`` calls the callbacks that were registered with it. Ctrl-C
raises ``KeyboardInterrupt`` between two bytecodes, so it can arrive between a change and its
registration, or while the stack is closing. A :class:`Block` therefore makes and undoes its changes
with signals deferred: a signal is handled when the block is either completely entered or completely
undone. Python calls signal handlers in the main thread only, so other threads need no deferral.

**Threads and tasks.** Hooks are registered on the model, so they fire in every thread and every
asyncio task that runs it, but a recording or an intervention must only observe the forwards of its
own ``with`` block. :class:`Observers` holds what the active blocks of one thread or task have
registered, and :func:`own_context` disables a hook outside its block. Copies of the model that are
made inside the block do not get its hooks.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from contextvars import ContextVar
from functools import partial
from types import FrameType, TracebackType
from typing import Any, Generic, TypeVar

T = TypeVar("T")

_SIGNALS = tuple(map(int, signal.valid_signals()))  # the function takes 0.2 ms


class Block(AbstractContextManager[T], Generic[T]):
    """A ``with`` block around changes to a model or to torch.

    Args:
        change: Makes the changes and registers with the stack how each is undone. Its result is the
            value of the block. Functions passed to ``stack.push`` are called with the exception of
            the block (None without one), in reverse order of registration.
    """

    _is_open = False

    def __init__(self, change: Callable[[ExitStack], T]) -> None:
        self._change = change
        self._stack = ExitStack()

    def __enter__(self) -> T:
        """Make the changes; undo them if an error occurs."""
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
        """Undo the changes; an exception of the block is propagated."""
        self._restore(kind, error, traceback)

    def __del__(self) -> None:
        """Undo the changes if a signal arrived at the first bytecode of ``__exit__``.

        Python drops a ``KeyboardInterrupt`` that is raised here, so nothing is done for a block
        that was exited.
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
    """Defer signals of the main thread to the end of a ``with`` block."""

    _is_open = False

    def __enter__(self) -> None:
        """Replace each signal handler that is a Python function by one that stores the signal."""
        self.handlers: dict[int, Callable[[int, FrameType | None], Any]] = {}
        self.arrived: list[int] = []
        self.defers = not DeferredSignals._is_open and _in_main_thread()
        if not self.defers:
            return
        complete = False
        try:
            DeferredSignals._is_open = True
            for number in _SIGNALS:
                handler = signal.getsignal(number)
                if callable(handler):
                    self.handlers[number] = handler
                    signal.signal(number, self._arrive)
            complete = True
        finally:
            if not complete:
                self._put_back(list(self.handlers.items()))

    def __exit__(self, *failure: object) -> None:
        """Restore the handlers, and call those whose signal arrived."""
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
            if handlers:  # a signal arrived after its handler was restored
                self._put_back(handlers)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


class Observers(Generic[T]):
    """The objects that the active blocks of this thread or task registered, the outermost first.

    Args:
        name: The name of the context variable that holds them.
        install: Called before the first object of any thread is registered.
        remove: Called after the last object of any thread was removed.
    """

    def __init__(
        self,
        name: str,
        install: Callable[[], None] | None = None,
        remove: Callable[[], None] | None = None,
    ) -> None:
        self._active: ContextVar[tuple[T, ...]] = ContextVar(f"xmodal_interp_{name}", default=())
        self._install, self._remove = install, remove
        self._lock = threading.Lock()
        self.n_registered = 0  # in all threads

    def active(self) -> tuple[T, ...]:
        """Return the objects of this thread or task."""
        return self._active.get()

    def register(self, observer: T, stack: ExitStack) -> None:
        """Register an object in this thread or task until the stack of a block is closed."""
        self._active.set((*self.active(), observer))
        stack.callback(self._forget, observer)
        with self._lock:
            if self.n_registered == 0 and self._install is not None:
                self._install()
            self.n_registered += 1
        stack.callback(self._count_down)

    def _forget(self, observer: T) -> None:
        """Remove an object; the earlier tuple is not restored, as blocks may exit in any order."""
        self._active.set(tuple(each for each in self.active() if each is not observer))

    def _count_down(self) -> None:
        with self._lock:
            self.n_registered -= 1
            if self.n_registered == 0 and self._remove is not None:
                self._remove()


Hook = Callable[..., Any]

_blocks: Observers[object] = Observers("blocks")


def own_context(elsewhere: Callable[[], None] | None = None) -> Block[Callable[[Hook], Hook]]:
    """Return a decorator that disables a hook outside this ``with`` block.

    Args:
        elsewhere: Called instead of a hook that fires in a thread or task in which no block of this
            package is active.
    """
    return Block(partial(_own_context, elsewhere))


def _own_context(elsewhere: Callable[[], None] | None, stack: ExitStack) -> Callable[[Hook], Hook]:
    block = object()
    _blocks.register(block, stack)
    return lambda hook: _OwnHook(hook, block, elsewhere)


def in_a_block() -> bool:
    """Return whether a block of this package is active in this thread or task."""
    return bool(_blocks.active())


class _OwnHook:
    """A hook for a module that only runs inside its block.

    It accepts any arguments. Torch looks up at the time of the call whether a hook takes keyword
    arguments. If the hook is removed while another thread runs the module, torch calls it there
    without them.
    """

    def __init__(self, hook: Hook, block: object, elsewhere: Callable[[], None] | None) -> None:
        self.hook, self.block, self.elsewhere = hook, block, elsewhere

    def __call__(self, *given: Any) -> Any:
        blocks = _blocks.active()
        if self.block in blocks:
            return self.hook(*given)
        if not blocks and self.elsewhere is not None:
            self.elsewhere()
        return None

    def __reduce__(self) -> tuple[Callable[[], Hook], tuple[()]]:
        """Copy and pickle as a hook that does nothing."""
        return _no_hook, ()


def _no_hook() -> Hook:
    return _nothing


def _nothing(*_given: Any) -> None:
    """Do nothing: the hook of a copied model."""
