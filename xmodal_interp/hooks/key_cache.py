"""Keep the keys of a cache once instead of once per decode step, for growing and static caches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

from xmodal_interp.attention import AttentionCall
from xmodal_interp.hooks.raw_calls import RawCall, changed


class _Growing:
    """A tensor ``[sample, kv_head, key, width]`` with space for more keys.

    A decode step copies its own keys only. If each step copied all keys, the time of a long answer
    would be quadratic in its length.
    """

    def __init__(self, first: Tensor) -> None:
        self._whole, self._n = own_copy(first), first.shape[2]

    @property
    def tensor(self) -> Tensor:
        """The keys so far; a view."""
        return self._whole[:, :, : self._n]

    def grow(self, longer: Tensor) -> None:
        """Hold ``longer``, whose first entries are those that are held."""
        before, self._n = self._n, longer.shape[2]
        new = longer.detach()
        if self._n <= self._whole.shape[2]:
            self._whole[:, :, before : self._n] = new[:, :, before:]
            return
        sizes = list(new.shape)
        sizes[2] += sizes[2] // 4 + 16
        self._whole = new.new_empty(sizes)
        self._whole[:, :, : self._n] = new

    def trim(self) -> None:
        """Free the space for more keys."""
        self._whole = self.tensor.contiguous()


class KeyCache:
    """The keys (and values) of one layer for one batch.

    Args:
        k: ``[sample, kv_head, key, d_head]``; copied.
        v: ``[sample, kv_head, key, d_value]``, if values are kept; copied.
        seen: ``[key]``, True for keys that were visible to some earlier query; None if all were.
    """

    def __init__(self, k: Tensor, v: Tensor | None, seen: Bool[Tensor, " key"] | None) -> None:
        self._k, self._v = _Growing(k), None if v is None else _Growing(v)
        self.seen = seen

    @property
    def k(self) -> Tensor:
        """The keys."""
        return self._k.tensor

    @property
    def v(self) -> Tensor | None:
        """The values, if they are kept."""
        return None if self._v is None else self._v.tensor

    def grow(self, raw: RawCall, mask: Tensor | None) -> bool:
        """Replace the keys by those of a later step, if the keys in ``seen`` are unchanged.

        A growing cache has more keys than before; a static cache has overwritten hidden keys.

        Returns:
            Whether the keys were replaced.
        """
        k, new = self.k, raw.key.shape[2]
        held = k.shape[2]
        if held + raw.query.shape[2] == new:
            if not torch.equal(raw.key[:, :, :held], k):
                return False
            self._k.grow(raw.key)
            if self._v is not None:
                self._v.grow(raw.value)
            self.seen = seen_keys(mask)
            return True
        if held != new or self.seen is None:
            return False
        kept = self.seen.nonzero()[:, 0]
        if not torch.equal(raw.key[:, :, kept], k[:, :, kept]):
            return False
        self._k, self._v = _Growing(raw.key), None if self._v is None else _Growing(raw.value)
        now = seen_keys(mask)
        self.seen = now if now is None else self.seen | now
        return True

    def trim(self) -> None:
        """Free the space for further keys, at the end of a recording."""
        for each in (self._k, self._v):
            if each is not None:
                each.trim()


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
        return changed(self.call, k=k[:, :, : self.n_keys], v=v)

    def add_received(self, earlier: KeptCall) -> None:
        """Add what the keys of the previous step received, which is then removed from that step.

        Decode steps would otherwise hold a number per head, key and step.
        """
        received, before = self.call.key_received, earlier.call.key_received
        if received is not None and before is not None:
            received[..., : before.shape[2]] += before
            earlier.call = changed(earlier.call, key_received=None)


THIN = 8  # entries of a key that are compared


def thin(raw: RawCall) -> RawCall:
    """Return the call with a few entries of each key, which suffice to recognise it."""
    return changed(raw, key=raw.key[:, :1, :, :THIN])


def seen_keys(mask: Tensor | None) -> Bool[Tensor, " key"] | None:
    """Return which keys a boolean mask makes visible to some query; None for other masks."""
    if mask is None or mask.dtype != torch.bool:
        return None
    return mask.flatten(0, -2).any(0)


def own_copy(t: Tensor) -> Tensor:
    """Return a contiguous, detached copy."""
    return t.detach().clone(memory_format=torch.contiguous_format)
