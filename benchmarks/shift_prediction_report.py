"""Table and figures of what `shift_prediction.py` saw; run by it.

Every predictor is a number that needs no label of the target. They were compared on seeds 100 and
above, other pictures and other source models; the figures are of the seeds that the table names.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path
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


def report(out: Path, seeds: Sequence[int]) -> list[Row]:
    rows = rows_of(out, seeds)
    for row in rows:
        row |= {name: of(row) for name, of in COMBINED.items()}
    return rows


if __name__ == "__main__":
    import sys

    rows = report(Path(sys.argv[1]), [int(s) for s in sys.argv[2:]])
    for r in rows:
        print(
            r["kind"],
            r["target"],
            r["seed"],
            r["verdict"],
            r["entry"],
            *(
                f"{k}={r[k]:.2f}"
                for k in (
                    "source",
                    "accuracy_before",
                    "before_expected",
                    "before_confidence",
                    "before_nuclear_norm",
                    "before_views",
                    "before_renewed",
                    "before_frechet",
                    "accuracy_after",
                    "after_agreement",
                    "after_expected",
                    "after_confidence",
                    "after_views",
                )
            ),
        )
    for stage in ("before", "after"):
        for truth in ("accuracy", "held_out", "items"):
            print(
                stage, truth, {k: round(v, 2) for k, v in correlations(rows, stage, truth).items()}
            )
