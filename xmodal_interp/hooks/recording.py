"""The settings and the result of a recording."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from xmodal_interp.attention import AttentionCall
from xmodal_interp.hooks.agreement import Agreement
from xmodal_interp.hooks.bypass import Heard
from xmodal_interp.hooks.modules import Identity
from xmodal_interp.hooks.rotary import RotaryPositions
from xmodal_interp.vocabulary import TOWERS, Tower


@dataclass(eq=False)
class Recording:
    """The result of :func:`record`.

    Attributes:
        calls: Every call, in the order in which the model made them; set at the end of the block.
        results: The results of ``reduce``, one per call, if it was given (``calls`` is then empty).
        modules: Every attention module that is recorded.
        without_matrix: Layers that mix tokens without softmax attention: linear attention, state
            spaces, convolutions.
        unseen: Names of modules that ran without a recorded call.
        rotary: Position ids that the rotary embedding of the language tower received.
        agreement: The comparison of recorded probabilities with the model's outputs.
    """

    modules: tuple[Identity, ...]
    without_matrix: tuple[Identity, ...] = ()
    calls: list[AttentionCall] = field(default_factory=list)
    results: list[Any] = field(default_factory=list)
    unseen: list[str] = field(default_factory=list)
    rotary: RotaryPositions | None = None
    agreement: Agreement = field(default_factory=Agreement)


@dataclass(frozen=True)
class Choice:
    """The settings of a recording: the arguments of :func:`record`, and two more.

    ``inspect`` is called with every raw call, whose tensors belong to the model, and with the
    :class:`AttentionCall` made from it. ``refuse`` is whether an error is raised if the
    probabilities of a call do not give its output (see :mod:`xmodal_interp.hooks.agreement`).
    """

    towers: Sequence[Tower] = TOWERS
    layers: Collection[Any] | np.ndarray | Tensor | None = None
    values: bool = False
    norms: bool = False
    reduce: Callable[[AttentionCall], Any] | None = None
    inspect: Callable[[Heard, AttentionCall], None] | None = None
    refuse: bool = True

    def wants(self, identity: Identity) -> bool:
        """Whether a layer is to be recorded."""
        return identity.tower in self.towers and (
            self.layers is None or identity.layer in self.layers
        )
