"""Table, CSV and plot of what `bank.py` measured; run by it."""

from __future__ import annotations

import csv
import statistics
from pathlib import Path

import machine
from machine import quartiles

Times = dict[tuple[str, int], list[float]]  # (what, number of adapters) → milliseconds of each turn
TITLES = {"vit": "ViT-Tiny", "wav2vec2": "wav2vec2-base"}


def ratios(found: Times, key: tuple[str, int]) -> list[float]:
    """Each run's time over that of the base in the same turn."""
    return [a / b for a, b in zip(found[key], found["base", 0], strict=True)]


def show(model: str, found: Times, batch: int) -> None:
    """Medians, quartiles and ratios to the base, then the goals."""
    print(
        f"\n{model}: {'':18s} {'ms':>9s} {'quartiles':>19s} {'over base':>10s} {'quartiles':>15s}"
    )
    for (what, number), values in found.items():
        low, median, high = quartiles(values)
        a, b, c = quartiles(ratios(found, (what, number)))
        print(
            f"{what:14s} {number or '':>6} {median:14.1f} {low:9.1f} {high:9.1f} {b:10.3f} "
            f"{a:7.3f} {c:7.3f}"
        )
    mixed = [key for key in found if key[0] == "bank" and key[1] >= batch]
    if not mixed:
        return
    one = statistics.median(ratios(found, ("one adapter", 1)))
    for key in mixed:
        own = statistics.median(ratios(found, key))
        print(f"goal, {key[1]} adapters at most 1.10 × one for all: {own / one:.3f}")
    if ("PEFT", batch) in found:
        peer = statistics.median(ratios(found, ("PEFT", batch))) - 1
        own = statistics.median(ratios(found, ("bank", batch))) - 1
        print(f"goal, overhead at most a third of PEFT's: {own / peer:.3f} ({own:.3f}, {peer:.3f})")


def save(folder: Path, results: dict[str, Times], batch: int, where: dict[str, str]) -> Path:
    """A dated CSV, one row a run."""
    rows = (
        {"model": model, "batch": batch, "what": what, "adapters": number, "run": run,
         "milliseconds": f"{value:.3f}"}
        for model, found in results.items()
        for (what, number), values in found.items()
        for run, value in enumerate(values, start=1)
    )  # fmt: skip
    return machine.save("bank", rows, where, folder)


def read(files: list[Path]) -> tuple[dict[str, Times], int]:
    """What `save` wrote, and the batch; of a model in several files the last counts."""
    results: dict[str, Times] = {}
    batch = 0
    for path in files:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        for model in {row["model"]: None for row in rows}:
            found = results[model] = {}
            for row in (r for r in rows if r["model"] == model):
                key = row["what"], int(row["adapters"])
                found.setdefault(key, []).append(float(row["milliseconds"]))
                batch = int(row["batch"])
    return results, batch


def plot(path: Path, results: dict[str, Times], batch: int) -> None:
    """Cost over the base against the number of adapters, quartiles as a band."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        1, len(results), figsize=(5 * len(results), 3.6), squeeze=False, layout="constrained"
    )
    for axis, (model, found) in zip(axes[0], results.items(), strict=True):
        for what, colour in (("bank", "C0"), ("PEFT", "C1")):
            numbers = [n for w, n in found if w == what]
            if numbers:
                low, mid, high = zip(
                    *(quartiles(ratios(found, (what, n))) for n in numbers), strict=True
                )
                axis.plot(numbers, mid, "o-", color=colour, label=f"{what}, mixed batch")
                axis.fill_between(numbers, low, high, color=colour, alpha=0.2, lw=0)
        one = statistics.median(ratios(found, ("one adapter", 1)))
        axis.axhline(one, color="C2", ls="--", label="one adapter for all")
        axis.axhline(1, color="0.4", ls=":", label="base")
        drawn = sorted({n for _, n in found if n})
        axis.set_xscale("log", base=2)
        axis.set_xticks(drawn, [str(n) for n in drawn])
        axis.set(
            title=TITLES.get(model, model),
            xlabel=f"adapters (batch of {batch})",
            ylabel="time / base",
        )
        axis.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
