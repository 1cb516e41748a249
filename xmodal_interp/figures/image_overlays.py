"""Overlays: attention of text tokens to image tokens, drawn on the image.

The first panel of every figure is the image itself. The other panels share one colour scale and one
colour bar. A cell is one image token, drawn over the pixels that it covers. Parts of the image that
no token covers are dimmed and hatched.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import SupportsIndex, Unpack

import numpy as np

from xmodal_interp.arguments import checked
from xmodal_interp.attention import Positions, entries_of, numbers, resolve
from xmodal_interp.errors import InputError, quoted
from xmodal_interp.figures.looks import Look, Options
from xmodal_interp.figures.overlay_values import (
    Reading,
    flat,
    query_groups,
    query_positions,
    reading,
)
from xmodal_interp.figures.panels import Panel, in_rows, note_on, panel_figure
from xmodal_interp.figures.placement import Place, place_of
from xmodal_interp.figures.style import (
    FigurePath,
    Picture,
    about,
    heads_name,
    layer_name,
    named,
    panel_name,
    saved,
    styled,
)
from xmodal_interp.sample import Sample, Selector

Queries = Selector | Sequence[str | int]
"""A phrase, positions, or a sequence of both."""


@checked
@styled
def overlay(
    sample: Sample,
    queries: Selector,
    layer: int = -1,
    head: Positions | None = None,
    *,
    image: int = 0,
    path: FigurePath = None,
    **look: Unpack[Options],
) -> Picture:
    """Draw a phrase's attention on the image: the mean of its tokens, in one layer.

    Args:
        sample: The sample.
        queries: A phrase of the prompt or the answer, or positions.
        layer: Layer index; negative ones count from the last.
        head: A head, or several to average; all heads are averaged if not given.
        image: Index of the image.
        path: Where to save the figure.
        **look: Drawing options; see ``Look``.
    """
    chosen, place = Look(**look), place_of(sample, image)
    positions = query_positions(sample, place, queries, layer)
    read = reading(sample, place, positions, layer, head)
    panel = _panel(chosen, read, named(sample, positions))
    what = f"{layer_name(read.call)}, {heads_name(read.call, head)}"
    return saved(_figure(sample, place, [panel], chosen, what), path)


@checked
@styled
def overlays(
    sample: Sample,
    queries: Queries | None = None,
    layer: int = -1,
    head: Positions | None = None,
    *,
    image: int = 0,
    path: FigurePath = None,
    **look: Unpack[Options],
) -> Picture:
    """Draw the attention of each text token on the image, with one panel per token.

    Args:
        sample: The sample.
        queries: A phrase or positions, drawn with one panel per token; or a list of phrases and
            positions, drawn with one panel per entry, where a phrase is the mean of its tokens. If
            not given, all text after the image, generated tokens included.
        layer: Layer index; negative ones count from the last.
        head: A head, or several to average; all heads are averaged if not given.
        image: Index of the image.
        path: Where to save the figure.
        **look: Drawing options; see ``Look``.
    """
    chosen, place = Look(**look), place_of(sample, image)
    groups = query_groups(sample, place, queries)
    read = reading(sample, place, flat(groups), layer, head)
    panels = [
        _panel(chosen, read, panel_name(sample, group), queries=part)
        for group, part in zip(groups, _parts(groups), strict=True)
    ]
    what = f"{layer_name(read.call)}, {heads_name(read.call, head)}"
    return saved(_figure(sample, place, panels, chosen, what), path)


@checked
@styled
def head_overlays(
    sample: Sample,
    queries: Selector,
    layer: int = -1,
    heads: Positions | None = None,
    *,
    image: int = 0,
    path: FigurePath = None,
    **look: Unpack[Options],
) -> Picture:
    """Draw a phrase's attention on the image for each head of a layer, and for their mean.

    Args:
        sample: The sample.
        queries: A phrase or positions; their attention is averaged.
        layer: Layer index; negative ones count from the last.
        heads: Heads; all if not given.
        image: Index of the image.
        path: Where to save the figure.
        **look: Drawing options; see ``Look``.
    """
    chosen, place = Look(**look), place_of(sample, image)
    positions = query_positions(sample, place, queries)
    read = reading(sample, place, positions, layer, heads)
    panels = [_panel(chosen, read, name, of) for name, of in _by_head(read, heads)]
    what = f"{named(sample, positions)} in {layer_name(read.call)}, head by head"
    return saved(_figure(sample, place, panels, chosen, what), path)


@checked
@styled
def layer_overlays(
    sample: Sample,
    queries: Selector,
    layers: Sequence[int] | None = None,
    head: Positions | None = None,
    *,
    image: int = 0,
    path: FigurePath = None,
    **look: Unpack[Options],
) -> Picture:
    """Draw a phrase's attention on the image, with one panel per layer.

    Args:
        sample: The sample.
        queries: A phrase or positions; their attention is averaged.
        layers: Layers, such as ``[-4, -3, -2, -1]``; all recorded layers if not given.
        head: A head, or several to average; all heads are averaged if not given.
        image: Index of the image.
        path: Where to save the figure.
        **look: Drawing options; see ``Look``.
    """
    chosen, place = Look(**look), place_of(sample, image)
    positions = query_positions(sample, place, queries)
    wanted = sample.layers(kind=place.kind) if layers is None else layers
    row = entries_of(wanted)
    if row is None or isinstance(wanted, SupportsIndex) or not len(row):
        raise InputError(
            f"layers must be a list of at least one layer, such as [0, -1]; got {quoted(layers)}."
        )
    wanted = numbers(wanted, "layer", max(sample.layers(kind=place.kind), default=-1) + 1)
    reads = [reading(sample, place, positions, layer, head) for layer in wanted]
    panels = [_panel(chosen, read, f"layer {read.call.layer}") for read in reads]
    what = f"{named(sample, positions)}, layer by layer, {heads_name(reads[0].call, head)}"
    return saved(_figure(sample, place, panels, chosen, what), path)


@checked
@styled
def token_head_grid(
    sample: Sample,
    queries: Queries | None = None,
    layer: int = -1,
    heads: Positions | None = None,
    *,
    image: int = 0,
    path: FigurePath = None,
    **look: Unpack[Options],
) -> Picture:
    """Draw the attention of each text token in each head: tokens in rows, heads in columns.

    The last column is the mean of the heads.

    Args:
        sample: The sample.
        queries: As for ``overlays``.
        layer: Layer index; negative ones count from the last.
        heads: Heads; all if not given.
        image: Index of the image.
        path: Where to save the figure.
        **look: Drawing options; see ``Look``.
    """
    chosen, place = Look(**look), place_of(sample, image)
    groups = query_groups(sample, place, queries)
    read = reading(sample, place, flat(groups), layer, heads)
    rows = [
        [
            _panel(chosen, read, name if part.start == 0 else "", of, part)
            for name, of in _by_head(read, heads)
        ]
        for part in _parts(groups)
    ]
    title = f"{about(sample)}\n{layer_name(read.call)}: each token in each head"
    names = [panel_name(sample, group) for group in groups]
    return saved(_drawn(place, rows, chosen, title, names), path)


def _panel(
    look: Look,
    read: Reading,
    title: str,
    heads: Sequence[int] | None = None,
    queries: range | None = None,
) -> Panel:
    left_out = look.left_out(read.place, read.call, read.heads)
    values = read.values(look.show, heads, queries, left_out)
    return Panel(title, values, left_out=left_out, undrawn=read.undrawn(heads, queries))


def _figure(
    sample: Sample, place: Place, panels: Sequence[Panel], look: Look, what: str
) -> Picture:
    """Draw the image, then the panels."""
    rows = in_rows([Panel(place.name), *panels])
    return _drawn(place, rows, look, f"{about(sample)}\n{what}")


def _drawn(
    place: Place,
    rows: Sequence[Sequence[Panel]],
    look: Look,
    title: str,
    row_titles: Sequence[str] = (),
) -> Picture:
    """Draw panels with one colour scale."""
    values = [panel.values for row in rows for panel in row if panel.values is not None]
    scale = look.scale(values)
    scaled = [[panel.under(scale) for panel in row] for row in rows]
    return panel_figure(place, scaled, look, title, note_on(place, scaled, look), row_titles)


def _parts(groups: Sequence[Sequence[int]]) -> list[range]:
    """Return the range of each group's indices in the concatenated groups."""
    ends = np.cumsum([len(group) for group in groups]).tolist()
    return [range(end - len(group), end) for group, end in zip(groups, ends, strict=True)]


def _by_head(read: Reading, heads: Positions | None) -> list[tuple[str, Sequence[int] | None]]:
    """Return name and index of each chosen head, then of their mean."""
    n_heads = read.call.n_heads
    chosen = range(n_heads) if heads is None else resolve(heads, n_heads, "head").tolist()
    single: list[tuple[str, Sequence[int] | None]] = [
        (f"head {head}", [i]) for i, head in enumerate(chosen)
    ]
    return [*single, ("mean", None)] if len(single) > 1 else single
