"""Check that figures are readable: nothing is cut off, no texts overlap, sizes are bounded."""

import itertools

import numpy as np
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

WIDEST, HIGHEST = 15.0, 20.0  # inches
_TOUCHING = 1.5  # pixels by which boxes of texts may overlap
_DARK, _MOST_DARK = 40, 0.6  # grey level, and largest share of pixels below it


def texts_of(figure: Figure) -> list[Text]:
    """Return the texts that are drawn, with the tick labels that are in view."""
    found = list(figure.texts)
    for axes in figure.axes:
        if not axes.get_visible():
            continue
        found += [axes.title, axes._left_title, axes._right_title, *axes.texts]
        legend = axes.get_legend()
        if legend is not None:
            found += [*legend.get_texts(), legend.get_title()]
        for axis in (axes.xaxis, axes.yaxis):
            if axis.get_visible() and axes.axison:
                found += [axis.label, *_tick_labels(axis)]
    return [text for text in found if text.get_visible() and text.get_text().strip()]


def _tick_labels(axis: Axis) -> list[Text]:
    return [label for tick in axis._update_ticks() for label in (tick.label1, tick.label2)]


def problems_of(figure: Figure) -> list[str]:
    """Return what is wrong with a figure: empty if it is readable."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    width, height = figure.get_size_inches()
    problems = []
    if width > WIDEST or height > HIGHEST:
        problems.append(f"{width:.1f} x {height:.1f} inches is too large")
    edges = Bbox.from_bounds(0, 0, width * figure.dpi, height * figure.dpi)
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts_of(figure)]
    for words, box in boxes:
        if box.x0 < -1 or box.y0 < -1 or box.x1 > edges.x1 + 1 or box.y1 > edges.y1 + 1:
            problems.append(f"{words!r} is cut off")
    for (one, first), (other, second) in itertools.combinations(boxes, 2):
        across = min(first.x1, second.x1) - max(first.x0, second.x0)
        down = min(first.y1, second.y1) - max(first.y0, second.y0)
        if min(across, down) > _TOUCHING:
            problems.append(f"{one!r} overlaps {other!r}")
    for axes in figure.axes:
        box = axes.get_window_extent()
        if min(box.width, box.height) < 0.08 * figure.dpi:
            problems.append(
                f"axes {axes.get_title()!r} are only {box.width:.0f} x {box.height:.0f} px"
            )
    pixels = np.asarray(canvas.buffer_rgba())[..., :3].mean(-1)
    dark = float((pixels < _DARK).mean())
    if dark > _MOST_DARK:
        problems.append(f"{dark:.0%} of the figure is black")
    return problems
