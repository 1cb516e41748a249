"""Overlays of any values on an image: relevance, rollout, attention of vision-tower patches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Unpack

import numpy as np
import pandas as pd

from xmodal_interp.arguments import checked
from xmodal_interp.attention import Positions
from xmodal_interp.errors import GeometryError, InputError, quoted
from xmodal_interp.figures.curves import columns_of
from xmodal_interp.figures.looks import Look, MapOptions
from xmodal_interp.figures.panels import Panel, in_rows, note_on, panel_figure
from xmodal_interp.figures.placement import Box, Place, of_patches, place_of
from xmodal_interp.figures.scales import Meaning, label_of, scale_for
from xmodal_interp.figures.style import (
    FigurePath,
    Picture,
    about,
    heads_name,
    layer_name,
    readable,
    saved,
    styled,
)
from xmodal_interp.sample import Sample


@checked
@styled
def map_overlays(
    sample: Sample,
    maps: Mapping[str, np.ndarray],
    label: str,
    *,
    meaning: Meaning = "amount",
    image: int = 0,
    title: str | None = None,
    path: FigurePath = None,
    **look: Unpack[MapOptions],
) -> Picture:
    """Draw maps of one image side by side, with one colour scale.

    Args:
        sample: The sample.
        maps: Values by panel title: one value per token of the image, or per position of the vision
            tower, in sequence order; or an array ``[row, col]`` of either grid. NaN is transparent.
        label: Label of the colour bar.
        meaning: Colour scale: ``"amount"``, from 0; ``"difference"``, around 0; ``"ratio"``,
            around 1.
        image: Index of the image.
        title: Second line of the figure's title, below the question.
        path: Where to save the figure.
        **look: Drawing options; see ``Look``.

    Raises:
        GeometryError: The shape of a map fits no grid of the image.
    """
    if not isinstance(maps, Mapping):
        raise InputError(f"maps must be a mapping from titles to arrays; got {quoted(maps)}.")
    if not maps:
        raise InputError("maps is empty; pass at least one map.")
    place = place_of(sample, image)
    fitting = {
        name: _fitted(place, np.asarray(values, dtype=float)) for name, values in maps.items()
    }
    places = {finer for finer, _ in fitting.values()}
    if len(places) > 1:
        raise GeometryError(
            "Some maps are on image tokens, others on the patches of the vision tower. Draw the "
            "two kinds in separate figures."
        )
    if places == {True}:
        place = of_patches(place)
    values = {name: on_tokens for name, (_, on_tokens) in fitting.items()}
    text = about(sample) + (f"\n{title}" if title else "")
    return saved(_maps(place, values, label, meaning, text, Look(**look)), path)


@checked
@styled
def rollout_overlay(
    table: pd.DataFrame,
    sample: Sample,
    value: str = "rollout",
    *,
    image: int = 0,
    path: FigurePath = None,
    **look: Unpack[MapOptions],
) -> Picture:
    """Draw a table of ``attention_rollout`` on the image, with one panel per query.

    Args:
        table: The table; rows of samples with another name are ignored.
        sample: The sample.
        value: ``"rollout"``; or ``"log2_ratio"``, the ratio to the rollout of uniform attention.
        image: Index of the image.
        path: Where to save the figure.
        **look: Drawing options; see ``Look``.
    """
    place = place_of(sample, image)
    columns_of(table, ["image", "row", "col", value], "A rollout overlay")
    of_sample = _rows_of(table, sample)
    cells = of_sample[of_sample["image"].eq(image).fillna(value=False) & of_sample["row"].notna()]
    if not len(cells):
        raise InputError(
            f"The table has {len(table)} rows, but none for tokens of image {image} of sample "
            f"{sample.name!r}. Pass a table that attention_rollout returned for this sample."
        )
    vision = "tower" in cells and cells["tower"].eq("vision").all()
    shape = (
        (place.grid.patch_rows, place.grid.patch_cols)
        if vision
        else (place.grid.rows, place.grid.cols)
    )
    maps, undrawn = {}, []
    of_image = of_sample["image"].eq(image).fillna(value=False)
    for query, rows in cells.groupby("query", sort=False) if "query" in cells else [("", cells)]:
        grid = np.full(shape, np.nan)
        grid[rows["row"].astype(int), rows["col"].astype(int)] = rows[value]
        token = rows["query_token"].iloc[0] if "query_token" in rows else None
        name = f"position {query}" if pd.isna(token) else f'"{readable(str(token))}" ({query})'
        maps[name] = 2.0**grid if value == "log2_ratio" else grid
        alike = of_image & (of_sample["query"].eq(query) if "query" in of_sample else True)
        outside = float(of_sample[value][alike & of_sample["row"].isna()].sum())
        undrawn.append((outside, float(of_sample[value][alike].sum())) if outside else None)
    ratio = value == "log2_ratio"
    label = "rollout: times uniform\n(log scale)" if ratio else value
    place = of_patches(place) if vision else place
    on_tokens = {name: _fitted(place, grid)[1] for name, grid in maps.items()}
    title = f"{about(sample)}\nattention rollout{', vision tower' if vision else ''}, by query"
    meaning: Meaning = "ratio" if ratio else "amount"
    chosen = Look(**look)
    panels = [
        replace(panel, undrawn=None if ratio else outside)
        for panel, outside in zip(_panels(place, on_tokens, chosen), undrawn, strict=True)
    ]
    return saved(_drawn(place, panels, label, meaning, title, chosen), path)


@checked
@styled
def patch_overlays(
    sample: Sample,
    points: Sequence[tuple[float, float]],
    layer: int = -1,
    head: Positions | None = None,
    *,
    image: int = 0,
    path: FigurePath = None,
    **look: Unpack[MapOptions],
) -> Picture:
    """Draw the attention of single patches of the vision tower, with one panel per point.

    Args:
        sample: The sample.
        points: ``(x, y)`` in pixels of the original image. The patch at this point is the query and
            is outlined.
        layer: Layer of the vision tower; negative ones count from the last.
        head: A head, or several to average; all heads are averaged if not given.
        image: Index of the image.
        path: Where to save the figure.
        **look: Drawing options; see ``Look``.

    Raises:
        GeometryError: No patch covers a point, or the call does not have one position per patch.
    """
    place = of_patches(place_of(sample, image))
    call = sample.call(layer, tower="vision", call=image)
    if call.n_keys != len(place.keys):
        raise GeometryError(
            f"{call.name} has {call.n_keys} keys, but image {image} has {len(place.keys)} patches. "
            "Patch overlays require a vision layer with one position per patch."
        )
    patches = [_patch_at(place, x, y) for x, y in points]
    probs = call.probs(head, patches)[0].mean(0).double().cpu().numpy()
    seen = call.visible(patches)[0].any(0).cpu().numpy()
    maps = {
        f"patch at ({x:.0f}, {y:.0f})": np.where(seen[i], probs[i], np.nan)
        for i, (x, y) in enumerate(points)
    }
    title = f"{layer_name(call)}, {heads_name(call, head)}"
    marks = [[_box(place.grid.boxes[patch])] for patch in patches]
    return saved(
        _maps(place, maps, label_of("probability"), "amount", title, Look(**look), marks), path
    )


def _rows_of(table: pd.DataFrame, sample: Sample) -> pd.DataFrame:
    """Return the table's rows of a sample.

    If several samples of a table share a name, the analysis has numbered their names.
    """
    if "sample" not in table:
        return table
    numbered = table.attrs.get("numbered", {})
    alike = [name for name in table["sample"].unique() if numbered.get(name, name) == sample.name]
    if len(alike) > 1:
        raise InputError(
            f"The table has several samples named {sample.name!r}: "
            f"{', '.join(map(repr, alike))}. Choose one with table[table['sample'] == "
            f"{alike[0]!r}], or give each sample a unique name."
        )
    return table[table["sample"].isin(alike)]


def _maps(
    place: Place,
    maps: Mapping[str, np.ndarray],
    label: str,
    meaning: Meaning,
    title: str,
    look: Look,
    marks: Sequence[Sequence[Box]] = (),
) -> Picture:
    panels = _panels(place, maps, look, marks)
    if meaning == "amount":
        panels = [
            replace(panel, undrawn=_undrawn(place, values))
            for panel, values in zip(panels, maps.values(), strict=True)
        ]
    return _drawn(place, panels, label, meaning, title, look)


def _panels(
    place: Place,
    maps: Mapping[str, np.ndarray],
    look: Look,
    marks: Sequence[Sequence[Box]] = (),
) -> list[Panel]:
    left_out = look.left_out(place)
    return [
        Panel(
            name,
            values if left_out is None else np.where(left_out, np.nan, values),
            left_out=left_out,
            outlined=marks[i] if marks else (),
        )
        for i, (name, values) in enumerate(maps.items())
    ]


def _drawn(
    place: Place, panels: Sequence[Panel], label: str, meaning: Meaning, title: str, look: Look
) -> Picture:
    values = [panel.values for panel in panels if panel.values is not None]
    scale = look.over_image(scale_for(meaning, values, label, vmax=look.vmax, power=look.power))
    rows = in_rows([Panel(place.name), *(panel.under(scale) for panel in panels)])
    return panel_figure(place, rows, look, title, note_on(place, rows, look))


def _undrawn(place: Place, values: np.ndarray) -> tuple[float, float] | None:
    """Return the sum over tokens without a cell and over all tokens; None if the first is 0."""
    without = np.nansum(values[place.without_cell]) if place.shares is None else 0.0
    return (float(without), float(np.nansum(values))) if without else None


def _fitted(place: Place, values: np.ndarray) -> tuple[bool, np.ndarray]:
    """Return whether values are on patches, and the values as one per token or patch."""
    grid = place.grid
    for on_patches, shape, places in (
        (False, (grid.rows, grid.cols), grid.places),
        (True, (grid.patch_rows, grid.patch_cols), grid.patch_places),
    ):
        if values.shape == (len(places),):
            return on_patches, values
        if values.shape == shape:
            return on_patches, np.where(places[:, 0] < 0, np.nan, values[tuple(places.T)])
    raise GeometryError(
        f"A map of shape {values.shape} fits no grid of image {place.number}. The image has "
        f"{len(grid.places)} tokens ({grid.rows} x {grid.cols}) and {len(grid.patch_places)} "
        f"vision positions ({grid.patch_rows} x {grid.patch_cols})."
    )


def _patch_at(place: Place, x: float, y: float) -> int:
    x0, y0, x1, y1 = place.grid.boxes.T
    inside = np.flatnonzero((x0 <= x) & (x < x1) & (y0 <= y) & (y < y1))
    if not len(inside):
        raise GeometryError(
            f"No patch of image {place.number} covers the point ({x:g}, {y:g}). Patches cover x "
            f"{np.nanmin(x0):g} to {np.nanmax(x1):g} and y {np.nanmin(y0):g} to "
            f"{np.nanmax(y1):g} px."
        )
    return int(inside[0])


def _box(corners: np.ndarray) -> Box:
    x0, y0, x1, y1 = corners.tolist()
    return x0, y0, x1, y1
