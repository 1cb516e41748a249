"""Overlays: attention of text tokens to image tokens, drawn on the image.

``overlay_grid`` draws one panel per query, layer or head, or per pair of them; the functions after
it are its common cases. ``before_after`` compares two samples. All panels of attention share one
colour scale and one colour bar. A cell is one image token, drawn over the pixels that it covers.
Parts of the image that no token covers are dimmed and hatched.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, SupportsIndex, Unpack, get_args

import numpy as np

from xmodal_interp.arguments import checked
from xmodal_interp.attention import Positions, entries_of, numbers, resolve
from xmodal_interp.errors import GeometryError, InputError, quoted
from xmodal_interp.figures.overlay_panels import (
    AttentionOptions,
    OverlayOptions,
    Panel,
    in_rows,
    panel_figure,
    with_scale,
)
from xmodal_interp.figures.overlay_values import (
    ImageAttention,
    attention_on_image,
    query_groups,
    query_positions,
)
from xmodal_interp.figures.placement import PlacedImage, placed_image
from xmodal_interp.figures.scales import SHOW_LABELS, color_scale
from xmodal_interp.figures.style import (
    FigurePath,
    Picture,
    about,
    heads_name,
    layer_name,
    named,
    panel_name,
    readable,
    saved,
    styled,
)
from xmodal_interp.sample import Sample, Selector

Queries = Selector | Sequence[str | int]
"""A phrase, positions, or a sequence of both."""

Facet = Literal["query", "layer", "head"]


class GridOptions(AttentionOptions, total=False):
    """Keyword arguments of every figure that ``overlay_grid`` draws; see there."""

    image: int
    path: FigurePath


@checked
@styled
def overlay_grid(
    sample: Sample,
    queries: Queries | None = None,
    layers: Sequence[int] | None = (-1,),
    heads: Positions | None = None,
    *,
    rows: Facet | None = None,
    columns: Facet | None = "query",
    image: int = 0,
    path: FigurePath = None,
    **options: Unpack[AttentionOptions],
) -> Picture:
    """Draw attention on the image, with one panel per query, layer or head.

    Args:
        sample: The sample.
        queries: A phrase or positions of the prompt or the answer. With the facet ``"query"``, they
            are drawn with one panel per token; a list of phrases and positions with one panel per
            entry, where a phrase is the mean of its tokens; and all text after the image, generated
            tokens included, if not given. Without it, their attention is averaged.
        layers: Layers, such as ``[-2, -1]``; all recorded layers if None. Without the facet
            ``"layer"``, one layer.
        heads: A head or several; all if not given. With the facet ``"head"``, the last panel is
            their mean; without it, they are averaged.
        rows: Facet of the rows: ``"query"``, ``"layer"`` or ``"head"``. If not given, the first
            panel is the image itself and the panels are wrapped.
        columns: Facet of the columns; None for a single panel per row.
        image: Index of the image.
        path: Where to save the figure.
        **options: Drawing options; see ``OverlayOptions``.
    """
    facets = {rows, columns}
    if facets - {None, *get_args(Facet)} or (rows is not None and rows == columns):
        raise InputError(
            f"rows and columns must be two of {', '.join(get_args(Facet))}, or None; got "
            f"{quoted(rows)} and {quoted(columns)}."
        )
    drawing, placed = OverlayOptions(**options), placed_image(sample, image)
    layer_numbers = (
        _layer_numbers(sample, placed, layers) if "layer" in facets else list(layers or ())
    )
    if "layer" not in facets and len(layer_numbers) != 1:
        raise InputError(f"Without the facet 'layer', layers must be one layer; got {layers}.")
    if "query" in facets:
        groups = query_groups(sample, placed, queries)
    else:
        layer = layer_numbers[0] if facets == {None} else None
        groups = [query_positions(sample, placed, queries, layer)]  # type: ignore[arg-type]
    positions = [position for group in groups for position in group]
    read = [attention_on_image(sample, placed, positions, layer, heads) for layer in layer_numbers]
    left_out = [drawing.left_out(placed, one.call, heads) for one in read]
    stops = np.cumsum([len(group) for group in groups]).tolist()
    single = "" if "query" in facets else named(sample, positions)
    # what the rows or columns of each facet select, by title
    entries: dict[Facet | None, list[tuple[str, dict[str, Any]]]] = {
        None: [(single if facets == {None} else "", {})],
        "query": [
            (panel_name(sample, group), {"queries": range(stop - len(group), stop)})
            for group, stop in zip(groups, stops, strict=True)
        ],
        "layer": [(f"layer {one.call.layer}", {"layer": i}) for i, one in enumerate(read)],
        "head": _head_entries(read[0]),
    }

    def panel(title: str, layer: int = 0, **part: Any) -> Panel:
        return _attention_panel(title, read[layer], drawing, left_out[layer], **part)

    panels = [
        panel("" if r else title, **row, **column)
        for r, (_, row) in enumerate(entries[rows])
        for title, column in entries[columns]
    ]
    panels = with_scale(
        panels, drawing.scale([each.values for each in panels if each.values is not None])
    )
    n_cols, row_titles = len(entries[columns]), [title for title, _ in entries[rows]]
    shown: list[Sequence[Panel]]
    if rows is None:
        shown, row_titles = in_rows([Panel(placed.name), *panels]), []
    else:
        shown = [panels[i : i + n_cols] for i in range(0, len(panels), n_cols)]
    where = [
        *([single] if single and facets != {None} else []),
        "layer by layer" if "layer" in facets else layer_name(read[0].call),
        "head by head" if "head" in facets else heads_name(read[0].call, heads),
    ]
    title = f"{about(sample)}\n{', '.join(where)}"
    return saved(panel_figure(placed, shown, drawing, title, row_titles), path)


@checked
def overlay(
    sample: Sample,
    queries: Selector,
    layer: int = -1,
    head: Positions | None = None,
    **options: Unpack[GridOptions],
) -> Picture:
    """Draw a phrase's attention on the image: the mean of its tokens, in one layer.

    Args:
        sample: The sample.
        queries: A phrase of the prompt or the answer, or positions.
        layer: Layer index; negative ones count from the last.
        head: A head, or several to average; all heads are averaged if not given.
        **options: ``image``, ``path`` and drawing options; see ``overlay_grid``.
    """
    return overlay_grid(sample, queries, [layer], head, columns=None, **options)


@checked
def overlays(
    sample: Sample,
    queries: Queries | None = None,
    layer: int = -1,
    head: Positions | None = None,
    **options: Unpack[GridOptions],
) -> Picture:
    """Draw the attention of each text token on the image, with one panel per token.

    Args:
        sample: The sample.
        queries: A phrase or positions, drawn with one panel per token; or a list of phrases and
            positions, drawn with one panel per entry, where a phrase is the mean of its tokens. If
            not given, all text after the image, generated tokens included.
        layer: Layer index; negative ones count from the last.
        head: A head, or several to average; all heads are averaged if not given.
        **options: ``image``, ``path`` and drawing options; see ``overlay_grid``.
    """
    return overlay_grid(sample, queries, [layer], head, **options)


@checked
def head_overlays(
    sample: Sample,
    queries: Selector,
    layer: int = -1,
    heads: Positions | None = None,
    **options: Unpack[GridOptions],
) -> Picture:
    """Draw a phrase's attention on the image for each head of a layer, and for their mean.

    Args:
        sample: The sample.
        queries: A phrase or positions; their attention is averaged.
        layer: Layer index; negative ones count from the last.
        heads: Heads; all if not given.
        **options: ``image``, ``path`` and drawing options; see ``overlay_grid``.
    """
    return overlay_grid(sample, queries, [layer], heads, columns="head", **options)


@checked
def layer_overlays(
    sample: Sample,
    queries: Selector,
    layers: Sequence[int] | None = None,
    head: Positions | None = None,
    **options: Unpack[GridOptions],
) -> Picture:
    """Draw a phrase's attention on the image, with one panel per layer.

    Args:
        sample: The sample.
        queries: A phrase or positions; their attention is averaged.
        layers: Layers, such as ``[-4, -3, -2, -1]``; all recorded layers if not given.
        head: A head, or several to average; all heads are averaged if not given.
        **options: ``image``, ``path`` and drawing options; see ``overlay_grid``.
    """
    return overlay_grid(sample, queries, layers, head, columns="layer", **options)


@checked
def token_head_grid(
    sample: Sample,
    queries: Queries | None = None,
    layer: int = -1,
    heads: Positions | None = None,
    **options: Unpack[GridOptions],
) -> Picture:
    """Draw the attention of each text token in each head: tokens in rows, heads in columns.

    The last column is the mean of the heads.

    Args:
        sample: The sample.
        queries: As for ``overlays``.
        layer: Layer index; negative ones count from the last.
        heads: Heads; all if not given.
        **options: ``image``, ``path`` and drawing options; see ``overlay_grid``.
    """
    return overlay_grid(sample, queries, [layer], heads, rows="query", columns="head", **options)


@checked
@styled
def before_after(
    before: Sample,
    after: Sample,
    queries: Selector,
    layer: int = -1,
    head: Positions | None = None,
    *,
    image: int = 0,
    path: FigurePath = None,
    **options: Unpack[AttentionOptions],
) -> Picture:
    """Draw a phrase's attention in two models, such as before and after training, and the change.

    Args:
        before: The first model's sample.
        after: The second model's sample, of the same image and prompt.
        queries: A phrase or positions; their attention is averaged.
        layer: Layer index; negative ones count from the last.
        head: A head, or several to average; all heads are averaged if not given.
        image: Index of the image.
        path: Where to save the figure.
        **options: Drawing options; see ``OverlayOptions``. The change of a lift is drawn as a
            ratio.

    Raises:
        GeometryError: The image tokens of the two samples differ in number or place.
    """
    drawing, placed = OverlayOptions(**options), placed_image(before, image)
    grid, grid_after = placed.grid, placed_image(after, image).grid
    if grid.places.shape != grid_after.places.shape or not np.allclose(
        grid.boxes, grid_after.boxes, equal_nan=True
    ):
        raise GeometryError(
            f"The samples differ in their image tokens: before has {grid.rows} x {grid.cols} "
            f"tokens on {grid.width} x {grid.height} px, after has {grid_after.rows} x "
            f"{grid_after.cols} on {grid_after.width} x {grid_after.height} px. Pass samples of "
            "the same image, made with the same processor settings."
        )
    panels, values = [], []
    for name, sample in (("before", before), ("after", after)):
        here = placed_image(sample, image)
        positions = query_positions(sample, here, queries)
        read = attention_on_image(sample, here, positions, layer, head)
        title = f'{name}: "{readable(sample.answer)}"' if sample.answer else name
        left_out = drawing.left_out(here, read.call, head)
        panels.append(_attention_panel(title, read, drawing, left_out))
        values.append(read.values(drawing.show, left_out=left_out))
    if drawing.show == "lift":
        with np.errstate(divide="ignore", invalid="ignore"):
            change, name = values[1] / values[0], "after / before"
        scale = color_scale("ratio", [change], f"{name}\n(log scale)")
    else:
        change, name = values[1] - values[0], "after - before"
        scale = color_scale("difference", [change], f"change of\n{SHOW_LABELS[drawing.show]}")
    row = [
        Panel(placed.name),
        *with_scale(panels, drawing.scale(values)),
        *with_scale([Panel(name, change)], scale),
    ]
    where = f"{named(before, positions)}: {layer_name(read.call)}, {heads_name(read.call, head)}"
    title = f'"{before.question}"\n{where}'
    return saved(panel_figure(placed, [row], drawing, title), path)


def _attention_panel(
    title: str,
    read: ImageAttention,
    options: OverlayOptions,
    left_out: np.ndarray | None,
    heads: Sequence[int] | None = None,
    queries: Sequence[int] | None = None,
) -> Panel:
    """Return the panel of some of the heads and queries; all if not given."""
    values = read.values(options.show, heads, queries, left_out)
    return Panel(title, values, left_out=left_out, undrawn=read.undrawn(heads, queries))


def _head_entries(read: ImageAttention) -> list[tuple[str, dict[str, Any]]]:
    """Return title and index of each chosen head, then of their mean."""
    n_heads = read.call.n_heads
    chosen = range(n_heads) if read.heads is None else resolve(read.heads, n_heads, "head").tolist()
    single: list[tuple[str, dict[str, Any]]] = [
        (f"head {head}", {"heads": [i]}) for i, head in enumerate(chosen)
    ]
    return [*single, ("mean", {})] if len(single) > 1 else single


def _layer_numbers(sample: Sample, placed: PlacedImage, layers: Sequence[int] | None) -> list[int]:
    """Return the numbers of the layers; all recorded ones if None."""
    recorded = sample.layers(kind=placed.kind)
    layer_numbers = recorded if layers is None else layers
    row = entries_of(layer_numbers)
    if row is None or isinstance(layer_numbers, SupportsIndex) or not len(row):
        raise InputError(
            f"layers must be a list of at least one layer, such as [0, -1]; got {quoted(layers)}."
        )
    return numbers(layer_numbers, "layer", max(recorded, default=-1) + 1)
