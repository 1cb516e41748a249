"""Attention sinks: keys that receive a large share of attention from most queries.

Gu et al. 2025 (arXiv 2410.10781), whose ``alpha_k`` is called ``received_k`` here:
``received_k = 1 / n_k * sum_i A_ik`` over the ``n_k`` queries ``i`` that see key ``k``. Key ``k``
is a sink of a head if ``received_k > threshold``. Under attention uniform over the visible keys,
the first of ``T`` causal positions receives ``H_T / T`` (``H_T`` is the harmonic number; 0.0741 for
``T`` = 64). Tables therefore have this null next to the received share.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from xmodal_interp.analysis.selection import (
    POSITION_COLUMNS,
    Layers,
    counted_once,
    counted_positions,
    per_head,
    position_columns,
    position_table,
    query_weights,
    received,
    rows_of,
    selected_calls,
    visual_number,
)
from xmodal_interp.analysis.tables import Part, call_table, long_table, over_samples
from xmodal_interp.arguments import checked, real_number
from xmodal_interp.attention import AttentionCall, Positions
from xmodal_interp.errors import InputError
from xmodal_interp.sample import Sample
from xmodal_interp.vocabulary import Tower

THRESHOLD = 0.3  # epsilon of Gu et al.
_SOURCES = {"token_kind": "kind"}  # columns of the token table with another name
MIN_QUERIES = 8  # a key that fewer queries see is never a sink


@checked
def attention_sinks(  # noqa: PLR0913  every option has a default
    samples: Sample | Iterable[Sample],
    *,
    threshold: float = THRESHOLD,
    tower: Tower | None = None,
    layers: Layers = None,
    heads: Positions | None = None,
    n_positions: int | None = None,
    min_queries: int = MIN_QUERIES,
    image: int = 0,
    workers: int = 1,
) -> pd.DataFrame:
    """Return the attention that keys receive, and whether they are sinks (Gu et al. 2025).

    The attention is self-attention, averaged over the kept query rows.

    Args:
        samples: One sample or many.
        threshold: A key that receives more than this mean probability is a sink of the head; above
            0 and at most 1.
        tower: ``"language"`` or ``"vision"``; ``Sample.tower`` if not given.
        layers: Layers, all if not given.
        heads: Heads, all if not given.
        n_positions: Use only the first ``n_positions`` positions, without padding. The paper uses
            64. All if not given.
        min_queries: Keys that fewer queries see are never sinks. For example, only one query
            sees the last position.
        image: Index of the image in the vision tower; videos are numbered after the images.
        workers: Number of processes that read the samples; results do not depend on it.

    Returns:
        One row per sample, layer, head and key, for the first position and for every key that is a
        sink of some head of the layer: ``sample, tower, kind, layer, head, key, token, token_kind,
        image, row, col, video, frame``, then ``received`` (mean probability), ``null`` (the same
        under uniform attention over the visible keys), ``lift`` (received / null), ``sink``,
        ``n_queries`` (queries that see the key).

    Raises:
        InputError: ``threshold`` is not above 0 and at most 1.
    """
    _check_threshold(threshold)
    parameters: dict[str, Any] = {
        "threshold": threshold,
        "tower": tower,
        "layers": layers,
        "heads": heads,
        "n_positions": n_positions,
        "min_queries": min_queries,
        "image": image,
    }

    def table_rows(sample: Sample) -> Iterator[Part]:
        tokens: pd.DataFrame | Mapping[str, Any] | None = None
        if (tower or sample.tower) == "language":
            columns = [_SOURCES.get(name, name) for name in POSITION_COLUMNS]
            arrays = (sample.tokens[name].array for name in columns)
            tokens = dict(zip(POSITION_COLUMNS, arrays, strict=True))
        for call, first, chosen, share, null, n_queries, sink in _sinks(sample, **parameters):
            if tokens is None:
                tokens = position_table(sample, call.tower, image, call.n_keys)
            always = torch.tensor([first])
            keys = torch.unique(torch.cat([sink.any(0).nonzero()[:, 0], always]))
            values = {
                "received": share[:, keys],
                "null": null[:, keys],
                "lift": share[:, keys] / null[:, keys],
                "sink": sink[:, keys],
                "n_queries": n_queries[:, keys].long(),
            }
            part = call_table(call, {"head": chosen, "key": keys.tolist()}, values)
            index = {name: part[name] for name in ("tower", "kind", "layer", "head", "key")}
            yield index | position_columns(tokens, part["key"]) | part

    return over_samples(samples, table_rows, "attention_sinks", parameters, workers)


@checked
def sink_rate(  # noqa: PLR0913  every option has a default
    samples: Sample | Iterable[Sample],
    *,
    threshold: float = THRESHOLD,
    tower: Tower | None = None,
    layers: Layers = None,
    heads: Positions | None = None,
    n_positions: int | None = None,
    min_queries: int = MIN_QUERIES,
    image: int = 0,
    workers: int = 1,
) -> pd.DataFrame:
    """Return the share of heads with a sink (Gu et al. 2025); arguments as in ``attention_sinks``.

    Returns:
        One row per sample and layer: ``sample, tower, kind, layer``, then ``first`` (share of heads
        for which the first position is a sink), ``any`` (share of heads with at least one sink),
        ``n_heads``. The paper reports the mean of ``first`` over samples and layers.
    """
    _check_threshold(threshold)
    parameters: dict[str, Any] = {
        "threshold": threshold,
        "tower": tower,
        "layers": layers,
        "heads": heads,
        "n_positions": n_positions,
        "min_queries": min_queries,
        "image": image,
    }

    def table_rows(sample: Sample) -> Iterator[Part]:
        for call, first, chosen, _, _, _, sink in _sinks(sample, **parameters):
            values = {
                "first": sink[:, first].double().mean(),
                "any": sink.any(1).double().mean(),
                "n_heads": torch.tensor(len(chosen)),
            }
            rates = long_table({"layer": [call.layer]}, values)
            yield {"tower": call.tower, "kind": call.kind} | rates

    return over_samples(samples, table_rows, "sink_rate", parameters, workers)


def sink_keys(
    call: AttentionCall,
    heads: Sequence[int],
    rows: Int[Tensor, " query"],
    *,
    threshold: float = THRESHOLD,
    always: int | None = None,
) -> Bool[Tensor, "head key"]:
    """Return a mask of each head's sinks over the query rows, including the key ``always``."""
    _check_threshold(threshold)
    share, _, n_queries = _received(call, rows, heads)
    sink = (share > threshold) & (n_queries >= MIN_QUERIES)
    if always is not None:
        sink[:, always] = True
    return sink


def _sinks(
    sample: Sample,
    *,
    threshold: float,
    tower: Tower | None,
    layers: Layers,
    heads: Positions | None,
    n_positions: int | None,
    min_queries: int,
    image: int,
) -> Iterator[tuple[AttentionCall, int, list[int], Tensor, Tensor, Tensor, Tensor]]:
    """Yield each layer of a sample, its first position, its chosen heads, and four tensors.

    The first position is that without padding. The tensors ``[head, key]`` are the received share,
    its null, the number of queries that see the key, and whether the key is a sink.
    """
    of = tower or sample.tower
    number = visual_number(sample, of, image)
    for call, chosen in selected_calls(sample, layers, heads, tower=of, call=number):
        counted = counted_positions(sample, of, image, call.n_keys)
        rows = rows_of(call, counted)
        if n_positions is not None:
            places = counted.long().cumsum(0) - 1
            rows = rows[places.to(rows.device)[rows] < n_positions]
        share, null, n_queries = _received(call, rows, chosen)
        sink = (share > threshold) & (n_queries >= min_queries)
        yield call, int(counted.nonzero()[0]), chosen, share, null, n_queries, sink


def _received(
    call: AttentionCall, rows: Int[Tensor, " query"], heads: Sequence[int]
) -> tuple[Float[Tensor, "head key"], Float[Tensor, "head key"], Float[Tensor, "head key"]]:
    """Return per key the mean probability over queries that see it, its null, and their number."""

    def sums() -> Float[Tensor, "2 #head key"]:
        chosen = query_weights(call, rows).double()[:, None]
        even = chosen / call.n_visible().clamp(min=1)
        return call.visible_sums(torch.cat([chosen.expand_as(even), even])).float().cpu()

    counts = counted_once(call, "received", (rows.tolist(),), sums)
    seen_by, null = (per_head(each, heads) for each in counts)
    total = received(call, rows, heads).cpu()
    return total / seen_by, null / seen_by, seen_by


def _check_threshold(threshold: float) -> None:
    real_number(threshold, "threshold")
    if not 0 < threshold <= 1:
        raise InputError(f"threshold must be above 0 and at most 1; got {threshold}.")
