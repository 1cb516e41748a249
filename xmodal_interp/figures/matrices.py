"""Attention as matrices: of one layer, of text against image tokens, or several side by side.

Hidden cells are grey.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np
from matplotlib.axes import Axes

from xmodal_interp.arguments import checked
from xmodal_interp.at import Selector
from xmodal_interp.attention import AttentionCall, Positions
from xmodal_interp.errors import InputError, quoted
from xmodal_interp.figures.matrix_axes import (
    NAMES,
    AxisLabels,
    Run,
    draw_matrix,
    group_labels,
    labels_of,
    legible_side,
    name_blocks,
    widening_note,
)
from xmodal_interp.figures.matrix_selection import Matrix, MatrixSelection, matrix_of, selections_of
from xmodal_interp.figures.overlay_panels import draw_image, draw_rows
from xmodal_interp.figures.overlay_values import attention_on_image, query_groups
from xmodal_interp.figures.placement import PlacedImage, placed_image
from xmodal_interp.figures.scales import ColorScale, Show, check_show, scale_of
from xmodal_interp.figures.style import (
    BAR,
    FigurePath,
    Picture,
    about,
    escaped,
    heads_name,
    layer_name,
    new_picture,
    saved,
    styled,
)
from xmodal_interp.sample import Sample
from xmodal_interp.vocabulary import AttentionKind, Tower

_SIDES = (5.6, 9.0)  # side of a matrix with few and with many named tokens, inches
_SMALL_SIDE = 3.2  # side of a matrix next to others, inches
_PITCH = 0.21  # height of a row of a token-patch matrix, inches


@checked
@styled
def attention_matrix(  # noqa: PLR0913  every option has a default
    sample: Sample,
    layer: int = -1,
    head: Positions | None = None,
    *,
    zoom: Literal["text-image"] | None = None,
    show: Literal["probability", "lift"] = "probability",
    tower: Tower | None = None,
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
        tower: ``"vision"``, ``"connector"`` or ``"language"``; ``Sample.tower`` if not given.
        kind: ``"self"``, or ``"cross"`` for models with cross-attention.
        image: Index of the image in the vision tower, or for ``zoom``.
        path: Where to save the figure.

    Raises:
        InputError: A wrong argument, a sample without the image or without text after it, or a
            matrix that is too large to draw.
    """
    check_show(show, ("probability", "lift"))
    if not (zoom is None or (isinstance(zoom, str) and zoom == "text-image")):
        raise InputError(f"zoom must be 'text-image' or None; got {quoted(zoom)}.")
    tower = tower or sample.tower
    if zoom is not None and tower != "language":
        raise InputError(
            f"zoom shows text against image tokens, which the {tower} tower does not have. Leave "
            "zoom out."
        )
    placed = placed_image(sample, image) if zoom else None
    if placed is not None and placed.kind != kind:
        raise InputError(
            f"zoom is not available for kind={kind!r}: the text of sample {sample.name!r} attends "
            f"to image tokens by {placed.kind}-attention. Pass kind={placed.kind!r}."
        )
    number = 0 if tower == "language" else image
    matrix = matrix_of(MatrixSelection(sample, layer, head, tower, kind, number))
    values = matrix.probs if show == "probability" else matrix.lift
    scale = scale_of(show, [values], power=0.0)
    side = max(legible_side(matrix.rows, *_SIDES), legible_side(matrix.columns, *_SIDES))
    grey = "Grey: hidden by the mask." if not matrix.visible.all() else "Nothing is hidden."
    note = grey + widening_note([matrix.rows, matrix.columns], side)
    title = f"{about(sample)}\n{layer_name(matrix.call)}, {heads_name(matrix.call, head)}"
    body = (NAMES + side + BAR, side + NAMES)
    if placed is None:
        picture = new_picture(body, title, note)
        axes = picture.subplots()
    else:
        block, rows = _zoomed(sample, matrix, placed, values, mean=show == "lift")
        width, height = _block_size(block)
        size = (body[0] + NAMES + width, max(body[1], height + 0.8))
        picture = new_picture(size, title, note, compress=False)
        below = max(side - height - 0.3, 0.1)
        grid = picture.add_gridspec(2, 2, width_ratios=(side, width), height_ratios=(height, below))
        axes = picture.add_subplot(grid[:, 0])
        zoom_axes = picture.add_subplot(grid[0, 1])
        _draw_block(zoom_axes, block, rows, placed, scale, (width, height))
        zoom_axes.set_title("text after the image \u2192 image " + placed.cells)
        if min(below, width * placed.grid.height / placed.grid.width) > 0.9:
            _draw_legend_image(picture.add_subplot(grid[1, 1]), placed)
    draw_matrix(axes, values, matrix.rows, matrix.columns, scale, (side, side))
    axes.set(ylabel="query", xlabel="key")
    name_blocks(axes, matrix.rows, matrix.columns, _block_mass(matrix), (side, side))
    scale.bar(picture, list(picture.axes), side)
    return saved(picture, path)


def _zoomed(
    sample: Sample, matrix: Matrix, placed: PlacedImage, values: np.ndarray, *, mean: bool
) -> tuple[np.ndarray, AxisLabels]:
    """Return the block of text after the image against image tokens, in raster order."""
    rows = np.flatnonzero(np.isin(matrix.call.query_positions.cpu(), sample.text_after_image()))
    if not len(rows):
        raise InputError(
            f"Sample {sample.name!r} has no recorded queries after the image. Draw it without zoom."
        )
    block = placed.on_cells(values[np.ix_(rows, placed.keys)], mean=mean)
    return block[:, _raster(placed)], matrix.rows.take(rows)


def _draw_legend_image(axes: Axes, placed: PlacedImage) -> None:
    """Draw the image with numbered token rows."""
    draw_image(axes, placed)
    draw_rows(axes, placed)
    axes.set_ylabel("row of " + placed.cells)
    axes.set_anchor("NW")


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
        queries: A selector; all text after the image if not given.
        image: Index of the image.
        show: ``"probability"``, ``"share"`` of the attention on the image, or ``"lift"``; see
            ``OverlayOptions``.
        vmax: Upper end of the colour scale; the largest value if not given.
        path: Where to save the figure.
    """
    check_show(show)
    placed = placed_image(sample, image)
    groups = query_groups(sample, placed, queries)
    positions = [position for group in groups for position in group]
    read = attention_on_image(sample, placed, positions, layer, head)
    order = _raster(placed)
    values = np.stack([read.values(show, queries=[i])[order] for i in range(len(groups))])
    rows = labels_of(sample.tokens).take(np.array(positions))
    scale = scale_of(show, [values], vmax=vmax, power=0.5)
    size = _block_size(values)
    title = f"{about(sample)}\n{layer_name(read.call)}, {heads_name(read.call, head)}"
    picture = new_picture((NAMES + size[0] + BAR, size[1] + 0.5), title)
    axes = picture.subplots()
    _draw_block(axes, values, rows, placed, scale, size)
    scale.bar(picture, [axes], size[1])
    return saved(picture, path)


@checked
@styled
def side_by_side(
    sources: Mapping[str, Sample | AttentionCall | MatrixSelection],
    *,
    shared: bool = False,
    show: Literal["probability", "lift"] = "probability",
    title: str = "Attention side by side",
    path: FigurePath = None,
) -> Picture:
    """Draw attention matrices side by side, with masked cells in grey.

    Args:
        sources: Matrices by panel title: a sample (its last language layer), a call of any tower
            (from ``xmodal_interp.record`` on any model), or a ``MatrixSelection`` that chooses
            tower, layer, head and names.
        shared: Use one colour scale for all panels instead of one per panel.
        show: ``"probability"`` on a log scale, or ``"lift"``, probability divided by uniform
            attention.
        title: Title of the figure.
        path: Where to save the figure.
    """
    check_show(show, ("probability", "lift"))
    selections = list(selections_of(sources).values())
    matrices = [matrix_of(selection) for selection in selections]
    values = [m.probs if show == "probability" else m.lift for m in matrices]
    scales = [scale_of(show, values if shared else [panel], power=0.0) for panel in values]
    if shared:
        scales = scales[:1] * len(values)
    note = "One colour scale for all panels." if shared else "Each panel has its own colour scale."
    note += " Grey: hidden by the mask." if any(not m.visible.all() for m in matrices) else ""
    note += widening_note([each for m in matrices for each in (m.rows, m.columns)], _SMALL_SIDE)
    width = (NAMES + _SMALL_SIDE) * len(matrices) + BAR * (1 if shared else len(matrices))
    picture = new_picture((width, 0.45 + _SMALL_SIDE + NAMES), title, note)
    panels = list(picture.subplots(1, len(matrices), squeeze=False)[0])
    for i, (name, matrix, axes) in enumerate(zip(sources, matrices, panels, strict=True)):
        size = (_SMALL_SIDE, _SMALL_SIDE)
        draw_matrix(axes, values[i], matrix.rows, matrix.columns, scales[i], size)
        what = f"{layer_name(matrix.call)}, {heads_name(matrix.call, selections[i].head)}"
        axes.set(xlabel="key", ylabel="query", title=f"{escaped(name)}\n{what}")
        if not shared:
            scales[i].bar(picture, [axes], _SMALL_SIDE)
    if shared:
        scales[0].bar(picture, panels, _SMALL_SIDE)
    return saved(picture, path)


def _draw_block(
    axes: Axes,
    values: np.ndarray,
    rows: AxisLabels,
    placed: PlacedImage,
    scale: ColorScale,
    inches: tuple[float, float],
) -> None:
    """Draw text tokens against image tokens, with lines between the image's rows."""
    order = _raster(placed)
    columns = group_labels(len(order), "")
    draw_matrix(axes, values, rows, columns, scale, inches)
    of_row = placed.grid.places[order, 0]
    starts = np.flatnonzero(np.diff(of_row, prepend=-1))
    for start in starts[1:]:
        axes.axvline(start, color="white", linewidth=0.8)
    middles = (starts + np.append(starts[1:], len(order))) / 2
    step = max(1, int(np.ceil(len(starts) * 0.22 / inches[0])))
    axes.set_xticks(middles[::step], [str(row) for row in of_row[starts][::step]])
    for r in range(1, len(rows)):
        axes.axhline(r, color="white", linewidth=0.4)
    size = f"{placed.grid.rows} x {placed.grid.cols}"
    axes.set_xlabel(f"{placed.cells} of image {placed.number}, by its rows ({size})")


def _raster(placed: PlacedImage) -> np.ndarray:
    """Return the indices of tokens that have a place on the image, in raster order."""
    row, col = placed.grid.places.T
    order = np.lexsort((col, row))
    return np.asarray(order[row[order] >= 0])


def _block_size(block: np.ndarray) -> tuple[float, float]:
    """Return width and height in inches for text tokens (rows) against image tokens."""
    n_rows, n_tokens = block.shape
    return float(np.clip(0.04 * n_tokens, 4.5, 9.0)), float(np.clip(_PITCH * n_rows, 1.7, 10.0))


def _block_mass(matrix: Matrix) -> Callable[[Run, Run], str]:
    """Return a function that formats the mean share of attention of a block."""

    def text(row: Run, column: Run) -> str:
        block = matrix.probs[row.start : row.stop, column.start : column.stop]
        if np.isnan(block).all():
            return "hidden"
        mass = np.nansum(block, axis=1).mean()
        return f"{row.group} \u2192 {column.group}: {mass:.0%} of attention"

    return text
