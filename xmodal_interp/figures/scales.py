"""Colour scales and their colour bars, one scale per figure.

* ``"probability"``: attention probability, from 0.
* ``"share"``: probability divided by the total on the image, from 0.
* ``"lift"``: probability times the number of visible keys, so that 1 is uniform attention; on a log
  scale around 1.

Cells that the mask hides are NaN, never 0, and are drawn in a separate colour.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, ListedColormap, LogNorm, Normalize, PowerNorm
from matplotlib.figure import Figure

from xmodal_interp.arguments import real_number
from xmodal_interp.errors import InputError, quoted
from xmodal_interp.figures.style import DIVERGING, HEAT, HIDDEN, NORMAL, SEQUENTIAL, wrapped

Show = Literal["probability", "share", "lift"]

Meaning = Literal["amount", "difference", "ratio"]
"""Quantity for the choice of a colour scale: from 0, around 0, or around 1 on a log scale."""

FAINTEST = 1e-4
"""Lower end of the log scale of probabilities; lower if the largest value requires it."""

WIDEST = 4.0
"""Default limit of the log2 scale of lifts: 2 ** 4 times uniform attention."""

_LABELS = {"probability": "attention probability", "share": "share of image attention"}

_HIDDEN_DARK = "#8a8a8a"  # hidden cells on scales whose middle is white

# opacity over an image of the weakest values and of the strongest
_FAINT, _STRONG = 0.0, 0.95


@dataclass(frozen=True, eq=False)
class Scale:
    """A colour scale.

    Attributes:
        norm: Maps drawn values to [0, 1].
        cmap: Maps [0, 1] to colours, and NaN to the colour of hidden cells.
        label: Label of the colour bar.
        log2: Whether the logarithm to base 2 is drawn.
        extend: The ends of the colour bar that include values beyond them.
        bar_cmap: Colours of the colour bar, if they differ from ``cmap``.
    """

    norm: Normalize
    cmap: Colormap
    label: str
    log2: bool = False
    extend: Literal["neither", "min", "max", "both"] = "neither"
    bar_cmap: Colormap | None = None

    @property
    def diverging(self) -> bool:
        """Whether the neutral value is the middle of the scale instead of its lower end."""
        return float(self.norm.vmin or 0) < 0

    def drawn(self, values: np.ndarray) -> np.ma.MaskedArray[Any, Any]:
        """Return values for ``imshow``: NaN masked, zeros of a log scale at its lower end."""
        hidden, low, high = np.isnan(values), float(self.norm.vmin or 0), float(self.norm.vmax or 0)
        if self.log2:  # values beyond an end stay beyond it, but become finite
            values = np.log2(np.clip(values, 2.0 ** (low - 1), 2.0 ** (high + 1)))
        elif isinstance(self.norm, LogNorm):
            values = np.maximum(values, low)
        return np.ma.masked_array(values, mask=hidden)

    def bar(self, figure: Figure, axes: Axes, height: float) -> None:
        """Draw the colour bar into ``axes``, which are ``height`` inches high."""
        bar = figure.colorbar(
            ScalarMappable(self.norm, self.bar_cmap or self.cmap), cax=axes, extend=self.extend
        )
        bar.set_label(wrapped(self.label, height, NORMAL))
        if self.log2:
            end = int(np.floor(float(self.norm.vmax or 1)))
            step = 1 if end <= 3 else 2
            marks = list(range(-(end // step) * step, end + 1, step))
            names = [f"1/{2**-mark}" if mark < 0 else str(2**mark) for mark in marks]
            bar.set_ticks(marks, labels=names)
            bar.minorticks_off()

    def over(self, ground: tuple[int, int]) -> Scale:
        """Return the scale for an overlay: neutral values and NaN are transparent.

        The colour bar shows the colours over the middle grey of ``ground``, the range of grey
        levels of the image's outlines.
        """
        colors = (self.cmap if self.diverging else mpl.colormaps[HEAT])(np.linspace(0, 1, 256))
        says = np.abs(np.linspace(-1, 1, 256)) if self.diverging else np.linspace(0, 1, 256)
        colors[:, 3] = _FAINT + (_STRONG - _FAINT) * says
        alpha = colors[:, 3:]
        opaque = colors[:, :3] * alpha + (1 - alpha) * sum(ground) / 2 / 255
        over = ListedColormap(colors).with_extremes(
            bad=(0, 0, 0, 0), under=colors[0], over=colors[-1]
        )
        return replace(self, cmap=over, bar_cmap=ListedColormap(opaque))


def check_show(show: str, allowed: Sequence[str] = get_args(Show)) -> None:
    """Raise InputError if ``show`` is not one of the allowed values."""
    if not isinstance(show, str) or show not in allowed:
        raise InputError(f"show must be one of {', '.join(allowed)}; got {quoted(show)}.")


def scale_of(
    show: Show, panels: Iterable[np.ndarray], *, vmax: float | None = None, power: float = 1.0
) -> Scale:
    """Return one colour scale for all panels of a figure.

    Args:
        show: Quantity of the values.
        panels: Values of the panels; NaN is ignored.
        vmax: Upper end; the largest value if not given. For a lift, its inverse is the lower end.
        power: Exponent of the colour scale for probabilities and shares: 1 is linear, 0 is a log
            scale.
    """
    lowest = 1 if show == "lift" else 0
    if vmax is not None and not real_number(vmax, "vmax") > lowest:
        raise InputError(f"vmax must be above {lowest} for a {show}; got {vmax}.")
    values = finite(panels)
    if show == "lift":
        return ratio_scale([values], "lift: times uniform\n(log scale)", vmax)
    return value_scale([values], label_of(show), vmax=vmax, power=power)


def label_of(show: Show) -> str:
    """Return the label of the colour bar for a quantity."""
    return _LABELS[show]


def value_scale(
    panels: Iterable[np.ndarray],
    label: str,
    *,
    vmax: float | None = None,
    power: float = 1.0,
    vmin: float = 0.0,
) -> Scale:
    """Return a scale from ``vmin``, or from the smallest value if it is a log scale.

    Args:
        panels: Values of the panels; NaN is ignored.
        label: Label of the colour bar.
        vmax: Upper end; the largest value if not given.
        power: Exponent of the colour scale: 1 is linear, 0 is a log scale.
        vmin: Lower end of a scale that is not a log scale.
    """
    if not 0 <= real_number(power, "power") <= 1:
        raise InputError(f"power must be between 0 (a log scale) and 1 (linear); got {power}.")
    values = finite(panels)
    top = float(values.max(initial=0.0)) or 1.0
    end = top if vmax is None else vmax
    above = top > end * (1 + 1e-6)
    if power > 0:
        norm = Normalize(vmin, end) if power == 1 else PowerNorm(power, vmin, end)
        how = {1.0: "", 0.5: "\n(square-root scale)"}.get(power, f"\n(scale: power {power:g})")
        return Scale(norm, _colors(SEQUENTIAL), label + how, extend="max" if above else "neither")
    positive = values[values > 0]
    start = max(float(positive.min(initial=end / 10)), min(FAINTEST, end / 10))
    below = bool((values < start * (1 - 1e-6)).any())
    return Scale(
        LogNorm(start, end),
        _colors(SEQUENTIAL),
        f"{label}\n(log scale)",
        extend="both" if above and below else "max" if above else "min" if below else "neither",
    )


def scale_for(
    meaning: Meaning,
    panels: Sequence[np.ndarray],
    label: str,
    *,
    vmax: float | None = None,
    power: float = 1.0,
) -> Scale:
    """Return a scale for any quantity; ``power`` applies to amounts only."""
    if vmax is not None and not real_number(vmax, "vmax") > 0:
        raise InputError(f"vmax must be above 0; got {vmax}.")
    if meaning == "amount":
        return value_scale(panels, label, vmax=vmax, power=power)
    if meaning == "difference":
        return difference_scale(panels, label, vmax)
    if meaning == "ratio":
        if vmax is not None and not vmax > 1:
            raise InputError(f"vmax must be above 1 for a ratio; got {vmax}.")
        return ratio_scale(panels, label, vmax)
    raise InputError(f"meaning must be one of {', '.join(get_args(Meaning))}; got {meaning!r}.")


def difference_scale(panels: Iterable[np.ndarray], label: str, vmax: float | None = None) -> Scale:
    """Return a diverging scale centred on 0."""
    largest = float(np.abs(finite(panels)).max(initial=0.0)) or 1.0
    end = largest if vmax is None else vmax
    beyond = largest > end * (1 + 1e-6)
    colors = _colors(DIVERGING, _HIDDEN_DARK)
    return Scale(Normalize(-end, end), colors, label, extend="both" if beyond else "neither")


def ratio_scale(panels: Iterable[np.ndarray], label: str, vmax: float | None = None) -> Scale:
    """Return a diverging log scale centred on 1, at most ``WIDEST`` wide unless ``vmax`` is given.

    Values beyond an end have the colour of that end.
    """
    with np.errstate(divide="ignore"):
        largest = float(np.abs(np.log2(finite(panels))).max(initial=0.0))
    end = float(np.clip(np.ceil(largest), 1, WIDEST)) if vmax is None else float(np.log2(vmax))
    return Scale(
        Normalize(-end, end),
        _colors(DIVERGING, _HIDDEN_DARK),
        label,
        log2=True,
        extend="both" if largest > end else "neither",
    )


def finite(panels: Iterable[np.ndarray]) -> np.ndarray:
    """Return the values of all panels in one flat array, without NaN."""
    flat = [np.asarray(panel, dtype=float).ravel() for panel in panels]
    values = np.concatenate(flat) if flat else np.empty(0)
    return values[~np.isnan(values)]


def _colors(name: str, hidden: str = HIDDEN) -> Colormap:
    return mpl.colormaps[name].with_extremes(bad=hidden)
