"""One run of an attention module, from its forward pre-hook to its forward hook."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from xmodal_interp.hooks.bypass import Bypass, Heard


@dataclass(eq=False)
class Run:
    """One run of an attention module.

    Attributes:
        module: The module: a known attention module or a holder of one.
        start: The number of calls that were kept before this run.
        n_heard: The number of recorded calls through the interface.
        inside: The number of functions of the interface that are running, 0 if none.
        aside: Bypassed calls, recorded outside the interface; they are kept only if the run made no
            call through the interface.
        silent: Names of attention modules in this run (itself included) without a recorded call.
        heard_inside: Whether any call was recorded during the run.
        bypass: The function mode that observes torch functions, or None.
    """

    module: nn.Module
    start: int
    n_heard: int = 0
    inside: int = 0
    aside: list[Heard] = field(default_factory=list)
    silent: list[str] = field(default_factory=list)
    heard_inside: bool = False
    bypass: Bypass | None = None
