"""Positional bias: attention as a function of relative distance and of key position.

For the visible cells ``(i, j)`` of a block, binned by distance ``d = i - j`` or by key position
``j``:

    raw(d) = mean A_ij        null(d) = mean 1 / v_i        lift(d) = mean A_ij v_i

``v_i`` is the number of keys that query ``i`` sees. Under attention uniform over the visible keys
the lift is 1 in every bin. The mean over each column of that causal matrix, in contrast, falls from
0.074 to 0.0002 over 64 positions, which is an effect of the mask alone.

Distances and positions are counted in the sequence, without padding. If the rotary embedding
received positions with several axes that differ (Qwen2-VL: time, row and column; the tokens of an
image have the same time), there is a third profile over the *rotary* distance: the largest of the
distances along the axes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from xmodal_interp.analysis.selection import (
    Layers,
    cells_of,
    image_keys,
    mean_where,
    queries_of,
    refuse_cross_attention,
    refuse_text,
    row_chunks,
    selected_calls,
    sequence_places,
)
from xmodal_interp.analysis.tables import Part, call_table, long_table, over_samples, samples_of
from xmodal_interp.arguments import checked
from xmodal_interp.attention import AttentionCall, Positions
from xmodal_interp.errors import InputError
from xmodal_interp.sample import Sample, Selector

BLOCKS = ("text->text", "text->image", "image->image")
AXES = ("distance", "key", "rope_distance")
_ROPE = ["rope_t", "rope_h", "rope_w"]


@checked
def positional_bias(
    samples: Sample | Iterable[Sample],
    *,
    blocks: Sequence[str] = BLOCKS,
    layers: Layers = None,
    heads: Positions | None = None,
    n_bins: int = 32,
) -> pd.DataFrame:
    """Return attention profiles over relative distance and key position, per block.

    Args:
        samples: One sample or many; all have the same bins.
        blocks: Query kind and key kind: ``text->text``, ``text->image``, ``image->image``. Video
            tokens count as image tokens; special tokens are in no block.
        layers: Layers, all if not given.
        heads: Heads, all if not given.
        n_bins: Number of bins of equal width that cover the longest sample; a bin is at least one
            position wide. Shorter samples fill fewer bins.

    Returns:
        One row per sample, layer, head, block, axis and bin:
        ``sample, tower, kind, layer, head, block, axis`` (``distance``: query position minus key
        position, negative if the key comes after the query; ``key``: position of the key, without
        padding; ``rope_distance``: rotary distance, only if rotary positions have several axes),
        ``start, stop`` (the bin, stop excluded), then ``raw``, ``null``, ``lift``, ``n_cells``.
        Bins without a visible cell are left out. To average over samples, weight by ``n_cells``.

    Raises:
        InputError: A block is unknown, or the sample has no image tokens in the sequence for it.
        NotRecordedError: Some query rows were not kept.
    """
    refuse_text(blocks, "blocks", "['text->image']")
    unknown = [block for block in blocks if block not in BLOCKS]
    if unknown or not len(blocks):
        raise InputError(
            f"blocks must be among {', '.join(BLOCKS)}; got {', '.join(unknown) or 'none'}."
        )
    if n_bins < 1:
        raise InputError(f"n_bins must be at least 1; got {n_bins}.")
    samples = samples_of(samples)
    longest = max((int(sequence_places(sample)[-1]) + 1 for sample in samples), default=1)
    bins = _Bins(width=-(-longest // n_bins), longest=longest)

    def table_rows(sample: Sample) -> Iterator[Part]:
        if any("image" in block for block in blocks):
            refuse_cross_attention(sample, "A profile of text->image or image->image")
            image_keys(sample, None)
        places, rope = sequence_places(sample), _rotary(sample)
        for call, chosen in selected_calls(sample, layers, heads):
            for block in blocks:
                queries, keys = (
                    torch.tensor(sample.visual if kind == "image" else sample.where(kind))
                    for kind in block.split("->")
                )
                part = _profile(call, chosen, queries, keys, bins, places, rope)
                index = {"layer": call.layer, "head": part["head"], "block": block}
                yield {"tower": "language", "kind": "self"} | index | part

    parameters = {"blocks": blocks, "layers": layers, "heads": heads, "n_bins": n_bins}
    return over_samples(samples, table_rows, "positional_bias", parameters)


@checked
def recency_index(
    samples: Sample | Iterable[Sample],
    *,
    window: int = 16,
    queries: Selector | None = None,
    layers: Layers = None,
    heads: Positions | None = None,
) -> pd.DataFrame:
    """Return the share of attention on the last few positions, with that of uniform attention.

    Args:
        samples: One sample or many.
        window: Number of positions, including the query itself.
        queries: ``"text"``, ``"last"``, positions or a phrase, as in ``cross_modal_ratio``; all
            text tokens if not given.
        layers: Layers, all if not given.
        heads: Heads, all if not given.

    Returns:
        One row per sample, layer and head: ``sample, tower, kind, layer, head, window``, then
        ``mass`` (0 to 1), ``null``, ``lift`` (the recency index: mean over queries of
        mass / null), ``n_queries``. Queries that see only keys in the window are left out; NaN if
        no query remains.

    Raises:
        InputError: ``window`` is below 1.
    """
    if window < 1:
        raise InputError(f"window must be at least 1, the query itself; got {window}.")

    def table_rows(sample: Sample) -> Iterator[Part]:
        rows = (
            torch.tensor(sample.where("text")) if queries is None else queries_of(sample, queries)
        )
        places = sequence_places(sample)
        for call, chosen in selected_calls(sample, layers, heads):
            mass, null = _recent(call, chosen, rows, places, window)
            beyond = null < 1
            values = {
                "mass": mean_where(mass, beyond),
                "null": mean_where(null, beyond),
                "lift": mean_where(mass / null, beyond),
                "n_queries": beyond.sum(1),
            }
            of_window = {name: value[:, None] for name, value in values.items()}
            yield call_table(call, {"head": chosen, "window": [window]}, of_window)

    parameters = {"window": window, "queries": queries, "layers": layers, "heads": heads}
    return over_samples(samples, table_rows, "recency_index", parameters)


@dataclass(frozen=True)
class _Bins:
    """Bins of ``width`` positions, aligned at 0, for all distances and positions of a sequence."""

    width: int
    longest: int

    @property
    def lowest(self) -> int:
        return -((self.longest - 1) // self.width + 1)

    @property
    def starts(self) -> list[int]:
        return [b * self.width for b in range(self.lowest, -self.lowest)]

    def of(self, places: Int[Tensor, "query key"]) -> Int[Tensor, "query key"]:
        """Return the bin index of each distance or position."""
        return torch.div(places, self.width, rounding_mode="floor") - self.lowest


def _rotary(sample: Sample) -> Int[Tensor, "position axis"] | None:
    """Return the rotary positions (0 for padding), or None if all axes have the same."""
    if not set(_ROPE) <= set(sample.tokens.columns):
        return None
    rotary = torch.tensor(sample.tokens[_ROPE].fillna(0).to_numpy(dtype="int64"))
    return rotary if bool((rotary != rotary[:, :1]).any()) else None


def _profile(
    call: AttentionCall,
    heads: Sequence[int],
    queries: Int[Tensor, " query"],
    keys: Int[Tensor, " key"],
    bins: _Bins,
    place_of: Int[Tensor, " position"],
    rope: Int[Tensor, "position axis"] | None,
) -> Part:
    """Return means per head, axis and bin over the visible cells of the queries and keys."""
    starts, axes = bins.starts, AXES if rope is not None else AXES[:2]
    sums: dict[str, Tensor] = {}
    for rows in row_chunks(call, queries, len(heads)):
        probs, seen, counts = cells_of(call, heads, rows, keys)
        of_rows, of_keys = place_of[rows][:, None], place_of[keys]
        places = [of_rows - of_keys, of_keys.expand(len(rows), -1)]
        if rope is not None:
            places.append((rope[rows][:, None] - rope[keys]).abs().amax(-1))
        every = {"n_cells": seen, "raw": probs, "null": seen / counts, "lift": probs * counts}
        for name, cells in every.items():
            empty = torch.zeros(len(cells), len(axes), len(starts), dtype=cells.dtype)
            total = sums.setdefault(name, empty)
            for axis, place in enumerate(places):
                total[:, axis].index_add_(1, bins.of(place).flatten(), cells.flatten(1))
    table = long_table({"head": heads, "axis": axes, "start": starts}, sums)
    n_cells, filled = table["n_cells"], table["n_cells"] > 0
    index = {name: table[name] for name in ("head", "axis", "start")}
    index["stop"] = table["start"] + bins.width
    means = {name: table[name] / np.maximum(n_cells, 1) for name in ("raw", "null", "lift")}
    columns = index | means | {"n_cells": n_cells.astype(np.int64)}
    return {name: column[filled] for name, column in columns.items()}


def _recent(
    call: AttentionCall,
    heads: Sequence[int],
    queries: Int[Tensor, " query"],
    place_of: Int[Tensor, " position"],
    window: int,
) -> tuple[Float[Tensor, "head query"], Float[Tensor, "head query"]]:
    """Return the mass on the last ``window`` keys of each query, and its null.

    The null is NaN for a query that sees no key.
    """
    keys = torch.arange(call.n_keys)
    mass, null = [], []
    for rows in row_chunks(call, queries, len(heads)):
        probs, seen, counts = cells_of(call, heads, rows, keys)
        distance = place_of[rows][:, None] - place_of
        near = (distance >= 0) & (distance < window)
        mass.append((probs * near).sum(-1))
        even = ((seen * near).sum(-1) / counts[..., 0]).where(seen.any(-1), torch.nan)
        null.append(even.expand(len(heads), -1))
    return torch.cat(mass, 1), torch.cat(null, 1)
