"""The metric against the size of the adapter: fixed ranks, and data-driven ones."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from lora_lightning.report.metrics import si
from lora_lightning.report.plots.style import INK, QUIET, Drawing, colour, look, plot
from lora_lightning.report.results import Run
from lora_lightning.report.summary import RANKED, Summary


@plot("ranks", "Which rank?")
def rank_plot(run: Run) -> Drawing | None:
    """Fixed ranks as a line, the chosen ones as a star; where several ranks were compared."""
    summary = Summary(run)
    found = [(m, match) for m in summary.methods if (match := RANKED.fullmatch(m))]
    if len(found) < 2 or not summary.targets:
        return None
    groups = list(dict.fromkeys(match["labels"] for _, match in found))
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots()
    for i, group in enumerate(groups):
        at = {match["rank"]: m for m, match in found if match["labels"] == group}
        _one(axes, summary, at, i + 1, group)
    if before := summary.before():
        mean = summary.unit.scale * summary.target(before).mean
        axes.axhline(mean, color=QUIET, linestyle="--", linewidth=1)
        axes.annotate(
            before, (1, mean), xycoords=("axes fraction", "data"), ha="right", va="bottom",
            fontsize=8.5, color=QUIET,
        )  # fmt: skip
    axes.set_xscale("log")
    # Not matplotlib's own: its powers of ten are mathematics, which the style does not parse.
    sizes = sorted({summary.parameters(m) for m, match in found if match["rank"].isdigit()})
    axes.set_xticks(sizes, [si(size) for size in sizes])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("trainable parameters")
    axes.set_ylabel(f"{run.metric} on the target ({summary.unit.name})")
    axes.grid(visible=True, axis="y")
    axes.legend(frameon=False, loc="best", fontsize=8.5)
    better = "lower" if summary.lower else "higher"
    return figure, (
        f"The numbers are ranks, the same in every layer that allows it; {better} is better. The "
        f"stars are rules, by which the target's data choose each layer's rank.{summary.bars()}"
    )


def _one(axes: Axes, summary: Summary, at: dict[str, str], i: int, labels: str) -> None:
    fixed = sorted((r for r in at if r.isdigit()), key=int)
    cells = [summary.target(at[r]) for r in fixed]
    x = np.array([summary.parameters(at[r]) for r in fixed])
    scale = summary.unit.scale
    y, error = (scale * np.array([getattr(c, name) for c in cells]) for name in ("mean", "sd"))
    axes.errorbar(
        x, y, np.nan_to_num(error), label=f"fixed rank, {labels}", elinewidth=1, **look(i)
    )
    for rank, place, height in zip(fixed, x, y, strict=True):
        axes.annotate(
            rank, (place, height), (0, 6), textcoords="offset points", ha="center",
            fontsize=8.5, color=colour(i),
        )  # fmt: skip
    for rule in sorted(at.keys() - set(fixed)):
        chosen = summary.target(at[rule])
        axes.errorbar(
            [summary.parameters(at[rule])], [scale * chosen.mean],
            np.nan_to_num([scale * chosen.sd]), linestyle="", elinewidth=1, marker="*",
            markersize=13, color=colour(i), markeredgecolor=INK, label=f"rank={rule}, {labels}",
        )  # fmt: skip
