"""Accuracy against rank over recipes: a table and docs/images/ranks.png from the results of sweeps.

    ranks="1 2 4 8 16 32 explained-variance"
    for name in lighting viewpoint environment; do
      lora-lightning sweep $name 'seeds=[0,1]' out=runs/ranks/$name --ranks $ranks
    done
    lora-lightning sweep speaker 'enrolment=[20]' 'train.lora.steps=[150]' \\
      'train.full.steps=[150]' out=runs/ranks/speaker --ranks $ranks
    python benchmarks/ranks.py runs/ranks/*/results.csv   # keeps them in a dated CSV, and draws
    python benchmarks/ranks.py                            # draws the newest CSV again

Ranks 1 to 32 and a rule are compared on the recipe's targets; steps start equally large at every
rank. Printed is what the rule loses against the best fixed rank, and its part of the numbers.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import re
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from lora_lightning.report.metrics import si
from lora_lightning.report.plots.style import COLOURS, QUIET, STYLE

RESULTS = Path(__file__).parent / "results"
PLOT = Path(__file__).parents[1] / "docs" / "images" / "ranks.png"
COLUMNS = ("recipe", "method", "domain", "seed", "metric", "value", "trainable_parameters")
RULE = "explained-variance"  # "auto" in results before 2026-11-28
Row = dict[str, Any]


def collected(paths: Iterable[Path]) -> list[Row]:
    """The rows of runs; the recipe is named after the folder."""
    rows = []
    for path in paths:
        with path.open(encoding="utf-8") as file:
            found = [{"recipe": path.parent.name, **row} for row in csv.DictReader(file)]
        rows += [{k: row[k] for k in COLUMNS} for row in found if row["metric"] != "CER"]
    return rows


def rank_of(method: str) -> str | None:
    """8 of "LoRA, rank 8, target labels"."""
    found = re.search(r"rank ([\w-]+)", method)
    return found[1].replace("auto", RULE) if found else None


def points(rows: list[Row], recipe: str) -> dict[str, dict[int, tuple[float, float]]]:
    """Rank → seed → (mean over the targets in %, trainable numbers); "" is the source model."""
    found: dict[str, dict[int, list[Row]]] = {}
    for row in rows:
        if row["recipe"] == recipe and row["domain"] != "source":
            rank = rank_of(row["method"]) or ""
            found.setdefault(rank, {}).setdefault(int(row["seed"]), []).append(row)
    return {
        rank: {
            seed: (100 * fmean(float(r["value"]) for r in own),
                   fmean(float(r["trainable_parameters"]) for r in own))
            for seed, own in seeds.items()
        }
        for rank, seeds in found.items()
    }  # fmt: skip


def over_seeds(seeds: dict[int, tuple[float, float]]) -> tuple[float, float]:
    """The means of both."""
    return fmean(v for v, _ in seeds.values()), fmean(n for _, n in seeds.values())


def show(recipe: str, found: dict[str, dict[int, tuple[float, float]]], lower: bool) -> None:
    """Print a recipe's table and verdict, for seeds that have every rank."""
    fixed = sorted((r for r in found if r.isdigit()), key=int)
    for rank in ["", *fixed, RULE]:
        mean, size = over_seeds(found[rank])
        each = ", ".join(f"{v:.1f}" for _, (v, _) in sorted(found[rank].items()))
        print(f"{recipe:12} {rank or 'source':18} {mean:5.1f}  ({each})  {size:9,.0f}")
    sign = -1 if lower else 1
    best = max(fixed, key=lambda r: sign * over_seeds(found[r])[0])
    (top, size), (value, chosen) = over_seeds(found[best]), over_seeds(found[RULE])
    loss = sign * (top - value)
    print(f"{recipe:12} {RULE} loses {loss:+.1f} against rank {best}, "
          f"with {chosen / size:.2f} of its numbers\n")  # fmt: skip


def draw(rows: list[Row], path: Path) -> None:
    """A panel for each recipe."""
    recipes = list(dict.fromkeys(row["recipe"] for row in rows))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.1 * len(recipes), 3.1), layout="constrained")
        for axes, recipe in zip(figure.subplots(1, len(recipes)), recipes, strict=True):
            metric = next(r["metric"] for r in rows if r["recipe"] == recipe)
            _panel(axes, points(rows, recipe))
            axes.set_title(f"{recipe}: {metric} in %", loc="left", fontsize=10)
        figure.supxlabel("trainable numbers", fontsize=9)
        figure.savefig(path, dpi=120)


def _panel(axes: Axes, found: dict[str, dict[int, tuple[float, float]]]) -> None:
    fixed = sorted((r for r in found if r.isdigit()), key=int)
    at = [over_seeds(found[r]) for r in fixed]
    sizes = [size for _, size in at]
    for rank, (_, size) in zip(fixed, at, strict=True):
        each = [v for v, _ in found[rank].values()]
        axes.plot([size] * len(each), each, ".", color=COLOURS[0], alpha=0.4, markersize=5)
    axes.plot(sizes, [v for v, _ in at], "o-", color=COLOURS[0], label="fixed rank")
    for rank, (value, size) in zip(fixed, at, strict=True):
        axes.annotate(rank, (size, value), (0, 7), textcoords="offset points", ha="center",
                      fontsize=8)  # fmt: skip
    value, size = over_seeds(found[RULE])
    each = [v for v, _ in found[RULE].values()]
    axes.plot([size] * len(each), each, ".", color=COLOURS[1], alpha=0.5, markersize=5)
    axes.plot([size], [value], "*", color=COLOURS[1], markersize=13, label=RULE)
    axes.set_xscale("log")
    axes.set_xticks(sizes[::2], [si(s) for s in sizes[::2]])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.margins(y=0.2)
    axes.grid(visible=True, axis="y", color=QUIET, alpha=0.3)
    axes.legend(frameon=False, fontsize=8, loc="best")


def main() -> None:
    """Collect, print, draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("files", nargs="*", type=Path, help="results.csv of sweeps")
    given = parser.parse_args()
    if given.files:
        rows = collected(given.files)
        with (RESULTS / f"{datetime.date.today()}-ranks.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
    else:
        with max(RESULTS.glob("*-ranks.csv")).open(encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    for recipe in dict.fromkeys(row["recipe"] for row in rows):
        metric = next(r["metric"] for r in rows if r["recipe"] == recipe)
        show(recipe, points(rows, recipe), lower=metric == "WER")
    draw(rows, PLOT)


if __name__ == "__main__":
    main()
