"""Keep the keys of a cache once instead of once per decode step, for growing and static caches."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool
from torch import Tensor

from xmodal_interp.attention import AttentionCall
from xmodal_interp.hooks.raw_calls import RawCall


@dataclass(eq=False)
class KeyCache:
    """The keys (and values) of one layer for one batch.

    Attributes:
        k: ``[sample, kv_head, key, d_head]``.
        v: ``[sample, kv_head, key, d_value]``, if values are kept.
        seen: ``[key]``, True for keys that were visible to some earlier query; None if all were.
    """

    k: Tensor
    v: Tensor | None
    seen: Bool[Tensor, " key"] | None = None

    def grow(self, raw: RawCall, mask: Tensor | None) -> bool:
        """Replace the keys by those of a later step, if the keys in ``seen`` are unchanged.

        A growing cache has more keys than before; a static cache has overwritten hidden keys.

        Returns:
            Whether the keys were replaced.
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
    """A call without keys, and the cache that holds its keys.

    Attributes:
        call: The call.
        cache: The keys of its module; None if the call holds probabilities or statistics instead
            of keys.
        n_keys: The number of keys of the call, which are the first ones of the cache.
    """

    call: AttentionCall
    cache: KeyCache | None = None
    n_keys: int = 0

    def whole(self) -> AttentionCall:
        """Return the call with its keys, as views of the cache."""
        if self.cache is None:
            return self.call
        k, v = self.cache.k, self.cache.v
        v = None if v is None else v[:, :, : self.n_keys]
        return replace(self.call, k=k[:, :, : self.n_keys], v=v)

    def add_received(self, earlier: KeptCall) -> None:
        """Add what the keys of the previous step received, which is then removed from that step.

        Decode steps would otherwise hold a number per head, key and step.
        """
        received, before = self.call.key_received, earlier.call.key_received
        if received is not None and before is not None:
            received[..., : before.shape[2]] += before
            earlier.call = replace(earlier.call, key_received=None)


THIN = 8  # entries of a key that are compared


def thin(raw: RawCall) -> RawCall:
    """Return the call with a few entries of each key, which suffice to recognise it."""
    return replace(raw, key=raw.key[:, :1, :, :THIN])


def seen_keys(mask: Tensor | None) -> Bool[Tensor, " key"] | None:
    """Return which keys a boolean mask makes visible to some query; None for other masks."""
    if mask is None or mask.dtype != torch.bool:
        return None
    return mask.flatten(0, -2).any(0)


def own_copy(t: Tensor) -> Tensor:
    """Return a contiguous, detached copy."""
    return t.detach().clone(memory_format=torch.contiguous_format)
