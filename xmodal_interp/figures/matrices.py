"""Attention as matrices: of one layer, of text against image tokens, or several side by side.

Hidden cells are grey. Matrices with more positions than pixels are pooled; the figure states how.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, Unpack, get_args

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from xmodal_interp.arguments import checked, one_of, whole_number
from xmodal_interp.at import Selector
from xmodal_interp.attention import AttentionCall, Positions
from xmodal_interp.errors import InputError, quoted
from xmodal_interp.figures.matrix_axes import (
    NAMES,
    PANELS_IN_A_ROW,
    AxisLabels,
    Run,
    draw_matrix,
    group_labels,
    labels_of,
    legible_side,
    name_blocks,
    pooling_note,
    widening_note,
)
from xmodal_interp.figures.matrix_selection import (
    Matrix,
    MatrixSelection,
    Pool,
    axis_labels,
    matrix_of,
    selections_of,
)
from xmodal_interp.figures.overlay_panels import draw_image, draw_rows
from xmodal_interp.figures.overlay_values import attention_on_image, query_groups
from xmodal_interp.figures.placement import PlacedImage, placed_image
from xmodal_interp.figures.scales import ColorScale, Show, check_show, scale_of
from xmodal_interp.figures.style import (
    BAR,
    NORMAL,
    WIDEST_PAGE,
    AxesOptions,
    FigureOptions,
    FigurePath,
    Picture,
    about,
    check_options,
    heads_name,
    layer_name,
    new_picture,
    placed_on,
    room,
    saved,
    styled,
    wrapped,
)
from xmodal_interp.sample import Sample
from xmodal_interp.vocabulary import AttentionKind, Tower

_SIDES = (5.6, 9.0)  # side of a matrix with few and with many named tokens, inches
_SMALL_SIDE = 3.2  # side of a matrix next to others, inches
_PITCH = 0.21  # height of a row of a token-patch matrix, inches
_MOST_ROWS = 48  # of a token-patch matrix


@checked
@styled
def attention_matrix(  # noqa: PLR0913  every option has a default
    sample: Sample,
    layer: int = -1,
    head: Positions | None = None,
    *,
    zoom: Literal["text-image"] | None = None,
    show: Literal["probability", "lift"] = "probability",
    pool: Pool = "mean",
    tower: Tower | None = None,
    kind: AttentionKind = "self",
    image: int = 0,
    path: FigurePath = None,
    **options: Unpack[AxesOptions],
) -> Figure:
    """Draw an attention matrix: queries in rows, keys in columns, masked cells in grey.

    Args:
        sample: The sample.
        layer: Layer index; negative ones count from the last.
        head: A head, or several to average; all heads are averaged if not given.
        zoom: ``"text-image"`` adds the block of text after the image against the image's tokens.
        show: ``"probability"`` on a log scale, or ``"lift"``, probability divided by uniform
            attention.
        pool: If there are more positions than about 800: a drawn cell is the ``"mean"`` or the
            ``"max"`` of the visible cells of adjacent tokens.
        tower: ``"vision"``, ``"connector"`` or ``"language"``; ``Sample.tower`` if not given.
        kind: ``"self"``, or ``"cross"`` for models with cross-attention.
        image: Index of the image in the vision tower, or for ``zoom``.
        path: Where to save the figure.
        **options: ``cmap``, ``width``, ``scale`` and ``ax``; see ``AxesOptions``. The matrix and
            its zoom share a scale unless it is ``"panel"``.

    Raises:
        InputError: A wrong argument, a sample without the image or without text after it, or a
            matrix that is too large to draw.
    """
    check_options(**options)
    check_show(show, ("probability", "lift"))
    one_of(pool, "pool", get_args(Pool))
    tower = tower or sample.tower
    ax, width, cmap = options.get("ax"), options.get("width"), options.get("cmap")
    placed = _zoomed_image(sample, zoom, tower, kind, image, ax)
    number = 0 if tower == "language" else image
    selection = MatrixSelection(sample, layer, head, tower, kind, number)
    labels = axis_labels(selection)
    side = max(legible_side(each, *_SIDES) for each in labels)
    if ax is not None:
        side = min(placed_on(ax)[1:])
    elif width is not None:
        side = min(side, room(width, side, NAMES + BAR))
    matrix = matrix_of(selection, side, show, pool)
    title = f"{about(sample)}\n{layer_name(matrix.call)}, {heads_name(matrix.call, head)}"
    if ax is not None:
        scale = scale_of(show, [matrix.values], power=0.0).colored(cmap)
        figure, wide, tall = placed_on(ax)
        _draw_whole(ax, matrix, scale, (wide, tall))
        scale.bar(figure, [ax], tall)
        return figure
    grey = "Nothing is hidden." if matrix.all_visible else "Grey: hidden by the mask."
    drawn = [matrix.rows, matrix.columns]
    note = grey + pooling_note(drawn, pool) + widening_note(drawn, side)
    body = (NAMES + side + BAR, side + NAMES)
    if placed is None:
        picture = new_picture(body, title, note, width=width)
        axes = picture.subplots()
        scale = scale_of(show, [matrix.values], power=0.0).colored(cmap)
    else:
        block, rows, page = _zoomed(sample, matrix, placed, layer, head, show)
        own = options.get("scale") == "panel"
        scale, other = (
            scale_of(show, maps, power=0.0).colored(cmap)
            for maps in (
                [matrix.values] if own else [matrix.values, block],
                [block] if own else [matrix.values, block],
            )
        )
        sides = body[0] + NAMES + (BAR if own else 0)
        natural, height = _block_size(block, side if width else None)
        block_width = min(natural, WIDEST_PAGE - sides) if width is None else natural
        extra = NAMES + block_width + (BAR if own else 0)
        size = (body[0] + extra, max(body[1], height + 0.8))
        if width is not None:  # the block is below the matrix
            size = (body[0], body[1] + height + 0.8)
        note += " Each panel has its own scale." if own else ""
        picture = new_picture(size, title, f"{note}{page}", compress=False, width=width)
        below = max(side - height - 0.3, 0.1)
        grid = picture.add_gridspec(
            2, 2, width_ratios=(side, block_width), height_ratios=(height, below)
        )
        if width is not None:
            grid = picture.add_gridspec(2, 1, height_ratios=(side, height))
        axes = picture.add_subplot(grid[:, 0] if width is None else grid[0])
        zoom_axes = picture.add_subplot(grid[0, 1] if width is None else grid[1])
        _draw_block(zoom_axes, block, rows, placed, other if own else scale, (block_width, height))
        heading = f"text after the image \u2192 image {placed.cells}"
        zoom_axes.set_title(wrapped(heading, block_width, NORMAL))
        if width is None and min(below, block_width * placed.grid.height / placed.grid.width) > 0.9:
            _draw_legend_image(picture.add_subplot(grid[1, 1]), placed)
        if own:
            other.bar(picture, [zoom_axes], height)
    _draw_whole(axes, matrix, scale, (side, side))
    own_bar = placed is not None and options.get("scale") == "panel"
    scale.bar(picture, [axes] if own_bar else list(picture.axes), side)
    return saved(picture, path)


def _zoomed_image(
    sample: Sample,
    zoom: str | None,
    tower: Tower,
    kind: AttentionKind,
    image: int,
    ax: Axes | None,
) -> PlacedImage | None:
    """Return the image whose block is enlarged; None without ``zoom``.

    Raises:
        InputError: ``zoom`` is wrong, or does not fit to the other arguments.
    """
    if zoom is None:
        return None
    if not (isinstance(zoom, str) and zoom == "text-image"):
        raise InputError(f"zoom must be 'text-image' or None; got {quoted(zoom)}.")
    if tower != "language":
        raise InputError(
            f"zoom shows text against image tokens, which the {tower} tower does not have. Leave "
            "zoom out."
        )
    if ax is not None:
        raise InputError("ax= requires a figure of one panel. Leave zoom out.")
    placed = placed_image(sample, image)
    if placed.kind != kind:
        raise InputError(
            f"zoom is not available for kind={kind!r}: the text of sample {sample.name!r} attends "
            f"to image tokens by {placed.kind}-attention. Pass kind={placed.kind!r}."
        )
    return placed


def _draw_whole(axes: Axes, matrix: Matrix, scale: ColorScale, inches: tuple[float, float]) -> None:
    """Draw a matrix with the share of attention of each block."""
    draw_matrix(axes, matrix.values, matrix.rows, matrix.columns, scale, inches)
    axes.set(ylabel="query", xlabel="key")
    name_blocks(axes, matrix.rows, matrix.columns, _block_mass(matrix), inches)


def _zoomed(
    sample: Sample,
    matrix: Matrix,
    placed: PlacedImage,
    layer: int,
    head: Positions | None,
    show: Show,
) -> tuple[np.ndarray, AxisLabels, str]:
    """Return the block of text after the image against image tokens, in raster order.

    The third value is a sentence if not all rows are drawn.
    """
    recorded = matrix.call.query_positions.cpu()
    rows = np.flatnonzero(np.isin(recorded, sample.text_after_image()))
    if not len(rows):
        raise InputError(
            f"Sample {sample.name!r} has no recorded queries after the image. Draw it without zoom."
        )
    positions = recorded[rows[:_MOST_ROWS]].numpy()
    values = _rows_on_image(sample, placed, positions.tolist(), layer, head, show)
    some = f" Of {len(rows)} text tokens, the first {_MOST_ROWS} are enlarged."
    labels = labels_of(sample.tokens).take(positions)
    return values, labels, some if len(rows) > _MOST_ROWS else ""


def _rows_on_image(
    sample: Sample,
    placed: PlacedImage,
    positions: Sequence[int],
    layer: int,
    head: Positions | None,
    show: Show,
) -> np.ndarray:
    """Return attention of text tokens to image tokens, ``[token, cell]`` in raster order."""
    read = attention_on_image(sample, placed, list(positions), layer, head)
    order = _raster(placed)
    return np.stack([read.values(show, queries=[i])[order] for i in range(len(positions))])


def _draw_legend_image(axes: Axes, placed: PlacedImage) -> None:
    """Draw the image with numbered token rows."""
    draw_image(axes, placed)
    draw_rows(axes, placed)
    axes.set_ylabel("row of " + placed.cells)
    axes.set_anchor("NW")


@checked
@styled
def token_patch_matrix(  # noqa: PLR0913  every option has a default
    sample: Sample,
    layer: int = -1,
    head: Positions | None = None,
    *,
    queries: Selector | None = None,
    image: int = 0,
    show: Show = "probability",
    vmax: float | None = None,
    page: int = 0,
    path: FigurePath = None,
    **options: Unpack[AxesOptions],
) -> Figure:
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
        page: A figure has at most 48 rows; the others are on the next pages. Each page has its own
            colour scale.
        path: Where to save the figure.
        **options: ``cmap``, ``width``, ``scale`` and ``ax``; see ``AxesOptions``.

    Raises:
        InputError: A wrong argument, or a page that does not exist.
    """
    check_options(**options)
    check_show(show)
    placed = placed_image(sample, image)
    groups = query_groups(sample, placed, queries)
    positions = [position for group in groups for position in group]
    n_pages = -(-len(positions) // _MOST_ROWS)
    if whole_number(page, "page", 0) >= n_pages:
        raise InputError(f"page must be between 0 and {n_pages - 1}; got {page}.")
    part = positions[page * _MOST_ROWS : (page + 1) * _MOST_ROWS]
    values = _rows_on_image(sample, placed, part, layer, head, show)
    call = sample.call(layer, tower=placed.tower, kind=placed.kind, call=placed.call)
    rows = labels_of(sample.tokens).take(np.array(part))
    scale = scale_of(show, [values], vmax=vmax, power=0.5).colored(options.get("cmap"))
    ax, width = options.get("ax"), options.get("width")
    if ax is not None:
        figure, wide, tall = placed_on(ax)
        _draw_block(ax, values, rows, placed, scale, (wide, tall))
        scale.bar(figure, [ax], tall)
        return figure
    size = _block_size(values, room(width, 9.0, NAMES + BAR) if width else None)
    title = f"{about(sample)}\n{layer_name(call)}, {heads_name(call, head)}"
    shown = f"{page * _MOST_ROWS + 1} to {page * _MOST_ROWS + len(part)}"
    note = (
        f"Page {page}: tokens {shown} of {len(positions)}; {n_pages} pages, by page=0 to "
        f"{n_pages - 1}."
    )
    picture = new_picture(
        (NAMES + size[0] + BAR, size[1] + 0.5), title, note if n_pages > 1 else "", width=width
    )
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
    pool: Pool = "mean",
    title: str = "Attention side by side",
    path: FigurePath = None,
    **options: Unpack[FigureOptions],
) -> Picture:
    """Draw attention matrices side by side, with masked cells in grey.

    Args:
        sources: Matrices by panel title: a sample (its last language layer), a call of any tower
            (from ``xmodal_interp.record`` on any model), or a ``MatrixSelection`` that chooses
            tower, layer, head and names.
        shared: Use one colour scale for all panels instead of one per panel; the same as
            ``scale="figure"``.
        show: ``"probability"`` on a log scale, or ``"lift"``, probability divided by uniform
            attention.
        pool: As for ``attention_matrix``.
        title: Title of the figure.
        path: Where to save the figure.
        **options: ``cmap``, ``width`` and ``scale``; see ``FigureOptions``.
    """
    check_options(**options)
    check_show(show, ("probability", "lift"))
    one_of(pool, "pool", get_args(Pool))
    shared = options.get("scale", "figure" if shared else "panel") == "figure"
    selections = list(selections_of(sources).values())
    columns = PANELS_IN_A_ROW[options.get("width")]
    n_rows = -(-len(selections) // columns)
    n_cols = -(-len(selections) // n_rows)
    bars = BAR * (1 if shared else n_cols)
    side = room(options.get("width"), (NAMES + _SMALL_SIDE) * n_cols, bars) / n_cols - NAMES
    side = float(np.clip(side, 0.6, _SMALL_SIDE))
    matrices = [matrix_of(selection, side, show, pool) for selection in selections]
    values = [m.values for m in matrices]
    scales = [
        scale_of(show, values if shared else [panel], power=0.0).colored(options.get("cmap"))
        for panel in values
    ]
    if shared:
        scales = scales[:1] * len(values)
    note = "One colour scale for all panels." if shared else "Each panel has its own colour scale."
    note += "" if all(m.all_visible for m in matrices) else " Grey: hidden by the mask."
    drawn = [each for m in matrices for each in (m.rows, m.columns)]
    note += pooling_note(drawn, pool) + widening_note(drawn, side)
    titles = []
    for name, matrix, selection in zip(sources, matrices, selections, strict=True):
        what = f"{layer_name(matrix.call)}, {heads_name(matrix.call, selection.head)}"
        titles.append(wrapped(f"{name}\n{what}", side + NAMES / 2, NORMAL, 2))
    lines = max(text.count("\n") + 1 for text in titles)
    size = ((NAMES + side) * n_cols + bars, (0.16 * lines + 0.1 + side + NAMES) * n_rows)
    picture = new_picture(size, title, note, width=options.get("width"))
    grid = picture.subplots(n_rows, n_cols, squeeze=False)
    panels = list(grid.flat)
    for axes in panels[len(matrices) :]:
        axes.remove()
    panels = panels[: len(matrices)]
    for text, matrix, axes, scale in zip(titles, matrices, panels, scales, strict=True):
        draw_matrix(axes, matrix.values, matrix.rows, matrix.columns, scale, (side, side))
        axes.set(xlabel="key", ylabel="query", title=text)
        if not shared:
            scale.bar(picture, [axes], side)
    if shared:
        scales[0].bar(picture, panels, side)
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
        axes.axvline(start, color="white", linewidth=0.8 if len(starts) <= 16 else 0.3)
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


def _block_size(block: np.ndarray, width: float | None = None) -> tuple[float, float]:
    """Return width and height in inches for text tokens (rows) against image tokens."""
    n_rows, n_tokens = block.shape
    wide = float(np.clip(0.04 * n_tokens, 4.5, 9.0)) if width is None else width
    return wide, float(np.clip(_PITCH * n_rows, 1.7, 10.0))


def _block_mass(matrix: Matrix) -> Callable[[Run, Run], str]:
    """Return a function that formats the mean share of attention of a block."""
    runs = [
        {run.start: i for i, run in enumerate(labels.runs())}
        for labels in (matrix.rows, matrix.columns)
    ]

    def text(row: Run, column: Run) -> str:
        mass = matrix.mass[runs[0][row.start], runs[1][column.start]]
        if np.isnan(mass):
            return "hidden"
        return f"{row.group} \u2192 {column.group}: {mass:.0%} of attention"

    return text
