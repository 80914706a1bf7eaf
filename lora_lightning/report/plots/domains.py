"""The metric by domain: lines over severities, or one line of dots for each domain."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lora_lightning.report.metrics import shorten
from lora_lightning.report.plots.style import COLOURS, QUIET, Drawing, colour, look, plot
from lora_lightning.report.results import Run
from lora_lightning.report.summary import RANKED, Cell, Summary, severity

MOST_DOMAINS = 40


@plot("accuracy", "How good is each method, and where?")
def domain_plot(run: Run) -> Drawing | None:
    """The metric by severity, one panel a kind of shift; by domain where none is graded."""
    summary = Summary(run)
    # A sweep's many ranks have a plot of their own (plots/ranks.py).
    summary.methods = [m for m in summary.methods if not RANKED.fullmatch(m)]
    thin = summary.closed_forms()
    if len(summary.methods) <= len(COLOURS):
        thin = []
    summary.methods = [m for m in summary.methods if m not in thin]
    # Error rates of single targets have a plot of their own (plots/speech.py).
    if not summary.methods or not summary.targets or summary.apart:
        return None
    drawn = _by_severity if summary.graded else _by_domain
    figure, caption = drawn(run, summary, thin)
    more = f" Thin and grey: the closed forms, which train nothing ({', '.join(thin)})."
    return figure, caption + more * bool(thin)


def _by_severity(run: Run, summary: Summary, thin: Sequence[str]) -> tuple[Figure, str]:
    graded = [(severity(domain) or ("", 0), domain) for domain in summary.targets]
    kinds = list(dict.fromkeys(kind for (kind, _), _ in graded))
    columns = min(len(kinds), 4)
    lines = math.ceil(len(kinds) / columns)
    figure = Figure(figsize=(9, 0.9 + 2.5 * lines), layout="constrained")
    grid = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    for axes in grid.flat[len(kinds) :]:
        axes.remove()
    for axes, kind in zip(grid.flat, kinds, strict=False):
        levels = sorted((level, domain) for (k, level), domain in graded if k == kind)
        places = ([(0, summary.source)] if summary.source else []) + levels
        axes.set_title(kind)
        axes.grid(visible=True, axis="y")
        _lines(axes, summary, places, 0.015 * columns)
        for method in thin:
            y, _ = _shown([summary.cell(method, [domain]) for _, domain in places], summary)
            axes.plot([place for place, _ in places], y, color=QUIET, alpha=0.6, linewidth=0.7)
        ticks = {0: "source"} if summary.source else {}
        ticks |= {level: str(level) for (_, level), _ in graded}
        axes.set_xticks(list(ticks), list(ticks.values()))
    grid.flat[0].set_ylim(_possible(grid.flat[0].get_ylim(), summary))  # that of all
    for row in grid[:, 0]:
        row.set_ylabel(f"{run.metric} ({summary.unit.name})")
    figure.supxlabel("severity of the shift", fontsize=9.5)
    for i in range(columns - 1, len(kinds), columns):
        _label_ends(grid.flat[i], summary.methods, 0.06 * columns)
    return figure, (
        "Each panel is one kind of shift, from the source domain on the left to the most severe "
        f"on the right; {'lower' if summary.lower else 'higher'} is better. All panels share one "
        f"scale.{summary.bars()}"
    )


def _lines(axes: Axes, summary: Summary, places: Sequence[tuple[int, str]], dodge: float) -> None:
    middle = (len(summary.methods) - 1) / 2
    for i, method in enumerate(summary.methods):
        cells = [summary.cell(method, [domain]) for _, domain in places]
        # Methods are shifted a little, so that none hides another.
        x = np.array([place for place, _ in places]) + dodge * (i - middle)
        y, error = _shown(cells, summary)
        axes.errorbar(x, y, np.nan_to_num(error), label=method, elinewidth=1, **look(i))


def _shown(cells: Sequence[Cell], summary: Summary) -> tuple[np.ndarray, np.ndarray]:
    """Means and spreads in the metric's unit."""
    scale = summary.unit.scale
    return scale * np.array([c.mean for c in cells]), scale * np.array([c.sd for c in cells])


def _possible(limits: tuple[float, float], summary: Summary) -> tuple[float, float]:
    """Without room for more than 100 % or less than 0, where bars reach beyond."""
    low, high = limits
    return (low, high) if summary.lower else (max(low, -3.0), min(high, 103.0))


def _label_ends(axes: Axes, methods: Sequence[str], distance: float) -> None:
    """Write each line's name beside its end, moved apart where they would overlap."""
    low, high = axes.get_ylim()
    ends = []
    for i, container in enumerate(axes.containers):
        x, y = np.asarray(container[0].get_data(), dtype=float)
        if np.isfinite(y).any():
            last = np.flatnonzero(np.isfinite(y))[-1]
            ends.append((y[last], x[last], i))
    ends.sort()
    heights = _apart([y for y, _, _ in ends], 0.155 * (high - low), low, high)
    right = axes.get_xlim()[1]
    for (y, x, i), height in zip(ends, heights, strict=True):
        axes.annotate(
            shorten(methods[i], 60).replace(", ", ",\n"),
            (x, y),
            (right + distance, height),
            va="center",
            fontsize=8.5,
            color=colour(i),
            fontweight="bold",
            linespacing=1.0,
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour(i), "lw": 0.6},
        )


def _apart(sorted_values: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Heights near the given ones, `gap` apart, and within the axes where there is room."""
    placed = list(sorted_values)
    for i in range(1, len(placed)):
        placed[i] = max(placed[i], placed[i - 1] + gap)
    ceiling = high
    for i in reversed(range(len(placed))):
        placed[i] = ceiling = min(placed[i], ceiling)
        ceiling -= gap
    return placed


def _by_domain(run: Run, summary: Summary, thin: Sequence[str]) -> tuple[Figure, str]:
    shown = ([summary.source] if summary.source else []) + summary.targets[:MOST_DOMAINS]
    figure = Figure(figsize=(9, 1.3 + 0.42 * len(shown)), layout="constrained")
    axes = figure.subplots()
    axes.grid(visible=True, axis="x")
    for i, method in enumerate(summary.methods):
        cells = [summary.cell(method, [domain]) for domain in shown]
        x, error = _shown(cells, summary)
        y = np.arange(len(shown)) + 0.14 * (i - (len(summary.methods) - 1) / 2)
        axes.errorbar(x, y, xerr=np.nan_to_num(error), label=method, linestyle="", **look(i))
    for method in thin:
        x, _ = _shown([summary.cell(method, [domain]) for domain in shown], summary)
        axes.plot(x, np.arange(len(shown)), ".", color=QUIET, alpha=0.6, markersize=3)
    names = [f"{d} (source)" if d == summary.source != "source" else d for d in shown]
    axes.set_yticks(range(len(shown)), [shorten(name, 30) for name in names])
    axes.set_ylim(len(shown) - 0.5, -0.5)
    axes.set_xlim(_possible(axes.get_xlim(), summary))
    axes.set_xlabel(f"{run.metric} ({summary.unit.name})")
    figure.legend(loc="outside upper left", ncols=4, frameon=False, handletextpad=0.2)
    rest = len(summary.targets) - MOST_DOMAINS
    more = f" The first {MOST_DOMAINS} target domains are shown, {rest} are not." * (rest > 0)
    return figure, f"One line a domain; further right is better.{summary.bars()}{more}"
