"""Table and figures of what `shift_prediction.py` saw; run by it.

Every predictor is a number that needs no label of the target. They were compared on seeds 100 and
above, other pictures and other source models; the figures are of the seeds that the table names.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure
from scipy.stats import spearmanr
from torch import Tensor

from lora_lightning.fingerprint import fingerprint
from lora_lightning.plots.style import COLOURS, MARKERS, QUIET, STYLE
from lora_lightning.shifts import compare
from lora_lightning.source_statistics import LayerStatistics, SourceStatistics
from lora_lightning.transduction import validators as score
from lora_lightning.verdicts import NAMES

Row = dict[str, Any]
BEFORE, AFTER = "expected", "agreement_confidence"  # what `shift` tells by


def rows_of(out: Path, seeds: Sequence[int]) -> list[Row]:
    """A row for each target that was seen."""
    found = []
    for seed in seeds:
        for path in sorted(out.glob(f"*-{seed}/source.pt")):
            source = torch.load(path, weights_only=False)["before"]
            statistics = statistics_of(source)
            kind = path.parent.name.rpartition("-")[0]
            for other in sorted(path.parent.glob("*.pt")):
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
    return SourceStatistics(layers, confidence, right, fingerprint(torch.nn.Identity()))


def row_of(source: SourceStatistics, seen: dict[str, Any]) -> Row:
    """The truth, and every predictor."""
    before, after = seen["before"], seen["after"]
    p, q = before["probabilities"], after["probabilities"]
    features = {name: x.float() for name, x in before["features"].items()}
    shift = compare(source, features, p, q, repeats=20)
    row: Row = {"source": source.accuracy, "verdict": shift.verdict, "entry": shift.entry}
    for name, what in (("before", before), ("after", after)):
        items = float((what["probabilities"].argmax(1) == what["labels"]).double().mean())
        held = seen[f"accuracy_{name}"]
        row |= {f"items_{name}": items, f"held_out_{name}": held}
        row[f"accuracy_{name}"] = (160 * items + 120 * held) / 280
    row |= {f"before_{k}": v for k, v in answers(source, p, before["views"]).items()}
    row |= {f"after_{k}": v for k, v in answers(source, q, after["views"]).items()}
    row["before_renewed"] = score.agreement(p, seen["renewed"])
    row["before_frechet"], row["before_proxy_a"] = -shift.frechet.value, -shift.proxy_a.value
    row["before_mmd"] = -shift.mmd.value
    row["after_agreement"] = score.agreement(p, q)
    row["after_frechet"] = row["before_frechet"]
    row["after_expected_source"] = row["before_expected"]
    return row


def answers(source: SourceStatistics, p: Tensor, views: Sequence[Tensor]) -> dict[str, float]:
    """Predictors from answers alone."""
    confidence = p.amax(dim=1)
    assert source.accuracy is not None
    return {
        "expected": score.thresholded_confidence(confidence, source.confidence, source.accuracy),
        "confidence": float(confidence.mean()),
        "nuclear_norm": score.nuclear_norm(p),
        "entropy": -score.mean_entropy(p),
        "views": sum(score.agreement(p, v) for v in views) / len(views),
    }


COMBINED: dict[str, Callable[[Row], float]] = {
    "before_confidence_views": lambda r: r["before_confidence"] * r["before_views"],
    "before_expected_renewed": lambda r: r["before_expected"] * r["before_renewed"],
    "after_agreement_confidence": lambda r: r["after_agreement"] * r["after_confidence"],
    "after_agreement_expected": lambda r: r["after_agreement"] * r["after_expected"],
    "after_mean_expected": lambda r: (r["after_expected"] + r["before_expected"]) / 2,
    "after_views_confidence": lambda r: r["after_views"] * r["after_confidence"],
    "after_mean_confidence": lambda r: r["after_confidence"] + r["before_confidence"],
    "after_agreement_views": lambda r: r["after_agreement"] * r["after_views"],
}


def correlations(rows: Sequence[Row], stage: str, truth: str = "accuracy") -> dict[str, float]:
    """Predictor → Spearman rank correlation with the truth, over all rows."""
    names = [n for n in rows[0] if n.startswith(f"{stage}_")]
    real = [r[f"{truth}_{stage}"] for r in rows]
    return {n: float(spearmanr([r[n] for r in rows], real).statistic) for n in names}


def report(out: Path, seeds: Sequence[int], csv_to: Path, pictures_to: Path) -> None:
    """Write the CSV and the figures, print the correlations and how often verdicts were right."""
    rows = rows_of(out, seeds)
    for row in rows:
        row |= {name: of(row) for name, of in COMBINED.items()}
    csv_to.parent.mkdir(parents=True, exist_ok=True)
    with csv_to.open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        table.writeheader()
        table.writerows(
            {k: round(v, 4) if isinstance(v, float) else v for k, v in r.items()} for r in rows
        )
    print(f"{len(rows)} targets, seeds {', '.join(map(str, seeds))}")
    for stage in ("before", "after"):
        tell(rows, stage)
    tell_verdicts(rows)
    for stage, name in (("before", BEFORE), ("after", AFTER)):
        draw(rows, stage, name, pictures_to / f"shift-{stage}.png")


def tell(rows: Sequence[Row], stage: str) -> None:
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
    lost = [100 * (r["source"] - r["accuracy_before"]) for r in rows]
    expected = [100 * (r["source"] - r[f"before_{BEFORE}"]) for r in rows]
    off = [abs(a - b) for a, b in zip(lost, expected, strict=True)]
    print(f"expected and true loss differ by {fmean(off):.1f} points on the mean, {max(off):.1f} "
          "at most")  # fmt: skip


def draw(rows: Sequence[Row], stage: str, name: str, path: Path) -> None:
    """The predictor against the truth, a marker for each kind of shift."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.6, 4.6), layout="constrained")
        axes = figure.subplots()
        for i, kind in enumerate(dict.fromkeys(r["kind"] for r in rows)):
            of = [r for r in rows if r["kind"] == kind]
            x, y = ([100 * r[k] for r in of] for k in (f"{stage}_{name}", f"accuracy_{stage}"))
            axes.plot(x, y, MARKERS[i], color=COLOURS[i + 1], label=kind, markersize=5, alpha=0.8)
        axes.plot([0, 100], [0, 100], color=QUIET, linewidth=0.8, linestyle=":")
        axes.set_xlabel(LABELS[stage])
        axes.set_ylabel(f"accuracy on the target, {stage} adapting (%)")
        axes.grid(visible=True)
        rank = correlations(rows, stage)[f"{stage}_{name}"]
        axes.set_title(f"{stage} adapting: rank correlation {rank:.2f}, {len(rows)} targets")
        axes.legend(frameon=False, loc="upper left")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=140, metadata={"Software": None})


LABELS = {
    "before": "expected without labels (%): average thresholded confidence",
    "after": "agreement with the source model × mean confidence (%)",
}
