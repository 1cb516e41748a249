"""Attention knock-out: block attention from some query positions to some key positions.

For the blocked edges (query i, key j), with i in ``queries`` and j in ``keys``:

* renormalised: the score of a blocked edge is minus infinity, so the other probabilities of the row
  grow (Geva et al. 2023, arXiv:2304.14767; for images Zhang et al. 2025, arXiv:2411.18620). The
  edges are added to the mask that the backend receives. Blocked probabilities are exactly 0, in a
  recording too.
* not renormalised: a blocked probability becomes 0 after the softmax, and the others do not change.
  The blocked terms are subtracted from the output, ``O_i - sum_j A_ij V_j``. A recording shows the
  probabilities before this.

The edge of a position to itself is never blocked, so each row of self-attention keeps a key.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, SupportsIndex

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from xmodal_interp.at import Selector
from xmodal_interp.attention import entries_of, numbers
from xmodal_interp.errors import CaptureError, InputError, quoted
from xmodal_interp.hooks.attention_modules import checked_heads
from xmodal_interp.hooks.interventions import Site
from xmodal_interp.hooks.positions import Selection
from xmodal_interp.hooks.raw_calls import RawCall
from xmodal_interp.vocabulary import AttentionKind, Tower

_MASKED_BACKENDS = ("eager", "sdpa")  # backends that take a mask with a row per query


@dataclass(frozen=True, eq=False)
class KnockOut:
    """See :func:`knock_out_attention`."""

    queries: Selection
    keys: Selection
    layers: tuple[Any, ...] | None
    heads: tuple[Any, ...] | None
    renormalise: bool
    tower: Tower
    kind: AttentionKind

    @property
    def selections(self) -> tuple[Selection, ...]:
        """Queries and keys; only queries in cross-attention, whose keys have other positions."""
        return (self.queries,) if self.kind == "cross" else (self.queries, self.keys)

    def heads_in(self, layers: Mapping[int, int | None]) -> Mapping[int, Sequence[int]]:
        """Return the heads to edit by layer, after checking that they exist."""
        named = layers if self.layers is None else numbers(self.layers, "layer", max(layers) + 1)
        wanted = dict.fromkeys(named, self.heads or ())
        return checked_heads(wanted, layers, f"{self.tower} {self.kind}-attention")

    def before(self, call: RawCall, site: Site) -> RawCall:
        """If renormalised: hide the blocked keys in the mask."""
        if not self.renormalise:
            return call
        blocked = self._blocked(call, site)
        if not blocked.any():
            return call
        if call.backend not in _MASKED_BACKENDS:
            raise CaptureError(
                f"The backend {call.backend!r} does not take a mask with a row per query, which "
                f"blocking attention requires ({' and '.join(_MASKED_BACKENDS)} do). Load the "
                "model with attn_implementation='sdpa', or pass renormalise=False."
            )
        visible = site.attention(call).visible()
        emptied = visible.any(-1) & ~(visible & ~blocked).any(-1)
        if emptied.any():
            row = site.start + int(emptied.nonzero()[0, -1])
            raise InputError(
                f"Query {row} of {site.identity.module} would lose all its keys, and a softmax "
                "over no keys is undefined. Leave it at least one key, or pass renormalise=False."
            )
        return replace(call, mask=_hidden(call, visible, blocked))

    def after(self, call: RawCall, output: Tensor, site: Site) -> Tensor:
        """If not renormalised: subtract the blocked terms from the output."""
        if self.renormalise:
            return output
        blocked = self._blocked(call, site)
        rows = blocked.any(-1).any(1).any(0).nonzero()[:, 0]
        if not len(rows):
            return output
        part = blocked[:, :, rows]
        probs = site.attention(call).probs(queries=rows)  # [sample, head, row, key]
        lost = torch.where(part, probs, 0.0) @ call.values_by_head
        return output.index_add(1, rows, -lost.transpose(1, 2).to(output.dtype))

    def _blocked(self, call: RawCall, site: Site) -> Bool[Tensor, "sample head query key"]:
        """Return the blocked edges; sample and head axes have length 1 if all entries agree."""
        n_keys = call.key.shape[2]
        rows = site.query_mask(self.queries, call)
        blocked = rows[:, :, None] & site.key_mask(self.keys, call)[:, None, :]
        if self.kind == "self":
            position = site.start + torch.arange(rows.shape[1], device=rows.device)
            blocked = blocked & (position[:, None] != torch.arange(n_keys, device=rows.device))
        blocked = blocked[:, None]
        return blocked & site.head_mask(call)[:, None, None] if site.heads else blocked


def knock_out_attention(
    queries: Selector,
    keys: Selector,
    *,
    layers: SupportsIndex | Collection[Any] | np.ndarray | Tensor | None = None,
    heads: SupportsIndex | Collection[Any] | np.ndarray | Tensor | None = None,
    renormalise: bool = True,
    tower: Tower = "language",
    kind: AttentionKind = "self",
) -> KnockOut:
    """Block attention from some queries to some keys; return an argument of ``intervene``.

    Args:
        queries: The query positions. By number: indices, a slice, or a boolean mask ``[position]``
            or ``[sample, position]``; in an encoder-decoder, each layer counts the positions of its
            own stack. Other selectors of :mod:`xmodal_interp.at` (a phrase, ``at.last``, a function
            of the sample, a list of these) are resolved in the prompt of each sample that a VLM
            runs. A list of lists has the selectors of each sample. In a padded batch, numbers are
            refused.
        keys: The key positions, in the same forms. A position can always attend to itself.
        layers: Layers to edit; all if not given. Negative numbers count from the end; a boolean
            mask has an entry for each layer.
        heads: Heads of these layers, in the same forms; all if not given.
        renormalise: Whether the remaining probabilities of a row sum to 1.
        tower: Part of the model.
        kind: Kind of attention; keys of cross-attention are counted separately from queries.

    Raises:
        InputError: ``layers`` or ``heads`` is not a list, or is empty.
        PositionError: A position is negative.
    """
    for name, chosen in (("layers", layers), ("heads", heads)):
        row = None if chosen is None else entries_of(chosen)
        if chosen is not None and row is None:
            raise InputError(
                f"{name} must be a number or a list, such as -1 or [0, 3]; got {quoted(chosen)}."
            )
        if row is not None and not len(row):
            raise InputError(f"{name} is empty; got {chosen!r}. Leave {name} out for all.")
    return KnockOut(
        Selection(queries),
        Selection(keys),
        None if layers is None else _as_tuple(layers),
        None if heads is None else _as_tuple(heads),
        renormalise,
        tower,
        kind,
    )


def _as_tuple(given: Any) -> tuple[Any, ...]:
    """Return the entries of a list, or the single number."""
    is_list = isinstance(given, Iterable) and getattr(given, "ndim", 1) != 0
    return tuple(given) if is_list else (int(given),)


def _hidden(
    call: RawCall,
    visible: Bool[Tensor, "#sample #head query key"],
    blocked: Bool[Tensor, "#sample #head query key"],
) -> Tensor:
    """Return the mask with the blocked edges hidden, boolean or additive like the original."""
    if call.mask is None:
        seen = visible & ~blocked
        if call.backend == "sdpa":
            return seen
        zeros = torch.zeros(seen.shape, dtype=call.query.dtype, device=seen.device)
        return zeros.masked_fill_(~seen, torch.finfo(zeros.dtype).min)
    mask: Tensor = call.mask
    if call.backend != "eager" and mask.dtype == torch.bool:
        return mask & ~blocked
    added = mask if mask.is_floating_point() else mask.to(call.query.dtype)
    hidden = torch.tensor(torch.finfo(added.dtype).min, dtype=added.dtype, device=added.device)
    return torch.where(blocked, hidden, added)
