"""Shared parts of all figures: the figure class, style, sizes, texts, saving.

Figures are built with matplotlib's object interface, never with pyplot. No global state changes, no
window opens, no backend is required, and a figure without references is freed.

The style does not depend on the user's matplotlib settings. Figures have an opaque white ground, so
that they are readable in dark notebooks too.
"""

from __future__ import annotations

import io
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, wraps
from os import PathLike
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypedDict, TypeVar, get_args

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.colors import Colormap
from matplotlib.figure import Figure as Figure
from matplotlib.font_manager import findfont, fontManager, get_font
from matplotlib.layout_engine import ConstrainedLayoutEngine

from xmodal_interp.arguments import user_path
from xmodal_interp.attention import AttentionCall, Positions, resolve
from xmodal_interp.errors import InputError, quoted
from xmodal_interp.escaping import printable
from xmodal_interp.sample import Sample
from xmodal_interp.store import store_around

FigurePath = str | PathLike[str] | None
"""Path to save a figure to; the suffix (png, pdf, svg) chooses the format. None does not save."""

Width = Literal["column", "page"]

WIDTHS: Mapping[Width, float] = {"column": 3.4, "page": 7.0}
"""Widths of figures in inches: of a column and of the text of a two-column page."""

WIDEST_PAGE = 14.0
"""Largest width of figures without ``width``, in inches."""

HIGHEST_PAGE = 16.0
"""Largest height of the panels of a figure, in inches."""

ScaleOf = Literal["figure", "panel"]

CmapLike = str | Colormap | None
"""A colour map or its name in matplotlib."""

SMALL, NORMAL, LARGE = 7.0, 8.0, 9.5
"""Text sizes in points."""

HIDDEN = "#b3b3b3"
"""Colour of cells that the mask hides."""

MATRIX_COLORS, DIVERGING_COLORS = "viridis", "RdBu_r"
"""Colour maps of matrices and lines, and of diverging scales; they suit colour-blind readers."""

OVERLAY_COLORS = ("#3b82f6", "#22d3a0", "#ffee55")
"""Colours of weak to strong values over an image. They become lighter in equal steps, which suits
colour-blind readers; and cool colours differ from those of most photos."""

OVERLAY_COLORS_ABOVE, OVERLAY_COLORS_BELOW = ("#ff4d00", "#ffdf4d"), ("#3b7dd8", "#7cbcff")
"""Colours over an image on diverging scales: of weak to strong values above the neutral value, and
below it."""

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
    "hatch.linewidth": 0.5,
    "legend.fontsize": SMALL,
    "legend.frameon": False,
    "text.usetex": False,
    "xtick.labelsize": SMALL,
    "xtick.major.size": 2.5,
    "xtick.major.width": 0.6,
    "ytick.labelsize": SMALL,
    "ytick.major.size": 2.5,
    "ytick.major.width": 0.6,
}
_SAVING: dict[Any, Any] = {  # matplotlib types the names of its settings
    "pdf.fonttype": 42,  # TrueType: text stays text, and is embedded
    "ps.fonttype": 42,
    "savefig.bbox": None,
    "savefig.dpi": 300,
    "savefig.facecolor": "auto",
    "savefig.transparent": False,
    "svg.fonttype": "none",  # text elements
}
_GROUPS = (  # settings that are reset, so that a figure is the same with any style of the user
    *("axes", "axes3d", "errorbar", "figure", "font", "grid", "hatch", "image", "legend", "lines"),
    *("mathtext", "patch", "savefig", "text", "xtick", "ytick"),
)

BAR = 1.1
"""Width of a colour bar with its label and the gap before it, inches."""

_MARGIN, _NARROWEST = 0.15, 4.8  # inches
_TITLE_LINES = 3  # of each line of a title; longer texts are cut

_Arguments = ParamSpec("_Arguments")
_Made = TypeVar("_Made")


class FigureOptions(TypedDict, total=False):
    """Keyword arguments of every figure.

    Attributes:
        cmap: A colour map of matplotlib or its name, instead of the figure's.
        width: ``"column"`` (3.4 inches) or ``"page"`` (7 inches) for print. If not given, the
            figure is as wide as its panels require.
        scale: One colour scale or value axis for the ``"figure"``, or one for each ``"panel"``;
            the figure states which.
    """

    cmap: CmapLike
    width: Width | None
    scale: ScaleOf | None


class AxesOptions(FigureOptions, total=False):
    """Keyword arguments of every figure that can be drawn into existing axes.

    Attributes:
        ax: Axes of any figure to draw into, instead of a new figure; their figure is returned.
    """

    ax: Axes | None


class Picture(Figure):
    """A matplotlib figure that is displayed when it is the last value of a notebook cell.

    It is saved with 300 dpi, and as PDF and SVG with text that can be selected and edited.
    """

    def savefig(self, fname: Any, **kwargs: Any) -> None:
        """Save the figure; see matplotlib's ``Figure.savefig``."""
        with mpl.rc_context(_style()):
            super().savefig(fname, **kwargs)

    def draw(self, renderer: Any) -> None:
        """Draw the figure in this package's style: matplotlib makes ticks when it draws."""
        with mpl.rc_context(_style()):
            super().draw(renderer)

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=120)
        return buffer.getvalue()


def check_options(
    cmap: CmapLike = None,
    width: Width | None = None,
    scale: ScaleOf | None = None,
    ax: Axes | None = None,
) -> None:
    """Raise InputError if an option of a figure has a wrong value.

    Raises:
        InputError: The options of ``FigureOptions`` and ``AxesOptions`` have a wrong value.
    """
    known = isinstance(cmap, Colormap) or (isinstance(cmap, str) and cmap in mpl.colormaps)
    if cmap is not None and not known:
        raise InputError(
            f"cmap must be a matplotlib colour map or its name, such as 'viridis'; got "
            f"{quoted(cmap)}."
        )
    for name, value, allowed in (
        ("width", width, get_args(Width)),
        ("scale", scale, get_args(ScaleOf)),
    ):
        if value is not None and not (isinstance(value, str) and value in allowed):
            raise InputError(
                f"{name} must be {allowed[0]!r}, {allowed[1]!r} or None; got {quoted(value)}."
            )
    if ax is not None and not isinstance(ax, Axes):
        raise InputError(f"ax must be matplotlib axes; got {quoted(ax)}.")


def placed_on(axes: Axes) -> tuple[Figure, float, float]:
    """Return the figure of axes, and their width and height in inches."""
    figure = axes.get_figure(root=True)
    assert isinstance(figure, Figure)
    box = axes.get_position()
    return figure, box.width * figure.get_figwidth(), box.height * figure.get_figheight()


def room(width: Width | None, natural: float, fixed: float = 0.0) -> float:
    """Return the inches for panels that would take ``natural`` inches.

    Args:
        width: Width of the figure; None if it can be as wide as it requires.
        natural: Inches that the panels take if there is room.
        fixed: Inches at the sides of the panels, which do not shrink.
    """
    if width is None:
        return float(min(natural, WIDEST_PAGE - fixed))
    return float(WIDTHS[width] - _MARGIN - fixed)


def new_picture(
    body: tuple[float, float],
    title: str,
    note: str = "",
    *,
    compress: bool = True,
    width: Width | None = None,
) -> Picture:
    """Return an empty figure with a title at the top and a note at the bottom.

    matplotlib's constrained layout places the axes, their labels and the colour bars.

    Args:
        body: Width and height without title and note, in inches; narrow figures are widened so
            that the title fits.
        title: Title of the figure.
        note: Small text on how the figure is drawn.
        compress: Whether to move the axes together; requires that all have a fixed aspect.
        width: Width of the figure; see ``FigureOptions``.
    """
    inches = WIDTHS[width] if width else max(body[0] + _MARGIN, _NARROWEST)
    size = LARGE if inches > WIDTHS["column"] else NORMAL
    heading = wrapped(title, inches - 2 * _MARGIN, size, _TITLE_LINES)
    below = wrapped(note, inches - 2 * _MARGIN, SMALL) if note else ""
    texts = 0.19 * (heading.count("\n") + 1) + (0.14 * (below.count("\n") + 1) if note else 0)
    edge = _MARGIN / inches
    layout = ConstrainedLayoutEngine(rect=(edge / 2, 0, 1 - edge, 1), compress=compress)
    picture = Picture(figsize=(inches, body[1] + texts + 0.25), layout=layout)
    picture.suptitle(heading, x=edge, ha="left", size=size)
    if note:
        style: dict[str, Any] = {"size": SMALL, "color": "#555555"}
        picture.supxlabel(below, x=edge, ha="left", **style)
    return picture


def styled(function: Callable[_Arguments, _Made]) -> Callable[_Arguments, _Made]:
    """Decorate a function to draw with this package's style, then restore matplotlib's settings."""

    @wraps(function)
    def inside(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Made:
        with mpl.rc_context(_style()):
            return function(*args, **kwargs)

    return inside


def saved(picture: Picture, path: FigurePath) -> Picture:
    """Return the figure, after writing it to ``path`` if given; missing folders are created.

    Raises:
        InputError: matplotlib cannot write a format of this suffix, the path is inside a store, or
            the file cannot be written.
    """
    if path is not None:
        target = target_of(path, list(picture.canvas.get_supported_filetypes()))
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            picture.savefig(target)
        except OSError as error:
            raise InputError(f"Cannot write the figure to {str(path)!r}: {error}.") from error
    return picture


def target_of(path: str | PathLike[str], suffixes: Sequence[str]) -> Path:
    """Return the path of a file to write.

    Raises:
        InputError: The file has another suffix, or is inside a store.
    """
    target = user_path(path)
    if target.suffix[1:].lower() not in suffixes:
        raise InputError(
            f"The file of a figure must end in {', '.join(suffixes)}; got {str(path)!r}."
        )
    around = store_around(target)
    if around is not None:
        raise InputError(
            f"{str(path)!r} is inside the store {str(around)!r}, where figures must not be "
            "saved. Choose another path."
        )
    return target


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


def wrapped(text: str, width: float, size: float = LARGE, most: int | None = None) -> str:
    """Return text broken into lines that fit into ``width`` inches at ``size`` points.

    Args:
        text: The text; its line breaks are kept.
        width: Inches.
        size: Points.
        most: Largest number of lines that a line of the text is broken into; the rest is cut.
    """
    lines: list[str] = []
    for line in text.split("\n"):
        parts = _broken(line, width, size)
        if most is not None and len(parts) > most:
            parts = [*parts[: most - 1], shortened(" ".join(parts[most - 1 :]), width, size)]
        lines += parts
    return escaped("\n".join(lines))


def shortened(text: str, width: float, size: float = NORMAL) -> str:
    """Return text, cut at its end so that it fits into ``width`` inches at ``size`` points."""
    if text_width(text, size) <= width:
        return text
    kept = text
    while kept and text_width(f"{kept}\u2026", size) > width:
        kept = kept[:-1]
    return f"{kept.rstrip()}\u2026"


def text_width(text: str, size: float = NORMAL) -> float:
    """Return the width of a line of text in inches, at ``size`` points.

    Letters are up to 6% wider on screens, where each begins at a whole pixel.
    """
    return 1.06 * sum(map(_letter_width, text)) * size / 72


def _broken(line: str, width: float, size: float) -> list[str]:
    """Return the lines that a line is broken into: between words, or within words too long."""
    lines, current = [], ""
    width = max(width, 0.2)  # a letter at least
    for word in re.findall(r"\S+\s*|\s+", line):
        if text_width((current + word).rstrip(), size) <= width:
            current += word
            continue
        if current.strip():
            lines.append(current.rstrip())
        current = word.lstrip()
        while text_width(current.rstrip(), size) > width:
            fitting = 1
            while text_width(current[: fitting + 1], size) <= width:
                fitting += 1
            lines.append(current[:fitting])
            current = current[fitting:]
    return [*lines, current.rstrip()] if current.strip() or not lines else lines


@lru_cache(maxsize=4096)
def _letter_width(letter: str) -> float:
    """Return the width of a letter in units of the text size."""
    font = get_font(findfont("DejaVu Sans"))
    if not font.get_char_index(ord(letter)):
        return 1.0 if unicodedata.east_asian_width(letter) in "WF" else 0.7
    font.set_size(72, 72)
    return float(font.load_char(ord(letter)).linearHoriAdvance) / 65536 / 72


def group_color(group: str) -> str:
    """Return the colour of a token group such as ``"image 0"``."""
    return GROUP_COLORS.get(group.split(" ")[0], "#444444")


def _style() -> dict[Any, Any]:
    """Return the settings of this package's style, for all settings that change a figure."""
    usual = {
        name: value
        for name, value in mpl.rcParamsDefault.items()
        if name.split(".")[0] in _GROUPS and name != "figure.max_open_warning"
    }
    return {**usual, **_LOOK, **_SAVING, "font.family": _fonts()}


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
