"""Statistics of the four attention blocks within and between image (V) and text (T).

A block is named by its query kind and key kind: ``T-V`` is the attention of text on the image.
Video tokens count as image tokens. Text is every token that is neither image, video nor padding.
In the vision tower, the two kinds are patches (V) and special tokens (S): class tokens and
registers. A cell is one query and one key; it is visible if the query may attend to the key. Per
block, layer and head:

* ``mass``: probability summed over the block's keys, averaged over the queries that see at least
  one of them;
* ``mean``: probability per visible cell. It is not comparable between blocks of different size: it
  is the mass divided by the number of keys, and falls as the resolution of the image rises.
* ``null`` and ``lift``: the mass under attention that is uniform over the visible keys, and
  mass / null of each query, averaged over queries.

A block without a visible cell has NaN, and ``visible`` is False. An example is ``V-T`` in a causal
model whose image comes before the text.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from xmodal_interp import at
from xmodal_interp.analysis.cross_modal import cross_modal_ratio
from xmodal_interp.analysis.selection import (
    Layers,
    mass_and_null,
    mean_where,
    n_visible,
    position_table,
    queries_of,
    received,
    refuse_cross_attention,
    selected_calls,
    visual_number,
)
from xmodal_interp.analysis.tables import Part, call_table, over_samples
from xmodal_interp.arguments import checked
from xmodal_interp.attention import AttentionCall, Positions
from xmodal_interp.errors import InputError
from xmodal_interp.sample import Sample, is_visual
from xmodal_interp.vocabulary import Tower

TIED = 1e-6  # largest relative difference from the peak that counts as a tie in float32
LETTERS: Mapping[Tower, Mapping[str, str]] = {
    "language": {"image": "V", "text": "T"},
    "vision": {"image": "V", "special": "S"},
}
PLACE_COLUMNS = ("image", "row", "col", "video", "frame")
_KEYS = ("tower", "kind", "layer", "head", "block", "query_kind", "key_kind")


@checked
def block_statistics(
    samples: Sample | Iterable[Sample],
    *,
    tower: Tower | None = None,
    layers: Layers = None,
    heads: Positions | None = None,
    image: int = 0,
    workers: int = 1,
) -> pd.DataFrame:
    """Return the attention within and between image and text, over visible cells only.

    Args:
        samples: One sample or many.
        tower: ``"language"``, or ``"vision"`` for patches and special tokens instead of image and
            text; ``Sample.tower`` if not given.
        layers: Layers, all if not given.
        heads: Heads, all if not given.
        image: Index of the image in the vision tower; videos are numbered after the images.
        workers: Number of processes that read the samples; results do not depend on it.

    Returns:
        Four rows per sample, layer and head: ``sample, tower, kind, layer, head, block, query_kind,
        key_kind``, then ``mass`` (0 to 1), ``mean`` (per visible cell), ``null``, ``lift``,
        ``n_queries`` (queries that see at least one key of the block), ``n_visible_cells``,
        ``visible``.

    Raises:
        InputError: The sample has no image, or text attends to the image by cross-attention.
        NotRecordedError: Some query rows were not kept.
    """
    parameters = {"tower": tower, "layers": layers, "heads": heads, "image": image}

    def table_rows(sample: Sample) -> Iterator[Part]:
        parts, of = [], tower or sample.tower
        letters = _letters(of)
        blocks = [f"{query}-{key}" for query in letters.values() for key in letters.values()]
        for call, chosen, values in _blocks(sample, layers, heads, of, image):
            order = np.argsort(chosen).tolist()
            ordered = {name: value[order] for name, value in values.items()}
            kinds = list(letters)
            axes: dict[str, list[Any]] = {
                "head": sorted(chosen),
                "query_kind": kinds,
                "key_kind": kinds,
            }
            part = call_table(call, axes, ordered)
            part["block"] = np.tile(blocks, len(chosen))
            parts.append({name: part[name] for name in _KEYS} | part)
        yield from sorted(parts, key=lambda part: int(part["layer"]))

    return over_samples(samples, table_rows, "block_statistics", parameters, workers)


@checked
def cross_modal_summary(
    samples: Sample | Iterable[Sample],
    layer: int = -1,
    *,
    heads: Positions | None = None,
    workers: int = 1,
) -> pd.DataFrame:
    """Summarise one layer in one row: four block means, the most attended patch, the ratio.

    All values are averaged over heads. Block means are over visible cells only, not over all cells
    of the matrix block. The queries of the patch and of the ratio are the text after the image.

    Args:
        samples: One sample or many.
        layer: Layer; negative ones count from the last.
        heads: Heads, all if not given.
        workers: Number of processes that read the samples; results do not depend on it.

    Returns:
        One row per sample: ``sample, tower, kind, layer``, then
        ``tv_mean, vt_mean, vv_mean, tt_mean`` (probability per visible cell, the query's kind
        first; NaN where no cell is visible), ``most_attended_patch`` (index among the image and
        video tokens; NA if several are tied), ``image, row, col, video, frame`` (its place),
        ``cross_modal_ratio``.

    Raises:
        InputError: The sample has no image or no text after it, or text attends to the image by
            cross-attention.
    """

    def table_rows(sample: Sample) -> Iterator[Part]:
        ((call, chosen, values),) = _blocks(sample, layer, heads, "language", 0)
        means = values["mean"].nanmean(0)  # [query kind, key kind]
        tokens = sample.visual
        attended = received(call, queries_of(sample, at.text), chosen)[:, tokens].mean(0)
        peaks = (attended >= attended.max() * (1 - TIED)).nonzero()[:, 0]
        best = int(peaks[0]) if len(peaks) == 1 else None
        token = [-1 if best is None else int(tokens[best])]
        places = {name: sample.tokens[name].array for name in PLACE_COLUMNS}
        ratio = cross_modal_ratio(sample, layers=layer, heads=heads, by=("layer",))["ratio"]
        yield {
            "tower": "language",
            "kind": "self",
            "layer": call.layer,
            "tv_mean": float(means[1, 0]),
            "vt_mean": float(means[0, 1]),
            "vv_mean": float(means[0, 0]),
            "tt_mean": float(means[1, 1]),
            "most_attended_patch": pd.array([best], dtype="Int64"),
            **{name: place.take(token, allow_fill=True)[0] for name, place in places.items()},
            "cross_modal_ratio": float(ratio.iloc[0]),
        }

    parameters = {"layer": layer, "heads": heads}
    return over_samples(samples, table_rows, "cross_modal_summary", parameters, workers)


def _letters(tower: Tower) -> Mapping[str, str]:
    """Return the letter of each kind of token in a tower.

    Raises:
        InputError: The tower has no such kinds.
    """
    if tower not in LETTERS:
        raise InputError(
            f"block_statistics is not defined for tower={tower!r}. Choose 'language' or 'vision'."
        )
    return LETTERS[tower]


def _blocks(
    sample: Sample, layers: Layers, heads: Positions | None, tower: Tower, visual: int
) -> Iterator[tuple[AttentionCall, list[int], dict[str, Tensor]]]:
    """Yield each layer, its chosen heads and the values, ``[head, query kind, key kind]``."""
    if tower == "language":
        refuse_cross_attention(sample, "A statistic of attention blocks")
        kinds = sample.kinds
    else:
        kinds = _kinds_of_patches(sample, visual)
    image, other = is_visual(kinds), np.isin(kinds, ["text", "special"])
    if not image.any():
        raise InputError(
            f"Sample {sample.name!r} has no image tokens among its {len(kinds)} positions. "
            "Block statistics require a sample with an image or a video."
        )
    keys = torch.from_numpy(np.stack([image, other]))
    queries = [each.nonzero()[:, 0] for each in keys]
    number = visual_number(sample, tower, visual)
    for call, chosen in selected_calls(sample, layers, heads, tower=tower, call=number):
        if tower == "vision":
            position_table(sample, tower, visual, call.n_keys)  # refuses other positions
        of_queries = [_block_values(call, chosen, each, keys) for each in queries]
        values = {name: torch.stack([of[name] for of in of_queries], 1) for name in of_queries[0]}
        yield call, chosen, values


def _kinds_of_patches(sample: Sample, visual: int) -> np.ndarray:
    """Return the kind of each position of the vision tower for an image."""
    visual_number(sample, "vision", visual)
    n_positions = len(sample.patch_names(visual))
    table = position_table(sample, "vision", visual, n_positions)
    return table["token_kind"].to_numpy(dtype=object)


def _block_values(
    call: AttentionCall,
    heads: Sequence[int],
    queries: Int[Tensor, " query"],
    keys: Bool[Tensor, "group key"],
) -> dict[str, Tensor]:
    """Return the values of the blocks between the queries and each group, ``[head, group]``."""
    mass, null = (each.double() for each in mass_and_null(call, keys, heads, queries))
    cells = (null * n_visible(call, queries, heads).cpu()[..., None]).round()
    seen = cells > 0
    n_queries, n_cells = seen.sum(1), cells.nan_to_num().sum(1)
    return {
        "mass": mean_where(mass, seen),
        "mean": mass.where(seen, 0.0).sum(1) / n_cells,
        "null": mean_where(null, seen),
        "lift": mean_where(mass / null, seen),
        "n_queries": n_queries,
        "n_visible_cells": n_cells.long(),
        "visible": n_queries > 0,
    }
