"""The four blocks of attention between image (V) and text (T): who looks at whom, and how much.

A block is named query kind - key kind, so that ``T-V`` is text looking at the image. Tokens of
videos are image tokens here. Text is every token that is neither image, video nor padding; the two
key kinds share out each row. Per block, layer and head:

* ``mass``: probability per query, summed over the block's keys, averaged over the queries that see
  any of them;
* ``mean``: probability per cell, over visible cells only. ``mean`` of blocks of different size are
  not comparable: the mean is the mass over the number of keys, and it falls with the resolution of
  the image.
* ``null`` and ``lift``: the mass if attention were uniform over the visible keys, and mass / null
  query by query, averaged.

A block without a visible cell (``V-T`` where the image comes first in a causal model) is NaN and
``visible`` is False: it is not that the image does not look, it cannot.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from xmodal_interp.analysis.cross_modal import cross_modal_ratio
from xmodal_interp.analysis.frames import keyed, long_table, over_samples, stacked
from xmodal_interp.analysis.nulls import n_visible, null_mass, received
from xmodal_interp.analysis.selecting import (
    Layers,
    calls_of,
    heads_of,
    queries_of,
    refuse_cross_attention,
)
from xmodal_interp.arguments import checked
from xmodal_interp.attention import AttentionCall, Positions
from xmodal_interp.errors import InputError
from xmodal_interp.sample import Sample
from xmodal_interp.vocabulary import TEXT, VISUAL_KINDS

TIED = 1e-6  # probabilities this close, relative to the peak, are equal in float32
SHORT = {"image": "V", "text": "T"}
_COLUMNS = ("tower", "kind", "layer", "head", "block", "query_kind", "key_kind")


@checked
def block_statistics(
    samples: Sample | Iterable[Sample],
    *,
    layers: Layers = None,
    heads: Positions | None = None,
) -> pd.DataFrame:
    """Attention within and between image and text, over visible cells only.

    Args:
        samples: One sample or many.
        layers: Layers, all if not given.
        heads: Heads, all if not given.

    Returns:
        Four rows per sample, layer and head: ``sample, tower, kind, layer, head, block, query_kind,
        key_kind``, then ``mass`` (0 to 1), ``mean`` (per visible cell), ``null``, ``lift``,
        ``n_queries`` (that see any of the block), ``n_visible_cells``, ``visible``.

    Raises:
        InputError: No image, or an image that is not in the sequence.
        NotRecordedError: Query rows that were not kept.
    """
    return over_samples(
        samples,
        lambda sample: _blocks(sample, layers, heads),
        analysis="block_statistics",
        parameters={"layers": layers, "heads": heads},
    )


@checked
def cross_modal_summary(
    samples: Sample | Iterable[Sample], layer: int = -1, *, heads: Positions | None = None
) -> pd.DataFrame:
    """One layer in one row: the four blocks, the most attended patch, the cross-modal ratio.

    Everything is averaged over heads. Unlike the usual average over matrix blocks, only visible
    cells count, and only text behind the image is asked for the patch and the ratio.

    Args:
        samples: One sample or many.
        layer: Layer; negative ones count from the last.
        heads: Heads, all if not given.

    Returns:
        One row per sample: ``sample, tower, kind, layer``, then
        ``tv_mean, vt_mean, vv_mean, tt_mean`` (probability per visible cell, the query's kind
        first; NaN where nothing is visible), ``most_attended_patch`` (index among the image and
        video tokens; NA where several are attended alike), ``image, row, col, video, frame`` (where
        it is), ``cross_modal_ratio``.

    Raises:
        InputError: No image, no text behind it, or an image that is not in the sequence.
    """

    def table_of(sample: Sample) -> pd.DataFrame:
        blocks = _blocks(sample, layer, heads)
        means = blocks.groupby("block")["mean"].mean()
        call = next(calls_of(sample, layer))
        tokens = sample.visual
        chosen = heads_of(call, heads)
        attended = received(call, queries_of(sample, TEXT), chosen)[:, tokens].mean(0)
        peaks = (attended >= attended.max() * (1 - TIED)).nonzero()[:, 0]
        best = int(peaks[0]) if len(peaks) == 1 else None  # a flat map has no peak
        place = sample.tokens.reindex([-1 if best is None else int(tokens[best])]).iloc[0]
        ratio = cross_modal_ratio(sample, layers=layer, heads=heads, by=("layer",))["ratio"]
        row = {
            **{
                f"{name}_mean": means[f"{name[0]}-{name[1]}".upper()]
                for name in ("tv", "vt", "vv", "tt")
            },
            "most_attended_patch": best,
            "image": place["image"],
            "row": place["row"],
            "col": place["col"],
            "video": place["video"],
            "frame": place["frame"],
            "cross_modal_ratio": ratio.iloc[0],
        }
        about = {"tower": "language", "kind": "self", "layer": call.layer}
        return pd.DataFrame([about | row]).astype({"most_attended_patch": "Int64"})

    parameters = {"layer": layer, "heads": heads}
    return over_samples(samples, table_of, analysis="cross_modal_summary", parameters=parameters)


def _blocks(sample: Sample, layers: Layers, heads: Positions | None) -> pd.DataFrame:
    refuse_cross_attention(sample, "A block of attention")
    kinds = sample.tokens["kind"]
    of_kind = {
        "image": torch.tensor(kinds.isin(VISUAL_KINDS).to_numpy(dtype=bool)),
        "text": torch.tensor(kinds.isin(["text", "special"]).to_numpy(dtype=bool)),
    }
    if not of_kind["image"].any():
        raise InputError(
            f"Blocks are between image and text. Sample {sample.name!r} has no image tokens among "
            f"its {len(sample)} positions."
        )
    keys = torch.stack(list(of_kind.values()))
    tables = []
    for call in calls_of(sample, layers):
        chosen = heads_of(call, heads)
        for query_kind, positions in of_kind.items():
            values = _block_values(call, chosen, positions.nonzero()[:, 0], keys)
            names = np.array([f"{SHORT[query_kind]}-{SHORT[key]}" for key in of_kind])
            values |= {"block": names[None], "query_kind": np.array([[query_kind]])}
            part = long_table({"head": chosen, "key_kind": list(of_kind)}, values)
            table = keyed(part, tower="language", kind="self", layer=call.layer)
            tables.append({name: table[name] for name in _COLUMNS} | table)
    return stacked(tables).sort_values(["layer", "head"], kind="stable", ignore_index=True)


def _block_values(
    call: AttentionCall,
    heads: Sequence[int],
    queries: Int[Tensor, " query"],
    keys: Bool[Tensor, "group key"],
) -> dict[str, np.ndarray]:
    """Values of the blocks between some queries and each group of keys, ``[head, group]``."""
    mass = call.mass(keys, heads, queries)[0].cpu().double()
    null = null_mass(call, keys, heads, queries).cpu().double()
    cells = (null * n_visible(call, queries, heads).cpu()[..., None]).round()
    seen = cells > 0
    n_queries, n_cells = seen.sum(1), cells.nan_to_num().sum(1)
    inside = mass.where(seen, 0.0)
    values = {
        "mass": inside.sum(1) / n_queries,
        "mean": inside.sum(1) / n_cells,
        "null": null.where(seen, 0.0).sum(1) / n_queries,
        "lift": (inside / null).where(seen, 0.0).sum(1) / n_queries,
        "n_queries": n_queries,
        "n_visible_cells": n_cells.long(),
        "visible": n_queries > 0,
    }
    return {name: value.numpy() for name, value in values.items()}
