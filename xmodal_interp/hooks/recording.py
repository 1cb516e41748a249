"""What is to be listened to, and what was heard."""

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
    """What was heard.

    Attributes:
        calls: Every call, in the order the model made them; there when the block has ended.
        results: What ``reduce`` returned for each call, if it was given (``calls`` is then empty).
        modules: Every attention module that is listened to.
        without_matrix: Layers that mix tokens without a softmax, so without a matrix of
            probabilities: linear attention, state spaces, convolutions.
        unseen: Names of modules that ran without a call that could be heard.
        rotary: What the rotary embedding of the language tower was told of positions.
        agreement: Whether the probabilities are those that the model computed with.
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
    """What to listen to, and what to do with it; the fields are the arguments of :func:`record`.

    ``inspect`` is called with every call as it was heard, its tensors the model's own, and with the
    call by its proper names. ``refuse`` is whether a call whose probabilities do
    not give the output of its function (see :mod:`xmodal_interp.hooks.agreement`) is an error.
    """

    towers: Sequence[Tower] = TOWERS
    layers: Collection[Any] | np.ndarray | Tensor | None = None
    values: bool = False
    norms: bool = False
    reduce: Callable[[AttentionCall], Any] | None = None
    inspect: Callable[[Heard, AttentionCall], None] | None = None
    refuse: bool = True

    def wants(self, identity: Identity) -> bool:
        """Whether a layer is listened to."""
        return identity.tower in self.towers and (
            self.layers is None or identity.layer in self.layers
        )
