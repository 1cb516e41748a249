"""Overlays of other values on an image: any maps, rollout, attention of vision-tower patches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Unpack

import numpy as np
import pandas as pd

from xmodal_interp.arguments import checked, whole_number
from xmodal_interp.attention import Positions
from xmodal_interp.errors import GeometryError, InputError, quoted
from xmodal_interp.figures.curves import columns_of
from xmodal_interp.figures.overlay_panels import (
    MapOptions,
    OverlayOptions,
    Panel,
    in_rows,
    panel_figure,
)
from xmodal_interp.figures.placement import PlacedImage, placed_image, with_patches
from xmodal_interp.figures.scales import SHOW_LABELS, Meaning
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

_MOST = 60  # panels on a page


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
    page: int = 0,
    path: FigurePath = None,
    **options: Unpack[MapOptions],
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
        page: A figure has at most 60 maps; the others are on the next pages.
        path: Where to save the figure.
        **options: Drawing options; see ``OverlayOptions``.

    Raises:
        GeometryError: The shape of a map fits no grid of the image.
    """
    if not isinstance(maps, Mapping):
        raise InputError(f"maps must be a mapping from titles to arrays; got {quoted(maps)}.")
    if not maps:
        raise InputError("maps is empty; pass at least one map.")
    placed = placed_image(sample, image)
    fitted = [_fitted(placed, np.asarray(values, dtype=float)) for values in maps.values()]
    finer = {on_patches for on_patches, _ in fitted}
    if len(finer) > 1:
        raise GeometryError(
            "Some maps are on image tokens, others on the patches of the vision tower. Draw the "
            "two kinds in separate figures."
        )
    if True in finer:
        placed = with_patches(placed)
    panels = [
        Panel(name, values, undrawn=_undrawn(placed, values) if meaning == "amount" else None)
        for name, (_, values) in zip(maps, fitted, strict=True)
    ]
    drawing = OverlayOptions(**options)
    text = about(sample) + (f"\n{title}" if title else "")
    return saved(_figure(placed, panels, meaning, label, text, drawing, page), path)


@checked
@styled
def rollout_overlay(
    table: pd.DataFrame,
    sample: Sample,
    value: str = "rollout",
    *,
    image: int = 0,
    page: int = 0,
    path: FigurePath = None,
    **options: Unpack[MapOptions],
) -> Picture:
    """Draw a table of ``attention_rollout`` on the image, with one panel per query.

    Args:
        table: The table; rows of samples with another name are ignored.
        sample: The sample.
        value: ``"rollout"``; or ``"log2_ratio"``, the ratio to the rollout of uniform attention.
        image: Index of the image.
        page: A figure has at most 60 queries; the others are on the next pages.
        path: Where to save the figure.
        **options: Drawing options; see ``OverlayOptions``.
    """
    placed = placed_image(sample, image)
    columns_of(table, ["image", "row", "col", value], "A rollout overlay")
    of_sample = _rows_of(table, sample)
    cells = of_sample[of_sample["image"].eq(image).fillna(value=False) & of_sample["row"].notna()]
    if not len(cells):
        raise InputError(
            f"The table has {len(table)} rows, but none for tokens of image {image} of sample "
            f"{sample.name!r}. Pass a table that attention_rollout returned for this sample."
        )
    vision = "tower" in cells and cells["tower"].eq("vision").all()
    if vision:
        placed = with_patches(placed)
    ratio, of_image = value == "log2_ratio", of_sample[of_sample["image"].eq(image).fillna(False)]
    panels = []
    for query, rows in cells.groupby("query", sort=False) if "query" in cells else [("", cells)]:
        grid = np.full((placed.grid.rows, placed.grid.cols), np.nan)
        grid[rows["row"].astype(int), rows["col"].astype(int)] = rows[value]
        token = rows["query_token"].iloc[0] if "query_token" in rows else None
        name = f"position {query}" if pd.isna(token) else f'"{readable(str(token))}" ({query})'
        amounts = of_image[of_image["query"].eq(query)] if "query" in of_image else of_image
        outside = float(amounts[value][amounts["row"].isna()].sum())
        undrawn = (outside, float(amounts[value].sum())) if outside and not ratio else None
        _, values = _fitted(placed, 2.0**grid if ratio else grid)
        panels.append(Panel(name, values, undrawn=undrawn))
    label = "rollout: times uniform\n(log scale)" if ratio else value
    title = f"{about(sample)}\nattention rollout{', vision tower' if vision else ''}, by query"
    meaning: Meaning = "ratio" if ratio else "amount"
    drawing = OverlayOptions(**options)
    return saved(_figure(placed, panels, meaning, label, title, drawing, page), path)


@checked
@styled
def patch_overlays(
    sample: Sample,
    points: Sequence[tuple[float, float]],
    layer: int = -1,
    head: Positions | None = None,
    *,
    image: int = 0,
    page: int = 0,
    path: FigurePath = None,
    **options: Unpack[MapOptions],
) -> Picture:
    """Draw the attention of single patches of the vision tower, with one panel per point.

    Args:
        sample: The sample.
        points: ``(x, y)`` in pixels of the original image. The patch at this point is the query and
            is outlined.
        layer: Layer of the vision tower; negative ones count from the last.
        head: A head, or several to average; all heads are averaged if not given.
        image: Index of the image.
        page: A figure has at most 60 points; the others are on the next pages.
        path: Where to save the figure.
        **options: Drawing options; see ``OverlayOptions``.

    Raises:
        GeometryError: No patch covers a point, or the call does not have one position per patch.
    """
    placed = with_patches(placed_image(sample, image))
    call = sample.call(layer, tower="vision", call=image)
    if call.n_keys != len(placed.keys):
        raise GeometryError(
            f"{call.name} has {call.n_keys} keys, but image {image} has {len(placed.keys)} "
            "patches. Patch overlays require a vision layer with one position per patch."
        )
    patches = [_patch_at(placed, x, y) for x, y in points]
    probs = call.probs(head, patches)[0].mean(0).double().cpu().numpy()
    seen = call.visible(patches)[0].any(0).cpu().numpy()
    panels = []
    for (x, y), patch, row, visible in zip(points, patches, probs, seen, strict=True):
        x0, y0, x1, y1 = placed.grid.boxes[patch].tolist()
        values = np.where(visible, row, np.nan)
        panels.append(
            Panel(
                f"patch at ({x:.0f}, {y:.0f})",
                values,
                outlined=[(x0, y0, x1, y1)],
                undrawn=_undrawn(placed, values),
            )
        )
    title = f"{layer_name(call)}, {heads_name(call, head)}"
    label, drawing = SHOW_LABELS["probability"], OverlayOptions(**options)
    return saved(_figure(placed, panels, "amount", label, title, drawing, page), path)


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


def _figure(
    placed: PlacedImage,
    panels: Sequence[Panel],
    meaning: Meaning,
    label: str,
    title: str,
    options: OverlayOptions,
    page: int,
) -> Picture:
    """Draw the image, then the panels of a page without the left-out tokens, in one colour scale.

    Raises:
        InputError: The page does not exist.
    """
    n = len(panels)
    n_pages = -(-n // _MOST)
    if whole_number(page, "page", 0) >= n_pages:
        raise InputError(f"page must be between 0 and {n_pages - 1}; got {page}.")
    first, stop = page * _MOST, min((page + 1) * _MOST, n)
    panels = panels[first:stop]
    pages = (
        f"Page {page}: panels {first + 1} to {stop} of {n}; {n_pages} pages, by page=0 to "
        f"{n_pages - 1}."
    )
    left_out = options.left_out(placed)
    maps = [np.array(panel.values, dtype=float) for panel in panels]
    if left_out is not None:
        maps = [np.where(left_out, np.nan, values) for values in maps]
    shown = [
        replace(panel, values=values, left_out=left_out)
        for panel, values in zip(panels, maps, strict=True)
    ]
    scaled = options.of_values(shown, meaning, label)
    rows = in_rows([Panel(placed.name), *scaled], options.width)
    return panel_figure(placed, rows, options, title, remark=pages if n_pages > 1 else "")


def _undrawn(placed: PlacedImage, values: np.ndarray) -> tuple[float, float] | None:
    """Return the sum over tokens without a cell and over all tokens; None if the first is 0."""
    without = np.nansum(values[placed.without_cell]) if placed.shares is None else 0.0
    return (float(without), float(np.nansum(values))) if without else None


def _fitted(placed: PlacedImage, values: np.ndarray) -> tuple[bool, np.ndarray]:
    """Return whether values are on patches, and the values as one per token or patch."""
    grid = placed.grid
    for on_patches, shape, places in (
        (False, (grid.rows, grid.cols), grid.places),
        (True, (grid.patch_rows, grid.patch_cols), grid.patch_places),
    ):
        if values.shape == (len(places),):
            return on_patches, values
        if values.shape == shape:
            return on_patches, np.where(places[:, 0] < 0, np.nan, values[tuple(places.T)])
    raise GeometryError(
        f"A map of shape {values.shape} fits no grid of image {placed.number}. The image has "
        f"{len(grid.places)} tokens ({grid.rows} x {grid.cols}) and {len(grid.patch_places)} "
        f"vision positions ({grid.patch_rows} x {grid.patch_cols})."
    )


def _patch_at(placed: PlacedImage, x: float, y: float) -> int:
    x0, y0, x1, y1 = placed.grid.boxes.T
    inside = np.flatnonzero((x0 <= x) & (x < x1) & (y0 <= y) & (y < y1))
    if not len(inside):
        raise GeometryError(
            f"No patch of image {placed.number} covers the point ({x:g}, {y:g}). Patches cover x "
            f"{np.nanmin(x0):g} to {np.nanmax(x1):g} and y {np.nanmin(y0):g} to "
            f"{np.nanmax(y1):g} px."
        )
    return int(inside[0])
