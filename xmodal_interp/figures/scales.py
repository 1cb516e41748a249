"""Colour scales and their colour bars: one scale per figure, or per panel.

* ``"probability"``: attention probability, from 0.
* ``"share"``: probability divided by the total on the image, from 0.
* ``"lift"``: probability times the number of visible keys, so that 1 is uniform attention; on a log
  scale around 1.

Cells that the mask hides are NaN, never 0, and are drawn in a separate colour.

Over an image, :meth:`ColorScale.over` draws values as light or as a layer of colour. The layer is
transparent at the neutral value. Its opacity is chosen such that the lightness (CIELAB) of the
colour over a dimmed middle grey rises in equal steps with the value, so that values can be compared
without seeing colours.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colorbar import Colorbar, make_axes
from matplotlib.colors import (
    Colormap,
    LinearSegmentedColormap,
    ListedColormap,
    LogNorm,
    Normalize,
    PowerNorm,
)
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from xmodal_interp.arguments import real_number
from xmodal_interp.errors import InputError, quoted
from xmodal_interp.figures.style import (
    DIVERGING_COLORS,
    HIDDEN,
    MATRIX_COLORS,
    NORMAL,
    OVERLAY_COLORS,
    OVERLAY_COLORS_ABOVE,
    OVERLAY_COLORS_BELOW,
    CmapLike,
    wrapped,
)

Show = Literal["probability", "share", "lift"]

Style = Literal["colour", "light"]
"""How values are drawn over an image."""

Meaning = Literal["amount", "difference", "ratio"]
"""Quantity for the choice of a colour scale: from 0, around 0, or around 1 on a log scale."""

FAINTEST = 1e-4
"""Lower end of the log scale of probabilities; lower if the largest value requires it."""

WIDEST = 4.0
"""Default limit of the log2 scale of lifts: 2 ** 4 times uniform attention."""

SHOW_LABELS = {
    "probability": "attention probability",
    "share": "share of image attention",
    "lift": "lift: times uniform\n(log scale)",
}
"""Labels of the colour bars."""

CLIPPED_AT = 99
"""Percentile of the values at which the scale of an overlay ends if the largest is far above it."""

_FAR_ABOVE = 6.0  # times; such a value would leave most of a square-root scale empty

_HIDDEN_DARK = "#8a8a8a"  # hidden cells on scales whose middle is white

DIMMED: Mapping[Style, float] = {"colour": 0.45, "light": 0.25}
"""Brightness of the image below a layer of colour, and of unlit parts in ``style="light"``."""

# opacity of the strongest values over an image; the weakest are transparent
_STRONG, _STRONG_BELOW = 0.85, 0.6
_LEVELS = 256

_BAR_WIDTH, _BAR_GAP = 0.13, 0.11  # of a colour bar, and between it and the panels, inches
_TALLEST_BAR = 6.0  # largest height of panels whose colour bar is as high as they are, inches
_SHORT_BAR = 2.6  # height of the colour bar of higher panels, inches


@dataclass(frozen=True, eq=False)
class _BarPlace:
    """Axes locator of a colour bar at the right of panels, aligned with their top.

    The constrained layout reserves space for a colour bar, but places it by the cells of the grid,
    and panels with a fixed aspect can be smaller than their cells. This locator places it by the
    panels.

    Attributes:
        panels: The panels.
        highest: Largest height, inches.
        aspect: Height divided by width.
    """

    panels: Sequence[Axes]
    highest: float
    aspect: float

    def __call__(self, axes: Any, _renderer: Any) -> Bbox:
        width, height = axes.figure.get_size_inches()
        around = Bbox.union([panel.get_position() for panel in self.panels])
        tall = min(around.height, self.highest / height)
        wide = tall * height / self.aspect / width
        return Bbox.from_bounds(around.x1 + _BAR_GAP / width, around.y1 - tall, wide, tall)


@dataclass(frozen=True, eq=False)
class ColorScale:
    """A colour scale.

    Attributes:
        norm: Maps drawn values to [0, 1].
        cmap: Maps [0, 1] to colours, and NaN to the colour of hidden cells.
        label: Label of the colour bar.
        log2: Whether the logarithm to base 2 is drawn.
        extend: The ends of the colour bar that include values beyond them.
        bar_cmap: Colours of the colour bar, if they differ from ``cmap``.
        own: Whether the scale is that of one of several panels with a common colour bar.
    """

    norm: Normalize
    cmap: Colormap
    label: str
    log2: bool = False
    extend: Literal["neither", "min", "max", "both"] = "neither"
    bar_cmap: Colormap | None = None
    own: bool = False

    @property
    def span(self) -> str:
        """The range of the values, such as ``"0 to 0.23"``."""
        low, high = float(self.norm.vmin or 0), float(self.norm.vmax or 0)
        if self.log2:
            return f"1/{2**high:.3g} to {2**high:.3g}"
        above = "more than " if self.extend in ("max", "both") else ""
        return f"{low:.2g} to {above}{high:.2g}"

    def colored(self, cmap: CmapLike) -> ColorScale:
        """Return the scale with other colours; unchanged if ``cmap`` is None."""
        if cmap is None:
            return self
        chosen = mpl.colormaps[cmap] if isinstance(cmap, str) else cmap
        return replace(self, cmap=chosen.with_extremes(bad=tuple(self.cmap.get_bad().tolist())))

    def relative(self) -> ColorScale:
        """Return the scale of one of several panels, whose common colour bar has no numbers."""
        label = re.sub(r"\nclipped at .*\n?.*largest: \S+", "", self.label)
        return replace(self, label=label, own=True)

    @property
    def diverging(self) -> bool:
        """Whether the neutral value is the middle of the scale instead of its lower end."""
        return float(self.norm.vmin or 0) < 0

    def drawn(self, values: np.ndarray) -> np.ma.MaskedArray[Any, Any]:
        """Return values for ``imshow``; NaN is masked, zeros get the lower end of a log scale."""
        hidden, low, high = np.isnan(values), float(self.norm.vmin or 0), float(self.norm.vmax or 0)
        if self.log2:  # values beyond an end stay beyond it, but become finite
            values = np.log2(np.clip(values, 2.0 ** (low - 1), 2.0 ** (high + 1)))
        elif isinstance(self.norm, LogNorm):
            values = np.maximum(values, low)
        return np.ma.masked_array(values, mask=hidden)

    def bar(
        self,
        figure: Figure,
        panels: Sequence[Axes],
        height: float,
        lines: Sequence[float] | np.ndarray = (),
    ) -> Colorbar:
        """Draw the colour bar at the right of panels, and return it.

        It extends from the top of the panels to their bottom; if they are very high, it is shorter.

        Args:
            figure: The figure.
            panels: The panels.
            height: Height of the panels, inches; an estimate suffices.
            lines: Values to mark by lines.
        """
        short = height > _TALLEST_BAR
        tall = _SHORT_BAR if short else height
        place = _BarPlace(panels, _SHORT_BAR if short else math.inf, tall / _BAR_WIDTH)
        # Two panels that touch the right and the lower edge are enough for the layout, which
        # measures the colour bar once per panel that it belongs to.
        last = max(panels, key=lambda panel: _corner(panel)[1])
        parents = list(dict.fromkeys([last, max(panels, key=_corner)]))
        across = Bbox.union([panel.get_position() for panel in parents]).width
        axes, placing = make_axes(
            parents,
            fraction=0.01,
            aspect=place.aspect,
            pad=_BAR_GAP / (across * figure.get_figwidth()),
            panchor=False,
        )
        axes.set_axes_locator(place)
        colors = ScalarMappable(self.norm, self.bar_cmap or self.cmap)
        extend = "neither" if self.own else self.extend
        bar = figure.colorbar(colors, cax=axes, extend=extend, **placing)
        label = f"{self.label}\nscale of each panel" if self.own else self.label
        bar.set_label(wrapped(label, tall, NORMAL))
        for value in lines:
            bar.ax.axhline(value, color="white", linewidth=0.7)
        if self.own:
            ends = [float(self.norm.vmin or 0), float(self.norm.vmax or 1)]
            middle = [0.0] if self.diverging else []
            names = ["low", *(["1" if self.log2 else "0"] if middle else []), "high"]
            bar.set_ticks([ends[0], *middle, ends[1]], labels=names)
            bar.minorticks_off()
        elif self.log2:
            end = int(np.floor(float(self.norm.vmax or 1)))
            step = 1 if end <= 3 else 2
            marks = list(range(-(end // step) * step, end + 1, step))
            names = [f"1/{2**-mark}" if mark < 0 else str(2**mark) for mark in marks]
            bar.set_ticks(marks, labels=names)
            bar.minorticks_off()
        return bar

    def over(self, style: Style = "colour", cmap: CmapLike = None) -> ColorScale:
        """Return the scale for an overlay: neutral values and NaN are transparent.

        The colour bar shows the colours over a middle grey.

        Args:
            style: ``"colour"``: a layer of colour over the dimmed image. ``"light"``: a black layer
                over the image, whose opacity falls with the value.
            cmap: Colours instead of the usual ones. Opacity is then proportional to the distance
                from the neutral value.
        """
        middle = 0.5 * (DIMMED[style] if style == "colour" else 1.0)
        if style == "light":
            colors = np.zeros((_LEVELS, 4))
            colors[:, 3] = (1 - DIMMED[style]) * np.linspace(1, 0, _LEVELS)
        elif cmap is not None:
            chosen = mpl.colormaps[cmap] if isinstance(cmap, str) else cmap
            colors = np.asarray(chosen(np.linspace(0, 1, _LEVELS)))
            colors[:, 3] = _STRONG * np.abs(np.linspace(-1 if self.diverging else 0, 1, _LEVELS))
        elif self.diverging:
            above = _layer(OVERLAY_COLORS_ABOVE, _LEVELS // 2, middle, _STRONG)
            below = _layer(OVERLAY_COLORS_BELOW, _LEVELS // 2, middle, _STRONG_BELOW)
            colors = np.concatenate([below[::-1], above])
        else:
            colors = _layer(OVERLAY_COLORS, _LEVELS, middle, _STRONG)
        alpha = colors[:, 3:]
        opaque = colors[:, :3] * alpha + (1 - alpha) * middle
        hidden = (0, 0, 0, 1 - DIMMED[style] if style == "light" else 0)
        over = ListedColormap(colors).with_extremes(bad=hidden, under=colors[0], over=colors[-1])
        return replace(self, cmap=over, bar_cmap=ListedColormap(opaque))


def _layer(named: Sequence[str], n: int, middle: float, strong: float) -> np.ndarray:
    """Return the colours of a layer with opacity, such that its lightness rises in equal steps.

    Args:
        named: The colours of weak to strong values; all are lighter than ``middle``.
        n: Number of levels.
        middle: Grey below the layer.
        strong: Opacity of the strongest values.
    """
    colors = np.asarray(
        LinearSegmentedColormap.from_list("layer", list(named))(np.linspace(0, 1, n))
    )
    steps = np.linspace(0, 1, 2049)[:, None, None]
    mixed = lightness(steps * colors[None, :, :3] + (1 - steps) * middle)  # [step, level]
    lowest, highest = mixed[0, 0], np.interp(strong, steps[:, 0, 0], mixed[:, -1])
    targets = np.linspace(lowest, highest, n)
    colors[:, 3] = [
        np.interp(target, mixed[:, i], steps[:, 0, 0]) for i, target in enumerate(targets)
    ]
    return colors


def lightness(colors: np.ndarray) -> np.ndarray:
    """Return the lightness (CIELAB L*, 0 to 100) of sRGB colours ``[..., 3]`` from 0 to 1."""
    linear = np.where(colors <= 0.04045, colors / 12.92, ((colors + 0.055) / 1.055) ** 2.4)
    luminance = linear @ [0.2126, 0.7152, 0.0722]
    cube_root = np.cbrt(luminance)
    return np.where(luminance > (6 / 29) ** 3, 116 * cube_root - 16, luminance * (29 / 3) ** 3)


def _corner(panel: Axes) -> tuple[int, int]:
    """Return the last row and the last column of a panel in its grid, each plus 1."""
    spec = panel.get_subplotspec()
    assert spec is not None
    return spec.rowspan.stop, spec.colspan.stop


def check_show(show: str, allowed: Sequence[str] = get_args(Show)) -> None:
    """Raise InputError if ``show`` is not one of the allowed values."""
    if not isinstance(show, str) or show not in allowed:
        raise InputError(f"show must be one of {', '.join(allowed)}; got {quoted(show)}.")


def scale_of(
    show: Show,
    panels: Iterable[np.ndarray],
    *,
    vmax: float | None = None,
    power: float = 1.0,
    clip: bool = False,
) -> ColorScale:
    """Return one colour scale for all panels of a figure.

    Args:
        show: Quantity of the values.
        panels: Values of the panels; NaN is ignored.
        vmax: Upper end; the largest value if not given. For a lift, its inverse is the lower end.
        power: Exponent of the colour scale for probabilities and shares: 1 is linear, 0 is a log
            scale.
        clip: As in :func:`color_scale`.
    """
    lowest = 1 if show == "lift" else 0
    if vmax is not None and not real_number(vmax, "vmax") > lowest:
        raise InputError(f"vmax must be above {lowest} for a {show}; got {vmax}.")
    meaning: Meaning = "ratio" if show == "lift" else "amount"
    return color_scale(meaning, panels, SHOW_LABELS[show], vmax=vmax, power=power, clip=clip)


def color_scale(
    meaning: Meaning,
    panels: Iterable[np.ndarray],
    label: str,
    *,
    vmax: float | None = None,
    power: float = 1.0,
    vmin: float = 0.0,
    clip: bool = False,
) -> ColorScale:
    """Return one colour scale for values of any quantity.

    Args:
        meaning: Quantity of the values. A ratio is drawn from ``1 / vmax`` to ``vmax``.
        panels: Values of the panels; NaN is ignored.
        label: Label of the colour bar.
        vmax: Upper end. If not given: the largest value; for a ratio, at most 2 ** ``WIDEST``.
        power: Exponent of the scale of amounts: 1 is linear, 0 is a log scale.
        vmin: Lower end of the scale of amounts, unless it is a log scale.
        clip: Whether a scale of amounts without ``vmax`` ends at the percentile ``CLIPPED_AT`` if
            the largest value is more than six times as large, such as that of an attention sink.
            The label states it.
    """
    if meaning not in get_args(Meaning):
        raise InputError(f"meaning must be one of {', '.join(get_args(Meaning))}; got {meaning!r}.")
    if vmax is not None and not real_number(vmax, "vmax") > 0:
        raise InputError(f"vmax must be above 0; got {vmax}.")
    values = finite(panels)
    if meaning == "amount":
        if clip and vmax is None and len(values):
            largest = float(values.max())
            end = float(np.percentile(values, CLIPPED_AT, method="lower"))
            if 0 < _FAR_ABOVE * end < largest:
                vmax, label = end, f"{label}\nclipped at the {CLIPPED_AT}th percentile;"
                label += f" largest: {largest:.2g}"
        return _amount_scale(values, label, vmax, power, vmin)
    if meaning == "ratio":
        if vmax is not None and not vmax > 1:
            raise InputError(f"vmax must be above 1 for a ratio; got {vmax}.")
        with np.errstate(divide="ignore"):
            values = np.log2(values)
    largest = float(np.abs(values).max(initial=0.0))
    if meaning == "ratio":
        end = float(np.clip(np.ceil(largest), 1, WIDEST)) if vmax is None else float(np.log2(vmax))
    else:
        end = (largest or 1.0) if vmax is None else vmax
    return ColorScale(
        Normalize(-end, end),
        mpl.colormaps[DIVERGING_COLORS].with_extremes(bad=_HIDDEN_DARK),
        label,
        log2=meaning == "ratio",
        extend="both" if largest > end * (1 + 1e-6) else "neither",
    )


def _amount_scale(
    values: np.ndarray, label: str, vmax: float | None, power: float, vmin: float
) -> ColorScale:
    if not 0 <= real_number(power, "power") <= 1:
        raise InputError(f"power must be between 0 (a log scale) and 1 (linear); got {power}.")
    colors = mpl.colormaps[MATRIX_COLORS].with_extremes(bad=HIDDEN)
    top = float(values.max(initial=0.0)) or 1.0
    end = top if vmax is None else vmax
    above = top > end * (1 + 1e-6)
    if power > 0:
        norm = Normalize(vmin, end) if power == 1 else PowerNorm(power, vmin, end)
        how = {1.0: "", 0.5: "\n(square-root scale)"}.get(power, f"\n(scale: power {power:g})")
        return ColorScale(norm, colors, label + how, extend="max" if above else "neither")
    positive = values[values > 0]
    start = max(float(positive.min(initial=end / 10)), min(FAINTEST, end / 10))
    below = bool((values < start * (1 - 1e-6)).any())
    return ColorScale(
        LogNorm(start, end),
        colors,
        f"{label}\n(log scale)",
        extend="both" if above and below else "max" if above else "min" if below else "neither",
    )


def finite(panels: Iterable[np.ndarray]) -> np.ndarray:
    """Return the values of all panels in one flat array, without NaN."""
    flat = [np.asarray(panel, dtype=float).ravel() for panel in panels]
    values = np.concatenate(flat) if flat else np.empty(0)
    return values[~np.isnan(values)]
