"""Matrices with labelled axes: one label per run of image tokens, one per text token.

A prompt has hundreds of image tokens and a few words. At equal width, text tokens would be too thin
to label. A token with a name is therefore drawn several times as wide as an image token, and a note
on the figure gives the factor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import Patch, Rectangle
from matplotlib.transforms import BboxTransformTo, ScaledTranslation, blended_transform_factory

from xmodal_interp.figures.scales import ColorScale
from xmodal_interp.figures.style import SMALL, Width, group_color, readable

NAMES = 1.2
"""Inches for the names and the axis label left of or below a matrix."""

PANELS_IN_A_ROW: Mapping[Width | None, int] = {None: 4, "page": 2, "column": 1}
"""Largest number of matrices next to each other, by the width of the figure."""

_PITCH = 0.115  # smallest distance of two legible names, inches
_BROAD = 0.75  # width of a run's name that is written along the axis, inches
_MOST_FOR_NAMES = 0.65  # largest share of an axis for tokens with names
_LEAST_FOR_LINES = 0.09  # a line would hide runs narrower than this, inches
_LEGEND = 0.9  # width of an entry of the legend, inches
_BELOW_NAMES = 0.68  # inches between a matrix and the legend of its groups


@dataclass(frozen=True)
class Run:
    """Adjacent positions of one group: ``start`` to ``stop`` (exclusive) of an axis."""

    group: str
    start: int
    stop: int


@dataclass(frozen=True, eq=False)
class AxisLabels:
    """Labels of one axis of a matrix.

    Attributes:
        names: One per position; empty for positions labelled only by their run.
        groups: One per position: ``image 0``, ``text``, ``generated``, ``special``, ...
        sizes: Number of tokens that each position stands for; 1 each if empty.
    """

    names: tuple[str, ...]
    groups: tuple[str, ...]
    sizes: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.names)

    def take(self, index: np.ndarray) -> AxisLabels:
        """Return the labels of the positions in ``index``."""
        chosen = index.tolist()
        return AxisLabels(
            tuple(self.names[i] for i in chosen), tuple(self.groups[i] for i in chosen)
        )

    def pooled(self, inches: float, most: int) -> tuple[AxisLabels, np.ndarray]:
        """Return the labels of at most about ``most`` bins, and the first position of each bin.

        Adjacent positions of one group are pooled. Positions whose names fit on an axis of
        ``inches`` are kept.
        """
        if len(self) <= most:
            return self, np.arange(len(self))
        named = np.array([bool(name) for name in self.names])
        keeps = int(named.sum()) * _PITCH / inches <= _MOST_FOR_NAMES
        n_kept = int(named.sum()) if keeps else 0
        factor = -(-(len(self) - n_kept) // max(1, most - n_kept))
        starts: list[int] = []
        for run in self.runs():
            start = run.start
            while start < run.stop:
                starts.append(start)
                stop = min(start + factor, run.stop)
                if keeps and named[start]:
                    stop = start + 1
                elif keeps and named[start:stop].any():
                    stop = start + int(np.argmax(named[start:stop]))
                start = stop
        firsts = np.array(starts)
        sizes = np.diff(firsts, append=len(self))
        names = tuple(
            self.names[i] if size == 1 and keeps else ""
            for i, size in zip(starts, sizes.tolist(), strict=True)
        )
        groups = tuple(self.groups[i] for i in starts)
        return AxisLabels(names, groups, tuple(sizes.tolist())), firsts

    def runs(self) -> list[Run]:
        """Return the runs of adjacent positions of one group, in order."""
        found, start = [], 0
        for group, members in groupby(self.groups):
            stop = start + len(list(members))
            found.append(Run(group, start, stop))
            start = stop
        return found

    def widths(self, inches: float) -> np.ndarray:
        """Return the drawn width of each position on an axis of this length.

        The unit is the narrowest position.
        """
        single = np.array([bool(name) for name in self.names], dtype=bool)
        n_single, n_other = int(single.sum()), int((~single).sum())
        share = n_single * _PITCH / inches
        if not n_single or not n_other or share > _MOST_FOR_NAMES:
            return np.ones(len(self), dtype=int)
        wide = max(1, int(np.ceil(share * n_other / (n_single * (1 - share)))))
        return np.where(single, wide, 1)


def labels_of(table: pd.DataFrame) -> AxisLabels:
    """Return the labels of a token table."""
    names, groups = [], []
    for kind, role, image, token in zip(
        table["kind"], table["role"], table["image"], table["token"], strict=True
    ):
        of_image = kind in ("image", "video")
        names.append("" if of_image or kind == "padding" else readable(str(token), 12))
        groups.append(
            f"image {image}"
            if kind == "image"
            else "generated"
            if kind == "text" and role == "generated"
            else str(kind)
        )
    return AxisLabels(tuple(names), tuple(groups))


def group_labels(n: int, group: str, names: Sequence[str] | None = None) -> AxisLabels:
    """Return labels for ``n`` positions of one group, for calls without a token table."""
    shown = (
        ("",) * n if names is None else tuple(readable(name, 12) if name else "" for name in names)
    )
    return AxisLabels(shown, (group,) * n)


def draw_matrix(
    axes: Axes,
    values: np.ndarray,
    rows: AxisLabels,
    columns: AxisLabels,
    scale: ColorScale,
    inches: tuple[float, float],
    n_lines: int = 1,
) -> None:
    """Draw a matrix ``[row, column]`` with its labels; NaN has the colour of hidden cells.

    Args:
        axes: Axes to draw on.
        values: The matrix.
        rows: Labels of the rows.
        columns: Labels of the columns.
        scale: Colour scale.
        inches: Width and height of the axes.
        n_lines: Number of lines of the label of the horizontal axis.
    """
    wide, tall = columns.widths(inches[0]), rows.widths(inches[1])
    shown = np.asarray(values, dtype=np.float32)
    spread = np.repeat(np.repeat(shown, tall, axis=0), wide, axis=1)
    x, y = np.concatenate([[0], wide.cumsum()]), np.concatenate([[0], tall.cumsum()])
    axes.imshow(
        scale.drawn(spread),
        norm=scale.norm,
        cmap=scale.cmap,
        extent=(0, int(x[-1]), int(y[-1]), 0),
        interpolation="auto" if max(spread.shape) > 1500 else "nearest",
        interpolation_stage="data",
        aspect="auto",
    )
    for spine in axes.spines.values():
        spine.set_visible(True)
    named = _label(axes, rows, y, inches[1], upright=True)
    named |= _label(axes, columns, x, inches[0], upright=False)
    unnamed = [name for name in dict.fromkeys(rows.groups + columns.groups) if name not in named]
    if any(unnamed):
        axes.legend(
            handles=[Patch(color=group_color(name), label=name) for name in unnamed if name],
            loc="upper right",  # the label of the axis is in the middle
            bbox_to_anchor=(1.0, -(_BELOW_NAMES + 0.17 * (n_lines - 1)) / inches[1]),
            ncols=max(1, min(len(unnamed), int(inches[0] / 2 / _LEGEND))),
            borderaxespad=0,
        )


def name_blocks(
    axes: Axes,
    rows: AxisLabels,
    columns: AxisLabels,
    text: Callable[[Run, Run], str],
    inches: tuple[float, float],
) -> None:
    """Write the text of each block in its upper right corner, if the block is large enough."""
    x = np.concatenate([[0], columns.widths(inches[0]).cumsum()])
    y = np.concatenate([[0], rows.widths(inches[1]).cumsum()])
    for row in rows.runs():
        for column in columns.runs():
            width = (x[column.stop] - x[column.start]) * inches[0] / x[-1]
            height = (y[row.stop] - y[row.start]) * inches[1] / y[-1]
            label = text(row, column)
            if height < 0.22 or width < 0.062 * len(label) + 0.15:
                continue
            axes.annotate(
                label,
                (x[column.stop], y[row.start]),
                (-4, -4),
                textcoords="offset points",
                ha="right",
                va="top",
                size=SMALL,
                bbox={"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 1.5},
            )


def legible_side(labels: AxisLabels, least: float, most: float) -> float:
    """Return the side, in inches, at which all names are legible; ``least`` if above ``most``."""
    needed = sum(bool(name) for name in labels.names) * _PITCH
    needed = needed / _MOST_FOR_NAMES if "" in labels.names else needed
    return float(max(least, needed)) if needed <= most else least


def pooling_note(labels: Sequence[AxisLabels], pool: str) -> str:
    """Return a sentence on the pooling of positions; empty if there is none."""
    most = max((size for each in labels for size in each.sizes), default=1)
    if most == 1:
        return ""
    of = "mean" if pool == "mean" else "largest value"
    return f" A cell is the {of} of the visible cells of up to {most} adjacent tokens per side."


def widening_note(labels: Sequence[AxisLabels], inches: float) -> str:
    """Return a sentence on the width of tokens with names; empty if all are equally wide."""
    times = {int(each.widths(inches).max(initial=1)) for each in labels}
    if max(times) == 1:
        return ""
    at_most = "up to " if len(times) > 1 else ""
    return f" Tokens with a name are drawn {at_most}{max(times)} times as wide as the others."


def _label(
    axes: Axes, labels: AxisLabels, edges: np.ndarray, inches: float, *, upright: bool
) -> set[str]:
    """Draw names, a strip in the group colours, and lines between runs.

    Returns:
        The groups that have a label on one of their runs or tokens.
    """
    scale = inches / max(edges[-1], 1)
    legible = bool((np.diff(edges)[[bool(n) for n in labels.names]] * scale >= 0.95 * _PITCH).all())
    # (coordinate, text, group, whether the text is written along the axis)
    ticks: list[tuple[float, str, str, bool]] = []
    before = Run("", 0, 0)
    for run in labels.runs():
        start, stop = float(edges[run.start]), float(edges[run.stop])
        both = [(each, (edges[each.stop] - edges[each.start]) * scale) for each in (before, run)]
        before = run
        if not run.group:
            continue
        _strip(axes, start, stop, run.group, upright=upright)
        if _parted(both):
            line = axes.axhline if upright else axes.axvline
            line(start, color="white", linewidth=1.4)
            line(start, color="black", linewidth=0.6)
        single = [i for i in range(run.start, run.stop) if labels.names[i]]
        if single and legible:
            ticks += [
                (float(edges[i : i + 2].mean()), labels.names[i], run.group, False) for i in single
            ]
        elif (stop - start) * scale >= 1.5 * _PITCH:
            n = sum(labels.sizes[run.start : run.stop]) if labels.sizes else run.stop - run.start
            text = run.group if n == 1 else f"{run.group}\n{n} tokens"
            broad = (stop - start) * scale >= _BROAD
            ticks.append(((start + stop) / 2, text if broad else run.group, run.group, broad))
    axis = axes.yaxis if upright else axes.xaxis
    axis.set_ticks([place for place, *_ in ticks], labels=[text for _, text, *_ in ticks])
    axis.set_tick_params(length=0, pad=9)
    short = all(len(text) <= 2 for _, text, *_ in ticks)
    for label, (_, _, group, along) in zip(axis.get_ticklabels(), ticks, strict=True):
        turned = upright == along and not (short and not upright)
        label.set(color=group_color(group), size=SMALL, rotation=90 if turned else 0)
        label.set(multialignment="center", **({"va": "center"} if upright else {"ha": "center"}))
    return {group for _, _, group, _ in ticks}


def _parted(neighbours: Sequence[tuple[Run, float]]) -> bool:
    """Return whether two adjacent runs, given with their widths, have room for a line."""
    ends_image = any(run.group.startswith("image") and wide >= 0.5 for run, wide in neighbours)
    return all(wide > 0 and (ends_image or wide >= _LEAST_FOR_LINES) for _, wide in neighbours)


def _strip(axes: Axes, start: float, stop: float, group: str, *, upright: bool) -> None:
    """Draw a bar in the group's colour along these positions, next to the matrix."""
    thin, gap = 0.06, 0.025  # inches
    corner = ScaledTranslation(0, 0, BboxTransformTo(axes.bbox))
    inches = axes.figure.dpi_scale_trans + corner
    bar = Rectangle((-gap - thin, start), thin, stop - start)
    transform = blended_transform_factory(inches, axes.transData)
    if not upright:
        bar = Rectangle((start, -gap - thin), stop - start, thin)
        transform = blended_transform_factory(axes.transData, inches)
    bar.set(transform=transform, color=group_color(group), linewidth=0, clip_on=False)
    axes.add_artist(bar)
