"""Overlays: attention of text tokens to image tokens, or within the vision tower, on the image.

``overlay_grid`` draws one panel per query, layer, head or sample, or per pair of them; the
functions after it are its common cases. ``before_after`` compares two samples. All panels of
attention share one colour scale and one colour bar. A cell is one image token, drawn over the
pixels that it covers. Parts of the image that no token covers are dimmed and hatched.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, SupportsIndex, Unpack, get_args

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from xmodal_interp.arguments import checked, whole_number
from xmodal_interp.at import Selector
from xmodal_interp.attention import Positions, entries_of, numbers, resolve
from xmodal_interp.errors import GeometryError, InputError, quoted
from xmodal_interp.figures.overlay_panels import (
    AttentionOptions,
    OverlayOptions,
    Panel,
    in_rows,
    panel_figure,
    panel_on,
)
from xmodal_interp.figures.overlay_values import (
    ImageAttention,
    attention_on_image,
    query_groups,
    query_name,
    query_positions,
)
from xmodal_interp.figures.placement import PlacedImage, View, placed_image
from xmodal_interp.figures.scales import SHOW_LABELS, color_scale
from xmodal_interp.figures.style import (
    FigurePath,
    Picture,
    about,
    check_options,
    heads_name,
    layer_name,
    readable,
    saved,
    styled,
)
from xmodal_interp.sample import Sample
from xmodal_interp.vocabulary import Tower

Facet = Literal["query", "layer", "head", "sample"]

_MOST_WRAPPED, _MOST_ROWS, _MOST_COLUMNS = 60, 12, 17  # panels on a page

_MANY: Mapping[Facet, str] = {
    "query": "queries",
    "layer": "layers",
    "head": "heads",
    "sample": "samples",
}
_ARGUMENT: Mapping[Facet, str] = {"query": "queries", "layer": "layers", "head": "heads"}


class GridOptions(AttentionOptions, total=False):
    """Keyword arguments of every figure that ``overlay_grid`` draws; see there."""

    tower: Tower | None
    image: int
    view: View
    page: int
    ax: Axes | None
    path: FigurePath


@checked
@styled
def overlay_grid(  # noqa: PLR0913  every option has a default
    sample: Sample | Mapping[str, Sample],
    queries: Selector | None = None,
    layers: SupportsIndex | Sequence[int] | None = (-1,),
    heads: Positions | None = None,
    *,
    rows: Facet | None = None,
    columns: Facet | None = "query",
    tower: Tower | None = None,
    image: int = 0,
    view: View = "image",
    page: int = 0,
    ax: Axes | None = None,
    path: FigurePath = None,
    **options: Unpack[AttentionOptions],
) -> Figure:
    """Draw attention on the image, with one panel per query, layer, head or sample.

    Args:
        sample: The sample. With the facet ``"sample"``, several samples by title, such as
            ``{"before": one, "after": other}``; they may have different images.
        queries: A selector, see :mod:`xmodal_interp.at`. With the facet ``"query"``, its positions
            are drawn with one panel per token; those of a list with one panel per entry, which is
            the mean of the entry's positions; and all text after the image, generated
            tokens included, if not given. Without it, their attention is averaged. In the vision
            tower, positions of that tower or names such as ``"class"``; the class token if not
            given.
        layers: Layers, such as ``[-2, -1]``; all recorded layers if None. Without the facet
            ``"layer"``, one layer.
        heads: A head or several; all if not given. With the facet ``"head"``, the last panel is
            their mean; without it, they are averaged.
        rows: Facet of the rows: ``"query"``, ``"layer"``, ``"head"`` or ``"sample"``. If not given,
            the first panel is the image itself and the panels are wrapped.
        columns: Facet of the columns; None for a single panel per row. With the facet ``"sample"``,
            the image of each sample is above its column or at the left of its row.
        tower: ``"language"``, or ``"vision"`` for the attention between patches and special tokens
            of the vision tower; ``Sample.tower`` if not given.
        image: Index of the image.
        view: ``"thumbnail"`` draws the tokens of a tiled image's thumbnail instead of its tiles.
        page: A figure has at most 60 panels if they are wrapped, else 12 rows and 17 columns; the
            others are on the next pages. The note states the number of pages.
        ax: Axes to draw a single panel into.
        path: Where to save the figure.
        **options: Drawing options; see ``OverlayOptions``.

    Raises:
        InputError: A wrong argument, a page that does not exist, or ``ax`` for several panels.
    """
    drawing = OverlayOptions(**options)
    made = _grid(
        sample,
        queries,
        layers,
        heads,
        _Facets(rows, columns),
        tower,
        image,
        view,
        page,
        ax,
        drawing,
    )
    return saved(made, path) if isinstance(made, Picture) else made


@dataclass(frozen=True)
class _Facets:
    """What differs between the rows and the columns of a grid.

    Attributes:
        rows: Facet of the rows.
        columns: Facet of the columns.
        titles: Titles of the panels by query, by default the text of the queries.
        remark: A sentence for the note.
    """

    rows: Facet | None
    columns: Facet | None
    titles: Sequence[str] | None = None
    remark: str = ""


def _grid(  # noqa: PLR0913  the arguments of overlay_grid
    sample: Sample | Mapping[str, Sample],
    queries: Selector | None,
    layers: SupportsIndex | Sequence[int] | None,
    heads: Positions | None,
    by: _Facets,
    tower: Tower | None,
    image: int,
    view: View,
    page: int,
    ax: Axes | None,
    drawing: OverlayOptions,
) -> Figure:
    """Draw a grid; see ``overlay_grid``."""
    rows, columns = by.rows, by.columns
    facets = {rows, columns}
    if facets - {None, *get_args(Facet)} or (rows is not None and rows == columns):
        raise InputError(
            f"rows and columns must be two of {', '.join(get_args(Facet))}, or None; got "
            f"{quoted(rows)} and {quoted(columns)}."
        )
    check_options(ax=ax)
    samples = _by_title(sample, facets)
    choices = [
        _choice(each, placed_image(each, image, tower, view), queries, layers, heads, facets)
        for each in samples.values()
    ]
    counts = {**choices[0].counts(), None: 1, "sample": len(samples)}
    window = _window(rows, columns, counts, page)
    read = [
        _read(choice, heads, facets, drawing, window.parts.get("query", slice(None)))
        for choice in choices
    ]
    first = read[0]
    _refuse_other_entries(facets, dict(zip(samples, read, strict=True)))
    names = None if by.titles is None else by.titles[window.parts["query"]]
    # what the rows or columns of each facet select, by title
    entries: dict[Facet | None, list[tuple[str, dict[str, Any]]]] = {
        None: [(first.phrase if facets == {None} else "", {})],
        "query": [(name, {"query": i}) for i, name in enumerate(names or first.queries)],
        "layer": [(name, {"layer": i}) for i, name in enumerate(_titles(first, "layer"))],
        "head": _head_entries(first.layers[0]),
        "sample": [(title, {"number": i}) for i, title in enumerate(samples)],
    }
    for facet in {rows, columns} - {None, "query"}:  # the queries were selected before
        entries[facet] = entries[facet][window.parts.get(facet, slice(None))]

    def panel(
        title: str, number: int = 0, layer: int = 0, query: int | None = None, **part: Any
    ) -> Panel:
        one = read[number]
        if query is not None:
            part["queries"] = [query]
        made = _attention_panel(title, one.layers[layer], drawing, one.left_out[layer], **part)
        return replace(made, placed=one.placed)

    panels = [
        panel("" if r else title, **row, **column)
        for r, (_, row) in enumerate(entries[rows])
        for title, column in entries[columns]
    ]
    panels = drawing.of_attention(panels)
    if ax is not None:
        if len(panels) != 1:
            raise InputError(f"ax= requires a figure of one panel; this one has {len(panels)}.")
        return panel_on(ax, first.placed, panels[0], drawing)
    n_cols, row_titles = len(entries[columns]), [title for title, _ in entries[rows]]
    shown: list[Sequence[Panel]] = [panels[i : i + n_cols] for i in range(0, len(panels), n_cols)]
    if columns == "sample":
        pictures = [Panel(name, placed=one.placed) for name, one in zip(samples, read, strict=True)]
        shown = [pictures, *([replace(each, title="") for each in row] for row in shown)]
        row_titles = ["", *row_titles] if rows else []
    elif rows == "sample":
        names = [one.placed.name if r == 0 else "" for r, one in enumerate(read)]
        shown = [
            [Panel(name, placed=one.placed), *row]
            for name, one, row in zip(names, read, shown, strict=True)
        ]
    elif rows is None:
        pictured = [Panel(first.placed.name), *panels]
        shown, row_titles = in_rows(pictured, drawing.width), []
    calls = [one.layers[0].call for one in read]
    where = [
        *([] if facets == {None} else [_joined(one.phrase for one in read)]),
        "layer by layer" if "layer" in facets else _joined(layer_name(call) for call in calls),
        "head by head" if "head" in facets else _joined(heads_name(call, heads) for call in calls),
    ]
    asked = dict.fromkeys(about(each) for each in samples.values())
    title = next(iter(asked)) if len(asked) == 1 else f"{len(samples)} samples"
    title += f"\n{', '.join(text for text in where if text)}"
    remark = " ".join(filter(None, [by.remark, window.note]))
    return panel_figure(first.placed, shown, drawing, title, row_titles, remark)


@checked
def overlay(
    sample: Sample,
    queries: Selector | None = None,
    layer: int = -1,
    head: Positions | None = None,
    **options: Unpack[GridOptions],
) -> Figure:
    """Draw a phrase's attention on the image: the mean of its tokens, in one layer.

    Args:
        sample: The sample.
        queries: A selector, see :mod:`xmodal_interp.at`. If not given, all text after
            the image, or the class token of the vision tower.
        layer: Layer index; negative ones count from the last.
        head: A head, or several to average; all heads are averaged if not given.
        **options: ``tower``, ``image``, ``path`` and drawing options; see ``overlay_grid``.
    """
    return overlay_grid(sample, queries, [layer], head, columns=None, **options)


@checked
def overlays(
    sample: Sample,
    queries: Selector | None = None,
    layer: int = -1,
    head: Positions | None = None,
    **options: Unpack[GridOptions],
) -> Figure:
    """Draw the attention of each text token on the image, with one panel per token.

    Args:
        sample: The sample.
        queries: A selector, drawn with one panel per token; or a list, drawn with one panel per
            entry, which is the mean of the entry's positions. If
            not given, all text after the image, generated tokens included.
        layer: Layer index; negative ones count from the last.
        head: A head, or several to average; all heads are averaged if not given.
        **options: ``tower``, ``image``, ``path`` and drawing options; see ``overlay_grid``.
    """
    return overlay_grid(sample, queries, [layer], head, **options)


@checked
def head_overlays(
    sample: Sample,
    queries: Selector | None = None,
    layer: int = -1,
    heads: Positions | None = None,
    **options: Unpack[GridOptions],
) -> Figure:
    """Draw a phrase's attention on the image for each head of a layer, and for their mean.

    Args:
        sample: The sample.
        queries: As for ``overlay``; their attention is averaged.
        layer: Layer index; negative ones count from the last.
        heads: Heads; all if not given.
        **options: ``tower``, ``image``, ``path`` and drawing options; see ``overlay_grid``.
    """
    return overlay_grid(sample, queries, [layer], heads, columns="head", **options)


@checked
def layer_overlays(
    sample: Sample,
    queries: Selector | None = None,
    layers: SupportsIndex | Sequence[int] | None = None,
    head: Positions | None = None,
    **options: Unpack[GridOptions],
) -> Figure:
    """Draw a phrase's attention on the image, with one panel per layer.

    Args:
        sample: The sample.
        queries: As for ``overlay``; their attention is averaged.
        layers: Layers, such as ``[-4, -3, -2, -1]``; all recorded layers if not given.
        head: A head, or several to average; all heads are averaged if not given.
        **options: ``tower``, ``image``, ``path`` and drawing options; see ``overlay_grid``.
    """
    return overlay_grid(sample, queries, layers, head, columns="layer", **options)


@checked
def token_head_grid(
    sample: Sample,
    queries: Selector | None = None,
    layer: int = -1,
    heads: Positions | None = None,
    **options: Unpack[GridOptions],
) -> Figure:
    """Draw the attention of each text token in each head: tokens in rows, heads in columns.

    The last column is the mean of the heads.

    Args:
        sample: The sample.
        queries: As for ``overlays``.
        layer: Layer index; negative ones count from the last.
        heads: Heads; all if not given.
        **options: ``tower``, ``image``, ``path`` and drawing options; see ``overlay_grid``.
    """
    return overlay_grid(sample, queries, [layer], heads, rows="query", columns="head", **options)


@checked
@styled
def answer_overlays(
    sample: Sample,
    layer: int = -1,
    head: Positions | None = None,
    *,
    predicts: bool = True,
    image: int = 0,
    page: int = 0,
    path: FigurePath = None,
    **options: Unpack[AttentionOptions],
) -> Figure:
    """Draw the attention of each generated token on the image, as a strip of small panels.

    Args:
        sample: The sample.
        layer: Layer index; negative ones count from the last.
        head: A head, or several to average; all heads are averaged if not given.
        predicts: Draw the attention of the position that predicts a token, which is one before it;
            otherwise that of the token itself, when it has become part of the input.
        image: Index of the image.
        page: A figure has at most 60 panels; the others are on the next pages.
        path: Where to save the figure.
        **options: Drawing options; see ``OverlayOptions``.

    Raises:
        InputError: The sample has no generated tokens.
    """
    generated = sample.where(role="generated")
    if not len(generated):
        raise InputError(
            f"Sample {sample.name!r} has no generated tokens. Capture it with max_new_tokens=..."
        )
    tokens = sample.tokens["token"].iloc[generated]
    drawing = OverlayOptions(**options)
    how = "that predicts it" if predicts else "of the token itself"
    by = _Facets(
        *(None, "query"),
        titles=[readable(str(token), 14) for token in tokens],
        remark=f"Each panel: a generated token, with the attention of the position {how}.",
    )
    positions = (generated - int(predicts)).tolist()
    made = _grid(sample, positions, [layer], head, by, None, image, "image", page, None, drawing)
    return saved(made, path) if isinstance(made, Picture) else made


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
        queries: A selector; the attention of its positions is averaged.
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
        together = [range(len(positions))]
        read = attention_on_image(sample, here, positions, layer, head, together)
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
    pictured, compared = Panel(placed.name), drawing.of_attention(panels)
    changed = drawing.scaled([Panel(name, change)], lambda _: scale)
    rows = [[pictured, *compared, *changed]]
    if drawing.width == "column":
        rows = [compared, [pictured, *changed]]
    asked = query_name(before, placed, positions)
    where = f"{asked}: {layer_name(read.call)}, {heads_name(read.call, head)}"
    title = f"{about(before.changed(answer=''))}\n{where}"
    return saved(panel_figure(placed, rows, drawing, title), path)


@dataclass(frozen=True, eq=False)
class _Read:
    """The attention of one sample that a grid draws.

    Attributes:
        placed: The image.
        queries: Title of each group of queries.
        layers: The attention of all groups, by layer.
        left_out: Tokens to mark as left out, by layer.
        phrase: Description of the queries, if they are averaged.
    """

    placed: PlacedImage
    queries: Sequence[str]
    layers: Sequence[ImageAttention]
    left_out: Sequence[np.ndarray | None]
    phrase: str


def _by_title(sample: object, facets: set[Facet | None]) -> Mapping[str, Sample]:
    """Return the samples of a grid by title; one sample has no title.

    Raises:
        InputError: There are several samples without the facet ``"sample"``, or the reverse.
    """
    if "sample" not in facets:
        if not isinstance(sample, Sample):
            raise InputError(
                f"sample must be one Sample, such as store[0]; got a {type(sample).__name__}."
            )
        return {"": sample}
    of_samples = isinstance(sample, Mapping) and all(
        isinstance(each, Sample) for each in sample.values()
    )
    if not isinstance(sample, Mapping) or not sample or not of_samples:
        raise InputError(
            "With the facet 'sample', sample must be a mapping from titles to samples, such as "
            f"{{'before': sample}}; got {quoted(sample)}."
        )
    return sample


@dataclass(frozen=True, eq=False)
class _Choice:
    """What a grid draws of one sample, before any probability is computed.

    Attributes:
        sample: The sample.
        placed: The image.
        groups: Positions of each group of queries.
        layers: Layers.
        n_heads: Number of panels by head: the chosen heads and their mean.
    """

    sample: Sample
    placed: PlacedImage
    groups: Sequence[Sequence[int]]
    layers: Sequence[int]
    n_heads: int

    def counts(self) -> dict[Facet | None, int]:
        """Return the number of panels by facet."""
        return {"query": len(self.groups), "layer": len(self.layers), "head": self.n_heads}


def _choice(
    sample: Sample,
    placed: PlacedImage,
    queries: Selector | None,
    layers: SupportsIndex | Sequence[int] | None,
    heads: Positions | None,
    facets: set[Facet | None],
) -> _Choice:
    """Return what a grid draws of a sample; the arguments are those of ``overlay_grid``."""
    chosen = _layer_numbers(sample, placed, layers)
    if "layer" not in facets and (layers is None or len(chosen) != 1):
        raise InputError(f"Without the facet 'layer', layers must be one layer; got {layers}.")
    groups: Sequence[Sequence[int]]
    if "query" in facets:
        groups = query_groups(sample, placed, queries)
    else:
        layer = None if facets & {"layer", "head"} else chosen[0]
        groups = [query_positions(sample, placed, queries, layer)]
    call = sample.call(chosen[0], tower=placed.tower, kind=placed.kind, call=placed.call)
    n_heads = call.n_heads
    if heads is not None and "head" in facets:
        n_heads = len(attention_on_image(sample, placed, groups[0][:1], chosen[0], heads).probs)
    return _Choice(sample, placed, groups, chosen, n_heads + int(n_heads > 1))


def _read(
    choice: _Choice,
    heads: Positions | None,
    facets: set[Facet | None],
    drawing: OverlayOptions,
    part: slice,
) -> _Read:
    """Return the attention that a page of a grid draws; ``part`` selects groups of queries."""
    sample, placed, groups = choice.sample, choice.placed, choice.groups[part]
    positions = [position for group in groups for position in group]
    stops = np.cumsum([len(group) for group in groups]).tolist()
    parts = [range(stop - len(group), stop) for group, stop in zip(groups, stops, strict=True)]
    read = [
        attention_on_image(sample, placed, positions, layer, heads, parts)
        for layer in choice.layers
    ]
    return _Read(
        placed,
        [query_name(sample, placed, group, short=True) for group in groups],
        read,
        [drawing.left_out(placed, one.call, heads) for one in read],
        "" if "query" in facets else query_name(sample, placed, positions),
    )


@dataclass(frozen=True)
class _Window:
    """The part of a grid that is on one page.

    Attributes:
        parts: Which entries of each facet; all if not given.
        note: A sentence on the pages; empty if there is only one.
    """

    parts: Mapping[Facet | None, slice]
    note: str


def _window(
    rows: Facet | None, columns: Facet | None, counts: Mapping[Facet | None, int], page: int
) -> _Window:
    """Return the part of a grid that is on a page.

    Raises:
        InputError: The page does not exist.
    """
    limits = [(columns, _MOST_WRAPPED if rows is None else _MOST_COLUMNS), (rows, _MOST_ROWS)]
    parts: dict[Facet | None, slice] = {}
    texts, rest = [], whole_number(page, "page", 0)
    n_pages = int(np.prod([-(-counts[facet] // most) for facet, most in limits]))
    if page >= n_pages:
        raise InputError(f"page must be between 0 and {n_pages - 1}; got {page}.")
    for facet, most in limits:
        n = counts[facet]
        rest, number = divmod(rest, -(-n // most))
        parts[facet] = slice(number * most, min((number + 1) * most, n))
        if n > most and facet is not None:
            texts.append(f"{_MANY[facet]} {number * most + 1} to {parts[facet].stop} of {n}")
    others = f"; {n_pages} pages, by page=0 to {n_pages - 1}" if n_pages > 1 else ""
    return _Window(parts, f"Page {page}: {', '.join(texts)}{others}." if texts else "")


def _refuse_other_entries(facets: set[Facet | None], read: Mapping[str, _Read]) -> None:
    """Raise InputError if a facet would have other panels in one sample than in the first."""
    for facet, argument in _ARGUMENT.items():
        titles = {name: _titles(one, facet) for name, one in read.items()}
        first = next(iter(titles))
        other = next((name for name in titles if titles[name] != titles[first]), None)
        if facet in facets and other is not None:
            raise InputError(
                f"All samples must have the same panels by {facet}: {first!r} has "
                f"{', '.join(titles[first])}; {other!r} has {', '.join(titles[other])}. Choose "
                f"{argument}= that give the same panels."
            )


def _joined(texts: Iterable[str]) -> str:
    """Return texts of several samples as one, each different text once."""
    return " / ".join(dict.fromkeys(texts))


def _titles(read: _Read, facet: Facet) -> list[str]:
    """Return the titles of a sample's panels by a facet."""
    if facet == "query":
        return list(read.queries)
    if facet == "head":
        return [title for title, _ in _head_entries(read.layers[0])]
    return [f"layer {one.call.layer}" for one in read.layers]


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


def _layer_numbers(
    sample: Sample, placed: PlacedImage, layers: SupportsIndex | Sequence[int] | None
) -> list[int]:
    """Return the numbers of the layers; all recorded ones if None."""
    recorded = sample.layers(placed.tower, placed.kind)
    layer_numbers = recorded if layers is None else layers
    row = entries_of(layer_numbers)
    if row is None or not len(row):
        raise InputError(
            "layers must be a layer or a list of at least one, such as -1 or [0, -1]; got "
            f"{quoted(layers)}."
        )
    return numbers(layer_numbers, "layer", max(recorded, default=-1) + 1)
