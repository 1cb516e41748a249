"""Draw the ratios that ``public_analyses.py`` measured over the number of tokens."""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib as mpl
import pandas as pd

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

COLUMNS = 4
COLORS = ("#9a9a9a", "#c07a2c", "#5b8a5b")  # of earlier packages
NOW, EAGER = "#1f5fa8", "#c2403a"
TICKS = (1, 1.5, 2, 3, 5, 10, 20, 50, 100, 200)


def draw(result: pd.DataFrame, path: Path) -> None:
    """Draw one panel for each work: its time over plain by the number of tokens.

    Args:
        result: Rows of ``public_analyses.measure``.
        path: The picture to write, PNG or PDF.
    """
    large = result[(result["model"] == "large") & result["time"].notna()]
    works = list(dict.fromkeys(large["work"]))
    packages = list(dict.fromkeys(large["package"]))
    n_columns = min(COLUMNS, len(works))
    n_rows = math.ceil(len(works) / n_columns)
    figure, panels = plt.subplots(
        n_rows,
        n_columns,
        figsize=(max(2.45 * n_columns, 6), 1.75 * n_rows + 0.7),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for panel, work in zip(panels.flat, works, strict=False):
        _draw_work(panel, large[large["work"] == work], packages)
        panel.set_title(work, fontsize=8.5, loc="left")
    for panel in panels.flat[len(works) :]:
        panel.set_visible(False)
    tokens = sorted(large["tokens"].unique())
    _label_axes(panels[0, 0], tokens, large)
    for column in range(n_columns):  # the lowest visible panel of each column has the tick labels
        lowest = panels[(len(works) - 1 - column) // n_columns, column]
        lowest.tick_params(labelbottom=True)
        lowest.set_xlabel("tokens", fontsize=8)
    figure.supylabel("time / plain forward", fontsize=9)
    lines = {line.get_label(): line for panel in panels.flat for line in panel.get_lines()}
    shown = {label: line for label, line in lines.items() if not str(label).startswith("_")}
    figure.legend(
        shown.values(), shown.keys(), loc="outside upper center", ncols=4, frameon=False, fontsize=9
    )
    figure.savefig(path, dpi=160)
    plt.close(figure)


def _draw_work(panel: Axes, rows: pd.DataFrame, packages: list[str]) -> None:
    earlier = dict(zip(packages[:-1], COLORS, strict=False))
    panel.axhline(1, color="#cccccc", linewidth=0.8, zorder=0)
    eager = rows[rows["eager_time"].notna()].sort_values("tokens") if "eager_time" in rows else ()
    if len(eager):
        style = {"color": EAGER, "marker": "s", "markersize": 3, "linewidth": 1, "linestyle": "--"}
        panel.plot(eager["tokens"], eager["eager_time"], label="eager attention and numpy", **style)
    for package in packages:
        of = rows[rows["package"] == package].sort_values("tokens")
        color = earlier.get(package, NOW)
        label = f"capture and analysis{f' ({package})' if len(packages) > 1 else ''}"
        panel.plot(of["tokens"], of["time"], color=color, marker="o", markersize=3.5, label=label)
    panel.spines[["top", "right"]].set_visible(False)
    panel.tick_params(labelsize=7.5)


def _label_axes(panel: Axes, tokens: list[int], rows: pd.DataFrame) -> None:
    """Set logarithmic axes, with the measured lengths and round ratios as ticks."""
    highest = max(1.6, float(rows.reindex(columns=["time", "eager_time"]).max().max()))
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.set_ylim(0.85, highest * 1.25)
    panel.set_xlim(tokens[0] * 0.85, tokens[-1] * 1.18)
    panel.xaxis.set_major_locator(FixedLocator(tokens))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    panel.yaxis.set_major_locator(FixedLocator([tick for tick in TICKS if tick < highest * 1.25]))
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    for axis in (panel.xaxis, panel.yaxis):
        axis.set_minor_locator(NullLocator())
        axis.set_minor_formatter(NullFormatter())
