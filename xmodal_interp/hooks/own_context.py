"""Limit hooks to the thread or task of the ``with`` block that registered them.

Hooks are registered on the model, so they fire in every thread and every asyncio task that runs it.
A recording or an intervention must only observe the forwards of its own ``with`` block. A context
variable holds the active blocks; outside of its block, a hook does nothing. Copies of the model
that are made inside the block do not get its hooks.
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
    """Return a decorator that disables a hook outside this ``with`` block.

    Args:
        elsewhere: Called instead of a hook that fires in a thread or task in which no block of this
            package is active.
    """
    return Block(partial(_own_context, elsewhere))


def _own_context(elsewhere: Callable[[], None] | None, stack: ExitStack) -> Callable[[Hook], Hook]:
    block = object()
    _blocks.set((*_blocks.get(), block))
    stack.callback(_forget, block)
    return lambda hook: _OwnHook(hook, block, elsewhere)


def in_a_block() -> bool:
    """Whether a block of this package is active in this thread or task."""
    return bool(_blocks.get())


def _forget(block: object) -> None:
    """Remove a block; the previous tuple is not restored, as blocks may exit in any order."""
    _blocks.set(tuple(each for each in _blocks.get() if each is not block))


class _OwnHook:
    """A hook for a module that only runs inside its block.

    It accepts any arguments. Torch looks up at the time of the call whether a hook takes keyword
    arguments. If the hook is removed while another thread runs the module, torch calls it there
    without them.
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
        """Copy and pickle as a hook that does nothing."""
        return _no_hook, ()


def _no_hook() -> Hook:
    return _nothing


def _nothing(*_given: Any) -> None:
    """The hook of a copied model."""
