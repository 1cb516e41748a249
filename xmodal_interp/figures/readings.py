"""The numbers behind an overlay: what chosen queries and heads give to each token of an image.

1. Ask the call for the exact probabilities of these queries on the image's tokens, and for what the
   mask lets them see.
2. Leave out what is hidden: a cell that no chosen query can see is NaN, never 0.
3. Average over the chosen heads and queries, over visible cells only.
4. Turn into a share of the image's attention, or a lift, if that is to be shown.
5. Where tokens are learned queries, put it on the patches that are in them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from xmodal_interp.analysis.selecting import each_once
from xmodal_interp.attention import AttentionCall, Positions
from xmodal_interp.errors import InputError
from xmodal_interp.figures.placement import Place
from xmodal_interp.figures.scales import Show
from xmodal_interp.figures.wording import named
from xmodal_interp.sample import Sample, Selector


@dataclass(frozen=True, eq=False)
class Reading:
    """Attention of some queries on the tokens of one image, in one layer.

    Attributes:
        call: The call it was read from.
        place: The image.
        heads: Which heads were read, in order; all if None.
        probs: Probabilities; NaN in rows that see nothing.
        visible: What the mask lets each query see; the head axis may have length 1.
        n_visible: How many keys each query sees, image or not.
    """

    call: AttentionCall
    place: Place
    heads: Positions | None
    probs: Float[np.ndarray, "head query token"]
    visible: Bool[np.ndarray, "mask_head query token"]
    n_visible: Float[np.ndarray, "mask_head query"]

    def values(
        self,
        show: Show,
        heads: Sequence[int] | None = None,
        queries: Sequence[int] | None = None,
        left_out: Bool[np.ndarray, " token"] | None = None,
    ) -> Float[np.ndarray, " cell"]:
        """One value per cell of the place, NaN where it is hidden from every query or left out.

        Args:
            show: What the values are.
            heads: Which of the heads that were read, all if not given.
            queries: Which of the queries that were read, all if not given.
            left_out: Tokens to leave out; shares are of what the others get.
        """
        head = slice(None) if heads is None else list(heads)
        query = slice(None) if queries is None else list(queries)
        weights = self.n_visible[..., None] if show == "lift" else 1.0
        seen = np.broadcast_to(self.visible, self.probs.shape)
        cells = np.where(seen, self.probs * weights, 0.0)[head][:, query]
        counts = seen[head][:, query].sum((0, 1))
        if left_out is not None:
            counts = np.where(left_out, 0, counts)
        with np.errstate(invalid="ignore"):
            means = np.where(counts > 0, cells.sum((0, 1)) / np.maximum(counts, 1), np.nan)
            if show == "share":
                means /= np.nansum(means)
        return self.place.on_cells(means, mean=show == "lift")

    def undrawn(
        self, heads: Sequence[int] | None = None, queries: Sequence[int] | None = None
    ) -> tuple[float, float] | None:
        """Attention on tokens that have no cell (a thumbnail's, line breaks), and on all tokens.

        Both are means over the queries and heads; None where all tokens have a cell.

        Args:
            heads: Which of the heads that were read, all if not given.
            queries: Which of the queries that were read, all if not given.
        """
        without = self.place.without_cell
        if not without.any():
            return None
        head = slice(None) if heads is None else list(heads)
        query = slice(None) if queries is None else list(queries)
        mass = np.nan_to_num(self.probs)[head][:, query].mean((0, 1))
        return float(mass[without].sum()), float(mass.sum())


def reading(
    sample: Sample,
    place: Place,
    queries: Selector,
    layer: int,
    heads: Positions | None = None,
) -> Reading:
    """What some queries give to the tokens of an image.

    Args:
        sample: The sample.
        place: The image and its keys.
        queries: A phrase or positions.
        layer: Layer index; negative ones count from the last.
        heads: Heads, all if not given.
    """
    call = sample.call(layer, kind=place.kind)
    rows = sample.positions(queries)
    keys = torch.from_numpy(place.keys)
    return Reading(
        call,
        place,
        heads,
        call.probs(heads, rows, keys)[0].double().cpu().numpy(),
        call.visible(rows)[0][..., keys].cpu().numpy(),
        call.n_visible(rows)[0].double().cpu().numpy(),
    )


def query_positions(
    sample: Sample, place: Place, queries: Selector, layer: int | None = None
) -> list[int]:
    """Positions of the queries, of which one at least must see the image.

    Args:
        sample: The sample.
        place: The image and its keys.
        queries: A phrase or positions.
        layer: The layer that is shown; any layer will do if not given. Layers see differently
            where some have a window, or are those of a decoder.

    Raises:
        InputError: There are none, or none sees a token of the image.
    """
    positions: list[int] = each_once(sample.positions(queries)).tolist()
    if not positions:
        raise InputError("An overlay needs at least one query; the selection is empty.")
    layers = sample.layers(kind=place.kind) if layer is None else [layer]
    first = sample.call(min(layers, default=0), kind=place.kind)
    keys = torch.from_numpy(place.keys)
    calls = (sample.call(each, kind=place.kind) for each in layers)
    if not any(bool(call.visible(positions)[..., keys].any()) for call in calls):
        raise InputError(
            f"An overlay needs a query that can see the image. {named(sample, positions)} of "
            f"sample {sample.name!r} sees none of the {len(keys)} tokens of image {place.number}; "
            f"{_advice(first, keys, max(positions))}"
        )
    return positions


def _advice(call: AttentionCall, keys: Tensor, last: int) -> str:
    rows = call.query_positions
    sees = call.visible(rows)[..., keys].any(-1).flatten(0, 1).any(0).cpu()
    seeing = rows.cpu()[sees]
    if not len(seeing):
        return "no position that was kept does."
    if bool((seeing > last).any()):
        return "ask for a later position."
    return f"ask for a position from {int(seeing.min())} to {int(seeing.max())}."


def query_groups(
    sample: Sample, place: Place, queries: Selector | Sequence[str | int] | None
) -> list[list[int]]:
    """The queries of each panel: a token each, or an entry each where a list has a phrase in it."""
    if queries is None:
        queries = torch.from_numpy(sample.text_after_image())
    if isinstance(queries, Sequence) and not isinstance(queries, str):
        groups = [sample.positions(entry).tolist() for entry in queries]
    else:
        groups = [[position] for position in sample.positions(queries).tolist()]
    query_positions(sample, place, flat(groups))
    return groups


def flat(groups: Sequence[Sequence[int]]) -> list[int]:
    """The positions of all groups, one after the other."""
    return [position for group in groups for position in group]
