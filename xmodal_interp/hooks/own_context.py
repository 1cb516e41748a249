"""Hooks that keep to the block that puts them on.

Hooks sit on the model, so they fire in every thread and every task that runs it; a recording or an
intervention is meant for the forwards of its own ``with`` block, as the listeners of the tap are. A
context variable says whose forward it is. Copies of the model that are made inside of the block
take no hooks with them.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from contextvars import ContextVar
from functools import partial
from typing import Any

from xmodal_interp.restoring import Block

Hook = Callable[..., Any]

_blocks: ContextVar[tuple[object, ...]] = ContextVar("xmodal_interp_blocks", default=())


def own_context(elsewhere: Callable[[], None] | None = None) -> Block[Callable[[Hook], Hook]]:
    """Gives what makes a hook do nothing outside of this ``with`` block.

    Args:
        elsewhere: Called instead of a hook that fires where no block of this package is open at
            all, in another thread or task.
    """
    return Block(partial(_own_context, elsewhere))


def _own_context(elsewhere: Callable[[], None] | None, stack: ExitStack) -> Callable[[Hook], Hook]:
    block = object()
    _blocks.set((*_blocks.get(), block))
    stack.callback(_forget, block)
    return lambda hook: _OwnHook(hook, block, elsewhere)


def in_a_block() -> bool:
    """Whether a block of this package is open in this thread or task."""
    return bool(_blocks.get())


def _forget(block: object) -> None:
    """Blocks may be exited in any order, so an older state is not put back."""
    _blocks.set(tuple(each for each in _blocks.get() if each is not block))


class _OwnHook:
    """A hook for a module.

    It takes whatever it is given elsewhere: torch looks up whether a hook wants keyword arguments
    only when it calls it, so one that is taken off while another thread runs the module comes
    without.
    """

    def __init__(self, hook: Hook, block: object, elsewhere: Callable[[], None] | None) -> None:
        self.hook, self.block, self.elsewhere = hook, block, elsewhere

    def __call__(self, *given: Any) -> Any:
        blocks = _blocks.get()
        if self.block in blocks:
            return self.hook(*given)
        if not blocks and self.elsewhere is not None:
            self.elsewhere()
        return None

    def __reduce__(self) -> tuple[Callable[[], Hook], tuple[()]]:
        """What a copy of the model gets instead, and what is pickled with it."""
        return _no_hook, ()


def _no_hook() -> Hook:
    return _nothing


def _nothing(*_given: Any) -> None:
    """The hook of a copy."""
