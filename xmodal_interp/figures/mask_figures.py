"""Attention masks that layers used, read from their recorded calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Unpack

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, Normalize

from xmodal_interp.arguments import checked
from xmodal_interp.attention import AttentionCall
from xmodal_interp.figures.matrix_axes import (
    NAMES,
    PANELS_IN_A_ROW,
    AxisLabels,
    draw_matrix,
    widening_note,
)
from xmodal_interp.figures.matrix_selection import (
    MatrixSelection,
    axis_labels,
    pooled_mask,
    selections_of,
    visible_cells,
)
from xmodal_interp.figures.scales import ColorScale
from xmodal_interp.figures.style import (
    HIDDEN,
    NORMAL,
    SMALL,
    CmapLike,
    FigureOptions,
    FigurePath,
    Picture,
    about,
    check_options,
    group_color,
    layer_name,
    new_picture,
    room,
    saved,
    styled,
    wrapped,
)
from xmodal_interp.sample import Sample
from xmodal_interp.vocabulary import AttentionKind, Tower

_VISIBLE = "#6699cc"
_COLORS = LinearSegmentedColormap.from_list("mask", [HIDDEN, _VISIBLE])
_SIDE, _SMALL_SIDE = 4.6, 3.0  # inches


@checked
@styled
def mask_structure(
    sample: Sample,
    layer: int = 0,
    head: int | None = None,
    *,
    tower: Tower | None = None,
    kind: AttentionKind = "self",
    call: int = 0,
    path: FigurePath = None,
    **options: Unpack[FigureOptions],
) -> Picture:
    """Draw the mask of a layer, and the visible share of each block of token groups.

    Both panels are computed from the mask that was passed to the call, not from the model's type.

    Args:
        sample: The sample.
        layer: Layer index; negative ones count from the last.
        head: Head index; required if the heads have different masks.
        tower: ``"vision"``, ``"connector"`` or ``"language"``; ``Sample.tower`` if not given.
        kind: ``"self"``, ``"cross"`` or ``"channel"``.
        call: Index of the layer's call; in the vision tower, of the image.
        path: Where to save the figure.
        **options: ``cmap``, ``width`` and ``scale``; see ``FigureOptions``. All panels show the
            visible share from 0 to 1.
    """
    check_options(**options)
    selection = MatrixSelection(sample, layer, head, tower=tower, kind=kind, call=call)
    shares = visible_shares(selection)
    width = options.get("width")
    below = width == "column"  # the table is below the mask
    cells = (0.8, 0.5) if width is None else (0.5, 0.4)
    table = (max(cells[0] * shares.shape[1], 1.0), cells[1] * shares.shape[0])
    if below:
        side = room(width, _SIDE, NAMES)
    else:
        side = max(min(room(width, _SIDE + table[0], 2 * NAMES) - table[0], _SIDE), 0.6)
    title = f"{about(sample)}\nAttention mask of {layer_name(selection.found())}"
    cells_drawn, *labels = pooled_mask(selection, side)
    high = max(side + NAMES, table[1] + NAMES + 0.4)
    high = side + table[1] + 2 * NAMES + 0.4 if below else high
    size = (2 * NAMES + side + table[0], high)
    picture = new_picture(size, title, _note(labels, side), width=width)
    if below:
        grid = picture.add_gridspec(2, 1, height_ratios=(side, table[1]))
    else:
        ratios = (table[1], max(side - table[1], 0.1))
        grid = picture.add_gridspec(2, 2, width_ratios=(side, table[0]), height_ratios=ratios)
    scale = _scale(options.get("cmap"))
    mask_axes = picture.add_subplot(grid[0] if below else grid[:, 0])
    _draw_mask(mask_axes, cells_drawn, labels, scale, side)
    _draw_shares(picture.add_subplot(grid[1] if below else grid[0, 1]), shares, scale)
    return saved(picture, path)


@checked
@styled
def mask_comparison(
    sources: Mapping[str, Sample | AttentionCall | MatrixSelection],
    layer: int = 0,
    *,
    path: FigurePath = None,
    **options: Unpack[FigureOptions],
) -> Picture:
    """Draw the masks of several models or layers side by side, with the visible shares below.

    Args:
        sources: Masks by panel title: a sample, a call of any tower (from ``xmodal_interp.record``
            on any model), or a ``MatrixSelection`` of either.
        layer: For samples: layer of the language tower.
        path: Where to save the figure.
        **options: ``cmap``, ``width`` and ``scale``; see ``FigureOptions``.
    """
    check_options(**options)
    selections = selections_of(sources, layer)
    width = options.get("width")
    columns = PANELS_IN_A_ROW[width]
    n_rows = -(-len(selections) // columns)
    n_cols = -(-len(selections) // n_rows)
    side = room(width, (NAMES + _SMALL_SIDE) * n_cols) / n_cols - NAMES
    titles = [f"{name}\n{layer_name(each.found())}" for name, each in selections.items()]
    titles = [wrapped(title, side + 0.2, NORMAL, 3) for title in titles]
    below = [wrapped(measured(each), side + 0.5, SMALL) for each in selections.values()]
    lines = max(text.count("\n") + 1 for text in titles) + max(
        text.count("\n") + 1 for text in below
    )
    masks = [pooled_mask(each, side) for each in selections.values()]
    note = _note([label for _, *labels in masks for label in labels], side)
    size = ((NAMES + side) * n_cols, (0.16 * lines + side + NAMES + 0.2) * n_rows)
    picture = new_picture(size, "Attention masks", note, width=width)
    panels = picture.subplots(n_rows, n_cols, squeeze=False).ravel()
    for axes in panels[len(masks) :]:
        axes.remove()
    for axes, title, text, (cells, *labels) in zip(panels, titles, below, masks, strict=False):
        n_lines = text.count("\n") + 2
        _draw_mask(axes, cells, labels, _scale(options.get("cmap")), side, n_lines)
        axes.set_title(title)
        axes.set_xlabel(f"key\n{text}")
    return saved(picture, path)


def _scale(cmap: CmapLike) -> ColorScale:
    """Return the scale of the visible share of a cell."""
    return ColorScale(Normalize(0, 1), _COLORS, "visible").colored(cmap)


def visible_shares(selection: MatrixSelection) -> pd.DataFrame:
    """Return the visible share of every block: query groups in rows, key groups in columns."""
    seen = visible_cells(selection)
    rows, columns = axis_labels(selection)
    in_row, in_column = _members(rows), _members(columns)
    return pd.DataFrame(
        [[seen[np.ix_(r, c)].mean() for c in in_column.values()] for r in in_row.values()],
        index=list(in_row),
        columns=list(in_column),
    )


def measured(selection: MatrixSelection) -> str:
    """Return a line with the visible share of all cells, and of later keys in each token group."""
    seen = visible_cells(selection)
    call = selection.found()
    lines = [f"visible: {seen.mean():.1%} of all cells"]
    if call.kind == "self":
        rows, columns = axis_labels(selection)
        keys = _members(columns)
        later = np.arange(seen.shape[1])[None] > call.query_positions.cpu().numpy()[:, None]
        found = []
        for group, members in _members(rows).items():
            if group in keys:
                block = np.ix_(members, keys[group])
                if later[block].any():
                    found.append(f"{group}: {seen[block][later[block]].mean():.0%}")
        lines.append(f"visible keys after the query: {', '.join(found) or 'none exist'}")
    return "\n".join(lines)


def _members(labels: AxisLabels) -> dict[str, np.ndarray]:
    groups = np.array(labels.groups)
    return {group: np.flatnonzero(groups == group) for group in dict.fromkeys(labels.groups)}


def _draw_mask(
    axes: Axes,
    cells: np.ndarray,
    labels: Sequence[AxisLabels],
    scale: ColorScale,
    side: float,
    n_lines: int = 1,
) -> None:
    rows, columns = labels
    draw_matrix(axes, cells, rows, columns, scale, (side, side), n_lines)
    axes.set(xlabel="key", ylabel="query")


def _draw_shares(axes: Axes, shares: pd.DataFrame, scale: ColorScale) -> None:
    axes.imshow(shares, cmap=scale.cmap, norm=scale.norm, aspect="auto")
    for (r, c), share in np.ndenumerate(shares.to_numpy(dtype=float)):
        text = f"{share:.0%}" if share in (0.0, 1.0) else f"{share:.1%}"
        axes.text(c, r, text, ha="center", va="center", size=SMALL)
    names = [str(name) for name in shares.columns]
    axes.set_xticks(range(len(names)), names, rotation=90)
    axes.set_yticks(range(shares.shape[0]), [str(name) for name in shares.index])
    axes.tick_params(length=0)
    axes.set(xlabel="key", ylabel="query", title="visible share\nof each block")
    for axis, groups in ((axes.xaxis, shares.columns), (axes.yaxis, shares.index)):
        for label, name in zip(axis.get_ticklabels(), groups, strict=True):
            label.set_color(group_color(str(name)))


def _note(labels: Sequence[AxisLabels], side: float) -> str:
    most = max((size for each in labels for size in each.sizes), default=1)
    pooled = f" A cell is the visible share of up to {most} adjacent tokens per side."
    shades = "Blue: visible. Grey: hidden."
    return shades + (pooled if most > 1 else "") + widening_note(labels, side)
