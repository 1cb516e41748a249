"""Hooks that keep to the thread that puts them on.

Hooks sit on the model, so they fire in every thread that runs it; a recording or an intervention
is meant for the forwards of its own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any


def in_this_thread(hook: Callable[..., Any]) -> Callable[..., Any]:
    """The hook for a module, doing nothing in other threads than this one.

    It takes whatever it is given there: torch looks up whether a hook wants keyword arguments only
    when it calls it, so one that is taken off while another thread runs the module comes without.
    """
    thread = threading.get_ident()

    def guarded(*given: Any) -> Any:
        return hook(*given) if threading.get_ident() == thread else None

    return guarded
