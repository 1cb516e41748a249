"""Shared parts of all figures: the figure class, style, texts, saving.

Figures are built with matplotlib's object interface, never with pyplot. No global state changes, no
window opens, no backend is required, and a figure without references is freed.
"""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from os import PathLike
from typing import Any, ParamSpec, TypeVar

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager
from matplotlib.layout_engine import ConstrainedLayoutEngine

from xmodal_interp.arguments import user_path
from xmodal_interp.attention import AttentionCall, Positions, resolve
from xmodal_interp.errors import InputError
from xmodal_interp.escaping import printable
from xmodal_interp.sample import Sample
from xmodal_interp.store import store_around

FigurePath = str | PathLike[str] | None
"""Path to save a figure to; the suffix (png, pdf, svg) chooses the format. None does not save."""

SMALL, NORMAL, LARGE = 7.5, 9.0, 10.5
"""Text sizes in points."""

HIDDEN = "#b3b3b3"
"""Colour of cells that the mask hides."""

MATRIX_COLORS, OVERLAY_COLORS, DIVERGING_COLORS = "viridis", "magma", "RdBu_r"
"""Colour maps of matrices and lines, of overlays, and of diverging scales; they suit colour-blind
readers."""

GROUP_COLORS: Mapping[str, str] = {
    "image": "#0077bb",
    "video": "#33bbee",
    "text": "#ee7733",
    "generated": "#009988",
    "special": "#777777",
    "padding": "#dddddd",
    "class": "#777777",
    "register": "#aa3377",
}
"""Colours of token groups; image 0, image 1, ... are all ``image``."""

LINE_COLORS = ("#0077bb", "#ee7733", "#009988", "#cc3311", "#33bbee", "#ee3377", "#777777")

_LETTERS = [  # fonts for scripts that matplotlib's font lacks; used if installed
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

BAR = 1.1
"""Width of a colour bar with its label and the gap before it, inches."""

_MARGIN, _NARROWEST = 0.15, 4.8  # inches

_Arguments = ParamSpec("_Arguments")
_Made = TypeVar("_Made")


class Picture(Figure):
    """A matplotlib figure that is displayed when it is the last value of a notebook cell."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=120)
        return buffer.getvalue()


def new_picture(
    body: tuple[float, float], title: str, note: str = "", *, compress: bool = True
) -> Picture:
    """Return an empty figure with a title at the top and a note at the bottom.

    matplotlib's constrained layout places the axes, their labels and the colour bars.

    Args:
        body: Width and height without title and note, in inches; narrow figures are widened so
            that the title fits.
        title: Title of the figure.
        note: Small text on how the figure is drawn.
        compress: Whether to move the axes together; requires that all have a fixed aspect.
    """
    width = max(body[0] + _MARGIN, _NARROWEST)
    heading = wrapped(title, width - 2 * _MARGIN)
    below = wrapped(note, width - 2 * _MARGIN, SMALL) if note else ""
    texts = 0.19 * (heading.count("\n") + 1) + (0.14 * (below.count("\n") + 1) if note else 0)
    edge = _MARGIN / width
    layout = ConstrainedLayoutEngine(rect=(edge / 2, 0, 1 - edge, 1), compress=compress)
    picture = Picture(figsize=(width, body[1] + texts + 0.25), layout=layout)
    picture.suptitle(heading, x=edge, ha="left")
    if note:
        style: dict[str, Any] = {"size": SMALL, "color": "#555555"}
        picture.supxlabel(below, x=edge, ha="left", **style)
    return picture


def styled(function: Callable[_Arguments, _Made]) -> Callable[_Arguments, _Made]:
    """Decorate a function to draw with this package's style, then restore matplotlib's settings."""

    @wraps(function)
    def inside(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Made:
        with mpl.rc_context({**_LOOK, "font.family": _fonts()}):
            return function(*args, **kwargs)

    return inside


def saved(picture: Picture, path: FigurePath) -> Picture:
    """Return the figure, after writing it to ``path`` if given; missing folders are created.

    Raises:
        InputError: matplotlib cannot write a format of this suffix, the path is inside a store, or
            the file cannot be written.
    """
    if path is not None:
        target = user_path(path)
        known = picture.canvas.get_supported_filetypes()
        if target.suffix[1:].lower() not in known:
            raise InputError(
                f"The file of a figure must end in {', '.join(known)}; got {str(path)!r}."
            )
        around = store_around(target)
        if around is not None:
            raise InputError(
                f"{str(path)!r} is inside the store {str(around)!r}, where figures must not be "
                "saved. Choose another path."
            )
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            picture.savefig(target)
        except OSError as error:
            raise InputError(f"Cannot write the figure to {str(path)!r}: {error}.") from error
    return picture


def readable(text: str, longest: int = 16) -> str:
    """Return a token's text for drawing: white space visible, cut to ``longest`` characters."""
    # byte-level and sentencepiece tokenisers put these marks before a word
    shown = text.strip(" \u0120\u2581")
    shown = shown.replace("\n", "\u21b5").replace("\t", "\u21e5").replace("\u010a", "\u21b5")
    shown = "".join(letter if letter.isprintable() else "\ufffd" for letter in shown) or "\u2423"
    return escaped(shown if len(shown) <= longest else shown[: longest - 1] + "\u2026")


def escaped(text: str) -> str:
    """Return text that matplotlib draws literally: dollar signs escaped, no control characters."""
    return re.sub(r"(?<!\\)\$", r"\\$", printable(text))


def wrapped(text: str, width: float, size: float = LARGE) -> str:
    """Return text broken into lines that fit into ``width`` inches at ``size`` points."""
    letters = max(12, int(width * 72 / (0.56 * size)))
    lines = [
        textwrap.wrap(line, letters, break_on_hyphens=False) or [""] for line in text.split("\n")
    ]
    return escaped("\n".join(line for of in lines for line in of))


def group_color(group: str) -> str:
    """Return the colour of a token group such as ``"image 0"``."""
    return GROUP_COLORS.get(group.split(" ")[0], "#444444")


def _fonts() -> list[str]:
    installed = {font.name for font in fontManager.ttflist}
    return ["DejaVu Sans", *(name for name in _LETTERS if name in installed)]


def about(sample: Sample) -> str:
    """Return a sample's question, followed by its answer if there is one.

    Without a question, it is the name of the sample.
    """
    if not sample.question:
        return f'{sample.name} \u2192 "{sample.answer}"' if sample.answer else sample.name
    return (
        f'"{sample.question}" \u2192 "{sample.answer}"' if sample.answer else f'"{sample.question}"'
    )


def layer_name(call: AttentionCall) -> str:
    """Return a layer's name: ``"language layer 3"`` or ``"language cross-attention layer 3"``."""
    return f"{call.tower} {'cross-attention ' if call.kind == 'cross' else ''}layer {call.layer}"


def heads_name(call: AttentionCall, heads: Positions | None) -> str:
    """Return a name for the chosen heads, such as ``"head 3"`` or ``"mean of 8 heads"``."""
    if heads is None:
        return f"mean of {call.n_heads} heads" if call.n_heads > 1 else "its only head"
    chosen = resolve(heads, call.n_heads, "head").tolist()
    if len(chosen) == 1:
        return f"head {chosen[0]}"
    few = len(chosen) <= 6
    return f"mean of heads {', '.join(map(str, chosen))}" if few else f"mean of {len(chosen)} heads"


def named(sample: Sample, positions: Sequence[int], longest: int = 24) -> str:
    """Return the text of some tokens, such as ``"red circle"``, or for many tokens their number."""
    table = sample.tokens.iloc[list(positions)]
    together = list(positions) == list(range(positions[0], positions[-1] + 1))
    if together and table["kind"].eq("text").all():
        text = sample.text[int(table["start"].iloc[0]) : int(table["end"].iloc[-1])]
        return f'"{readable(text, longest)}"'
    if len(positions) <= 3:
        return ", ".join(f'"{readable(str(token), longest)}"' for token in table["token"])
    return f"{len(positions)} tokens"


def panel_name(sample: Sample, positions: Sequence[int]) -> str:
    """Return the text of a panel's query; generated tokens are marked ``(answer)``."""
    generated = sample.tokens["role"].iloc[list(positions)].eq("generated").all()
    return named(sample, positions, 18) + (" (answer)" if generated else "")
