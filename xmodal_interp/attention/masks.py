"""Which keys a query may attend to.

Boolean masks, additive masks and the causal flag, read as one thing.

A backend is given either a mask (boolean, True where visible; or additive, hugely negative where
not) or none and a causal flag. Rows are built on demand, so that no ``[query, key]`` matrix is held
that the model did not hold itself.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

_BELOW_ANY_SCORE = -1e8
_MINUS_10_000 = -9.9e3  # as half precision rounds it
_FAR, _NEAR = -75.0, -25.0


def visible_rows(
    mask: Tensor | None,
    rows: Int[Tensor, " query"],
    positions: Int[Tensor, " query"],
    n_keys: int,
    *,
    causal: bool,
    sliding_window: int | None = None,
    segments: Int[Tensor, " key"] | None = None,
) -> Bool[Tensor, "sample head query key"]:
    """Visibility of every key for some queries.

    Sample and head axes have length 1 where the mask does not differ.

    Args:
        mask: ``[sample | 1, head | 1, query, key]``, boolean or additive, or None.
        rows: Which rows of ``mask`` are meant.
        positions: The key index that each of these queries stands at; used only where the mask is
            None.
        n_keys: Number of keys.
        causal: With no mask: keys behind the query are hidden.
        sliding_window: With no mask: keys this far back or farther are hidden.
        segments: With no mask: keys of another segment than the query's are hidden.
    """
    if mask is not None:
        return ~hides(mask[..., rows, :])
    keys = torch.arange(n_keys, device=rows.device)
    seen = torch.ones(len(rows), n_keys, dtype=torch.bool, device=rows.device)
    if causal:
        seen &= keys <= positions[:, None]
    if sliding_window is not None:
        seen &= keys > positions[:, None] - sliding_window
    if segments is not None:
        seen &= segments == segments[positions][:, None]
    return seen[None, None]


def hides(mask: Bool[Tensor, "*row key"] | Float[Tensor, "*row key"]) -> Bool[Tensor, "*row key"]:
    """Which keys the rows of a mask hide.

    Models write "hidden" as minus infinity, the dtype's minimum, -1e9, -1e4, or, in shifted
    windows, as -100 plus a position bias. An entry of an additive mask hides a key if it is -1e4
    or less; or -75 or less in a row without entries between -75 and -25: a position bias that gets
    so low does so step by step.
    """
    if mask.dtype == torch.bool:
        return ~mask
    far, between = mask <= _FAR, (mask > _FAR) & (mask < _NEAR)
    return torch.where(between.any(-1, keepdim=True), mask <= _MINUS_10_000, far)


def hidden_below(dtype: torch.dtype) -> float:
    """Additive mask entries at or below this hide a key, whatever its score.

    Half of the dtype's minimum, or -1e8 where that is higher.
    """
    return max(torch.finfo(dtype).min / 2, _BELOW_ANY_SCORE)


def additive_rows(
    mask: Tensor | None, rows: Int[Tensor, " query"]
) -> Float[Tensor, "sample head query key"] | None:
    """What an additive mask adds to visible keys, or None where it adds nothing."""
    if mask is None or mask.dtype == torch.bool:
        return None
    chosen = mask[..., rows, :].float()
    finite = torch.where(chosen > hidden_below(mask.dtype), chosen, 0.0)
    return finite if bool(finite.any()) else None


def scored_rows(
    visible: Bool[Tensor, "#sample #head query key"],
    additive: Float[Tensor, "#sample #head query key"] | None,
) -> Bool[Tensor, "#sample #head query key"]:
    """The keys that take part in the softmax of a row.

    Besides the visible keys, those that a finite entry of the mask hides: their probability is what
    the entry leaves of it. A row without a visible key has none.
    """
    if additive is None:
        return visible
    return (visible | (additive != 0)) & visible.any(-1, keepdim=True)


def as_added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean or integer mask as numbers that are added to the scores; booleans if all are equal.

    This is what the eager functions of transformers do with one: True adds 1.
    """
    if mask.is_floating_point():
        return mask
    if bool((mask == mask.flatten()[:1]).all()):  # the softmax does not change
        return torch.ones_like(mask, dtype=torch.bool)
    return mask.to(dtype)


def simplified(mask: Tensor) -> Tensor:
    """The mask as booleans (True is visible) if it only hides; one that adds scores stays."""
    if mask.dtype == torch.bool:
        return mask
    if not mask.is_floating_point():
        return mask != 0
    hidden = mask <= hidden_below(mask.dtype)
    only_hides = bool((hidden | (mask == 0)).all())
    return ~hidden if only_hides else mask.detach()
