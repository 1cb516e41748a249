"""Compute which keys a query can attend to, from a mask or a causal flag.

A backend receives either a mask (boolean, True where visible; or additive, with large negative
entries where hidden), or no mask and a causal flag. Rows are built on demand, so no
``[query, key]`` matrix is held in addition to the model's own.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

_BELOW_ANY_SCORE = -1e8
_MINUS_10_000 = -9.9e3  # in bfloat16, -1e4 is -9984
_GAP = (-75.0, -25.0)  # between the hidden entries (-100 plus a bias) and the visible ones


def visible_rows(
    mask: Tensor | None,
    rows: Int[Tensor, " query"],
    positions: Int[Tensor, " query"],
    keys: slice,
    *,
    causal: bool,
    sliding_window: int | None = None,
    segments: Int[Tensor, " position"] | None = None,
) -> Bool[Tensor, "sample head query key"]:
    """Return which of the keys the given queries can attend to.

    The sample and head axes have length 1 if the mask is the same for all samples or heads.

    Args:
        mask: ``[sample | 1, head | 1, query, key]``, boolean or additive, or None.
        rows: Rows of ``mask``.
        positions: The key index of each of these queries; used only without a mask.
        keys: The keys, ``slice(start, stop)``.
        causal: Without a mask: hide keys after the query.
        sliding_window: Without a mask: hide keys that are this many or more positions before the
            query.
        segments: Without a mask: hide keys of other segments than the query's.
    """
    if mask is not None:
        return ~hides(mask[..., rows, :])[..., keys]
    key = torch.arange(keys.start, keys.stop, device=rows.device)
    if causal:
        seen = key <= positions[:, None]
    else:
        seen = torch.ones(len(rows), len(key), dtype=torch.bool, device=rows.device)
    if sliding_window is not None:
        seen &= key > positions[:, None] - sliding_window
    if segments is not None:
        seen &= segments[keys] == segments[positions][:, None]
    return seen[None, None]


def hides(mask: Bool[Tensor, "*row key"] | Float[Tensor, "*row key"]) -> Bool[Tensor, "*row key"]:
    """Return which keys the rows of a mask hide.

    For hidden keys, models use minus infinity, the dtype's minimum, -1e9, -1e4, or (in shifted
    windows) -100 plus a position bias. An entry of an additive mask therefore hides a key if

    * it is at most -1e4, or
    * it is at most -75 and its row has no entry between -75 and -25. A position bias below -75 has
      such entries in its row, because it decreases gradually.
    """
    if mask.dtype == torch.bool:
        return ~mask
    low, high = _GAP
    between = (mask > low) & (mask < high)
    return torch.where(between.any(-1, keepdim=True), mask <= _MINUS_10_000, mask <= low)


def hidden_below(dtype: torch.dtype) -> float:
    """Return the value at or below which an additive mask entry hides a key of any score.

    This is half of the dtype's minimum, or -1e8 if that is larger.
    """
    return max(torch.finfo(dtype).min / 2, _BELOW_ANY_SCORE)


def additive_rows(
    mask: Tensor | None, rows: Int[Tensor, " query"]
) -> Float[Tensor, "sample head query key"] | None:
    """Return the entries of an additive mask that leave a key some score, else 0; None if all 0."""
    if mask is None or mask.dtype == torch.bool:
        return None
    chosen = mask[..., rows, :].float()
    finite = torch.where(chosen > hidden_below(mask.dtype), chosen, 0.0)
    return finite if bool(finite.any()) else None


def scored_rows(
    visible: Bool[Tensor, "#sample #head query key"],
    additive: Float[Tensor, "#sample #head query key"] | None,
) -> Bool[Tensor, "#sample #head query key"]:
    """Return the keys that take part in the softmax of a row.

    These are the visible keys, and keys that are hidden by a finite mask entry, which leaves them a
    small probability. In a row without a visible key, no key takes part.
    """
    if additive is None:
        return visible
    return (visible | (additive != 0)) & visible.any(-1, keepdim=True)


def as_added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert a boolean or integer mask to numbers that are added to the scores.

    The eager functions of transformers do the same: True adds 1. If all entries are equal, the
    result is a boolean mask that hides nothing.
    """
    if mask.is_floating_point():
        return mask
    if bool((mask == mask.flatten()[:1]).all()):  # the softmax does not change
        return torch.ones_like(mask, dtype=torch.bool)
    return mask.to(dtype)


def simplified(mask: Tensor) -> Tensor:
    """Convert a mask to booleans (True is visible) if it only hides keys; else return it."""
    if mask.dtype == torch.bool:
        return mask
    if not mask.is_floating_point():
        return mask != 0
    hidden = mask <= hidden_below(mask.dtype)
    only_hides = bool((hidden | (mask == 0)).all())
    return ~hidden if only_hides else mask.detach()
