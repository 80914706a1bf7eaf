"""Table and figures of the measurements of `shift_prediction.py`; run by it.

Every predictor is a number that needs no label of the target. They were compared on seeds 100 and
above, other pictures and other source models; the figures are of the seeds that the table names.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure
from scipy.stats import spearmanr
from torch import Tensor

from lora_lightning.adaptation import validators as score
from lora_lightning.adaptation.shift.measure import compare
from lora_lightning.adaptation.shift.source_statistics import LayerStatistics, SourceStatistics
from lora_lightning.adaptation.shift.verdicts import NAMES
from lora_lightning.report.plots.style import COLOURS, MARKERS, QUIET, STYLE

Row = dict[str, Any]
CHOSEN = "expected"  # what `shift` tells


def rows_of(out: Path, seeds: Sequence[int], kinds: Sequence[str]) -> list[Row]:
    """A row for each measured target."""
    found = []
    for seed in seeds:
        for kind in kinds:
            folder = out / f"{kind}-{seed}"
            source = torch.load(folder / "source.pt", weights_only=False)["before"]
            statistics = statistics_of(source)
            for other in sorted(folder.glob("*.pt")):
                if other.stem != "source":
                    seen = torch.load(other, weights_only=False)
                    found.append({"kind": kind, "target": other.stem, "seed": seed}
                                 | row_of(statistics, seen))  # fmt: skip
    return found


def statistics_of(seen: dict[str, Any]) -> SourceStatistics:
    """As `SourceStatistics.of` makes them."""
    confidence, best = seen["probabilities"].max(dim=1)
    right = float((best == seen["labels"]).double().mean())
    layers = {name: LayerStatistics.of(x.float()) for name, x in seen["features"].items()}
    steady = seen["second"].agreement(seen["probabilities"])
    return SourceStatistics(layers, confidence, right, steady, {})


def row_of(source: SourceStatistics, seen: dict[str, Any]) -> Row:
    """The truth, and every predictor."""
    before, after = seen["before"], seen["after"]
    p, q, second = before["probabilities"], after["probabilities"], before["second"]
    features = {name: x.float() for name, x in before["features"].items()}
    shift = compare(source, features, p, second, q, repeats=20)
    row: Row = {"verdict": shift.verdict, "entry": shift.entry, "source": source.accuracy,
                "kept_source": int(seen["accepted"] == 0)}  # fmt: skip
    for name, what in (("before", before), ("after", after)):
        items = float((what["probabilities"].argmax(1) == what["labels"]).double().mean())
        held = seen[f"accuracy_{name}"]
        row |= {f"items_{name}": items, f"held_out_{name}": held}
        row[f"accuracy_{name}"] = (160 * items + 120 * held) / 280
    row["before_expected"] = shift.expected_accuracy or 0.0  # None: too far for any
    row["after_expected"] = shift.expected_adapted or 0.0
    for name, answers in (("before", p), ("after", q)):
        row |= {f"{name}_{k}": v for k, v in of_answers(source, answers).items()}
    row["before_frechet"] = row["after_frechet"] = -shift.frechet.value
    row["before_mmd"], row["before_proxy_a"] = -shift.mmd.value, -shift.proxy_a.value
    row["after_agreement"] = shift.agreement
    row["after_second"] = second.agreement(q)
    row["after_agreement_confidence"] = row["after_agreement"] * row["after_confidence"]
    row["after_mean_thresholded"] = (row["after_thresholded"] + row["before_thresholded"]) / 2
    return row


def of_answers(source: SourceStatistics, p: Tensor) -> dict[str, float]:
    """Predictors from the predictions alone."""
    accuracy = source.accuracy or 0.0
    confidence = p.amax(dim=1)
    return {
        "thresholded": score.thresholded_confidence(confidence, source.confidence, accuracy),
        "confidence": float(confidence.mean()),
        "confidence_difference": accuracy - float(source.confidence.mean() - confidence.mean()),
        "nuclear_norm": score.nuclear_norm(p),
    }


def correlations(rows: Sequence[Row], stage: str, truth: str = "accuracy") -> dict[str, float]:
    """Predictor → Spearman rank correlation with the truth, over all rows."""
    names = [n for n in rows[0] if n.startswith(f"{stage}_")]
    real = [r[f"{truth}_{stage}"] for r in rows]
    return {n: float(spearmanr([r[n] for r in rows], real).statistic) for n in names}


def report(
    out: Path, seeds: Sequence[int], kinds: Sequence[str], csv_to: Path, pictures_to: Path
) -> None:
    """Write the CSV and the figures, print the correlations and how often verdicts were right."""
    rows = rows_of(out, seeds, kinds)
    csv_to.parent.mkdir(parents=True, exist_ok=True)
    with csv_to.open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        table.writeheader()
        table.writerows(
            {k: round(v, 4) if isinstance(v, float) else v for k, v in r.items()} for r in rows
        )
    print(f"{len(rows)} targets, seeds {', '.join(map(str, seeds))}")
    for stage in ("before", "after"):
        show(rows, stage)
    tell_adapted(rows)
    tell_verdicts(rows)
    for stage in ("before", "after"):
        draw(rows, stage, pictures_to / f"shift-{stage}.png")


def show(rows: Sequence[Row], stage: str) -> None:
    """A line for each predictor: all, those of each seed, and of each kind of shift."""
    kinds = list(dict.fromkeys(r["kind"] for r in rows))
    seeds = list(dict.fromkeys(r["seed"] for r in rows))
    groups = [[r for r in rows if r["seed"] == s] for s in seeds]
    groups += [[r for r in rows if r["kind"] == k] for k in kinds]
    whole, held = (correlations(rows, stage, t) for t in ("accuracy", "held_out"))
    parts = [correlations(g, stage) for g in groups]
    names = ["all", "held out", *(f"seed {s}" for s in seeds), *kinds]
    print(f"\n{stage:<28}" + "".join(f"{n:>12}" for n in names))
    for name in sorted(whole, key=whole.__getitem__, reverse=True):
        values = [whole[name], held[name], *(p[name] for p in parts)]
        print(f"{name:<28}" + "".join(f"{v:12.2f}" for v in values))


def tell_adapted(rows: Sequence[Row]) -> None:
    """The correlations on the targets that the guard let adapt."""
    of = [r for r in rows if not r["kept_source"]]
    rank = correlations(of, "after")[f"after_{CHOSEN}"]
    print(f"\nadapted, not kept as it was: {len(of)} targets, rank correlation {rank:.2f}")


def tell_verdicts(rows: Sequence[Row]) -> None:
    """What each verdict meant: accuracy lost, and what adapting without labels brought."""
    print("\nverdict     targets   lost (points: least, mean, most)    after adapting, still lost")
    for name in NAMES:
        of = [r for r in rows if r["verdict"] == name]
        if of:
            lost, still = (
                [100 * (r["source"] - r[f"accuracy_{stage}"]) for r in of]
                for stage in ("before", "after")
            )
            print(f"{name:<12}{len(of):>7}" + "".join(
                f"{min(x):12.1f}{fmean(x):8.1f}{max(x):8.1f}" for x in (lost, still)
            ))  # fmt: skip
    for stage in ("before", "after"):
        off = [100 * (r[f"{stage}_{CHOSEN}"] - r[f"accuracy_{stage}"]) for r in rows]
        print(f"{stage}: expected minus true accuracy {fmean(off):.1f} points on the mean, "
              f"{fmean(map(abs, off)):.1f} its size, {max(map(abs, off)):.1f} at most")  # fmt: skip


def draw(rows: Sequence[Row], stage: str, path: Path) -> None:
    """The predictor against the truth, a marker for each kind of shift."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.6, 4.6), layout="constrained")
        axes = figure.subplots()
        for i, kind in enumerate(dict.fromkeys(r["kind"] for r in rows)):
            of = [r for r in rows if r["kind"] == kind]
            x, y = ([100 * r[k] for r in of] for k in (f"{stage}_{CHOSEN}", f"accuracy_{stage}"))
            axes.plot(x, y, MARKERS[i], color=COLOURS[i + 1], label=kind, markersize=5, alpha=0.8)
        axes.plot([0, 100], [0, 100], color=QUIET, linewidth=0.8, linestyle=":")
        axes.set_xlabel("expected accuracy, without labels (%)")
        axes.set_ylabel(f"accuracy on the target, {stage} adapting (%)")
        axes.grid(visible=True)
        rank = correlations(rows, stage)[f"{stage}_{CHOSEN}"]
        axes.set_title(f"{stage} adapting: rank correlation {rank:.2f}, {len(rows)} targets")
        axes.legend(frameon=False, loc="upper left")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=140, metadata={"Software": None})
