"""Draw an image, heat maps, boxes and marks in pixel coordinates of the original image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle
from PIL import Image, ImageFilter

from xmodal_interp.figures.placement import Box, Boxes, Place, extent, uncovered
from xmodal_interp.figures.scales import Scale
from xmodal_interp.figures.style import SMALL, bare, plain

_LONGEST = 1024  # px; larger images are downscaled for drawing, in unchanged coordinates
DARK, LIGHT = (0, 100), (195, 255)
"""Ranges of grey levels for the outlines of an image below a heat map."""


def draw_image(axes: Axes, place: Place, ground: tuple[int, int] | None = None) -> None:
    """Draw the image in its pixel coordinates, unchanged or as grey outlines.

    Outlines show where brightness changes, not how bright the image is, so the colours of a map
    over them depend on its values alone.

    Args:
        axes: Axes to draw on.
        place: The image.
        ground: Range of grey levels for outlines; None draws the image unchanged.
    """
    picture = place.image
    if max(picture.size) > _LONGEST:
        picture = picture.copy()
        picture.thumbnail((_LONGEST, _LONGEST))
    width, height = place.grid.width, place.grid.height
    corners = (0.0, float(width), float(height), 0.0)
    if ground is None:
        axes.imshow(np.asarray(picture), extent=corners, zorder=0)
    else:
        half = (ground[1] - ground[0]) / 2
        pixels = ground[0] + half + half * _outlines(picture)
        axes.imshow(pixels, cmap="gray", vmin=0, vmax=255, extent=corners, zorder=0)
    axes.set(xlim=(0, width), ylim=(height, 0))
    bare(axes)


def _outlines(picture: Image.Image) -> Float[np.ndarray, "row col"]:
    """Return brightness minus that of the surroundings, scaled to -1 to 1; 0 in uniform areas."""
    grays = picture.convert("L")
    around = grays.filter(ImageFilter.GaussianBlur(max(1.0, max(picture.size) / 200)))
    detail = np.asarray(grays, dtype=float) - np.asarray(around, dtype=float)
    strong = float(np.percentile(np.abs(detail), 98))
    outlines: np.ndarray = np.clip(detail / max(strong, 8.0), -1, 1)
    return outlines


def draw_map(
    axes: Axes, place: Place, grid: np.ndarray, scale: Scale, *, smooth: bool
) -> AxesImage:
    """Draw values ``[row, col]`` over their tokens; NaN is transparent."""
    drawn = axes.imshow(
        scale.drawn(grid),
        extent=extent(place.grid),
        norm=scale.norm,
        cmap=scale.cmap,
        interpolation="bilinear" if smooth else "nearest",
        zorder=1,
    )
    axes.set(xlim=(0, place.grid.width), ylim=(place.grid.height, 0))
    return drawn


def draw_uncovered(axes: Axes, place: Place) -> None:
    """Hatch and dim the parts of the image that no token covers."""
    for x0, y0, x1, y1 in uncovered(place):
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


def draw_rows(axes: Axes, place: Place) -> None:
    """Draw lines between the rows of the grid, and the row numbers at the left."""
    left, right, bottom, top = extent(place.grid)
    edges = np.linspace(top, bottom, place.grid.rows + 1)
    axes.hlines(edges, left, right, color="white", linewidth=0.5, zorder=3)
    step = max(1, round(place.grid.rows / 12))
    middles = {row: (edges[row] + edges[row + 1]) / 2 for row in range(0, place.grid.rows, step)}
    inside = {row: y for row, y in middles.items() if 0 <= y <= place.grid.height}
    axes.set_yticks(list(inside.values()), [str(row) for row in inside])
    axes.set(xlim=(0, place.grid.width), ylim=(place.grid.height, 0))
    axes.tick_params(length=0)


def draw_marks(axes: Axes, place: Place, tokens: np.ndarray) -> None:
    """Draw a cross on each left-out token (index into the image's tokens)."""
    x0, y0, x1, y1 = place.grid.boxes[tokens].T
    axes.plot(
        *((x0 + x1) / 2, (y0 + y1) / 2, "x"),
        color="white",
        markersize=4,
        markeredgewidth=1.2,
        zorder=3,
        path_effects=_halo(2.4),
    )


def draw_boxes(axes: Axes, place: Place, boxes: Boxes) -> None:
    """Outline boxes, with their names if given, in white with a black halo."""
    items = list(boxes.items()) if isinstance(boxes, Mapping) else []
    for x0, y0, x1, y1 in boxes.values() if isinstance(boxes, Mapping) else boxes:
        outline = Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor="white")
        outline.set(linewidth=1.0, zorder=4, path_effects=_halo(2.2))
        axes.add_patch(outline)
    for (name, _), (x, y, below) in zip(items, _name_places(axes, place, items), strict=True):
        axes.annotate(
            plain(name),
            (x, y),
            (0, -2.5 if below else 2.5),
            textcoords="offset points",
            ha="center",
            va="top" if below else "bottom",
            color="white",
            size=SMALL,
            zorder=5,
            path_effects=_halo(2.0),
        )


def _name_places(
    axes: Axes, place: Place, items: Sequence[tuple[str, Box]]
) -> list[tuple[float, float, bool]]:
    """Return the position of each name in pixels, and whether it is below its box.

    Names stay inside the image and avoid each other.
    """
    inches = axes.get_position().width * axes.figure.get_figwidth()  # type: ignore[union-attr]
    unit = place.grid.width / inches / 72  # pixels of the image per point
    tall = (1.3 * SMALL + 4) * unit
    taken: list[Box] = []
    found = []
    for name, (x0, y0, x1, y1) in items:
        half = min(0.31 * SMALL * unit * len(name), place.grid.width / 2)
        x = float(np.clip((x0 + x1) / 2, half, place.grid.width - half))
        spots = [(y0 - tall, y0), (y1, y1 + tall)]
        clash = [
            sum(a < x + half and c > x - half and b < bottom and d > top for a, b, c, d in taken)
            + 2 * (top < 0 or bottom > place.grid.height)
            for top, bottom in spots
        ]
        below = bool(clash[1] < clash[0])
        taken.append((x - half, spots[below][0], x + half, spots[below][1]))
        found.append((x, y1 if below else y0, below))
    return found


def _halo(width: float) -> list[patheffects.AbstractPathEffect]:
    return [patheffects.withStroke(linewidth=width, foreground="black")]
