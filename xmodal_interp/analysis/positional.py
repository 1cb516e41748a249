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

The sums over cells are those of :mod:`xmodal_interp.analysis.cell_sums`. Counts and nulls depend on
the mask only. They are computed once for consecutive layers with the same mask, and once for all
heads unless the mask differs between heads.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from xmodal_interp.analysis.cell_sums import Bins, Blocks, CellSums
from xmodal_interp.analysis.selection import (
    CHUNK_BYTES,
    Layers,
    are_same,
    cells_of,
    image_keys,
    mean_where,
    n_visible,
    not_padding,
    queries_of,
    refuse_cross_attention,
    refuse_text,
    row_chunks,
    selected_calls,
    sequence_places,
    visibility,
)
from xmodal_interp.analysis.tables import (
    Part,
    Taken,
    call_table,
    long_table,
    over_samples,
    samples_of,
)
from xmodal_interp.arguments import checked
from xmodal_interp.at import Selector
from xmodal_interp.attention import AttentionCall, Positions
from xmodal_interp.attention.kernels import full_precision
from xmodal_interp.errors import InputError
from xmodal_interp.sample import Sample, is_visual

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
    workers: int = 1,
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
        workers: Number of processes that read the samples; results do not depend on it.

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
    longest = reach = 1
    for sample in samples:
        rotary, n_places = _rotary(sample), int(not_padding(sample).sum())
        longest, reach = max(longest, n_places), max(reach, n_places)
        if rotary is not None:  # in a video, the time may rise faster than the position
            rotary = rotary[not_padding(sample)]
            reach = max(reach, int((rotary.amax(0) - rotary.amin(0)).max()) + 1)
    bins = Bins(width=-(-longest // n_bins), reach=reach)

    def table_rows(sample: Sample) -> Iterator[Part]:
        if any("image" in block for block in blocks):
            refuse_cross_attention(sample, "A profile of text->image or image->image")
            image_keys(sample, None)
        work = _work(sample, blocks, bins)
        mask: _Mask | None = None
        for call, chosen in selected_calls(sample, layers, heads):
            _refuse_missing_rows(call, work)
            if mask is None or not mask.is_of(call, chosen):
                mask = _mask(call, chosen, work)
            part = _profile(chosen, mask, _prob_sums(call, chosen, mask, work), work.blocks)
            yield {"tower": "language", "kind": "self", "layer": call.layer} | part

    parameters = {"blocks": blocks, "layers": layers, "heads": heads, "n_bins": n_bins}
    return over_samples(samples, table_rows, "positional_bias", parameters, workers)


@checked
def recency_index(
    samples: Sample | Iterable[Sample],
    *,
    window: int = 16,
    queries: Selector | None = None,
    layers: Layers = None,
    heads: Positions | None = None,
    workers: int = 1,
) -> pd.DataFrame:
    """Return the share of attention on the last few positions, with that of uniform attention.

    Args:
        samples: One sample or many.
        window: Number of positions, including the query itself.
        queries: A selector, as in ``cross_modal_ratio``; all
            text tokens if not given.
        layers: Layers, all if not given.
        heads: Heads, all if not given.
        workers: Number of processes that read the samples; results do not depend on it.

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
    return over_samples(samples, table_rows, "recency_index", parameters, workers)


@dataclass(eq=False)
class _Work:
    """What the layers of a sample share.

    Attributes:
        blocks: The blocks, by place: the index in the sequence without padding.
        position: Position of each place.
        sums: Sums over rows of probabilities, by number of heads and of rows.
        buffers: Memory for rows of scores and of probabilities.
    """

    blocks: Blocks
    position: Int[Tensor, " place"]
    sums: dict[tuple[int, int], CellSums] = field(default_factory=dict)
    buffers: list[Tensor] = field(default_factory=list)


def _work(sample: Sample, blocks: Sequence[str], bins: Bins) -> _Work:
    position = not_padding(sample).nonzero()[:, 0]
    of_places, rope = sample.kinds[position.numpy()], _rotary(sample)
    kinds = {"text": of_places == "text", "image": is_visual(of_places)}
    pairs = (block.split("->") for block in dict.fromkeys(blocks))
    of_blocks = Blocks(
        [(query, key) for query, key in pairs],
        {name: torch.from_numpy(kind) for name, kind in kinds.items()},
        None if rope is None else rope[position],
        bins,
    )
    return _Work(of_blocks, position)


def _rotary(sample: Sample) -> Int[Tensor, "position axis"] | None:
    """Return the rotary positions (0 for padding), or None if all axes have the same."""
    if not set(_ROPE) <= set(sample.tokens.columns):
        return None
    axes = [sample.tokens[name].to_numpy(dtype="int64", na_value=0) for name in _ROPE]
    rotary = torch.from_numpy(np.stack(axes, axis=1))
    return rotary if bool((rotary != rotary[:, :1]).any()) else None


def _refuse_missing_rows(call: AttentionCall, work: _Work) -> None:
    """Raise NotRecordedError if a query of a block was not kept."""
    if call.rows is not None:
        for kind in work.blocks.query_kinds:
            call.n_visible(work.position[work.blocks.kinds[kind]])


@dataclass(frozen=True, eq=False)
class _Mask:
    """What depends only on the mask of a call.

    Attributes:
        about: What determines the mask.
        n_keys: Number of keys that the query at each place sees; 0 if it is in no block. The head
            axis has length 1 if the mask is the same for all heads.
        sums: Number of visible cells, and sum of ``1 / v``, per block, axis and bin.
    """

    about: tuple[Any, ...]
    n_keys: Float[Tensor, "#head place"]
    sums: Float[Tensor, "2 block #head axis bin"]

    def is_of(self, call: AttentionCall, heads: Sequence[int]) -> bool:
        """Return whether this is the mask of a call; False for an equal copy."""
        return are_same(self.about, _about_mask(call, heads))


def _about_mask(call: AttentionCall, heads: Sequence[int]) -> tuple[Any, ...]:
    shared = call.mask is None or call.mask.shape[1] == 1
    return *visibility(call), None if shared else tuple(heads)


def _mask(call: AttentionCall, heads: Sequence[int], work: _Work) -> _Mask:
    blocks, position = work.blocks, work.position
    queries, shared = blocks.queries, call.mask is None or call.mask.shape[1] == 1
    heads = heads[:1] if shared else heads
    n_keys = torch.zeros(len(heads), len(queries), dtype=torch.float64)
    n_keys[:, queries] = n_visible(call, position[queries], heads).cpu().double()

    def cells(places: Int[Tensor, " query"]) -> Float[Tensor, "head query place"]:
        seen = call.visible(position[places])[0].cpu()
        return (seen if shared else seen[list(heads)])[..., position].double()

    weights = torch.stack([torch.ones_like(n_keys), 1 / n_keys.clamp(min=1)])
    n_rows = _n_rows(call, 2 * len(heads))
    sums = CellSums(blocks, len(heads), n_rows, torch.float64).of(cells, weights)
    return _Mask(_about_mask(call, heads), n_keys, sums)


def _prob_sums(
    call: AttentionCall, heads: Sequence[int], mask: _Mask, work: _Work
) -> Float[Tensor, "2 block head axis bin"]:
    """Return the sum of the probabilities, and that of probability times ``v``."""
    position = work.position
    causal = call.causal and call.mask is None and call.offset == 0
    some_see_none = bool((mask.n_keys[:, work.blocks.queries] == 0).any())
    plain = _CausalRows(call, heads, work.buffers) if _CausalRows.fits(call) else None

    def cells(places: Int[Tensor, " query"]) -> Float[Tensor, "head query place"]:
        rows = position[places]
        keys = position[: int(places[-1]) + 1] if causal else position
        first, stop = int(keys[0]), int(keys[-1]) + 1
        if plain is not None:
            probs = plain(rows)
        else:
            part = call.take("key", slice(0, stop)) if causal else call
            probs = part.probs(list(heads), rows)[0].cpu()
        probs = probs[..., first:stop] if len(keys) == stop - first else probs[..., keys]
        return probs.where(mask.n_keys[:, places, None] > 0, 0.0) if some_see_none else probs

    weights = torch.stack([torch.ones_like(mask.n_keys), mask.n_keys]).float()
    size = len(heads), _n_rows(call, len(heads))
    if size not in work.sums:
        work.sums[size] = CellSums(work.blocks, *size, torch.float32)
    return work.sums[size].of(cells, weights)


class _CausalRows:
    """Rows of probabilities of a causal call, up to the last key that one of them sees.

    Equal to ``call.probs``, without its copies: the scores of hidden keys are not computed, and the
    scores of all chunks are written into one buffer.

    Args:
        call: A call for which ``fits`` is True.
        heads: The heads.
        buffers: Memory, which is replaced if it is too small.
    """

    def __init__(self, call: AttentionCall, heads: Sequence[int], buffers: list[Tensor]) -> None:
        assert call.q is not None
        assert call.k is not None
        q, k, chosen = call.q[0], call.k[0], list(heads)
        if chosen != list(range(len(q))):
            n_groups = len(q) // len(k)
            q, k = q[chosen], k[[head // n_groups for head in chosen]]
        self._q, self._scaling = q, call.scaling
        self._k = k.float().transpose(1, 2)
        self._buffers = buffers

    @staticmethod
    def fits(call: AttentionCall) -> bool:
        """Return whether a call has a causal flag, and nothing else that changes its scores."""
        extras = (call.mask, call.bias, call.softcap, call.sinks, call.sliding_window)
        others = (call.segments, call.rows, call.dense)
        bare = all(extra is None for extra in (*extras, *others))
        held = call.q is not None and call.k is not None and call.device.type == "cpu"
        return bare and held and call.causal and call.offset == 0

    @full_precision()
    def __call__(self, rows: Int[Tensor, " query"]) -> Float[Tensor, "head query key"]:
        """Return the probabilities of some rows; they are valid until the next call."""
        n_heads, n_rows, stop = len(self._q), len(rows), int(rows[-1]) + 1
        start = int(rows[0])
        every = len(rows) == stop - start
        q = (self._q[:, start:stop] if every else self._q[:, rows]).float()
        q = q.unflatten(0, (len(self._k), -1)).flatten(1, 2)
        n = n_heads * n_rows * stop
        if not self._buffers or n > len(self._buffers[0]):
            self._buffers[:] = torch.empty(2, n, dtype=torch.float32).unbind()
        scores, probs = (buffer[:n].view(len(q), -1, stop) for buffer in self._buffers)
        torch.bmm(q, self._k[..., :stop], out=scores)
        scores, probs = (each.view(n_heads, n_rows, stop) for each in (scores, probs))
        scores *= self._scaling
        hidden = torch.arange(start + 1, stop) > rows[:, None]
        scores[..., start + 1 :].masked_fill_(hidden, -torch.inf)
        return torch.softmax(scores, -1, out=probs)


def _n_rows(call: AttentionCall, n_heads: int) -> int:
    """Return the number of rows of float32 probabilities that take a few MB."""
    return max(1, CHUNK_BYTES // max(8 * call.n_keys * n_heads, 1))


def _profile(
    heads: Sequence[int],
    mask: _Mask,
    probs: Float[Tensor, "2 block head axis bin"],
    blocks: Blocks,
) -> Part:
    """Return means per head, block, axis and bin with a visible cell."""
    (n_cells, null), (raw, lift) = mask.sums, probs
    names = tuple(f"{query}->{key}" for query, key in blocks.pairs)
    axes = AXES if blocks.rope is not None else AXES[:2]
    index = {
        "block": range(len(names)),
        "head": heads,
        "axis": range(len(axes)),
        "start": blocks.bins.starts,
    }
    values = {"raw": raw, "null": null, "lift": lift, "n_cells": n_cells}
    table = long_table(index, values)
    filled = table["n_cells"] > 0
    table = {name: column[filled] for name, column in table.items()}
    means = {name: table[name] / table["n_cells"] for name in ("raw", "null", "lift")}
    return {
        "head": table["head"],
        "block": Taken(_text(names), table["block"]),
        "axis": Taken(_text(axes), table["axis"]),
        "start": table["start"],
        "stop": table["start"] + blocks.bins.width,
        **means,
        "n_cells": table["n_cells"].astype(np.int64),
    }


@functools.cache
def _text(names: tuple[str, ...]) -> Any:
    """Return the names as an array; the same array each time, so that parts of a table share it."""
    return pd.Series(np.array(names, dtype=object)).array


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
