"""What all figures share: a figure that shows itself, one look, one way to write tokens and save.

Figures are made through matplotlib's objects, never through pyplot: nothing global is changed, no
window opens, no backend is needed, and a figure that nobody holds is freed.
"""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Callable, Mapping
from functools import wraps
from os import PathLike
from typing import Any, ParamSpec, TypeVar

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager

from xmodal_interp.errors import InputError
from xmodal_interp.paths import user_path
from xmodal_interp.printable import printable
from xmodal_interp.store import store_around

FigurePath = str | PathLike[str] | None
"""Where to save a figure; the ending (png, pdf, svg) chooses the format. None saves nothing."""

SMALL, NORMAL, LARGE = 7.5, 9.0, 10.5
"""Text sizes in points, at the size a figure is saved in."""

HIDDEN = "#b3b3b3"
"""Cells that the mask hides."""

SEQUENTIAL, HEAT, DIVERGING = "viridis", "magma", "RdBu_r"
"""Colour maps for all eyes: of matrices, of overlays, of what has a middle."""

GROUP_COLORS: Mapping[str, str] = {
    "image": "#0077bb",
    "video": "#33bbee",
    "text": "#ee7733",
    "generated": "#009988",
    "special": "#777777",
    "padding": "#dddddd",
    "class": "#777777",
}
"""Colours of token groups; image 0, image 1, ... are all ``image``."""

LINE_COLORS = ("#0077bb", "#ee7733", "#009988", "#cc3311", "#33bbee", "#ee3377", "#777777")

_LETTERS = [  # scripts that the font of matplotlib lacks, if one of these is installed
    *("Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "Source Han Sans SC", "PingFang SC"),
    *("Hiragino Sans", "Microsoft YaHei", "SimHei", "WenQuanYi Zen Hei", "Arial Unicode MS"),
]

_LOOK: dict[Any, Any] = {
    "axes.edgecolor": "#444444",
    "axes.labelsize": NORMAL,
    "axes.linewidth": 0.6,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "center",
    "axes.titlepad": 4.0,
    "axes.titlesize": NORMAL,
    "axes.titleweight": "normal",
    "figure.facecolor": "white",
    "figure.titlesize": LARGE,
    "figure.titleweight": "normal",
    "font.size": NORMAL,
    "legend.fontsize": SMALL,
    "legend.frameon": False,
    "savefig.bbox": None,
    "savefig.dpi": 180,
    "text.usetex": False,
    "xtick.labelsize": SMALL,
    "xtick.major.size": 2.5,
    "xtick.major.width": 0.6,
    "ytick.labelsize": SMALL,
    "ytick.major.size": 2.5,
    "ytick.major.width": 0.6,
}

_Arguments = ParamSpec("_Arguments")
_Made = TypeVar("_Made")


class Picture(Figure):
    """A matplotlib figure that a notebook shows as the last value of a cell."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=120)
        return buffer.getvalue()


def styled(function: Callable[_Arguments, _Made]) -> Callable[_Arguments, _Made]:
    """Draw under the look of this package, and leave matplotlib's settings as they were."""

    @wraps(function)
    def inside(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Made:
        with mpl.rc_context({**_LOOK, "font.family": _fonts()}):
            return function(*args, **kwargs)

    return inside


def saved(picture: Picture, path: FigurePath) -> Picture:
    """The figure, written to ``path`` if there is one; its folder is made.

    Raises:
        InputError: The file's name ends in no format that matplotlib writes, it is inside a store,
            or no file can be written there.
    """
    if path is not None:
        target = user_path(path)
        known = picture.canvas.get_supported_filetypes()
        if target.suffix[1:].lower() not in known:
            raise InputError(
                f"A figure is written to a file that ends in {', '.join(known)}; got {str(path)!r}."
            )
        around = store_around(target)
        if around is not None:
            raise InputError(
                f"A figure is not written into a store. {str(path)!r} is inside the store "
                f"{str(around)!r}; choose another path."
            )
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            picture.savefig(target)
        except OSError as error:
            raise InputError(f"A figure could not be written to {str(path)!r}: {error}.") from error
    return picture


def readable(text: str, longest: int = 16) -> str:
    """Text of a token as it can be drawn: white space made visible, cut to ``longest``."""
    # the marks that byte-level and sentencepiece tokenisers put before a word
    shown = text.strip(" \u0120\u2581")
    shown = shown.replace("\n", "\u21b5").replace("\t", "\u21e5").replace("\u010a", "\u21b5")
    shown = "".join(letter if letter.isprintable() else "\ufffd" for letter in shown) or "\u2423"
    return plain(shown if len(shown) <= longest else shown[: longest - 1] + "\u2026")


def plain(text: str) -> str:
    """Text that matplotlib draws as it stands: not as a formula, without control characters."""
    return re.sub(r"(?<!\\)\$", r"\\$", printable(text))


def wrapped(text: str, width: float, size: float = LARGE) -> str:
    """Text broken into lines that fit into ``width`` inches at ``size`` points."""
    letters = max(12, int(width * 72 / (0.56 * size)))
    lines = [
        textwrap.wrap(line, letters, break_on_hyphens=False) or [""] for line in text.split("\n")
    ]
    return plain("\n".join(line for of in lines for line in of))


def group_color(group: str) -> str:
    """The colour of a token group such as ``"image 0"``."""
    return GROUP_COLORS.get(group.split(" ")[0], "#444444")


def bare(axes: Axes) -> None:
    """No ticks and no frame: an axes that holds a picture."""
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


def _fonts() -> list[str]:
    installed = {font.name for font in fontManager.ttflist}
    return ["DejaVu Sans", *(name for name in _LETTERS if name in installed)]
