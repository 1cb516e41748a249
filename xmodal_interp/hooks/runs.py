"""One attention module at work, between the hook that opens it and the one that closes it."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from xmodal_interp.hooks.bypass import Bypass, Heard


@dataclass(eq=False)
class Run:
    """One attention module at work.

    Attributes:
        module: The module; or one that is named so too and holds others.
        start: How many calls had been kept before.
        n_heard: Calls through the interface.
        inside: Whether the interface's function is running.
        aside: What was heard beside the interface; it counts if the interface was never asked.
        silent: Names of attention modules, of itself or what it holds, that ran without a call.
        heard_inside: Whether any call was heard while it ran.
        bypass: The listener to torch functions, if there is one.
    """

    module: nn.Module
    start: int
    n_heard: int = 0
    inside: int = 0
    aside: list[Heard] = field(default_factory=list)
    silent: list[str] = field(default_factory=list)
    heard_inside: bool = False
    bypass: Bypass | None = None
