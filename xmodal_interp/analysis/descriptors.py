"""What a head is like: how spread its attention is, and how far it reaches over the image.

Entropy: ``H_i = -sum_j A_ij ln A_ij``, beside ``ln v_i``, the most that a query with ``v_i``
visible keys can have. (Dividing by the length of the sequence instead would make every causal head
look focused.) Learned sinks take part in the softmax and are no key: a row then sums to ``1 - s``,
and its entropy is that of the row divided by this sum, ``H_i / (1 - s) + ln(1 - s)``.

Distance: ``sum_j A_ij |p_i - p_j|`` over the places ``p`` of patches, averaged over queries
(Dosovitskiy et al. 2021, arXiv 2010.11929). Class tokens have no place: they are taken out and the
rest of the row is renormalised; the mass that they had is reported. Uniform attention over a square
grid reaches about 0.52 of its side.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from xmodal_interp.analysis.frames import keyed, long_table, over_samples, stacked
from xmodal_interp.analysis.nulls import cells_of, n_visible
from xmodal_interp.analysis.padding import rows_of
from xmodal_interp.analysis.selecting import (
    Layers,
    calls_of,
    heads_of,
    image_calls,
    queries_of,
    refuse_cross_attention,
    row_chunks,
)
from xmodal_interp.arguments import checked
from xmodal_interp.attention import AttentionCall, Positions
from xmodal_interp.errors import GeometryError, InputError
from xmodal_interp.sample import Sample, Selector
from xmodal_interp.vocabulary import Tower


@checked
def attention_entropy(
    samples: Sample | Iterable[Sample],
    *,
    tower: Tower = "language",
    queries: Selector | None = None,
    layers: Layers = None,
    heads: Positions | None = None,
) -> pd.DataFrame:
    """How spread attention is: mean entropy of the rows, beside that of uniform attention.

    Self-attention. Queries that see a single key have no choice and are left out.

    Args:
        samples: One sample or many.
        tower: Part of the model; in the vision tower each image is described apart.
        queries: As in ``cross_modal_ratio``, in the language tower only; all that are held if not
            given.
        layers: Layers, all if not given.
        heads: Heads, all if not given.

    Returns:
        One row per sample, layer, head (and image): ``sample, tower, kind, layer, head, image`` (NA
        in the language tower), then ``entropy`` (nats, of the attention among the keys), ``null``
        (nats, uniform attention), ``relative_entropy`` (of each row, then averaged: 0 looks at one
        key, 1 at all alike), ``n_queries``, ``sink_mass`` (0 to 1: what learned sinks take of the
        rows; 0 in a model without).

    Raises:
        InputError: Queries that are given for another tower than the language tower.
        NotRecordedError: A tower that was not kept.
    """
    if tower != "language" and queries is not None:
        raise InputError(
            "Queries are positions of the text and its image tokens: for the language tower only. "
            f"Got {queries!r} for the {tower} tower; leave them out there."
        )

    def table_of(sample: Sample) -> pd.DataFrame:
        asked = None if queries is None else queries_of(sample, queries)
        tables = []
        for image, call in image_calls(sample, layers, tower):
            chosen = heads_of(call, heads)
            held = rows_of(sample, call) if tower == "language" else call.query_positions
            values = _entropy(call, chosen, held if asked is None else asked)
            number = np.nan if image is None else image
            table = long_table({"head": chosen}, {"image": number, **values})
            tables.append(keyed(table, tower=tower, kind="self", layer=call.layer))
        return stacked(tables).astype({"image": "Int64"})

    return over_samples(
        samples,
        table_of,
        analysis="attention_entropy",
        parameters={"tower": tower, "queries": queries, "layers": layers, "heads": heads},
    )


@checked
def attention_distance(
    samples: Sample | Iterable[Sample],
    *,
    tower: Tower = "vision",
    layers: Layers = None,
    heads: Positions | None = None,
) -> pd.DataFrame:
    """How far attention between the patches of an image reaches (Dosovitskiy et al. 2021).

    Args:
        samples: One sample or many.
        tower: ``"vision"``: between patches; ``"language"``: between the image tokens of the
            sequence.
        layers: Layers, all if not given.
        heads: Heads, all if not given.

    Returns:
        One row per sample, layer, head and image: ``sample, tower, kind, layer, head, image``, then
        ``distance_px`` (pixels of the original image), ``distance_grid`` (cells of the grid),
        ``null_px``, ``null_grid`` (uniform attention over the visible patches),
        ``relative_distance`` (px over null px), ``outside`` (mass on what has no place on this
        image, taken out before renormalising), ``n_queries``.

    Raises:
        InputError: The connector, whose positions have no place, or the language tower where the
            image is not in its sequence.
        GeometryError: A grid that does not fit the positions of the tower, or without places.
    """
    if tower == "connector":
        raise InputError(
            "A distance is between places on the image. The positions of the connector have none; "
            "choose tower='vision' or tower='language'."
        )

    def table_of(sample: Sample) -> pd.DataFrame:
        if tower == "language":
            refuse_cross_attention(sample, "A distance between the image tokens of the sequence")
        tables = []
        for image in range(len(sample.grids)):
            positions, places, cell_px = _places(sample, image, tower)
            for call in calls_of(
                sample, layers, tower=tower, call=image if tower == "vision" else 0
            ):
                _check_places(sample, call, image, tower)
                chosen = heads_of(call, heads)
                values = _distances(call, chosen, positions, places, cell_px)
                table = long_table({"head": chosen, "image": [image]}, values)
                tables.append(keyed(table, tower=tower, kind="self", layer=call.layer))
        if not tables:
            raise InputError(
                f"A distance is between places on an image. Sample {sample.name!r} has no image."
            )
        return stacked(tables)

    return over_samples(
        samples,
        table_of,
        analysis="attention_distance",
        parameters={"tower": tower, "layers": layers, "heads": heads},
    )


def _entropy(
    call: AttentionCall, heads: Sequence[int], queries: Int[Tensor, " query"]
) -> dict[str, Tensor]:
    """Means over the queries that see at least two keys, per head."""
    counts = n_visible(call, queries, heads).cpu().double()
    free = counts > 1
    entropy = call.entropy(list(heads), queries)[0].cpu().double()
    sunk = torch.zeros_like(entropy)
    if call.sinks is not None:
        every = torch.ones(1, call.n_keys, dtype=torch.float32)
        on_keys = call.mass(every, list(heads), queries)[0, ..., 0].cpu().double()
        entropy, sunk = entropy / on_keys + on_keys.log(), 1 - on_keys
    entropy, sunk = entropy.where(free, 0.0), sunk.where(free, 0.0)
    most = counts.log().where(free, 1.0)
    n_queries = free.sum(1)
    return {
        "entropy": entropy.sum(1) / n_queries,
        "null": most.where(free, 0.0).sum(1) / n_queries,
        "relative_entropy": (entropy / most).sum(1) / n_queries,
        "n_queries": n_queries,
        "sink_mass": sunk.sum(1) / n_queries,
    }


def _places(
    sample: Sample, image: int, tower: Tower
) -> tuple[Int[Tensor, " patch"], Float[Tensor, "patch 2"], Float[Tensor, "2"]]:
    """Positions of an image's patches, their row and column, height and width of a cell in px."""
    grid = sample.grids[image]
    positions, places, boxes = (
        np.arange(len(grid.patch_places)),
        grid.patch_places,
        grid.patch_boxes,
    )
    if tower == "language":
        positions, places, boxes = sample.where("image", image=image), grid.places, grid.boxes
    placed = places[:, 0] >= 0
    if not placed.any():
        raise GeometryError(
            f"A distance is between places on an image. Image {image} of sample {sample.name!r} "
            f"has none in the {tower} tower. {grid.reason or ''}".rstrip()
        )
    if boxes is not None:
        size = _cell_px(boxes[placed])
    else:  # the patches fill the same box as the tokens
        fewer = np.array([grid.rows / grid.patch_rows, grid.cols / grid.patch_cols])
        size = _cell_px(grid.boxes[grid.places[:, 0] >= 0]) * fewer
    return (
        torch.tensor(positions[placed]),
        torch.tensor(places[placed]).double(),
        torch.tensor(size, dtype=torch.float64),
    )


def _cell_px(boxes: Float[np.ndarray, "cell 4"]) -> Float[np.ndarray, "2"]:
    """Height and width of a cell."""
    width, height = np.nanmedian(boxes[:, 2:] - boxes[:, :2], axis=0)
    return np.array([height, width])


def _check_places(sample: Sample, call: AttentionCall, image: int, tower: Tower) -> None:
    n_places = len(sample.grids[image].patch_places) if tower == "vision" else call.n_keys
    if n_places != call.n_keys:
        raise GeometryError(
            f"The grid of an image has a place for each position of the tower. Image {image} of "
            f"sample {sample.name!r} has {n_places} places, {call.name} has {call.n_keys} keys."
        )


def _distances(
    call: AttentionCall,
    heads: Sequence[int],
    positions: Int[Tensor, " patch"],
    places: Float[Tensor, "patch 2"],
    cell_px: Float[Tensor, "2"],
) -> dict[str, Float[Tensor, "head 1"] | Int[Tensor, "head 1"]]:
    """Mean distance of the patches from what they attend to, rows renormalised over the patches."""
    names = ("distance_px", "distance_grid", "null_px", "null_grid", "outside")
    sums = torch.zeros(len(names), len(heads), dtype=torch.float64)
    n_queries = torch.zeros(len(heads), dtype=torch.long)
    for chunk in row_chunks(call, torch.arange(len(positions)), len(heads)):
        probs, seen, _ = cells_of(call, heads, positions[chunk], positions)
        steps = places[chunk, None] - places
        apart = torch.linalg.vector_norm(torch.stack([steps * cell_px, steps]), dim=-1)
        within = probs.sum(-1)
        distance = torch.einsum("hqk,uqk->uhq", probs, apart) / within
        null = torch.einsum("hqk,uqk->uhq", seen, apart) / seen.sum(-1)
        values = torch.cat([distance, null.expand_as(distance), 1 - within[None]])
        sums += values.where(within > 0, 0.0).sum(-1)
        n_queries += (within > 0).sum(-1)
    means = dict(zip(names, (sums / n_queries)[..., None], strict=True))
    outside = means.pop("outside")
    return {
        **means,
        "relative_distance": means["distance_px"] / means["null_px"],
        "outside": outside,
        "n_queries": n_queries[:, None],
    }
