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
        chosen = mask[..., rows, :]
        return chosen if chosen.dtype == torch.bool else chosen > hidden_below(chosen.dtype)
    keys = torch.arange(n_keys, device=rows.device)
    seen = torch.ones(len(rows), n_keys, dtype=torch.bool, device=rows.device)
    if causal:
        seen &= keys <= positions[:, None]
    if sliding_window is not None:
        seen &= keys > positions[:, None] - sliding_window
    if segments is not None:
        seen &= segments == segments[positions][:, None]
    return seen[None, None]


def hidden_below(dtype: torch.dtype) -> float:
    """Additive mask entries at or below this hide a key.

    Half of the dtype's minimum, or minus infinity.
    """
    return torch.finfo(dtype).min / 2


def additive_rows(
    mask: Tensor | None, rows: Int[Tensor, " query"]
) -> Float[Tensor, "sample head query key"] | None:
    """What an additive mask adds to visible keys, or None where it adds nothing."""
    if mask is None or mask.dtype == torch.bool:
        return None
    chosen = mask[..., rows, :].float()
    finite = torch.where(chosen > hidden_below(mask.dtype), chosen, 0.0)
    return finite if bool(finite.any()) else None


def simplified(mask: Tensor) -> Tensor:
    """The mask as booleans (True is visible) if it only hides; one that adds scores stays."""
    if mask.dtype == torch.bool:
        return mask
    if not mask.is_floating_point():
        return mask != 0
    hidden = mask <= hidden_below(mask.dtype)
    only_hides = bool((hidden | (mask == 0)).all())
    return ~hidden if only_hides else mask.detach()
