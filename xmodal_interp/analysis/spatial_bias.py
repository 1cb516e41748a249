"""Spatial bias: which places of the image grid get more attention, independent of the content.

1. ``raster_map``: attention of text on each cell of the grid, averaged over the queries that see
   the whole image, and divided by its mean over the cells. This *lift* is 1 everywhere if the model
   has no preference within the image. It is averaged over samples: the effect of image content
   averages out, the effect of position remains.
2. ``raster_profile``: the share of each row and of each column.
3. ``raster_bias``: a least-squares fit of the log lift,

       ln lift(y, x) = c + a y + b x + e max(|y|, |x|)

   with ``y, x`` from -1 (top, left edge) to 1 (bottom, right edge). ``a`` > 0 prefers the bottom,
   ``b`` > 0 the right, ``e`` > 0 the edge over the centre. A slope is the change from the centre to
   the edge.
4. The control: the same statistics for blank or noise images, and the difference. Positional bias
   is in both, so the difference is content that did not average out.

With rotary positions alone, a single layer prefers the bottom of the image, which is near the text;
the rollout of a causal stack prefers the top. A published example: pruning image tokens by their
attention in shallow layers removes mostly the top of the image (arXiv 2412.13180).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from xmodal_interp import at
from xmodal_interp.analysis.connector_rollout import are_queries
from xmodal_interp.analysis.processes import rows_of_samples
from xmodal_interp.analysis.selection import (
    Layers,
    image_keys,
    image_places,
    position_table,
    received,
    refuse_cross_attention,
    rows_in_tower,
    selected_calls,
    visual_number,
)
from xmodal_interp.analysis.tables import (
    Part,
    add_provenance,
    call_table,
    joined,
    samples_of,
    stacked,
    stamped,
    unique_name,
)
from xmodal_interp.arguments import checked
from xmodal_interp.at import Selector
from xmodal_interp.attention import AttentionCall, Positions
from xmodal_interp.errors import GeometryError, InputError
from xmodal_interp.sample import Sample
from xmodal_interp.vocabulary import Tower

HEAD_KEYS = ["tower", "kind", "layer", "head"]
CELL_KEYS = [*HEAD_KEYS, "row", "col"]
SLOPES = ("row_slope", "col_slope", "edge_slope")


@checked
def raster_map(
    samples: Sample | Iterable[Sample],
    *,
    tower: Tower | None = None,
    queries: Selector | None = None,
    layers: Layers = None,
    heads: Positions | None = None,
    image: int = 0,
    per_sample: bool = False,
    workers: int = 1,
) -> pd.DataFrame:
    """Return attention on each cell of the image grid, relative to the mean cell.

    The map is averaged over samples.

    Args:
        samples: One sample or many, with grids of the same shape. The influence of image content
            falls with the number and variety of the samples.
        tower: ``"language"``, or ``"vision"`` for the patches of the vision tower; ``Sample.tower``
            if not given.
        queries: A selector, as in ``cross_modal_ratio``;
            ``"text"`` if not given. In the vision tower, positions or a name; the class token if
            not given.
        layers: Layers, all if not given.
        heads: Heads, all if not given.
        image: Index of the image in each sample.
        per_sample: Whether to return the map of each sample instead of the mean map, for example to
            bootstrap over samples.
        workers: Number of processes that read the samples; results do not depend on it.

    Returns:
        One row per layer, head and cell with a token: ``tower, kind, layer, head, row, col``, then
        ``lift`` (attention divided by the mean over cells). NaN if in some sample no query sees the
        whole image. With ``per_sample`` there is one row per sample too, and the first column is
        ``sample``.

    Raises:
        InputError: There are no samples, a sample has no image or no text after it, or text attends
            to the image by cross-attention.
        GeometryError: Grids have different shapes, image tokens have no row and column, or the
            samples have different kept layers.
    """
    first: Part | None = None
    total: Any = 0.0
    provenance: list[Mapping[str, Any]] = []
    names: dict[str, str] = {}
    lifts: list[np.ndarray] = []

    def table_rows(sample: Sample) -> list[Part]:
        return [_cells(sample, tower or sample.tower, queries, layers, heads, image)]

    with closing(rows_of_samples(samples_of(samples), table_rows, workers)) as found:
        for name, of_sample, (cells,) in found:
            if first is None:
                first = cells
            _refuse_other_cells(first, cells, name)
            unique_name(name, names)
            if per_sample:
                lifts.append(cells["lift"])
            else:
                total = total + cells["lift"]
            add_provenance(provenance, of_sample)
    if first is None:
        raise InputError("raster_map requires at least one sample; got none.")
    n_samples = len(names)
    if per_sample:
        of_samples = zip(names, lifts, strict=True)
        table = stacked([{"sample": name, **first, "lift": lift} for name, lift in of_samples])
    else:
        table = pd.DataFrame({**first, "lift": total / n_samples})
    parameters = {"tower": tower, "queries": queries, "layers": layers, "heads": heads}
    parameters |= {"image": image}
    parameters |= {"per_sample": per_sample} if per_sample else {}
    return stamped(
        table,
        analysis="raster_map",
        parameters=parameters,
        provenance=provenance,
        n_samples=n_samples,
    )


@checked
def raster_profile(  # noqa: PLR0913  every option has a default
    samples: Sample | Iterable[Sample],
    *,
    control: Sample | Iterable[Sample] | None = None,
    tower: Tower | None = None,
    queries: Selector | None = None,
    layers: Layers = None,
    heads: Positions | None = None,
    image: int = 0,
    per_sample: bool = False,
    workers: int = 1,
) -> pd.DataFrame:
    """Return the share of the attention on the image that each grid row and column gets.

    Args:
        samples: As for ``raster_map``.
        control: Samples of blank or noise images with the same question.
        tower: As for ``raster_map``.
        queries: As for ``raster_map``.
        layers: Layers, all if not given.
        heads: Heads, all if not given.
        image: Index of the image in each sample.
        per_sample: Whether to return rows for each sample instead of those of the mean map, for
            example to bootstrap over samples.
        workers: Number of processes that read the samples; results do not depend on it.

    Returns:
        One row per layer, head, axis and index: ``tower, kind, layer, head, axis`` (``row`` or
        ``col``), ``index``, then ``share`` (of the attention on the image, 0 to 1), ``null`` (the
        share of the image's cells), ``lift`` (share / null). With a control also ``share_control``
        and ``share_difference``. With ``per_sample`` the first column is ``sample``; the control is
        averaged over its samples.
    """
    options = {"tower": tower, "queries": queries, "layers": layers, "heads": heads}
    options |= {"image": image, "workers": workers}
    table = _with_control(samples, control, per_sample=per_sample, **options)
    by = _keys(table)
    lifts = [name for name in table.columns if name.startswith("lift")]
    total = table.groupby(by)[lifts].transform("sum", min_count=1)
    table["null"] = 1.0 / table.groupby(by)["lift"].transform("size")
    for name in lifts:
        table[name.replace("lift", "share")] = table[name] / total[name]
    profiles = []
    for axis in ("row", "col"):
        sums = table.groupby([*by, axis], sort=False).sum(min_count=1).reset_index()
        sums.insert(len(by), "axis", axis)
        profiles.append(sums.rename(columns={axis: "index"}))
    profile = pd.concat(profiles, ignore_index=True)
    profile["lift"] = profile["share"] / profile["null"]
    columns = [*by, "axis", "index", "share", "null", "lift"]
    if control is not None:
        profile["share_difference"] = profile["share"] - profile["share_control"]
        columns += ["share_control", "share_difference"]
    profile = profile.sort_values([*by, "axis", "index"], ignore_index=True)[columns]
    profile.index.name = "number"  # the default name in JSON, "index", is a column here
    profile.attrs = {**table.attrs, "analysis": "raster_profile"}
    return profile


@checked
def raster_bias(  # noqa: PLR0913  every option has a default
    samples: Sample | Iterable[Sample],
    *,
    control: Sample | Iterable[Sample] | None = None,
    tower: Tower | None = None,
    queries: Selector | None = None,
    layers: Layers = None,
    heads: Positions | None = None,
    image: int = 0,
    per_sample: bool = False,
    workers: int = 1,
) -> pd.DataFrame:
    """Return the slopes of attention from top to bottom, left to right and centre to edge.

    Args:
        samples: As for ``raster_map``.
        control: Samples of blank or noise images with the same question.
        tower: As for ``raster_map``.
        queries: As for ``raster_map``.
        layers: Layers, all if not given.
        heads: Heads, all if not given.
        image: Index of the image in each sample.
        per_sample: Whether to return rows for each sample instead of those of the mean map, for
            example to bootstrap over samples.
        workers: Number of processes that read the samples; results do not depend on it.

    Returns:
        One row per layer and head: ``tower, kind, layer, head``, then
        ``row_slope, col_slope, edge_slope`` (change of ln lift from the centre to the bottom edge,
        to the right edge, to any edge; 0.7 is a factor of 2). With a control also each slope as
        ``..._control`` and ``..._difference``. NaN if a cell gets no attention, if no query sees
        the whole image, or if the grid is too small to separate the terms. With ``per_sample`` the
        first column is ``sample``; the control is averaged over its samples.
    """
    options = {"tower": tower, "queries": queries, "layers": layers, "heads": heads}
    options |= {"image": image, "workers": workers}
    table = _with_control(samples, control, per_sample=per_sample, **options)
    by = _keys(table)
    cells = table.drop_duplicates(["row", "col"])
    design = _design(cells["row"].to_numpy(dtype=float), cells["col"].to_numpy(dtype=float))
    bias = table.drop_duplicates(by)[by].reset_index(drop=True)
    bias[list(SLOPES)] = _slopes(table["lift"].to_numpy().reshape(-1, len(cells)), design)
    if control is not None:
        of_control = _slopes(table["lift_control"].to_numpy().reshape(-1, len(cells)), design)
        bias[[f"{name}_control" for name in SLOPES]] = of_control
        bias[[f"{name}_difference" for name in SLOPES]] = bias[list(SLOPES)].to_numpy() - of_control
    bias.attrs = {**table.attrs, "analysis": "raster_bias"}
    return bias


def _with_control(
    samples: Sample | Iterable[Sample],
    control: Sample | Iterable[Sample] | None,
    *,
    per_sample: bool,
    **options: Any,
) -> pd.DataFrame:
    """Return the map with the control's lift as a column and ``n_control`` in its parameters."""
    table = raster_map(samples, per_sample=per_sample, **options)
    if control is None:
        return table
    control = samples_of(control)
    of_control = raster_map(control, **options)
    _refuse_other_cells(table.head(len(of_control)), of_control, control[0].name)
    n_maps = len(table) // len(of_control)
    table["lift_control"] = np.tile(of_control["lift"].to_numpy(), n_maps)
    table.attrs["parameters"] |= {"n_control": of_control.attrs["n_samples"]}
    return table


def _keys(table: pd.DataFrame) -> list[str]:
    """Return the columns that identify a map."""
    return [name for name in ("sample", *HEAD_KEYS) if name in table.columns]


def _cells(
    sample: Sample,
    tower: Tower,
    queries: Selector | None,
    layers: Layers,
    heads: Positions | None,
    image: int,
) -> Part:
    """Return the columns of the map of a sample, with one row per layer, head and cell."""
    tokens, places = _tokens(sample, image) if tower == "language" else _patches(sample, image)
    rows = rows_in_tower(sample, queries, tower, image, at.text)
    cells = {name: places[name].to_numpy()[None] for name in ("row", "col")}
    parts = []
    number = visual_number(sample, tower, image)
    for call, chosen in selected_calls(sample, layers, heads, tower=tower, call=number):
        if tower != "language":
            position_table(sample, tower, image, call.n_keys)  # refuses other positions
        values = {**cells, "lift": _lift(call, chosen, rows, tokens)}
        parts.append(call_table(call, {"head": chosen, "cell": range(len(tokens))}, values))
    columns = joined(parts)
    del columns["cell"]
    return columns


def _tokens(sample: Sample, image: int) -> tuple[Int[Tensor, " cell"], pd.DataFrame]:
    """Return the positions of an image's tokens in the language tower, and their rows and columns.

    Raises:
        InputError: The sample has no such image, or text attends to it by cross-attention.
        GeometryError: The tokens have no rows and columns.
    """
    refuse_cross_attention(sample, "A raster map")
    tokens = image_keys(sample, image).nonzero()[:, 0]
    places = image_places(sample.tokens).iloc[tokens.tolist()]
    placed = places["row"].notna().to_numpy(dtype=bool)
    if not placed.any():
        learned = "They are learned queries: use xi.on_patches for attention on the patches."
        grid = sample.grids[image]
        raise GeometryError(
            f"The tokens of image {image} of sample {sample.name!r} have no row and column. "
            f"{learned if are_queries(grid) else grid.reason or ''}".rstrip()
        )
    return tokens[torch.tensor(placed)], places[placed].astype("int64")


def _patches(sample: Sample, image: int) -> tuple[Int[Tensor, " cell"], pd.DataFrame]:
    """Return the positions of an image's patches in the vision tower, and their rows and columns.

    Raises:
        InputError: The sample has no such image.
        GeometryError: The patches have no rows and columns.
    """
    visual_number(sample, "vision", image)
    if image >= len(sample.grids):
        raise InputError(
            f"Sample {sample.name!r} has no image {image}; it has {len(sample.grids)} images, "
            "numbered from 0."
        )
    places = sample.grids[image].patch_places
    placed = np.flatnonzero(places[:, 0] >= 0)
    if not len(placed):
        raise GeometryError(
            f"The patches of image {image} of sample {sample.name!r} have no row and column. "
            f"{sample.grids[image].reason or ''}".rstrip()
        )
    return torch.from_numpy(placed), pd.DataFrame(places[placed], columns=["row", "col"])


def _lift(
    call: AttentionCall,
    heads: Sequence[int],
    queries: Int[Tensor, " query"],
    tokens: Int[Tensor, " cell"],
) -> Float[np.ndarray, "head cell"]:
    """Return attention on each cell divided by the mean cell, over queries that see all cells.

    NaN if no query sees all cells.
    """
    cells = torch.zeros(1, call.n_keys, dtype=torch.float32)
    cells[0, tokens] = 1.0
    seen = call.null_mass(cells, queries)[0, ..., 0] * call.n_visible(queries)[0]
    seeing = queries[(seen.round() == len(tokens)).all(0).cpu()]
    if len(seeing) == 0:
        return np.full((len(heads), len(tokens)), np.nan)
    mass = received(call, seeing, heads).cpu().double()[:, tokens]
    return (mass / mass.mean(1, keepdim=True)).numpy()


def _design(
    row: Float[np.ndarray, " cell"], col: Float[np.ndarray, " cell"]
) -> Float[np.ndarray, "cell term"]:
    """Return the terms of the fit per cell: constant, y and x (-1 to 1), eccentricity (0 to 1)."""
    y, x = (2 * place / max(place.max(), 1) - (place.max() > 0) for place in (row, col))
    return np.column_stack([np.ones_like(y), y, x, np.maximum(np.abs(y), np.abs(x))])


def _slopes(
    lift: Float[np.ndarray, "map cell"], design: Float[np.ndarray, "cell term"]
) -> Float[np.ndarray, "map slope"]:
    """Fit the log lift by least squares; NaN for a term that is the same in all cells."""
    log_lift = np.log(lift, out=np.full_like(lift, np.nan), where=lift > 0)
    varying = np.ptp(design, axis=0) > 0
    varying[0] = True
    slopes = np.full((len(lift), design.shape[1]), np.nan)
    slopes[:, varying] = log_lift @ np.linalg.pinv(design[:, varying]).T
    return slopes[:, 1:]


def _refuse_other_cells(table: Part | pd.DataFrame, other: Part | pd.DataFrame, name: str) -> None:
    layers = [pd.unique(one["layer"]).tolist() for one in (table, other)]
    if layers[0] != layers[1]:
        raise GeometryError(
            f"Sample {name!r} has the layers {layers[1]}, the other samples have "
            f"{layers[0]}. Choose layers= that all samples have."
        )
    columns = [[np.asarray(one[name]) for name in CELL_KEYS] for one in (table, other)]
    if not all(map(np.array_equal, *columns)):
        shapes = [f"{t['row'].max() + 1} x {t['col'].max() + 1}" for t in (table, other)]
        raise GeometryError(
            f"Sample {name!r} has a grid of {shapes[1]}, the other samples have "
            f"{shapes[0]}. Pass samples whose image grids have the same shape."
        )
