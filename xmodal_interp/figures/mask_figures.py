"""Attention masks that layers used, read from their recorded calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, Normalize

from xmodal_interp.arguments import checked
from xmodal_interp.attention import AttentionCall
from xmodal_interp.figures.matrix_axes import NAMES, AxisLabels, draw_matrix, widening_note
from xmodal_interp.figures.matrix_selection import (
    MatrixSelection,
    axis_labels,
    selections_of,
    visible_cells,
)
from xmodal_interp.figures.scales import ColorScale
from xmodal_interp.figures.style import (
    HIDDEN,
    SMALL,
    FigurePath,
    Picture,
    about,
    group_color,
    layer_name,
    new_picture,
    saved,
    styled,
    wrapped,
)
from xmodal_interp.sample import Sample
from xmodal_interp.vocabulary import AttentionKind, Tower

_VISIBLE = "#6699cc"
_MASK = ColorScale(Normalize(0, 1), ListedColormap([HIDDEN, _VISIBLE]), "visible")
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
    """
    selection = MatrixSelection(sample, layer, head, tower=tower, kind=kind, call=call)
    shares = visible_shares(selection)
    table = (max(0.8 * shares.shape[1], 1.4), 0.5 * shares.shape[0])
    title = f"{about(sample)}\nAttention mask of {layer_name(selection.found())}"
    width = 2 * NAMES + _SIDE + table[0]
    picture = new_picture((width, _SIDE + NAMES), title, _note([selection], _SIDE))
    grid = picture.add_gridspec(
        2, 2, width_ratios=(_SIDE, table[0]), height_ratios=(table[1], max(_SIDE - table[1], 0.1))
    )
    _draw_mask(picture.add_subplot(grid[:, 0]), selection, _SIDE)
    _draw_shares(picture.add_subplot(grid[0, 1]), shares)
    return saved(picture, path)


@checked
@styled
def mask_comparison(
    sources: Mapping[str, Sample | AttentionCall | MatrixSelection],
    layer: int = 0,
    *,
    path: FigurePath = None,
) -> Picture:
    """Draw the masks of several models or layers side by side, with the visible shares below.

    Args:
        sources: Masks by panel title: a sample, a call of any tower (from ``xmodal_interp.record``
            on any model), or a ``MatrixSelection`` of either.
        layer: For samples: layer of the language tower.
        path: Where to save the figure.
    """
    selections = selections_of(sources, layer)
    titles = [f"{name}\n{layer_name(each.found())}" for name, each in selections.items()]
    titles = [wrapped(title, _SMALL_SIDE + 0.2) for title in titles]
    body = 0.2 * max(title.count("\n") + 1 for title in titles) + _SMALL_SIDE + NAMES + 0.6
    note = _note(list(selections.values()), _SMALL_SIDE)
    width = (NAMES + _SMALL_SIDE) * len(selections)
    picture = new_picture((width, body), "Attention masks", note)
    panels = picture.subplots(1, len(selections), squeeze=False)[0]
    for axes, title, selection in zip(panels, titles, selections.values(), strict=True):
        _draw_mask(axes, selection, _SMALL_SIDE)
        axes.set_title(title)
        axes.set_xlabel(f"key\n{wrapped(measured(selection), _SMALL_SIDE + 0.2, SMALL)}")
    return saved(picture, path)


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


def _draw_mask(axes: Axes, selection: MatrixSelection, side: float) -> None:
    rows, columns = axis_labels(selection)
    cells = visible_cells(selection).astype(float)
    draw_matrix(axes, cells, rows, columns, _MASK, (side, side))
    axes.set(xlabel="key", ylabel="query")


def _draw_shares(axes: Axes, shares: pd.DataFrame) -> None:
    axes.imshow(shares, cmap=ListedColormap([HIDDEN]), aspect="auto")
    axes.imshow(
        np.ones(shares.shape),
        cmap=ListedColormap([_VISIBLE]),
        alpha=shares.to_numpy(),
        aspect="auto",
    )
    for (r, c), share in np.ndenumerate(shares.to_numpy(dtype=float)):
        text = f"{share:.0%}" if share in (0.0, 1.0) else f"{share:.1%}"
        axes.text(c, r, text, ha="center", va="center", size=SMALL)
    axes.set_xticks(range(shares.shape[1]), [str(name) for name in shares.columns], rotation=30)
    axes.set_yticks(range(shares.shape[0]), [str(name) for name in shares.index])
    axes.tick_params(length=0)
    axes.set(xlabel="key", ylabel="query", title="visible share\nof each block")
    for axis, names in ((axes.xaxis, shares.columns), (axes.yaxis, shares.index)):
        for label, name in zip(axis.get_ticklabels(), names, strict=True):
            label.set_color(group_color(str(name)))


def _note(selections: Sequence[MatrixSelection], side: float) -> str:
    labels = [each for selection in selections for each in axis_labels(selection)]
    return "Blue: visible. Grey: hidden." + widening_note(labels, side)
