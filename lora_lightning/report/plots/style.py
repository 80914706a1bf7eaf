"""Shared by all plots: the registry, colours, markers and matplotlib settings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from matplotlib.figure import Figure

from lora_lightning.registry import Registry
from lora_lightning.report.results import Run

Drawing = tuple[Figure, str]  # with its caption
Plotter = Callable[[Run], Drawing | None]
PLOTS: Registry[tuple[str, Plotter]] = Registry("plot")  # each with its title, as the page has them

INK, QUIET, FAINT = "#1f2933", "#616e7c", "#d9dee3"
RIGHT, WRONG = "#00755a", "#b8400a"
# Okabe and Ito's palette, darkened where it would be faint on white; told apart by
# people with any of the common colour blindnesses. Markers differ as well.
COLOURS = ("#616e7c", "#009e73", "#0072b2", "#d55e00", "#b15e8f", "#b07d00", "#56b4e9")
MARKERS = "oDs^vPX*"  # one more than colours: the eighth method is told from the first
# Text is measured in the first, which is wide: in the others it takes less room.
FONTS = (
    "'DejaVu Sans', Verdana, system-ui, 'Noto Sans CJK SC', 'PingFang SC', 'Microsoft YaHei', "
    "'Noto Sans', sans-serif"
)
STYLE: Any = {  # matplotlib types the keys as one huge Literal
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "text.color": INK,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "lora-lightning",  # the same file for the same run
    "text.parse_math": False,  # a class may be called "$5"
    "axes.labelcolor": INK,
    "axes.edgecolor": QUIET,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.8,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}


def plot(name: str, title: str) -> Callable[[Plotter], Plotter]:
    """Decorator that adds a plot to every report: its file's name, and its title on the page."""

    def add(figure_of: Plotter) -> Plotter:
        PLOTS.register(name)((title, figure_of))
        return figure_of

    return add


def look(i: int) -> dict[str, Any]:
    """Colour and marker of the i-th method, the same in every plot."""
    return {"color": colour(i), "marker": MARKERS[i % len(MARKERS)], "markersize": 4.5}


def colour(i: int) -> str:
    """Colour of the i-th method."""
    return COLOURS[i % len(COLOURS)]
