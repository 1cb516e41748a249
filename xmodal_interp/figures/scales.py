"""What a colour means: one scale per figure, with its colour bar.

* ``"probability"``: as it is, from 0.
* ``"share"``: of the attention that an image gets, from 0.
* ``"lift"``: probability times the number of visible keys, so that 1 is uniform attention; on a log
  scale around 1.

What the mask hides is no number: it is NaN here and has a colour of its own.
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
"""What values of any origin are: amounts from 0, differences around 0, or ratios around 1."""

FAINTEST = 1e-4
"""Where the log scale of probabilities ends."""

WIDEST = 4.0
"""Where the log scale of lifts ends, if nothing else is asked for: 2 ** 4 times uniform."""

_LABELS = {"probability": "attention probability", "share": "share of image attention"}

_HIDDEN_DARK = "#8a8a8a"  # where the middle of the scale is white

# opacity over an image of values that say nothing, and of the strongest
_FAINT, _STRONG = 0.0, 0.95


@dataclass(frozen=True, eq=False)
class Scale:
    """Colours for values.

    Attributes:
        norm: From drawn values to [0, 1].
        cmap: From there to colours; NaN has the colour of what is hidden.
        label: What the colour bar says.
        log2: Whether the logarithm to base 2 is drawn.
        extend: Which ends of the colour bar stand for values beyond it.
        bar_cmap: Colours of the colour bar, if they are not those of ``cmap``.
    """

    norm: Normalize
    cmap: Colormap
    label: str
    log2: bool = False
    extend: Literal["neither", "min", "max", "both"] = "neither"
    bar_cmap: Colormap | None = None

    @property
    def diverging(self) -> bool:
        """Whether the scale has a middle that says nothing, instead of an end that does."""
        return float(self.norm.vmin or 0) < 0

    def drawn(self, values: np.ndarray) -> np.ma.MaskedArray[Any, Any]:
        """Values as they are drawn: NaN masked, zeros on a log scale at its lower end."""
        hidden, low, high = np.isnan(values), float(self.norm.vmin or 0), float(self.norm.vmax or 0)
        if self.log2:  # what is beyond an end stays beyond it, but finite
            values = np.log2(np.clip(values, 2.0 ** (low - 1), 2.0 ** (high + 1)))
        elif isinstance(self.norm, LogNorm):
            values = np.maximum(values, low)
        return np.ma.masked_array(values, mask=hidden)

    def bar(self, figure: Figure, axes: Axes, height: float) -> None:
        """The colour bar, in axes of its own that are ``height`` inches high."""
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
        """Colours over the outlines of an image: what says little is see-through, and so is NaN.

        What the colour bar shows is the colours over the ground's middle grey.
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
    """Refuse what cannot be shown."""
    if not isinstance(show, str) or show not in allowed:
        raise InputError(f"show must be one of {', '.join(allowed)}; got {quoted(show)}.")


def scale_of(
    show: Show, panels: Iterable[np.ndarray], *, vmax: float | None = None, power: float = 1.0
) -> Scale:
    """One scale for all panels of a figure.

    Args:
        show: What the values are.
        panels: Their values; NaN is left out.
        vmax: Upper end; that of the values if not given. For a lift, its inverse is the lower end.
        power: Colours of probabilities and shares grow with this power of the value; 0 is a log
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
    """What a colour bar says of values."""
    return _LABELS[show]


def value_scale(
    panels: Iterable[np.ndarray],
    label: str,
    *,
    vmax: float | None = None,
    power: float = 1.0,
    vmin: float = 0.0,
) -> Scale:
    """Amounts from ``vmin`` (on a log scale, the smallest); arguments as in ``scale_of``."""
    if not 0 <= real_number(power, "power") <= 1:
        raise InputError(f"power must lie between 0 (a log scale) and 1 (linear); got {power}.")
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
    """A scale for values of any origin; ``power`` is for amounts."""
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
    """Differences, centred on 0."""
    largest = float(np.abs(finite(panels)).max(initial=0.0)) or 1.0
    end = largest if vmax is None else vmax
    beyond = largest > end * (1 + 1e-6)
    colors = _colors(DIVERGING, _HIDDEN_DARK)
    return Scale(Normalize(-end, end), colors, label, extend="both" if beyond else "neither")


def ratio_scale(panels: Iterable[np.ndarray], label: str, vmax: float | None = None) -> Scale:
    """Ratios, on a log scale centred on 1; what is further than ``WIDEST`` is cut off."""
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
    """All numbers of all panels in one row, NaN left out."""
    flat = [np.asarray(panel, dtype=float).ravel() for panel in panels]
    values = np.concatenate(flat) if flat else np.empty(0)
    return values[~np.isnan(values)]


def _colors(name: str, hidden: str = HIDDEN) -> Colormap:
    return mpl.colormaps[name].with_extremes(bad=hidden)
