"""Keys of a cache, kept once: those of a growing cache, and those of a static one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

from xmodal_interp.hooks.tapping import RawCall


@dataclass(eq=False)
class KeyCache:
    """The keys (and values) of one layer, as far as they are one sequence.

    Attributes:
        k: ``[sample, kv_head, key, d_head]``.
        v: Values, if they are kept.
        seen: ``[key]``, which keys any query so far could see; None if all.
    """

    k: Tensor
    v: Tensor | None
    seen: Bool[Tensor, " key"] | None = None

    def grow(self, raw: RawCall, mask: Tensor | None) -> bool:
        """Take the keys of a later step, if those that were seen are still the same.

        A growing cache has more of them; a static one wrote over some that had been hidden.
        """
        held, new = self.k.shape[2], raw.key.shape[2]
        if held + raw.query.shape[2] == new:
            same = torch.equal(raw.key[:, :, :held], self.k)
        elif held == new and self.seen is not None:
            kept = self.seen.nonzero()[:, 0]
            same = torch.equal(raw.key[:, :, kept], self.k[:, :, kept])
        else:
            same = False
        if same:
            self.k = own_copy(raw.key)
            self.v = None if self.v is None else own_copy(raw.value)
            before = self.seen if held == new else None
            now = seen_keys(mask)
            self.seen = now if before is None or now is None else before | now
        return same


def seen_keys(mask: Tensor | None) -> Bool[Tensor, " key"] | None:
    """Which keys any query sees under a boolean mask; None if the mask does not tell."""
    if mask is None or mask.dtype != torch.bool:
        return None
    return mask.flatten(0, -2).any(0)


def own_copy(t: Tensor) -> Tensor:
    """A contiguous copy outside of the graph of gradients."""
    return t.detach().clone(memory_format=torch.contiguous_format)
