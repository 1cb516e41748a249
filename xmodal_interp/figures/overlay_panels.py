"""Panels of an overlay figure: an image, a map of values over it, boxes and crosses.

``OverlayOptions`` holds the drawing options, ``Panel`` the content of one panel, and
``panel_figure`` draws rows of panels with the colour bars at the right and a note below. All
coordinates are pixels of the original image.

The image keeps its colours and is dimmed evenly. With ``style="colour"``, a layer of colour is
drawn over it: a pixel is ``(1 - a) * dimmed + a * colour``, where the opacity ``a`` and the colour
depend on the value only. With ``style="light"``, a pixel is ``level * image``, where the level
depends on the value only. A uniform map therefore adds no structure to the image. Tokens that the
mask hides are hatched; weak attention is not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
from jaxtyping import Bool
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import PathPatch, Rectangle
from matplotlib.path import Path

from xmodal_interp.analysis.sinks import sink_keys
from xmodal_interp.arguments import as_list, real_number, whole_number
from xmodal_interp.attention import AttentionCall, Positions, resolve
from xmodal_interp.boxes.number_formats import pixel_boxes
from xmodal_interp.errors import InputError, quoted
from xmodal_interp.figures.placement import PixelBox, PixelBoxes, PlacedImage, extent, uncovered
from xmodal_interp.figures.scales import (
    DIMMED,
    ColorScale,
    Meaning,
    Show,
    Style,
    check_show,
    color_scale,
    scale_of,
)
from xmodal_interp.figures.style import (
    BAR,
    HIGHEST_PAGE,
    NORMAL,
    SMALL,
    CmapLike,
    FigureOptions,
    Picture,
    ScaleOf,
    Width,
    check_options,
    escaped,
    new_picture,
    placed_on,
    room,
    text_width,
    wrapped,
)

_LONGEST = 1024  # px; larger images are downscaled for drawing, in unchanged coordinates
_SATURATION = 0.6  # of the dimmed image
_DARKEST = 0.65  # brightness to which dark images are dimmed
_BAR = 0.8  # width of a colour bar in a figure of a column's width, inches
_GAP = 0.08  # between panels, inches
_SIDES = ((4, 2.0), (6, 1.75), (10, 1.3), (99, 0.9))  # side of a panel by number of columns, inches
_IN_A_ROW: Mapping[Width | None, tuple[int, int]] = {
    None: (6, 12),
    "page": (5, 8),
    "column": (2, 3),
}
_MANY = 24  # panels; more of them are smaller
_NAMES = 1.4  # largest width of the titles of rows, inches


class MapOptions(FigureOptions, total=False):
    """Keyword arguments of every figure on an image; see ``OverlayOptions``."""

    hide: Positions | Literal["sinks"] | None
    boxes: PixelBoxes | None
    smooth: bool
    contours: int | Sequence[float]
    style: Style
    vmax: float | None
    power: float | None


class AttentionOptions(MapOptions, total=False):
    """Keyword arguments of every overlay of attention; see ``OverlayOptions``."""

    show: Show


@dataclass(frozen=True)
class OverlayOptions:
    """How an overlay is drawn.

    Attributes:
        show: ``"probability"``; ``"share"``, probability divided by the total on the image; or
            ``"lift"``, probability divided by uniform attention over the visible keys.
        hide: Tokens to exclude from the colour scale and mark with a cross: positions, or
            ``"sinks"`` for those that ``attention_sinks`` finds in any of the drawn heads.
        boxes: Boxes ``(x0, y0, x1, y1)`` in pixels to outline, such as an object's true box, in
            any form that :func:`xmodal_interp.boxes.pixel_boxes` takes; a mapping gives them names,
            and a name may have several boxes.
        smooth: Interpolate between tokens (bilinear); otherwise each token is one cell.
        contours: Contour lines between the centres of tokens: their number, equally spaced on the
            colour scale, or their values.
        style: ``"colour"`` draws a layer of colour over the dimmed image, with an opacity that
            follows the value; ``"light"`` lights the image where the value is high.
        vmax: Upper end of the colour scale. If not given: the largest value, or the 99th percentile
            if the largest is more than six times as large, such as that of an attention sink; the
            colour bar states this.
        power: Exponent of the colour scale for probabilities and shares: 1 is linear, 0.5 shows
            weak attention next to strong, 0 is a log scale. If not given: 1, or 0.5 for
            ``style="light"``.
        cmap: A colour map of matplotlib or its name, for ``style="colour"``.
        width: ``"column"`` (3.4 inches) or ``"page"`` (7 inches) for print.
        scale: One colour scale for the ``"figure"``, or one for each ``"panel"``.
    """

    show: Show = "probability"
    hide: Positions | Literal["sinks"] | None = None
    boxes: PixelBoxes | None = None
    smooth: bool = False
    contours: int | Sequence[float] = ()
    style: Style = "colour"
    vmax: float | None = None
    power: float | None = None
    cmap: CmapLike = None
    width: Width | None = None
    scale: ScaleOf | None = None

    def __post_init__(self) -> None:
        check_show(self.show)
        check_options(self.cmap, self.width, self.scale)
        if not (isinstance(self.style, str) and self.style in get_args(Style)):
            raise InputError(f"style must be 'colour' or 'light'; got {quoted(self.style)}.")
        if self.style == "light" and self.cmap is not None:
            raise InputError(
                f"cmap={quoted(self.cmap)} requires style='colour': style='light' has no colours."
            )
        if isinstance(self.contours, (int, np.integer)):
            whole_number(self.contours, "contours", 0, 20)
        else:
            for level in as_list(self.contours, "contours"):
                real_number(level, "contours")

    def left_out(
        self, placed: PlacedImage, call: AttentionCall | None = None, heads: Positions | None = None
    ) -> Bool[np.ndarray, " token"] | None:
        """Return True on the image tokens that ``hide`` excludes, or None if ``hide`` is None.

        Args:
            placed: The image.
            call: Attention call in which sinks are searched; required for ``hide="sinks"``.
            heads: Heads in which sinks are searched; all if not given.

        Raises:
            InputError: ``hide`` holds positions that are not tokens of this image, or is
                ``"sinks"`` without a call.
        """
        keys = placed.keys
        if self.hide is None:
            return None
        if isinstance(self.hide, str):
            if self.hide != "sinks" or call is None:
                allowed = "positions" if call is None else "'sinks' or positions"
                raise InputError(f"hide must be {allowed}; got {self.hide!r}.")
            chosen_heads = resolve(slice(None) if heads is None else heads, call.n_heads, "head")
            rows = call.query_positions.cpu()
            if placed.present is not None:
                rows = rows[placed.present[rows.numpy()]]
            found = sink_keys(call, chosen_heads.tolist(), rows).any(0).numpy()
            return np.asarray(found[keys], dtype=bool)
        chosen = resolve(self.hide, int(keys.max()) + 1, "position").numpy()
        others = sorted(set(chosen.tolist()) - set(keys.tolist()))
        if others:
            raise InputError(
                f"hide holds positions that are not tokens of image {placed.number}: "
                f"{', '.join(map(str, others[:6]))}. Its tokens are among the positions "
                f"{keys.min()} to {keys.max()}."
            )
        return np.isin(keys, chosen)

    @property
    def exponent(self) -> float:
        """Exponent of the colour scale."""
        if self.power is not None:
            return self.power
        return 0.5 if self.style == "light" else 1.0

    def of_attention(self, panels: Sequence[Panel]) -> list[Panel]:
        """Return panels of attention with their colour scales."""
        return self.scaled(
            panels,
            lambda maps: scale_of(self.show, maps, vmax=self.vmax, power=self.exponent, clip=True),
        )

    def of_values(self, panels: Sequence[Panel], meaning: Meaning, label: str) -> list[Panel]:
        """Return panels of any quantity with their colour scales."""
        return self.scaled(
            panels,
            lambda maps: color_scale(
                meaning, maps, label, vmax=self.vmax, power=self.exponent, clip=True
            ),
        )

    def scaled(
        self, panels: Sequence[Panel], scale: Callable[[list[np.ndarray]], ColorScale]
    ) -> list[Panel]:
        """Return panels with one colour scale, or each with its own.

        Args:
            panels: Panels with values.
            scale: Returns the scale of values.
        """
        maps = [panel.values for panel in panels if panel.values is not None]
        if self.scale != "panel":
            return _with(panels, scale(maps).over(self.style, self.cmap))
        scales = [scale([values]).over(self.style, self.cmap) for values in maps]
        return [
            replace(panel, title=f"{panel.title}\n{each.span}".lstrip("\n"), scale=each.relative())
            for panel, each in zip(panels, scales, strict=True)
        ]


@dataclass(frozen=True, eq=False)
class Panel:
    """Values on one image.

    Attributes:
        title: Text above the panel.
        values: One per token of the image, NaN where hidden; None draws the image alone.
        scale: Colour scale; panels with the same scale share one colour bar.
        left_out: Tokens to mark as left out.
        outlined: Boxes to outline on this panel only.
        undrawn: Attention to tokens without a cell, and to all tokens of the image.
        placed: The image, if it is not that of the figure.
    """

    title: str
    values: np.ndarray | None = None
    scale: ColorScale | None = None
    left_out: np.ndarray | None = None
    outlined: Sequence[PixelBox] = ()
    undrawn: tuple[float, float] | None = None
    placed: PlacedImage | None = None


def _with(panels: Sequence[Panel], scale: ColorScale) -> list[Panel]:
    return [replace(panel, scale=scale) for panel in panels]


def in_rows(panels: Sequence[Panel], width: Width | None = None) -> list[Sequence[Panel]]:
    """Split panels into rows of about equal length, of smaller panels if there are many."""
    few, many = _IN_A_ROW[width]
    n_rows = -(-len(panels) // (few if len(panels) <= _MANY else many))
    length = -(-len(panels) // n_rows)
    return [panels[i : i + length] for i in range(0, len(panels), length)]


def panel_figure(
    placed: PlacedImage,
    rows: Sequence[Sequence[Panel]],
    options: OverlayOptions,
    title: str,
    row_titles: Sequence[str] = (),
    remark: str = "",
) -> Picture:
    """Draw panels in rows.

    Args:
        placed: The image of panels that have none; its shape determines the size of the panels.
        rows: Panels of each row; rows may differ in length.
        options: Drawing options.
        title: Title of the figure.
        row_titles: Text at the left of each row.
        remark: A sentence for the note below the panels.
    """
    n_cols = max(len(row) for row in rows)
    panels = [panel for row in rows for panel in row]
    # panels with a scale each have one bar in common
    scales = {_bar_of(p.scale): p.scale for p in panels if p.scale is not None}
    names = [wrapped(text, _NAMES, NORMAL, 3) for text in row_titles]
    left = (
        max((text_width(line) for name in names for line in name.split("\n")), default=-0.1) + 0.1
    )
    # inches of a panel: the image's aspect, smaller for many columns
    side = next(inches for most, inches in _SIDES if n_cols <= most)
    aspect = float(np.clip(placed.grid.width / placed.grid.height, 1 / 6, 6.0))
    natural = n_cols * (side * aspect**0.5 + _GAP)
    bars = (_BAR if options.width == "column" else BAR) * len(scales)
    width = room(options.width, natural, left + bars) / n_cols - _GAP
    lines_of = 0.35 if any(panel.title for panel in panels) else 0.0  # of titles, at most
    width = min(width, (HIGHEST_PAGE / len(rows) - _GAP - lines_of) * aspect)
    height = width / aspect
    titles = [[wrapped(panel.title, width + _GAP / 2, NORMAL, 2) for panel in row] for row in rows]
    lines = [max(0 if not text else text.count("\n") + 1 for text in row) for row in titles]
    heights = [height + _GAP + (0.04 + 0.14 * n if n else 0) for n in lines]
    tall = sum(heights)
    picture = new_picture(
        (left + n_cols * (width + _GAP) + bars, tall),
        title,
        " ".join(filter(None, [_note(placed, panels, options), remark])),
        width=options.width,
    )
    grid = picture.subplots(len(rows), n_cols, squeeze=False)
    drawn: dict[object, list[Axes]] = {key: [] for key in scales}
    for (r, c), axes in np.ndenumerate(grid):
        if c >= len(rows[r]):
            axes.remove()
            continue
        panel = rows[r][c]
        _draw_panel(axes, panel.placed or placed, panel, options, width)
        axes.set_title(titles[r][c])
        if panel.scale is not None:
            drawn[_bar_of(panel.scale)].append(axes)
        axes.xaxis.set_visible(False)
        axes.yaxis.set_visible(bool(row_titles) and c == 0)
        if row_titles and c == 0:
            axes.set_ylabel(names[r], rotation=0, ha="right", va="center")
    for key, scale in scales.items():
        inside = [any(p.scale and _bar_of(p.scale) == key for p in row) for row in rows]
        of_scale = sum(each for each, has in zip(heights, inside, strict=True) if has)
        scale.bar(picture, drawn[key], of_scale, _levels(scale, options.contours))
    return picture


def panel_on(axes: Axes, placed: PlacedImage, panel: Panel, options: OverlayOptions) -> Figure:
    """Draw one panel with its colour bar into existing axes; return their figure."""
    figure, width, height = placed_on(axes)
    _draw_panel(axes, panel.placed or placed, panel, options, width)
    axes.set_title(wrapped(panel.title, width, NORMAL, 2))
    if panel.scale is not None:
        height = min(height, width * placed.grid.height / placed.grid.width)
        panel.scale.bar(figure, [axes], height, _levels(panel.scale, options.contours))
    return figure


def _bar_of(scale: ColorScale | None) -> object:
    """Return a key that panels with a common colour bar share."""
    return None if scale is None else (scale.label if scale.own else id(scale))


def _note(placed: PlacedImage, panels: Sequence[Panel], options: OverlayOptions) -> str:
    """Return the note on how a figure is drawn."""
    images = list({id(one): one for one in (panel.placed or placed for panel in panels)}.values())
    how = "interpolated between {}s (bilinear)" if options.smooth else "one cell per {} (nearest)"
    parts = [how.format(unit) for unit in dict.fromkeys(one.unit for one in images)]
    if sum(panel.scale is not None for panel in panels) > 1:
        own = any(panel.scale is not None and panel.scale.own for panel in panels)
        parts.append("each panel has its own scale" if own else "all panels share a scale")
    if options.style == "light":
        parts.append("the image is lit where the value is high")
    if any(_hidden_cells(panel.placed or placed, panel).any() for panel in panels):
        parts.append("crossed hatching: hidden by the mask")
    bare = dict.fromkeys(one.unit for one in images if uncovered(one))
    parts += [f"hatched: no {unit} there" for unit in bare]
    if any(_tile_edges(one) for one in images) and any(panel.values is None for panel in panels):
        parts.append("lines on the image: edges of its tiles")
    undrawn = [panel.undrawn for panel in panels if panel.undrawn is not None]
    if undrawn:
        without, whole = (_span(amounts) for amounts in zip(*undrawn, strict=True))
        parts.append(
            f"not drawn: tokens{_elsewhere(images)} without a place, which receive {without} of "
            f"the {whole} that the {images[0].medium} receives"
        )
    marked = [int(panel.left_out.sum()) for panel in panels if panel.left_out is not None]
    if any(marked):
        parts.append(f"\u00d7: {_span(marked)} left out")
    elif marked:
        parts.append("nothing to leave out")
    return "; ".join(parts).capitalize() + "."


def _elsewhere(images: Sequence[PlacedImage]) -> str:
    if any(one.unit == "thumbnail token" for one in images):
        return " of the tiles, or"
    return " of the thumbnail, or" if any(one.grid.thumbnail is not None for one in images) else ""


def _span(amounts: Sequence[float]) -> str:
    """Return the range of numbers as text, such as ``"0.24"`` or ``"0.10 to 0.24"``."""
    ends = [
        str(end) if isinstance(end, int) else f"{end:.3g}" for end in (min(amounts), max(amounts))
    ]
    return ends[0] if ends[0] == ends[1] else " to ".join(ends)


def _draw_panel(
    axes: Axes, placed: PlacedImage, panel: Panel, options: OverlayOptions, inches: float
) -> None:
    named = named_boxes(options.boxes)
    if panel.values is None or panel.scale is None:
        draw_image(axes, placed)
        edges = _tile_edges(placed)
        for color, width in (("black", 1.6), ("white", 0.8)) if edges else ():
            axes.add_collection(LineCollection(edges, colors=color, linewidths=width, zorder=3))
    else:
        draw_image(axes, placed, dim=options.style == "colour")
        grid = placed.on_grid(panel.values)
        draw_map(axes, placed, grid, panel.scale, smooth=options.smooth)
        _draw_hidden(axes, placed, _hidden_cells(placed, panel))
        _draw_contours(axes, placed, panel.scale, grid, options.contours)
        if np.isnan(panel.values).all():
            axes.text(
                *(0.5, 0.5, "hidden by the mask"),
                transform=axes.transAxes,
                ha="center",
                va="center",
                size=SMALL,
                color="white",
                bbox={"facecolor": "black", "linewidth": 0, "pad": 2},
                zorder=4,
            )
        _draw_uncovered(axes, placed)
        named = [("", box) for _, box in named]  # names are written once, on the image itself
    if panel.left_out is not None and placed.shares is None:
        _draw_crosses(axes, placed, np.flatnonzero(panel.left_out))
    draw_boxes(axes, placed, [("", box) for box in panel.outlined], inches)
    draw_boxes(axes, placed, named, inches)


def dimmed(pixels: np.ndarray) -> np.ndarray:
    """Return pixels ``[row, col, 3]`` of 0 to 255 as the ground of a layer of colour.

    All pixels are changed alike: a factor times a mixture of the pixel and its grey, so that the
    colours of the layer stand out. The factor is ``DIMMED["colour"]``, or higher for dark images,
    up to the mean brightness that a dimmed middle grey has.
    """
    grays = pixels @ [[0.299], [0.587], [0.114]]
    usual = DIMMED["colour"]
    factor = np.clip(usual * 255 / 2 / max(float(grays.mean()), 1.0), usual, _DARKEST)
    mixed = _SATURATION * pixels + (1 - _SATURATION) * grays
    return np.asarray(np.round(factor * mixed), dtype=np.uint8)


def draw_image(axes: Axes, placed: PlacedImage, *, dim: bool = False) -> None:
    """Draw the image, or its dimmed version."""
    picture = placed.image.convert("RGB")
    picture.thumbnail((_LONGEST, _LONGEST))
    width, height = placed.grid.width, placed.grid.height
    pixels = np.asarray(picture)
    pixels = dimmed(pixels) if dim else pixels
    axes.imshow(pixels, extent=(0.0, float(width), float(height), 0.0), zorder=0)
    axes.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def draw_map(
    axes: Axes, placed: PlacedImage, grid: np.ndarray, scale: ColorScale, *, smooth: bool
) -> AxesImage:
    """Draw values ``[row, col]`` over their tokens; NaN is transparent."""
    drawn = axes.imshow(
        scale.drawn(grid),
        extent=extent(placed.grid),
        norm=scale.norm,
        cmap=scale.cmap,
        interpolation="bilinear" if smooth else "nearest",
        interpolation_stage="data",
        zorder=1,
    )
    axes.set(xlim=(0, placed.grid.width), ylim=(placed.grid.height, 0))
    return drawn


def _hidden_cells(placed: PlacedImage, panel: Panel) -> Bool[np.ndarray, "row col"]:
    """Return the cells with a token that the mask hides, as ``[row, col]``."""
    if panel.values is None:
        return np.zeros((placed.grid.rows, placed.grid.cols), dtype=bool)
    hidden = np.isnan(panel.values)
    if panel.left_out is not None and placed.shares is None:
        hidden &= ~panel.left_out
    return np.asarray(placed.on_grid(hidden.astype(float)) == 1)


def _draw_hidden(axes: Axes, placed: PlacedImage, cells: Bool[np.ndarray, "row col"]) -> None:
    """Hatch cells."""
    if not cells.any():
        return
    left, right, bottom, top = extent(placed.grid)
    width, height = (right - left) / placed.grid.cols, (bottom - top) / placed.grid.rows
    boxes = []
    for row, along in enumerate(cells):  # one rectangle per run of cells of a row
        ends = np.flatnonzero(np.diff(along.astype(int), prepend=0, append=0))
        for first, stop in ends.reshape(-1, 2):
            x0, x1 = left + first * width, left + stop * width
            y0, y1 = top + row * height, top + (row + 1) * height
            boxes.append([(x0, y0), (x1, y0), (x1, y1), (x0, y1), (x0, y0)])
    shape = Path.make_compound_path(*(Path(box, closed=True) for box in boxes))
    patch = PathPatch(shape, hatch="xxx", facecolor="none", edgecolor="#c8c8c8aa", linewidth=0.0)
    patch.set_zorder(2)
    axes.add_patch(patch)


def _levels(scale: ColorScale, contours: int | Sequence[float]) -> np.ndarray:
    """Return the levels of contour lines, in the units of the norm."""
    if isinstance(contours, (int, np.integer)):
        inside = np.linspace(0, 1, int(contours) + 2)[1:-1]
        return np.asarray(scale.norm.inverse(inside), dtype=float).ravel()
    levels = np.unique(np.asarray(list(contours), dtype=float))
    return np.log2(levels[levels > 0]) if scale.log2 else levels


def _draw_contours(
    axes: Axes,
    placed: PlacedImage,
    scale: ColorScale,
    grid: np.ndarray,
    contours: int | Sequence[float],
) -> None:
    """Draw contour lines through values ``[row, col]`` at the centres of their cells."""
    levels = _levels(scale, contours)
    if not len(levels):
        return
    if min(grid.shape) < 2:
        raise InputError(
            f"Contour lines require at least 2 x 2 cells; the image has {grid.shape[0]} x "
            f"{grid.shape[1]}. Leave contours out."
        )
    left, right, bottom, top = extent(placed.grid)
    x = left + (np.arange(grid.shape[1]) + 0.5) * (right - left) / grid.shape[1]
    y = top + (np.arange(grid.shape[0]) + 0.5) * (bottom - top) / grid.shape[0]
    drawn = scale.drawn(grid)
    crossed = levels[(levels > drawn.min()) & (levels < drawn.max())]
    if len(crossed):
        lines = axes.contour(x, y, drawn, crossed, colors="white", linewidths=0.7, zorder=2.5)
        lines.set_path_effects(_halo(1.6))


def _tile_edges(placed: PlacedImage) -> list[list[tuple[float, float]]]:
    """Return the lines between the tiles of an image, in pixels."""
    grid = placed.grid
    if grid.tiles is None or len(grid.tiles) != len(grid.places) or not grid.rows:
        return []
    tiles = np.nan_to_num(placed.on_grid(grid.tiles.astype(float)), nan=-1.0)
    left, right, bottom, top = extent(grid)
    width, height = (right - left) / grid.cols, (bottom - top) / grid.rows
    beside, below = tiles[:, 1:] != tiles[:, :-1], tiles[1:] != tiles[:-1]
    edges = []
    for row, col in np.argwhere(beside):
        x, y = left + (col + 1) * width, top + row * height
        edges.append([(x, y), (x, y + height)])
    for row, col in np.argwhere(below):
        x, y = left + col * width, top + (row + 1) * height
        edges.append([(x, y), (x + width, y)])
    return edges


def _draw_uncovered(axes: Axes, placed: PlacedImage) -> None:
    """Hatch and dim the parts of the image that no token covers."""
    for x0, y0, x1, y1 in uncovered(placed):
        axes.add_patch(
            Rectangle(
                (x0, y0),
                x1 - x0,
                y1 - y0,
                hatch="////",
                facecolor=(0.6, 0.6, 0.6, 0.75),
                edgecolor="#4d4d4d",
                linewidth=0.0,
                zorder=2,
            )
        )


def draw_rows(axes: Axes, placed: PlacedImage) -> None:
    """Draw lines between the rows of the grid, and the row numbers at the left."""
    left, right, bottom, top = extent(placed.grid)
    edges = np.linspace(top, bottom, placed.grid.rows + 1)
    axes.hlines(edges, left, right, color="white", linewidth=0.5, zorder=3)
    step = max(1, round(placed.grid.rows / 12))
    middles = {row: (edges[row] + edges[row + 1]) / 2 for row in range(0, placed.grid.rows, step)}
    inside = {row: y for row, y in middles.items() if 0 <= y <= placed.grid.height}
    axes.set_yticks(list(inside.values()), [str(row) for row in inside])
    axes.set(xlim=(0, placed.grid.width), ylim=(placed.grid.height, 0))
    axes.tick_params(length=0)


def _draw_crosses(axes: Axes, placed: PlacedImage, tokens: np.ndarray) -> None:
    """Draw a cross on each left-out token (index into the image's tokens)."""
    x0, y0, x1, y1 = placed.grid.boxes[tokens].T
    axes.plot(
        *((x0 + x1) / 2, (y0 + y1) / 2, "x"),
        color="white",
        markersize=4,
        markeredgewidth=1.2,
        zorder=3,
        path_effects=_halo(2.4),
    )


def named_boxes(boxes: PixelBoxes | None) -> list[tuple[str, PixelBox]]:
    """Return each box to draw with its name, or with an empty name.

    Raises:
        InputError: A box is invalid.
    """
    if boxes is None or not len(boxes):
        return []
    of_names = boxes.items() if isinstance(boxes, Mapping) else [("", boxes)]
    return [(name, tuple(box)) for name, of in of_names for box in pixel_boxes(of).tolist()]


def draw_boxes(
    axes: Axes, placed: PlacedImage, named: Sequence[tuple[str, PixelBox]], inches: float
) -> None:
    """Outline boxes, with their names if given, in white with a black halo.

    Args:
        axes: Axes to draw on.
        placed: The image.
        named: The name of each box, or an empty string, and the box.
        inches: Width of the axes. The names stay inside the image and avoid each other.
    """
    unit = placed.grid.width / inches / 72  # pixels of the image per point
    tall = (1.3 * SMALL + 4) * unit
    written: list[PixelBox] = []
    for name, (x0, y0, x1, y1) in named:
        outline = Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor="white")
        outline.set(linewidth=1.0, zorder=4, path_effects=_halo(2.2))
        axes.add_patch(outline)
        if not name:
            continue
        half = min(0.31 * SMALL * unit * len(name), placed.grid.width / 2)
        x = float(np.clip((x0 + x1) / 2, half, placed.grid.width - half))
        spots = [(y0 - tall, y0), (y1, y1 + tall)]
        clashes = [
            sum(a < x + half and c > x - half and b < bottom and d > top for a, b, c, d in written)
            + 2 * (top < 0 or bottom > placed.grid.height)
            for top, bottom in spots
        ]
        below = bool(clashes[1] < clashes[0])
        written.append((x - half, spots[below][0], x + half, spots[below][1]))
        axes.annotate(
            escaped(name),
            (x, y1 if below else y0),
            (0, -2.5 if below else 2.5),
            textcoords="offset points",
            ha="center",
            va="top" if below else "bottom",
            color="white",
            size=SMALL,
            zorder=5,
            path_effects=_halo(2.0),
        )


def _halo(width: float) -> list[patheffects.AbstractPathEffect]:
    return [patheffects.withStroke(linewidth=width, foreground="black")]
