"""Training losses of the rows that were trained."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lora_lightning.report.metrics import shorten
from lora_lightning.report.plots.style import COLOURS, Drawing, plot
from lora_lightning.report.results import Run

MOST_PANELS, COLUMNS = 12, 3
Curve = list[tuple[int, float]]


@plot("losses", "How did the trainings go?")
def loss_plot(run: Run) -> Drawing | None:
    """A panel for each row that was trained, with a line for each of its trainings."""
    panels: dict[str, list[Curve]] = {}
    for (name, _, seed), curve in run.losses.items():
        # The source model is trained once for all seeds, or for each.
        if curve and (seed == next(iter(run.losses))[2]):
            panels.setdefault(name, []).append(curve)
    if not panels:
        return None
    names = list(panels)[:MOST_PANELS]
    columns = min(COLUMNS, len(names))
    lines = math.ceil(len(names) / columns)
    figure = Figure(figsize=(9, 0.5 + 2.1 * lines), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False)
    for axes in grid.flat[len(names) :]:
        axes.remove()
    for axes, name in zip(grid.flat, names, strict=False):
        _panel(axes, name, panels[name])
    figure.supxlabel("optimizer step", fontsize=9.5)
    more = f" The first {MOST_PANELS} of {len(panels)} are shown." * (len(panels) > MOST_PANELS)
    return figure, (
        "Training loss by step, of the first seed; a thin line for each target where they have "
        "adapters of their own. The trainings minimise different losses: compare a curve with "
        f"itself, not one panel with another.{more}"
    )


def _panel(axes: Axes, name: str, curves: list[Curve]) -> None:
    axes.set_title(shorten(name, 36), fontsize=9)
    axes.grid(visible=True, axis="y")
    several = len(curves) > 1
    for curve in curves:
        x, y = np.array(curve).T
        mark = "o" if len(curve) == 1 else ""
        axes.plot(
            x, y, mark + "-", color=COLOURS[2], linewidth=0.8 if several else 1.4,
            alpha=0.5 if several else 1, markersize=3,
        )  # fmt: skip
    axes.locator_params("y", nbins=4)
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
