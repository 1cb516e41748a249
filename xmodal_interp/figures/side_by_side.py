"""Attention matrices of different towers and attention kinds side by side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from xmodal_interp.arguments import checked
from xmodal_interp.attention import AttentionCall
from xmodal_interp.figures.layout import BAR, sheet
from xmodal_interp.figures.matrix_axes import NAMES, draw_matrix, widened
from xmodal_interp.figures.matrix_sources import View, matrix_of, views_of
from xmodal_interp.figures.scales import check_show, scale_of
from xmodal_interp.figures.style import (
    FigurePath,
    Picture,
    heads_name,
    layer_name,
    plain,
    saved,
    styled,
)
from xmodal_interp.sample import Sample

_SIDE, _GAP = 3.2, 0.1  # inches


@checked
@styled
def side_by_side(
    sources: Mapping[str, Sample | AttentionCall | View],
    *,
    shared: bool = False,
    show: Literal["probability", "lift"] = "probability",
    title: str = "Attention side by side",
    path: FigurePath = None,
) -> Picture:
    """Draw attention matrices side by side, with masked cells in grey.

    Args:
        sources: Matrices by panel title: a sample (its last language layer), a call of any tower
            (from ``xmodal_interp.record`` on any model), or a ``View`` that chooses tower, layer,
            head and names.
        shared: Use one colour scale for all panels instead of one per panel.
        show: ``"probability"`` on a log scale, or ``"lift"``, probability divided by uniform
            attention.
        title: Title of the figure.
        path: Where to save the figure.
    """
    check_show(show, ("probability", "lift"))
    views = list(views_of(sources).values())
    matrices = [matrix_of(view) for view in views]
    values = [m.probs if show == "probability" else m.lift for m in matrices]
    scales = (
        [scale_of(show, values, power=0.0)] * len(views)
        if shared
        else [scale_of(show, [panel], power=0.0) for panel in values]
    )
    step = NAMES + _SIDE + _GAP + (0.0 if shared else BAR)
    times = max(widened(labels, _SIDE) for m in matrices for labels in (m.rows, m.columns))
    note = "One colour scale for all panels." if shared else "Each panel has its own colour scale."
    note += " Grey: hidden by the mask." if any(not m.visible.all() for m in matrices) else ""
    if times > 1:
        note += f" Tokens with a name are drawn up to {times} times as wide as the others."
    page = sheet(step * len(views) + (BAR if shared else 0.0), 0.45 + _SIDE + NAMES, title, note)
    for i, (name, view, matrix) in enumerate(zip(sources, views, matrices, strict=True)):
        axes = page.axes(step * i + NAMES, 0.45, _SIDE, _SIDE)
        draw_matrix(axes, values[i], matrix.rows, matrix.columns, scales[i], (_SIDE, _SIDE))
        axes.set(xlabel="key", ylabel="query")
        what = f"{layer_name(matrix.call)}, {heads_name(matrix.call, view.head)}"
        axes.set_title(f"{plain(name)}\n{what}")
        if not shared or i == len(views) - 1:
            page.bar(scales[i], step * i + NAMES + _SIDE + 0.12, 0.45, 2.6)
    return saved(page.picture, path)
