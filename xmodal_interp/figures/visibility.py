"""Attention masks that layers used, read from their recorded calls."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.patches import Patch

from xmodal_interp.arguments import checked
from xmodal_interp.attention import AttentionCall
from xmodal_interp.figures.layout import Sheet, sheet
from xmodal_interp.figures.matrix_axes import NAMES, Labels, draw_matrix, widened
from xmodal_interp.figures.matrix_sources import View, axis_labels, views_of, visible_cells
from xmodal_interp.figures.scales import Scale
from xmodal_interp.figures.style import (
    HIDDEN,
    SMALL,
    FigurePath,
    Picture,
    about,
    group_color,
    layer_name,
    saved,
    styled,
    wrapped,
)
from xmodal_interp.sample import Sample
from xmodal_interp.vocabulary import AttentionKind, Tower

_VISIBLE = "#6699cc"
_MASK = Scale(Normalize(0, 1), ListedColormap([HIDDEN, _VISIBLE]), "visible")
_SIDE, _SMALL_SIDE = 4.6, 3.0  # inches


@checked
@styled
def mask_structure(
    sample: Sample,
    layer: int = 0,
    head: int | None = None,
    *,
    tower: Tower = "language",
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
        tower: ``"vision"``, ``"connector"`` or ``"language"``.
        kind: ``"self"``, ``"cross"`` or ``"channel"``.
        call: Index of the layer's call; in the vision tower, of the image.
        path: Where to save the figure.
    """
    view = View(sample, layer, head, tower=tower, kind=kind, call=call)
    shares = visible_shares(view)
    table = (0.8 * shares.shape[1], 0.5 * shares.shape[0])
    left = NAMES + _SIDE + 1.2
    title = f"{about(sample)}\nAttention mask of {layer_name(view.found())}"
    page = sheet(left + table[0] + 0.35, _SIDE + NAMES, title, _note([view], _SIDE))
    _draw(page, view, NAMES, 0.05, _SIDE)
    axes = page.axes(left, 0.35, *table)
    _draw_shares(axes, shares)
    axes.set_title("visible share of each block")
    axes.legend(
        handles=[Patch(color=_VISIBLE, label="visible"), Patch(color=HIDDEN, label="hidden")],
        loc="upper left",
        bbox_to_anchor=(0, -0.75 / table[1]),
        ncols=2,
        borderaxespad=0,
    )
    return saved(page.picture, path)


@checked
@styled
def mask_comparison(
    sources: Mapping[str, Sample | AttentionCall | View], layer: int = 0, *, path: FigurePath = None
) -> Picture:
    """Draw the masks of several models or layers side by side, with visible shares below each.

    Args:
        sources: Masks by panel title: a sample, a call of any tower (from ``xmodal_interp.record``
            on any model), or a ``View`` of either.
        layer: For samples: layer of the language tower.
        path: Where to save the figure.
    """
    views = views_of(sources, layer)
    step = NAMES + _SMALL_SIDE + 0.15
    titles = [
        wrapped(f"{name}\n{layer_name(view.found())}", _SMALL_SIDE + 0.2)
        for name, view in views.items()
    ]
    top = 0.1 + 0.2 * max(title.count("\n") + 1 for title in titles)
    body = top + _SMALL_SIDE + NAMES + 0.55
    note = _note(list(views.values()), _SMALL_SIDE)
    page = sheet(step * len(views) + 0.15, body, "Attention masks", note)
    for i, (title, view) in enumerate(zip(titles, views.values(), strict=True)):
        axes = _draw(page, view, step * i + NAMES, top, _SMALL_SIDE)
        axes.set_title(title)
        words = wrapped(measured(view), _SMALL_SIDE + 0.2, SMALL)
        page.text(step * i + NAMES, top + 0.2 + _SMALL_SIDE + NAMES, words, "left", SMALL)
    return saved(page.picture, path)


def visible_shares(view: View) -> pd.DataFrame:
    """Return the visible share of every block: query groups in rows, key groups in columns."""
    seen = visible_cells(view)
    rows, columns = axis_labels(view)
    in_row, in_column = _members(rows), _members(columns)
    return pd.DataFrame(
        [[seen[np.ix_(r, c)].mean() for c in in_column.values()] for r in in_row.values()],
        index=list(in_row),
        columns=list(in_column),
    )


def measured(view: View) -> str:
    """Return text: the visible share of all cells, and of later keys within each token group."""
    seen = visible_cells(view)
    call = view.found()
    lines = [f"visible: {seen.mean():.1%} of all cells"]
    if call.kind == "self":
        rows, columns = axis_labels(view)
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


def _members(labels: Labels) -> dict[str, np.ndarray]:
    groups = np.array(labels.groups)
    return {group: np.flatnonzero(groups == group) for group in dict.fromkeys(labels.groups)}


def _draw(page: Sheet, view: View, left: float, top: float, side: float) -> Axes:
    axes = page.axes(left, top, side, side)
    rows, columns = axis_labels(view)
    draw_matrix(axes, visible_cells(view).astype(float), rows, columns, _MASK, (side, side))
    axes.set(xlabel="key", ylabel="query")
    return axes


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
    axes.set(xlabel="key", ylabel="query")
    for axis, names in ((axes.xaxis, shares.columns), (axes.yaxis, shares.index)):
        for label, name in zip(axis.get_ticklabels(), names, strict=True):
            label.set_color(group_color(str(name)))


def _note(views: list[View], side: float) -> str:
    times = max(widened(labels, side) for view in views for labels in axis_labels(view))
    grey = "Blue: visible. Grey: hidden."
    return (
        f"{grey} Tokens with a name are drawn up to {times} times as wide as the others."
        if times > 1
        else grey
    )
