"""Angles predicted against true ones, before and after adaptation."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lora_lightning.report.metrics import CLOSE, DEGREES, angle_between, shorten
from lora_lightning.report.plots.style import FAINT, QUIET, Drawing, look, plot
from lora_lightning.report.results import Prediction, Run
from lora_lightning.report.summary import Summary, severity, target_items

TICKS = (-180, -90, 0, 90, 180)
MOST_KINDS = 8


@plot("angles", "How far off are the angles?")
def angle_plot(run: Run) -> Drawing | None:
    """A dot for each target item, one panel before and one after."""
    if Summary(run).unit != DEGREES:
        return None
    items = target_items(run)
    if not items:
        return None
    figure = Figure(figsize=(9, 4.9), layout="constrained")
    axes = figure.subplots(1, 2, sharex=True, sharey=True)
    for ax, name, side in zip(axes, ("before", "after"), ("source", "adapted"), strict=True):
        off = [angle_between(float(p.label), float(getattr(p, side))) for p in items]
        told = f"off by {np.mean(off):.1f}°, half of {len(off)} by {np.median(off):.1f}°"
        ax.set_title(f"{name}: {told}")
        _panel(ax, items, side)
    axes[0].set_ylabel("predicted azimuth (degrees)")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=MOST_KINDS, frameon=False)
    return figure, (
        "Each dot is a target item; a perfect model has all on the line. The circle closes: "
        f"the top is the bottom, so the corners are right too. Grey: within {CLOSE:.0f}°. A dot on "
        "the falling diagonal takes left for right."
    )


def _panel(ax: Axes, items: list[Prediction], side: str) -> None:
    line = np.array([-180.0, 180.0])
    for turn in (-360, 0, 360):
        ax.fill_between(line, line + turn - CLOSE, line + turn + CLOSE, color=FAINT, linewidth=0)
        ax.plot(line, line + turn, color=QUIET, linewidth=0.8)
    groups: dict[str, list[Prediction]] = {}
    for p in items:
        graded = severity(p.domain)
        groups.setdefault(graded[0] if graded else p.domain, []).append(p)
    for i, (kind, members) in enumerate(groups.items()):
        x, y = ([float(getattr(p, name)) for p in members] for name in ("label", side))
        name = shorten(kind, 20) if i < MOST_KINDS else None
        style = {**look(i + 1), "markersize": 3.2}
        ax.plot(x, y, linestyle="", alpha=0.7, markeredgewidth=0, label=name, **style)
    ax.set_xlim(-180, 180)
    ax.set_ylim(-180, 180)
    ax.set_xticks(TICKS)
    ax.set_yticks(TICKS)
    ax.set_xlabel("true azimuth (degrees)")
    ax.set_aspect("equal")
