"""Entropy of attention and mean attention distance of each head.

Entropy: ``H_i = -sum_j A_ij ln A_ij``, reported with its maximum ``ln v_i`` for a query with
``v_i`` visible keys. (Dividing by the logarithm of the sequence length instead would make every
causal head look focused.) Learned sinks take part in the softmax but are not keys: a row then sums
to ``1 - s``, and the entropy is that of the renormalised row, ``H_i / (1 - s) + ln(1 - s)``.

Distance: ``sum_j A_ij |p_i - p_j|`` over the places ``p`` of patches, averaged over queries
(Dosovitskiy et al. 2021, arXiv 2010.11929). Class tokens have no place: they are removed, the rest
of the row is renormalised, and the removed mass is reported. The distance of uniform attention over
a square grid is about 0.52 of its side.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from xmodal_interp.analysis.selection import (
    Layers,
    counted_positions,
    mean_where,
    n_visible,
    per_head,
    refuse_cross_attention,
    rows_in_tower,
    rows_of,
    selected_calls,
    uniform,
)
from xmodal_interp.analysis.tables import Part, call_table, over_samples
from xmodal_interp.arguments import checked
from xmodal_interp.at import Selector
from xmodal_interp.attention import AttentionCall, Positions
from xmodal_interp.errors import GeometryError, InputError
from xmodal_interp.sample import Sample
from xmodal_interp.vocabulary import Tower


@checked
def attention_entropy(
    samples: Sample | Iterable[Sample],
    *,
    tower: Tower | None = None,
    queries: Selector | None = None,
    layers: Layers = None,
    heads: Positions | None = None,
    workers: int = 1,
) -> pd.DataFrame:
    """Return the mean entropy of self-attention rows, with that of uniform attention.

    Queries that see only one key always have entropy 0 and are left out.

    Args:
        samples: One sample or many.
        tower: Part of the model; ``Sample.tower`` if not given. The vision tower has separate rows
            for each image.
        queries: As in ``cross_modal_ratio``, or in the vision tower positions or a name such as
            ``"class"``; all kept query rows if not given.
        layers: Layers, all if not given.
        heads: Heads, all if not given.
        workers: Number of processes that read the samples; results do not depend on it.

    Returns:
        One row per sample, layer, head (and image): ``sample, tower, kind, layer, head, image`` (NA
        in the language tower), then ``entropy`` (nats, over the keys), ``null`` (nats, uniform
        attention), ``relative_entropy`` (mean over queries of entropy / null: 0 if all attention is
        on one key, 1 if it is uniform), ``n_queries``, ``sink_mass`` (mean probability of the
        learned sinks, 0 to 1; 0 in a model without learned sinks).

    Raises:
        InputError: ``queries`` is given for another tower than language and vision.
        NotRecordedError: The tower was not kept.
    """
    if tower not in (None, "language", "vision") and queries is not None:
        raise InputError(
            f"queries can only be given for the language and the vision tower; got {queries!r} for "
            f"the {tower} tower. Leave queries out."
        )

    def table_rows(sample: Sample) -> Iterator[Part]:
        of = tower or sample.tower
        of_tower = {key[3] for key in sample.calls if key[:2] == (of, "self")}
        for number in sorted(of_tower) or [0]:
            chosen_rows = None
            if queries is not None:
                chosen_rows = rows_in_tower(sample, queries, of, number, queries)
            for call, chosen in selected_calls(sample, layers, heads, tower=of, call=number):
                rows = rows_of(call, counted_positions(sample, of, number, call.n_queries))
                values = _entropy(call, chosen, rows if chosen_rows is None else chosen_rows)
                image = np.nan if of == "language" else number
                yield call_table(call, {"head": chosen}, {"image": image, **values})

    parameters = {"tower": tower, "queries": queries, "layers": layers, "heads": heads}
    table = over_samples(samples, table_rows, "attention_entropy", parameters, workers)
    table["image"] = table["image"].astype("Int64")
    return table


@checked
def attention_distance(
    samples: Sample | Iterable[Sample],
    *,
    tower: Tower = "vision",
    layers: Layers = None,
    heads: Positions | None = None,
    workers: int = 1,
) -> pd.DataFrame:
    """Return the mean distance between patches and the patches they attend to.

    See Dosovitskiy et al. 2021.

    Args:
        samples: One sample or many.
        tower: ``"vision"`` for the patches of the vision tower, ``"language"`` for the image tokens
            of the sequence.
        layers: Layers, all if not given.
        heads: Heads, all if not given.
        workers: Number of processes that read the samples; results do not depend on it.

    Returns:
        One row per sample, layer, head and image: ``sample, tower, kind, layer, head, image``, then
        ``distance_px`` (pixels of the original image), ``distance_grid`` (cells of the grid),
        ``null_px``, ``null_grid`` (uniform attention over the visible patches),
        ``relative_distance`` (``distance_px / null_px``), ``outside`` (mass on keys that are not
        patches of this image, removed before renormalising), ``n_queries``.

    Raises:
        InputError: ``tower`` is ``"connector"``, or ``"language"`` in a model in which text attends
            to the image by cross-attention.
        GeometryError: The grid of the image has no places, or does not fit the positions of the
            tower.
    """
    if tower == "connector":
        raise InputError(
            "attention_distance is not defined for tower='connector', whose positions have no "
            "place on the image. Choose tower='vision' or tower='language'."
        )

    def table_rows(sample: Sample) -> Iterator[Part]:
        if tower == "language":
            refuse_cross_attention(sample, "attention_distance with tower='language'")
            next(
                selected_calls(sample, layers, heads, tower=tower)
            )  # a sample of a vision model has none
        if not sample.grids:
            raise InputError(
                f"Sample {sample.name!r} has no image. attention_distance requires one."
            )
        for image in range(len(sample.grids)):
            positions, places, cell_px = _places(sample, image, tower)
            number = image if tower == "vision" else 0
            for call, chosen in selected_calls(sample, layers, heads, tower=tower, call=number):
                _check_places(sample, call, image, tower)
                values = _distances(call, chosen, positions, places, cell_px)
                yield call_table(call, {"head": chosen, "image": [image]}, values)

    parameters = {"tower": tower, "layers": layers, "heads": heads}
    return over_samples(samples, table_rows, "attention_distance", parameters, workers)


def _entropy(
    call: AttentionCall, heads: Sequence[int], queries: Int[Tensor, " query"]
) -> dict[str, Tensor]:
    """Return, per head, the mean entropy, its null and the mean sink mass.

    The means are over the queries that see at least two keys.
    """
    counts = n_visible(call, queries, heads).cpu().double()
    free = counts > 1
    entropy = call.entropy(list(heads), queries)[0].cpu().double()
    sunk = torch.zeros_like(entropy)
    if call.sinks is not None:
        every = torch.ones(1, call.n_keys, dtype=torch.float32)
        on_keys = call.mass(every, list(heads), queries)[0, ..., 0].cpu().double()
        entropy, sunk = entropy / on_keys + on_keys.log(), 1 - on_keys
    most = counts.log()
    return {
        "entropy": mean_where(entropy, free),
        "null": mean_where(most, free),
        "relative_entropy": mean_where(entropy / most, free),
        "n_queries": free.sum(1),
        "sink_mass": mean_where(sunk, free),
    }


def _places(
    sample: Sample, image: int, tower: Tower
) -> tuple[Int[Tensor, " patch"], Float[Tensor, "patch 2"], Float[Tensor, "2"]]:
    """Return the positions of an image's patches, their row and column, and the cell size in px."""
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
            f"The positions of image {image} of sample {sample.name!r} have no row and column in "
            f"the {tower} tower. {grid.reason or ''}".rstrip()
        )
    if boxes is not None:
        size = _cell_px(boxes[placed])
    else:  # the patches cover the same area as the tokens
        fewer = np.array([grid.rows / grid.patch_rows, grid.cols / grid.patch_cols])
        size = _cell_px(grid.boxes[grid.places[:, 0] >= 0]) * fewer
    return (
        torch.tensor(positions[placed]),
        torch.tensor(places[placed]).double(),
        torch.tensor(size, dtype=torch.float64),
    )


def _cell_px(boxes: Float[np.ndarray, "cell 4"]) -> Float[np.ndarray, "2"]:
    """Return the median height and width of the cells."""
    width, height = np.nanmedian(boxes[:, 2:] - boxes[:, :2], axis=0)
    return np.array([height, width])


def _check_places(sample: Sample, call: AttentionCall, image: int, tower: Tower) -> None:
    n_places = len(sample.grids[image].patch_places) if tower == "vision" else call.n_keys
    if n_places != call.n_keys:
        raise GeometryError(
            f"The grid of image {image} of sample {sample.name!r} has {n_places} places, but "
            f"{call.name} has {call.n_keys} keys."
        )


def _distances(
    call: AttentionCall,
    heads: Sequence[int],
    positions: Int[Tensor, " patch"],
    places: Float[Tensor, "patch 2"],
    cell_px: Float[Tensor, "2"],
) -> dict[str, Float[Tensor, "head 1"] | Int[Tensor, "head 1"]]:
    """Return the mean distance from each patch to its attended patches, rows renormalised."""
    of_keys = torch.full((call.n_keys, 2), torch.nan, dtype=torch.float64)
    of_keys[positions] = places
    patches = of_keys[:, :1].isnan().logical_not().T
    within = call.mass(patches, list(heads), positions)[0, ..., 0].cpu()
    even = uniform(call)
    units = {"px": of_keys * cell_px, "grid": of_keys}
    means = {}
    for unit, scaled in units.items():
        distance = call.distance(scaled, list(heads), positions)[0].cpu().double() / within
        seen = even.mass(patches, queries=positions)[0, ..., 0].cpu().double()
        null = even.distance(scaled, queries=positions)[0].cpu().double() / seen
        means[f"distance_{unit}"] = mean_where(distance, within > 0)[:, None]
        means[f"null_{unit}"] = mean_where(per_head(null, heads), within > 0)[:, None]
    outside = (1 - within.double()).clamp(min=0.0)  # rounding can give a negative rest
    return {
        **{name: means[name] for name in ("distance_px", "distance_grid", "null_px", "null_grid")},
        "relative_distance": means["distance_px"] / means["null_px"],
        "outside": mean_where(outside, within > 0)[:, None],
        "n_queries": (within > 0).sum(1)[:, None],
    }
