"""Keys of a growing cache, kept once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from xmodal_interp.hooks.tap import RawCall


@dataclass(eq=False)
class KeyCache:
    """The keys (and values) of one layer, as far as they are one growing sequence."""

    k: Tensor
    v: Tensor | None

    def grow(self, raw: RawCall) -> bool:
        """Take the longer keys of a later step, if they begin with the ones held."""
        held, new = self.k.shape[2], raw.key.shape[2]
        begins = held + raw.query.shape[2] == new and torch.equal(raw.key[:, :, :held], self.k)
        if begins:
            self.k = own_copy(raw.key)
            self.v = None if self.v is None else own_copy(raw.value)
        return begins


def own_copy(t: Tensor) -> Tensor:
    """A contiguous copy outside of the graph of gradients."""
    return t.detach().clone(memory_format=torch.contiguous_format)
