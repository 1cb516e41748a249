"""Panels of an overlay figure: an image, a map of values over it, boxes and crosses.

``OverlayOptions`` holds the drawing options, ``Panel`` the content of one panel, and
``panel_figure`` draws rows of panels with the colour bars at the right and a note below. All
coordinates are pixels of the original image.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypedDict

import numpy as np
from jaxtyping import Bool, Float
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle
from PIL import Image, ImageFilter

from xmodal_interp.analysis.sinks import sink_keys
from xmodal_interp.attention import AttentionCall, Positions, resolve
from xmodal_interp.boxes.number_formats import pixel_boxes
from xmodal_interp.errors import InputError
from xmodal_interp.figures.placement import PixelBox, PixelBoxes, PlacedImage, extent, uncovered
from xmodal_interp.figures.scales import ColorScale, Show, check_show, scale_of
from xmodal_interp.figures.style import BAR, HIDDEN, SMALL, Picture, escaped, new_picture

_MOST_IN_A_ROW = 6
_LONGEST = 1024  # px; larger images are downscaled for drawing, in unchanged coordinates
_DARK, _LIGHT = (0, 100), (195, 255)  # grey levels of the image's outlines below a map


class MapOptions(TypedDict, total=False):
    """Keyword arguments of every figure on an image; see ``OverlayOptions``."""

    hide: Positions | Literal["sinks"] | None
    boxes: PixelBoxes | None
    smooth: bool
    vmax: float | None
    power: float


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
        vmax: Upper end of the colour scale. If not given: the largest value, or the 99th percentile
            if the largest is more than six times as large, such as that of an attention sink; the
            colour bar states this.
        power: Exponent of the colour scale for probabilities and shares: 1 is linear, 0 is a log
            scale. The default, the square root, keeps weak attention visible next to strong.
    """

    show: Show = "probability"
    hide: Positions | Literal["sinks"] | None = None
    boxes: PixelBoxes | None = None
    smooth: bool = False
    vmax: float | None = None
    power: float = 0.5

    def __post_init__(self) -> None:
        check_show(self.show)

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

    def scale(self, panels: Iterable[np.ndarray]) -> ColorScale:
        """Return one colour scale for all panels."""
        return scale_of(self.show, panels, vmax=self.vmax, power=self.power, clip=True)


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


def with_scale(panels: Sequence[Panel], scale: ColorScale) -> list[Panel]:
    """Return panels with one colour scale, transparent at its neutral value."""
    over = scale.over(_LIGHT if scale.diverging else _DARK)
    return [replace(panel, scale=over) for panel in panels]


def in_rows(panels: Sequence[Panel]) -> list[Sequence[Panel]]:
    """Split panels into the fewest rows, of about equal length."""
    n_rows = -(-len(panels) // _MOST_IN_A_ROW)
    length = -(-len(panels) // n_rows)
    return [panels[i : i + length] for i in range(0, len(panels), length)]


def panel_figure(
    placed: PlacedImage,
    rows: Sequence[Sequence[Panel]],
    options: OverlayOptions,
    title: str,
    row_titles: Sequence[str] = (),
) -> Picture:
    """Draw panels in rows.

    Args:
        placed: The image of panels that have none; its shape determines the size of the panels.
        rows: Panels of each row; rows may differ in length.
        options: Drawing options.
        title: Title of the figure.
        row_titles: Text at the left of each row.
    """
    n_cols = max(len(row) for row in rows)
    # inches of a panel: the image's aspect, smaller for many columns
    side = 2.0 if n_cols <= 4 else 1.75 if n_cols <= 6 else 1.3
    aspect = float(np.clip(placed.grid.width / placed.grid.height, 1 / 6, 6.0))
    width, height = side * aspect**0.5, side / aspect**0.5
    scales = list({id(p.scale): p.scale for row in rows for p in row if p.scale}.values())
    left = max((len(text) for text in row_titles), default=0) * 0.075
    tall = sum(height + (0.25 if any(panel.title for panel in row) else 0.08) for row in rows)
    picture = new_picture(
        (left + n_cols * (width + 0.08) + BAR * len(scales), tall),
        title,
        _note(placed, [panel for row in rows for panel in row], options),
    )
    grid = picture.subplots(len(rows), n_cols, squeeze=False)
    drawn: dict[int, list[Axes]] = {id(scale): [] for scale in scales}
    for (r, c), axes in np.ndenumerate(grid):
        if c >= len(rows[r]):
            axes.remove()
            continue
        _draw_panel(axes, rows[r][c].placed or placed, rows[r][c], options, width)
        drawn.get(id(rows[r][c].scale), []).append(axes)
        axes.xaxis.set_visible(False)
        axes.yaxis.set_visible(bool(row_titles) and c == 0)
        if row_titles and c == 0:
            axes.set_ylabel(escaped(row_titles[r]), rotation=0, ha="right", va="center")
    for scale in scales:
        scale.bar(picture, drawn[id(scale)], tall)
    return picture


def _note(placed: PlacedImage, panels: Sequence[Panel], options: OverlayOptions) -> str:
    """Return the note on how a figure is drawn."""
    images = list({id(one): one for one in (panel.placed or placed for panel in panels)}.values())
    how = "interpolated between {}s (bilinear)" if options.smooth else "one cell per {} (nearest)"
    parts = [how.format(unit) for unit in dict.fromkeys(one.unit for one in images)]
    bare = dict.fromkeys(one.unit for one in images if uncovered(one))
    parts += [f"hatched: no {unit} there" for unit in bare]
    undrawn = [panel.undrawn for panel in panels if panel.undrawn is not None]
    if undrawn:
        of_thumbnail = (
            " of the thumbnail, or" if any(one.grid.thumbnail is not None for one in images) else ""
        )
        without, whole = (_span(amounts) for amounts in zip(*undrawn, strict=True))
        parts.append(
            f"not drawn: tokens{of_thumbnail} without a place, which receive {without} of the "
            f"{whole} that the image receives"
        )
    marked = [int(panel.left_out.sum()) for panel in panels if panel.left_out is not None]
    if any(marked):
        parts.append(f"\u00d7: {_span(marked)} left out")
    elif marked:
        parts.append("nothing to leave out")
    return "; ".join(parts).capitalize() + "."


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
    else:
        draw_image(axes, placed, _LIGHT if panel.scale.diverging else _DARK)
        draw_map(axes, placed, placed.on_grid(panel.values), panel.scale, smooth=options.smooth)
        if np.isnan(panel.values).all():
            axes.text(
                *(0.5, 0.5, "hidden by the mask"),
                transform=axes.transAxes,
                ha="center",
                va="center",
                size=SMALL,
                color=HIDDEN,
            )
        _draw_uncovered(axes, placed)
        named = [("", box) for _, box in named]  # names are written once, on the image itself
    if panel.left_out is not None and placed.shares is None:
        _draw_crosses(axes, placed, np.flatnonzero(panel.left_out))
    draw_boxes(axes, placed, [("", box) for box in panel.outlined], inches)
    draw_boxes(axes, placed, named, inches)
    axes.set_title(escaped(panel.title))


def draw_image(axes: Axes, placed: PlacedImage, ground: tuple[int, int] | None = None) -> None:
    """Draw the image in its pixel coordinates, unchanged or as grey outlines.

    Outlines show where brightness changes, not how bright the image is, so the colours of a map
    over them depend on its values alone.

    Args:
        axes: Axes to draw on.
        placed: The image.
        ground: Range of grey levels for outlines; None draws the image unchanged.
    """
    picture = placed.image
    if max(picture.size) > _LONGEST:
        picture = picture.copy()
        picture.thumbnail((_LONGEST, _LONGEST))
    width, height = placed.grid.width, placed.grid.height
    corners = (0.0, float(width), float(height), 0.0)
    if ground is None:
        axes.imshow(np.asarray(picture), extent=corners, zorder=0)
    else:
        half = (ground[1] - ground[0]) / 2
        pixels = ground[0] + half + half * _outlines(picture)
        axes.imshow(pixels, cmap="gray", vmin=0, vmax=255, extent=corners, zorder=0)
    axes.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def _outlines(picture: Image.Image) -> Float[np.ndarray, "row col"]:
    """Return brightness minus that of the surroundings, scaled to -1 to 1; 0 in uniform areas."""
    grays = picture.convert("L")
    around = grays.filter(ImageFilter.GaussianBlur(max(1.0, max(picture.size) / 200)))
    detail = np.asarray(grays, dtype=float) - np.asarray(around, dtype=float)
    strong = float(np.percentile(np.abs(detail), 98))
    outlines: np.ndarray = np.clip(detail / max(strong, 8.0), -1, 1)
    return outlines


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
        zorder=1,
    )
    axes.set(xlim=(0, placed.grid.width), ylim=(placed.grid.height, 0))
    return drawn


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
