"""The singular values of each layer's delta, and its effective rank."""

from __future__ import annotations

import math

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from lora_lightning.linalg.decompose import effective_rank
from lora_lightning.report.plots.style import COLOURS, FAINT, INK, QUIET, Drawing, plot
from lora_lightning.report.results import Run

MOST_LABELS = 60
BLUE = COLOURS[2]


@plot("spectrum", "Which layers changed, and was the rank enough?")
def spectrum_plot(run: Run) -> Drawing | None:
    """Singular values of each layer's delta above, effective rank against the rank below."""
    spectra = {name: _clean(values) for name, values in run.spectra.items()}
    if not any(values.size for values in spectra.values()):
        return None
    figure = Figure(figsize=(9, 5.6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(5, 2))
    _values(above, list(spectra.values()))
    _ranks(below, list(spectra.values()), [len(values) for values in run.spectra.values()])
    step = math.ceil(len(spectra) / MOST_LABELS)
    names = [_end(name) for name in _without_common_prefix(list(spectra))]
    ticks = range(0, len(names), step)
    below.set_xticks(ticks, names[::step], rotation=90, fontsize=8 if len(names) <= 30 else 6.5)
    below.set_xlim(-0.7, max(len(names), 8) - 0.3)
    return figure, (
        "Above, one column of dots a layer, from the input on the left to the output on the right: "
        "the singular values of what adaptation added to its weight, largest filled. High "
        "columns changed most; crosses at the bottom mark layers that did not change. "
        "Below, how many directions each layer really uses (effective rank, the exponential of "
        "the spectrum's entropy) of those it has (grey): bars that fill the grey call for a "
        "higher rank, short bars would do with a lower one."
    )


def _end(name: str, limit: int = 32) -> str:
    """Of a long name the end, which tells layers apart."""
    return name if len(name) <= limit else f"…{name[1 - limit :]}"


def _clean(values: list[float]) -> np.ndarray:
    """The finite values above rounding error, largest first."""
    kept = sorted((v for v in values if math.isfinite(v) and v > 0), reverse=True)
    return np.array([v for v in kept if v > 1e-7 * kept[0]])


def _values(axes: Axes, spectra: list[np.ndarray]) -> None:
    axes.set_yscale("log")
    axes.grid(visible=True, axis="y")
    for x, values in enumerate(spectra):
        if values.size:
            axes.plot([x, x], values[[0, -1]], color=BLUE, lw=1, alpha=0.35, zorder=1)
            axes.plot([x] * values.size, values, "o", ms=3.2, mfc="white", mec=BLUE, mew=0.8)
            axes.plot(x, values[0], "o", ms=5.5, color=BLUE)
        else:
            axes.plot(x, 0.03, "x", color=QUIET, ms=5, transform=axes.get_xaxis_transform())
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 50 * low else (1,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_ylabel("singular value of the delta")
    axes.tick_params(axis="x", length=0)


def _ranks(axes: Axes, spectra: list[np.ndarray], ranks: list[int]) -> None:
    used = [effective_rank(torch.from_numpy(v)) if v.size else 0.0 for v in spectra]
    axes.bar(range(len(ranks)), ranks, width=0.72, color=FAINT)
    axes.bar(range(len(used)), used, width=0.72, color=BLUE)
    axes.set_ylabel("rank used")
    top = max(ranks)
    axes.set_yticks([0, top / 2, top] if top % 2 == 0 else [0, top], minor=False)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.tick_params(axis="x", length=0, labelcolor=INK)
    axes.spines["bottom"].set_visible(False)


def _without_common_prefix(names: list[str]) -> list[str]:
    """Names less the leading parts that all of them share ("model.blocks.3" → "3" never alone)."""
    parts = [name.split(".") for name in names]
    shared = 0
    while all(len(p) > shared + 1 for p in parts) and len({p[shared] for p in parts}) == 1:
        shared += 1
    if len(names) < 2 or any(p[shared].isdigit() for p in parts):
        shared = max(shared - 1, 0)
    return [".".join(p[shared:]) for p in parts]
