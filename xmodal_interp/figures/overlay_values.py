"""Values of an overlay: attention of chosen queries and heads to each token of an image.

1. Compute the exact probabilities of these queries on the image's tokens, and which of the tokens
   the mask makes visible.
2. Exclude masked tokens: a token that no chosen query may attend to is NaN, never 0.
3. Average over the chosen heads and queries, over visible tokens only.
4. For ``show="share"`` or ``"lift"``, convert the probabilities.
5. If the tokens are learned queries, distribute the values over the patches of the vision tower.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from xmodal_interp import at
from xmodal_interp.analysis.selection import each_once, rows_in_tower
from xmodal_interp.at import Selector
from xmodal_interp.attention import AttentionCall, Positions, entries_of
from xmodal_interp.errors import GeometryError, InputError
from xmodal_interp.figures.placement import PlacedImage
from xmodal_interp.figures.scales import Show
from xmodal_interp.figures.style import named, panel_name
from xmodal_interp.sample import Sample
from xmodal_interp.selected_positions import of_function

_CHUNK = 2**22  # largest number of probabilities computed at once


@dataclass(frozen=True, eq=False)
class ImageAttention:
    """Attention of some queries to the tokens of one image, in one layer.

    Queries are summed by group while they are read, so that the memory does not depend on their
    number.

    Attributes:
        call: The attention call.
        placed: The image.
        heads: The chosen heads, in order; all if None.
        probs: Sums of probabilities over the queries of a group; NaN in rows without a visible key
            count as 0.
        lifts: Sums of probability times the number of visible keys.
        n_visible: Number of queries of a group that may attend to a token; the head axis may have
            length 1.
        n_queries: Number of queries of each group.
    """

    call: AttentionCall
    placed: PlacedImage
    heads: Positions | None
    probs: Float[np.ndarray, "head group token"]
    lifts: Float[np.ndarray, "head group token"]
    n_visible: Int[np.ndarray, "mask_head group token"]
    n_queries: Int[np.ndarray, " group"]

    def values(
        self,
        show: Show,
        heads: Sequence[int] | None = None,
        queries: Sequence[int] | None = None,
        left_out: Bool[np.ndarray, " token"] | None = None,
    ) -> Float[np.ndarray, " cell"]:
        """Return one value per cell, NaN where it is hidden from every query or left out.

        Args:
            show: Quantity to return; see ``OverlayOptions``.
            heads: Indices into the chosen heads; all if not given.
            queries: Indices of groups; all if not given.
            left_out: Tokens to leave out; shares are of the attention on the other tokens.
        """
        cells = _part(self.lifts if show == "lift" else self.probs, heads, queries).sum((0, 1))
        counts = _part(np.broadcast_to(self.n_visible, self.probs.shape), heads, queries)
        counts = counts.sum((0, 1))
        if left_out is not None:
            counts = np.where(left_out, 0, counts)
        with np.errstate(invalid="ignore"):
            means = np.where(counts > 0, cells / np.maximum(counts, 1), np.nan)
            if show == "share":
                means /= np.nansum(means)
        return self.placed.on_cells(means, mean=show == "lift")

    def undrawn(
        self, heads: Sequence[int] | None = None, queries: Sequence[int] | None = None
    ) -> tuple[float, float] | None:
        """Return the attention to tokens without a cell (thumbnail, line breaks) and to all tokens.

        Both are means over the queries and heads. Return None if all tokens have a cell.

        Args:
            heads: Indices into the chosen heads; all if not given.
            queries: Indices of groups; all if not given.
        """
        without = self.placed.without_cell
        return self.to_tokens(without, heads, queries) if without.any() else None

    def to_tokens(
        self,
        tokens: Bool[np.ndarray, " token"],
        heads: Sequence[int] | None = None,
        queries: Sequence[int] | None = None,
    ) -> tuple[float, float]:
        """Return the attention to some tokens and to all, averaged over the queries and heads."""
        sums = _part(self.probs, heads, queries)
        chosen = self.n_queries if queries is None else self.n_queries[list(queries)]
        mass = sums.mean(0).sum(0) / chosen.sum()
        return float(mass[tokens].sum()), float(mass.sum())


def _part(
    values: np.ndarray, heads: Sequence[int] | None, queries: Sequence[int] | None
) -> np.ndarray:
    head = slice(None) if heads is None else list(heads)
    query = slice(None) if queries is None else list(queries)
    return values[head][:, query]


def attention_on_image(
    sample: Sample,
    placed: PlacedImage,
    queries: Selector,
    layer: int,
    heads: Positions | None = None,
    groups: Sequence[range] | None = None,
) -> ImageAttention:
    """Return the attention of some queries to the tokens of an image.

    Args:
        sample: The sample.
        placed: The image and its keys.
        queries: A selector.
        layer: Layer index; negative ones count from the last.
        heads: Heads; all if not given.
        groups: Indices into the queries, one range per group, in order; one group per query if not
            given.

    Raises:
        GeometryError: The layer of the vision tower does not have one position per patch.
    """
    call = _call(sample, placed, layer)
    rows = _positions(sample, placed, queries)
    keys = torch.from_numpy(placed.keys)
    sizes = [1] * len(rows) if groups is None else [len(group) for group in groups]
    of_group = np.repeat(np.arange(len(sizes)), sizes)
    n_heads = call.n_heads if heads is None else len(call.probs(heads, rows[:1], keys[:1])[0])
    probs = np.zeros((n_heads, len(sizes), len(keys)))
    lifts = np.zeros_like(probs)
    n_visible = np.zeros((len(call.visible(rows[:1])[0]), *probs.shape[1:]), dtype=np.int64)
    n_rows = max(1, _CHUNK // (n_heads * max(1, len(keys))))
    for part in (slice(start, start + n_rows) for start in range(0, len(rows), n_rows)):
        seen = call.visible(rows[part])[0][..., keys].cpu().numpy()
        of_keys = call.probs(heads, rows[part], keys)[0].double().cpu().numpy()
        of_keys = np.where(seen, of_keys, 0.0)
        weights = call.n_visible(rows[part])[0].double().cpu().numpy()[..., None]
        sums: tuple[tuple[np.ndarray, np.ndarray], ...] = (
            *((probs, of_keys), (lifts, of_keys * weights)),
            (n_visible, seen),
        )
        for group in np.unique(of_group[part]).tolist():
            inside = of_group[part] == group
            for total, values in sums:
                total[:, group] += values[:, inside].sum(1)
    return ImageAttention(call, placed, heads, probs, lifts, n_visible, np.array(sizes))


def _call(sample: Sample, placed: PlacedImage, layer: int) -> AttentionCall:
    """Return the call of a layer whose keys are those of the image."""
    call = sample.call(layer, tower=placed.tower, kind=placed.kind, call=placed.call)
    if placed.tower == "vision" and call.n_keys != len(placed.keys):
        raise GeometryError(
            f"{call.name} has {call.n_keys} keys, but image {placed.number} has "
            f"{len(placed.keys)} patches and special tokens. Draw a vision layer with one "
            "position per patch."
        )
    return call


def _positions(sample: Sample, placed: PlacedImage, queries: Selector) -> Tensor:
    return sample.positions(queries, tower=placed.tower, image=placed.number)


def query_name(
    sample: Sample, placed: PlacedImage, positions: Sequence[int], *, short: bool = False
) -> str:
    """Return the queries in words: the text of tokens, or the names of vision-tower positions.

    Args:
        sample: The sample.
        placed: The image, whose tower the positions are in.
        positions: The positions.
        short: Whether the text is the title of a panel.
    """
    if placed.tower == "language":
        return panel_name(sample, positions) if short else named(sample, positions)
    names = sample.patch_names(placed.number)[list(positions)].tolist()
    if len(names) > 3:
        return f"{len(names)} positions"
    places = placed.grid.places[list(positions)].tolist()
    return ", ".join(
        f"patch in row {row}, column {col}"
        if row >= 0
        else f"{name} token"
        if name == "class"
        else name
        for name, (row, col) in zip(names, places, strict=True)
    )


def query_positions(
    sample: Sample, placed: PlacedImage, queries: Selector | None, layer: int | None = None
) -> list[int]:
    """Return the positions of the queries; at least one must be able to attend to the image.

    Args:
        sample: The sample.
        placed: The image and its keys.
        queries: A selector. If not given, all text after the image, or the class token
            of the vision tower.
        layer: The drawn layer, whose mask is tested; one of all recorded layers suffices if not
            given. Masks differ between layers with and without a window, and between encoder and
            decoder.

    Raises:
        InputError: The selection is empty, or the mask hides the image from all of its positions.
    """
    rows = rows_in_tower(sample, queries, placed.tower, placed.number, at.text)
    positions: list[int] = each_once(rows).tolist()
    if not positions:
        raise InputError("The selection of queries is empty. Pass at least one position.")
    layers = sample.layers(placed.tower, placed.kind) if layer is None else [layer]
    first = _call(sample, placed, min(layers, default=0))
    keys = torch.from_numpy(placed.keys)
    calls = (_call(sample, placed, each) for each in layers)
    if not any(bool(call.visible(positions)[..., keys].any()) for call in calls):
        raise InputError(
            f"{query_name(sample, placed, positions)} of sample {sample.name!r} cannot attend to "
            f"any of the {len(keys)} tokens of {placed.medium} {placed.number}. "
            f"{_advice(first, keys, max(positions))}"
        )
    return positions


def _advice(call: AttentionCall, keys: Tensor, last: int) -> str:
    rows = call.query_positions
    can_see = call.visible(rows)[..., keys].any(-1).flatten(0, 1).any(0).cpu()
    rows_that_see = rows.cpu()[can_see]
    if not len(rows_that_see):
        return "No recorded query can."
    if bool((rows_that_see > last).any()):
        return "Choose a later position."
    return f"Choose a position from {int(rows_that_see.min())} to {int(rows_that_see.max())}."


def query_groups(sample: Sample, placed: PlacedImage, queries: Selector | None) -> list[list[int]]:
    """Return the positions of each panel.

    A list gives one panel per entry, any other selector one panel per token.
    """
    queries = of_function(sample, queries)
    if queries is None and placed.tower == "language":
        queries = torch.from_numpy(sample.text_after_image())
    elif queries is None:
        queries = rows_in_tower(sample, None, placed.tower, placed.number, at.text)
    if isinstance(queries, (list, tuple)) and entries_of(queries) is None:
        groups = [_positions(sample, placed, entry).tolist() for entry in queries]
    else:
        groups = [[position] for position in _positions(sample, placed, queries).tolist()]
    query_positions(sample, placed, [position for group in groups for position in group])
    return groups
