"""Keys of a cache, kept once: those of a growing cache, and those of a static one."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool
from torch import Tensor

from xmodal_interp.attention import AttentionCall
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


@dataclass(eq=False)
class KeptCall:
    """A call without its keys, and the cache that they are the beginning of.

    Attributes:
        call: The call.
        cache: The keys of its module; None for probabilities, which have none.
        n_keys: How many of them are its own.
    """

    call: AttentionCall
    cache: KeyCache | None = None
    n_keys: int = 0

    def whole(self) -> AttentionCall:
        """The call with its keys, views into the cache."""
        if self.cache is None:
            return self.call
        k, v = self.cache.k, self.cache.v
        v = None if v is None else v[:, :, : self.n_keys]
        return replace(self.call, k=k[:, :, : self.n_keys], v=v)


def seen_keys(mask: Tensor | None) -> Bool[Tensor, " key"] | None:
    """Which keys any query sees under a boolean mask; None if the mask does not tell."""
    if mask is None or mask.dtype != torch.bool:
        return None
    return mask.flatten(0, -2).any(0)


def own_copy(t: Tensor) -> Tensor:
    """A contiguous copy outside of the graph of gradients."""
    return t.detach().clone(memory_format=torch.contiguous_format)
