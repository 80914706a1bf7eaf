"""The rounds of an adaptation without labels: scores, alarms, and pseudo-labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from lora_lightning.report.metrics import shorten
from lora_lightning.report.plots.style import QUIET, WRONG, Drawing, look, plot
from lora_lightning.report.results import Run

# Score → its label in the plot; all lie between 0 and 1.
SCORES = {
    "agreement": "agreement with the source",
    "nuclear_norm": "nuclear norm",
    "cohesion": "neighbours that agree",
    "mirror": "concordance with the mirror image",
    "spread": "spread of the answers, over the source's",
    "canary": "accuracy on the canary",
}


@plot("rounds", "How did it go without labels?")
def rounds_plot(run: Run) -> Drawing | None:
    """The first seed's rounds, where there were some."""
    if not run.rounds:
        return None
    rounds = next(iter(run.rounds.values()))
    return rounds_figure(rounds, run.classes), (
        "What the guard looks at after each round, without a label; round 0 is the source model. "
        "A cross is an alarm: that round was not kept."
        + " Beside it, how many items of the target were given each class as pseudo-label."
        * any(r["histogram"] for r in rounds)
    )


def rounds_figure(rounds: Sequence[dict[str, Any]], classes: Sequence[str] = ()) -> Figure:
    """Scores by round, and the pseudo-labels' classes by round where there were labels.

    Args:
        rounds: As `lora_lightning.adaptation.rounds.Round` holds them, as dictionaries.
        classes: Their names; numbers where there are none.
    """
    labelled = [r for r in rounds if r["histogram"]]
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, *right = figure.subplots(1, 2 if labelled else 1, squeeze=False)[0]
    indices = [r["index"] for r in rounds]
    for i, (score, name) in enumerate(SCORES.items()):
        values = [r["scores"].get(score, np.nan) for r in rounds]
        if not np.isnan(values).all():
            left.plot(indices, values, label=name, **look(i))
    for r in rounds:
        if r["alarms"]:
            left.axvline(r["index"], color=WRONG, linewidth=0.8, linestyle=":")
            left.plot([r["index"]], [0.03], "x", color=WRONG, markersize=7)
    left.set_ylim(min(0.0, left.get_ylim()[0]), 1.03)
    left.set_xticks(indices)
    left.set_xlabel("round")
    left.grid(visible=True, axis="y")
    figure.legend(loc="outside upper left", ncols=3, frameon=False, fontsize=8.5)
    if right:
        _histogram(right[0], figure, labelled, classes)
    return figure


def _histogram(
    axes: Any, figure: Figure, labelled: Sequence[dict[str, Any]], classes: Sequence[str]
) -> None:
    counts = np.array([r["histogram"] for r in labelled]).T
    names = list(classes) or [str(i) for i in range(len(counts))]
    image = axes.imshow(counts, cmap="Blues", vmin=0, aspect="auto", interpolation="nearest")
    axes.set_xticks(range(len(labelled)), [str(r["index"]) for r in labelled])
    step = -(-len(names) // 20)
    axes.set_yticks(range(0, len(names), step), [shorten(n, 16) for n in names[::step]])
    axes.set_xlabel("round")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    bar = figure.colorbar(image, ax=axes, pad=0.02)
    bar.set_label("items with that pseudo-label", color=QUIET, size=8.5)
    bar.outline.set_visible(False)
