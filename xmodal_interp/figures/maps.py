"""Any numbers on an image: relevance, rollout, where a patch of the vision tower looks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Unpack

import numpy as np
import pandas as pd

from xmodal_interp.arguments import checked
from xmodal_interp.attention import Positions
from xmodal_interp.errors import GeometryError, InputError, quoted
from xmodal_interp.figures.looks import Look, MapOptions
from xmodal_interp.figures.panels import Panel, in_rows, note_on, panel_figure
from xmodal_interp.figures.placement import Box, Place, of_patches, place_of
from xmodal_interp.figures.scales import Meaning, label_of, scale_for
from xmodal_interp.figures.style import FigurePath, Picture, readable, saved, styled
from xmodal_interp.figures.tables import columns_of
from xmodal_interp.figures.wording import about, heads_name, layer_name
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
    """Any maps of one image side by side, under one colour scale.

    Args:
        sample: The sample.
        maps: Title and values of each: one per token of the image, or per position of the vision
            tower, in sequence order; or ``[row, col]`` of either grid. NaN is see-through.
        label: What the values are, for the colour bar.
        meaning: ``"amount"``, from 0; ``"difference"``, around 0; ``"ratio"``, around 1.
        image: Which image.
        title: Of the figure, below the question.
        path: Where to save the figure.
        **look: See ``Look``.

    Raises:
        GeometryError: Values that fit no grid of the image.
    """
    if not isinstance(maps, Mapping):
        raise InputError(f"maps are arrays by their titles; got {quoted(maps)}.")
    if not maps:
        raise InputError("Maps side by side need at least one map; got none.")
    place = place_of(sample, image)
    fitting = {
        name: _fitted(place, np.asarray(values, dtype=float)) for name, values in maps.items()
    }
    places = {finer for finer, _ in fitting.values()}
    if len(places) > 1:
        raise GeometryError(
            "Maps side by side lie on one grid. Some of these are on image tokens, some on the "
            "patches of the vision tower; draw them in two figures."
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
    """The rollout of ``attention_rollout`` on the image, a panel per query.

    Args:
        table: Its table; rows of samples of another name are passed over.
        sample: The sample.
        value: ``"rollout"``; or ``"log2_ratio"``: beside the rollout of uniform attention.
        image: Which image.
        path: Where to save the figure.
        **look: See ``Look``.
    """
    place = place_of(sample, image)
    columns_of(table, ["image", "row", "col", value], "A rollout overlay")
    of_sample = _rows_of(table, sample)
    cells = of_sample[of_sample["image"].eq(image).fillna(value=False) & of_sample["row"].notna()]
    if not len(cells):
        raise InputError(
            f"A rollout overlay needs rows of the image's tokens. The table has {len(table)} rows, "
            f"none of image {image} of sample {sample.name!r}."
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
    """Where patches of the vision tower look: a panel per point of the image.

    Args:
        sample: The sample.
        points: ``(x, y)`` in pixels of the original image; the patch there asks, and is outlined.
        layer: Layer of the vision tower; negative ones count from the last.
        head: A head, or several to average; the mean of all if not given.
        image: Which image.
        path: Where to save the figure.
        **look: See ``Look``.

    Raises:
        GeometryError: A point that no patch covers.
    """
    place = of_patches(place_of(sample, image))
    call = sample.call(layer, tower="vision", call=image)
    if call.n_keys != len(place.keys):
        raise GeometryError(
            f"A call of the vision tower has one position per patch. {call.name} has "
            f"{call.n_keys}, the image has {len(place.keys)}."
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
    """The rows of a sample, which may have been numbered there as one of several of its name."""
    if "sample" not in table:
        return table
    numbered = table.attrs.get("numbered", {})
    alike = [name for name in table["sample"].unique() if numbered.get(name, name) == sample.name]
    if len(alike) > 1:
        raise InputError(
            f"A rollout overlay is of one sample. The table has {', '.join(map(repr, alike))}, all "
            f"of the name {sample.name!r}: choose one, as by table[table['sample'] == "
            f"{alike[0]!r}], or give samples names of their own."
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
    """What tokens without a cell have of all values; None where that is nothing."""
    without = np.nansum(values[place.without_cell]) if place.shares is None else 0.0
    return (float(without), float(np.nansum(values))) if without else None


def _fitted(place: Place, values: np.ndarray) -> tuple[bool, np.ndarray]:
    """Whether values are on patches, and one value per token or patch."""
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
        f"Image {place.number} has {len(grid.places)} tokens ({grid.rows} x {grid.cols}) and "
        f"{len(grid.patch_places)} vision positions ({grid.patch_rows} x {grid.patch_cols}); "
        f"got values of shape {values.shape}."
    )


def _patch_at(place: Place, x: float, y: float) -> int:
    x0, y0, x1, y1 = place.grid.boxes.T
    inside = np.flatnonzero((x0 <= x) & (x < x1) & (y0 <= y) & (y < y1))
    if not len(inside):
        raise GeometryError(
            f"A point lies on a patch. No patch of image {place.number} covers ({x:g}, {y:g}); "
            f"they cover x {np.nanmin(x0):g} to {np.nanmax(x1):g} and y {np.nanmin(y0):g} to "
            f"{np.nanmax(y1):g} px."
        )
    return int(inside[0])


def _box(corners: np.ndarray) -> Box:
    x0, y0, x1, y1 = corners.tolist()
    return x0, y0, x1, y1
