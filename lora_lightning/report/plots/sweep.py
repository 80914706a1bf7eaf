"""A sweep over settings: lines for one key, heat maps for two."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from lora_lightning.report.metrics import Unit, shorten
from lora_lightning.report.plots.style import INK, WRONG, look
from lora_lightning.report.plots.svg import styled, to_svg


def sweep_svg(
    axes: Mapping[str, Sequence[str]],
    values: Mapping[str, NDArray[np.float64]],
    metric: str,
    unit: Unit,
    best: Sequence[int] | None,
) -> bytes | None:
    """An SVG of a grid, or nothing where there are more keys than two.

    Args:
        axes: Key → its values, as typed.
        values: What was measured → its values in the metric, shaped as the grid; NaN where a cell
            has none.
        metric: Its name.
        unit: Its unit.
        best: The indices of the best cell, if one is known.
    """
    if len(axes) > 2 or not values:
        return None
    scaled = {name: unit.scale * found for name, found in values.items()}
    with styled():
        draw = _lines if len(axes) == 1 else _maps
        return to_svg(draw(axes, scaled, f"{metric} ({unit.name})", best))


def _lines(
    axes: Mapping[str, Sequence[str]], values: Mapping[str, Any], metric: str, best: Any
) -> Figure:
    [(key, given)] = axes.items()
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panel = figure.subplots()
    for i, (name, found) in enumerate(values.items(), 1):
        panel.plot(found, label=name, **look(i))
    if best is not None:
        panel.axvline(best[0], color=INK, linewidth=0.8, linestyle=":")
    panel.set_xticks(range(len(given)), [shorten(v, 20) for v in given])
    panel.set_xlabel(key)
    panel.set_ylabel(metric)
    panel.grid(visible=True, axis="y")
    panel.legend(frameon=False, loc="best", fontsize=8.5)
    return figure


def _maps(
    axes: Mapping[str, Sequence[str]], values: Mapping[str, Any], metric: str, best: Any
) -> Figure:
    rows = -(-len(values) // 2)
    (_, down), _ = axes.items()
    figure = Figure(figsize=(9, rows * (1.6 + 0.4 * len(down))), layout="constrained")
    panels = figure.subplots(rows, min(len(values), 2), squeeze=False).flatten()
    for panel, (name, found) in zip(panels, values.items(), strict=False):
        _map(panel, axes, found)
        panel.set_title(f"{name}: {metric}")
        if best is not None:
            corner = best[1] - 0.48, best[0] - 0.48
            panel.add_patch(Rectangle(corner, 0.96, 0.96, fill=False, color=WRONG, linewidth=2.5))
    for panel in panels[len(values) :]:
        panel.set_axis_off()
    return figure


def _map(panel: Axes, axes: Mapping[str, Sequence[str]], found: NDArray[np.float64]) -> None:
    (rows, down), (columns, across) = axes.items()
    shown = np.ma.masked_invalid(found)
    edges = (np.arange(len(given) + 1) - 0.5 for given in (across, down))
    image = panel.pcolormesh(*edges, shown, cmap="cividis", edgecolors="white", linewidth=1)
    panel.invert_yaxis()
    middle = np.mean(image.get_clim())
    for (i, j), value in np.ndenumerate(found):
        dark = not np.isnan(value) and value < middle
        text = "–" if np.isnan(value) else f"{value:.1f}"
        panel.text(j, i, text, ha="center", va="center", color="white" if dark else INK)
    panel.set_xticks(range(len(across)), [shorten(v, 12) for v in across])
    panel.set_yticks(range(len(down)), [shorten(v, 20) for v in down])
    panel.set_xlabel(columns)
    panel.set_ylabel(rows)
