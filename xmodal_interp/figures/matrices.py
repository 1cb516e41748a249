"""Attention as a matrix: all positions, or text tokens against image tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from matplotlib.axes import Axes

from xmodal_interp.arguments import checked
from xmodal_interp.attention import Positions
from xmodal_interp.errors import InputError, quoted
from xmodal_interp.figures.drawing import draw_image, draw_rows
from xmodal_interp.figures.layout import BAR, Sheet, sheet
from xmodal_interp.figures.matrix_axes import (
    NAMES,
    Labels,
    Run,
    draw_matrix,
    labels_of,
    legible_side,
    name_blocks,
    widened,
)
from xmodal_interp.figures.matrix_sources import Matrix, View, matrix_of
from xmodal_interp.figures.overlay_values import flat, query_groups, reading
from xmodal_interp.figures.placement import Place, place_of
from xmodal_interp.figures.scales import Scale, Show, check_show, scale_of
from xmodal_interp.figures.style import (
    FigurePath,
    Picture,
    about,
    heads_name,
    layer_name,
    saved,
    styled,
)
from xmodal_interp.sample import Sample, Selector
from xmodal_interp.vocabulary import AttentionKind

_SIDES = (5.6, 9.0)  # side of a matrix with few and with many named tokens, inches
_PITCH = 0.21  # height of a row of a token-patch matrix, inches


@checked
@styled
def attention_matrix(
    sample: Sample,
    layer: int = -1,
    head: Positions | None = None,
    *,
    zoom: Literal["text-image"] | None = None,
    show: Literal["probability", "lift"] = "probability",
    kind: AttentionKind = "self",
    image: int = 0,
    path: FigurePath = None,
) -> Picture:
    """Draw an attention matrix: queries in rows, keys in columns, masked cells in grey.

    Args:
        sample: The sample.
        layer: Layer index; negative ones count from the last.
        head: A head, or several to average; all heads are averaged if not given.
        zoom: ``"text-image"`` adds the block of text after the image against the image's tokens.
        show: ``"probability"`` on a log scale, or ``"lift"``, probability divided by uniform
            attention.
        kind: ``"self"``, or ``"cross"`` for models with cross-attention.
        image: Index of the image for ``zoom``.
        path: Where to save the figure.

    Raises:
        InputError: A wrong argument, a sample without the image or without text after it, or a
            matrix that is too large to draw.
    """
    check_show(show, ("probability", "lift"))
    if not (zoom is None or (isinstance(zoom, str) and zoom == "text-image")):
        raise InputError(f"zoom must be 'text-image' or None; got {quoted(zoom)}.")
    place = place_of(sample, image) if zoom else None
    if place is not None and place.kind != kind:
        raise InputError(
            f"zoom is not available for kind={kind!r}: the text of sample {sample.name!r} attends "
            f"to image tokens by {place.kind}-attention. Pass kind={place.kind!r}."
        )
    matrix = matrix_of(View(sample, layer, head, kind=kind))
    values = matrix.probs if show == "probability" else matrix.lift
    scale = scale_of(show, [values], power=0.0)
    side = max(legible_side(matrix.rows, *_SIDES), legible_side(matrix.columns, *_SIDES))
    right = NAMES + side + 0.1
    zoomed = None if place is None else _zoomed(sample, matrix, place, values, mean=show == "lift")
    width = 0.0 if zoomed is None else _wide(zoomed[0].shape[1])
    height = 0.0 if zoomed is None else _tall(len(zoomed[1]))
    title = f"{about(sample)}\n{layer_name(matrix.call)}, {heads_name(matrix.call, head)}"
    edge = right + (NAMES + width + 0.1 if zoomed else 0.0)
    body = max(side + NAMES, height + 0.8)
    page = sheet(edge + BAR, body, title, _note(matrix, side))
    axes = page.axes(NAMES, 0.05, side, side)
    draw_matrix(axes, values, matrix.rows, matrix.columns, scale, (side, side))
    axes.set(ylabel="query", xlabel="key")
    name_blocks(axes, matrix.rows, matrix.columns, _block_mass(matrix), (side, side))
    page.bar(scale, edge + 0.05, 0.05, 2.6)
    if zoomed is not None and place is not None:
        block, rows = zoomed
        drawn = _draw_block(page, (right + NAMES, 0.3, width, height), block, rows, place, scale)
        drawn.set_title("text after the image \u2192 image " + place.cells)
        _draw_legend_image(page, place, right + NAMES, height + 0.95, (width, body - NAMES))
    return saved(page.picture, path)


def _zoomed(
    sample: Sample, matrix: Matrix, place: Place, values: np.ndarray, *, mean: bool
) -> tuple[np.ndarray, Labels]:
    """Return the block of text after the image against image tokens, in raster order."""
    rows = np.flatnonzero(np.isin(matrix.call.query_positions.cpu(), sample.text_after_image()))
    if not len(rows):
        raise InputError(
            f"Sample {sample.name!r} has no recorded queries after the image. Draw it without zoom."
        )
    block = place.on_cells(values[np.ix_(rows, place.keys)], mean=mean)
    return block[:, _raster(place)], matrix.rows.take(rows)


def _draw_legend_image(
    page: Sheet, place: Place, left: float, top: float, room: tuple[float, float]
) -> None:
    """Draw the image with numbered token rows, if there is room for it."""
    aspect = place.grid.width / place.grid.height
    height = min(room[1] - top, room[0] / aspect, 2.4)
    if height > 0.9:
        axes = page.axes(left, top, height * aspect, height)
        draw_image(axes, place)
        draw_rows(axes, place)
        axes.set_ylabel("row of " + place.cells)


@checked
@styled
def token_patch_matrix(
    sample: Sample,
    layer: int = -1,
    head: Positions | None = None,
    *,
    queries: Selector | None = None,
    image: int = 0,
    show: Show = "probability",
    vmax: float | None = None,
    path: FigurePath = None,
) -> Picture:
    """Draw attention of text tokens (rows) to image tokens (columns, in raster order).

    Args:
        sample: The sample.
        layer: Layer index; negative ones count from the last.
        head: A head, or several to average; all heads are averaged if not given.
        queries: A phrase or positions; all text after the image if not given.
        image: Index of the image.
        show: ``"probability"``, ``"share"`` of the attention on the image, or ``"lift"``; see
            ``Look``.
        vmax: Upper end of the colour scale; the largest value if not given.
        path: Where to save the figure.
    """
    check_show(show)
    place = place_of(sample, image)
    groups = query_groups(sample, place, queries)
    read = reading(sample, place, torch.tensor(flat(groups)), layer, head)
    order = _raster(place)
    values = np.stack([read.values(show, queries=[i])[order] for i in range(len(groups))])
    rows = labels_of(sample.tokens).take(np.array(flat(groups)))
    scale = scale_of(show, [values], vmax=vmax, power=0.5)
    width = _wide(len(order))
    height = _tall(len(rows))
    title = f"{about(sample)}\n{layer_name(read.call)}, {heads_name(read.call, head)}"
    page = sheet(NAMES + width + 0.15 + BAR, height + 0.5, title)
    _draw_block(page, (NAMES, 0.05, width, height), values, rows, place, scale)
    page.bar(scale, NAMES + width + 0.15, 0.05, min(height, 2.6))
    return saved(page.picture, path)


def _draw_block(
    page: Sheet,
    where: tuple[float, float, float, float],
    values: np.ndarray,
    rows: Labels,
    place: Place,
    scale: Scale,
) -> Axes:
    """Draw text tokens against image tokens, with lines between the image's rows."""
    axes = page.axes(*where)
    order = _raster(place)
    draw_matrix(
        axes, values, rows, Labels(("",) * len(order), ("",) * len(order)), scale, where[2:]
    )
    of_row = place.grid.places[order, 0]
    starts = np.flatnonzero(np.diff(of_row, prepend=-1))
    for start in starts[1:]:
        axes.axvline(start, color="white", linewidth=0.8)
    middles = (starts + np.append(starts[1:], len(order))) / 2
    step = max(1, int(np.ceil(len(starts) * 0.22 / where[2])))
    axes.set_xticks(middles[::step], [str(row) for row in of_row[starts][::step]])
    for r in range(1, len(rows)):
        axes.axhline(r, color="white", linewidth=0.4)
    size = f"{place.grid.rows} x {place.grid.cols}"
    axes.set_xlabel(f"{place.cells} of image {place.number}, by its rows ({size})")
    return axes


def _raster(place: Place) -> np.ndarray:
    """Return the indices of tokens that have a place on the image, in raster order."""
    row, col = place.grid.places.T
    order = np.lexsort((col, row))
    return np.asarray(order[row[order] >= 0])


def _wide(n_tokens: int) -> float:
    """Return the width in inches for a number of image tokens."""
    return float(np.clip(0.04 * n_tokens, 4.5, 9.0))


def _tall(n_rows: int) -> float:
    """Return the height in inches for a number of text tokens."""
    return float(np.clip(_PITCH * n_rows, 1.7, 10.0))


def _note(matrix: Matrix, side: float) -> str:
    """Return the note on how the matrix is drawn."""
    times = max(widened(matrix.rows, side), widened(matrix.columns, side))
    grey = "Grey: hidden by the mask." if not matrix.visible.all() else "Nothing is hidden."
    wide = (
        f" Tokens with a name are drawn {times} times as wide as image tokens." if times > 1 else ""
    )
    return grey + wide


def _block_mass(matrix: Matrix) -> Callable[[Run, Run], str]:
    """Return a function that formats the mean share of attention of a block."""

    def text(row: Run, column: Run) -> str:
        block = matrix.probs[row.start : row.stop, column.start : column.stop]
        if np.isnan(block).all():
            return "hidden"
        mass = np.nansum(block, axis=1).mean()
        return f"{row.group} \u2192 {column.group}: {mass:.0%} of attention"

    return text
