"""The accuracy that `shift` expects on the suites' targets, and how many answers are right there.

    python -m benchmarks.shift_prediction_suites --part development
    python -m benchmarks.shift_prediction_suites --part final --table results/….csv [another.csv]

A row for each source model, target and condition, of which nothing is adapted: accuracy of the
source model on the target in parts of 1 (an item of none of the classes is never answered rightly),
what `shift` expects with its interval, and the numbers without labels that this and other
predictions are made of. Features are kept in the cache, so that a second run costs little.

``--table`` reads rows in place of measuring, and prints how far off the expectation is, how often
the interval holds the truth and how wide it is, by suite, network and condition; what the verdicts
meant; and for the choice of the interval's constants the 90 % quantile of |error| / half width in
each suite, of which the others know nothing.
"""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.suites.case import Case
from benchmarks.suites.choice import parser, tabulate
from benchmarks.suites.features import of_case
from lora_lightning.adaptation import validators as score
from lora_lightning.adaptation.shift import expected
from lora_lightning.adaptation.shift.batch_norm_agreement import Opinion
from lora_lightning.adaptation.shift.distances import bootstrap, frechet_distance
from lora_lightning.adaptation.shift.source_statistics import LayerStatistics, SourceStatistics
from lora_lightning.adaptation.shift.verdicts import NAMES, SPREAD, verdict

CONDITIONS = (
    "all", "3 classes", "5 classes", "10 to 1", "30 items", "open set", "upside down", "noise",
)  # fmt: skip
REPEATS = 20  # of the bootstrap
Row = dict[str, Any]


def measure(case: Case, condition: str, seed: int, network: str) -> Row:
    """One row."""
    found = of_case(case, condition, seed, network)
    held, target, labels = found["held"], found["target"], found["labels"]
    source, second = _source(held, found["held_labels"]), _second(target)
    layer = LayerStatistics.of(held[0])
    far = bootstrap(frechet_distance, layer.sample, layer.project(target[0]), repeats=REPEATS).value
    p, answered = target[1], _right(target[1], labels)
    sure = p.amax(dim=1)
    told = expected.expected_accuracy(source, p, second)
    low, high = expected.expected_interval(source, p, second) or (0.0, 1.0)
    row: Row = {
        "suite": case.name.partition("/")[0], "case": case.name, "condition": condition,
        "source": case.source, "network": network, "items": len(labels), "held": len(held[1]),
        "accuracy": float(answered.mean()),
        "accuracy_known": float(answered[labels >= 0].mean()) if (labels >= 0).any() else 0.0,
        "source_accuracy": source.accuracy, "expected": told, "low": low, "high": high,
        "verdict": verdict(expected.expected_drop(source, p, second), far), "frechet": far,
        "thresholded": score.thresholded_confidence(sure, source.confidence, source.accuracy or 0),
        "confidence": float(sure.mean()), "source_confidence": float(source.confidence.mean()),
        "most": float(p.argmax(1).bincount().max()) / len(p),
        "by_agreement": "", "agreement": "", "source_agreement": "",
    }  # fmt: skip
    if second is not None and source.agreement and source.accuracy:
        row["agreement"], row["source_agreement"] = second.agreement(p), source.agreement
        row["by_agreement"] = min(1.0, source.accuracy * row["agreement"] / source.agreement)
    return {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}


def _source(held: Any, labels: Tensor) -> SourceStatistics:
    """As `SourceStatistics.of` makes them, without layers."""
    second = _second(held)
    steady = None if second is None else second.agreement(held[1])
    right = float(_right(held[1], labels).mean())
    return SourceStatistics({}, held[1].amax(dim=1), right, steady, {})


def _second(seen: Any) -> Opinion | None:
    return None if seen[2] is None else Opinion(torch.arange(len(seen[1])), seen[2][1])


def _right(probabilities: Tensor, labels: Tensor) -> Tensor:
    return (probabilities.argmax(1) == labels).double()


def read(paths: list[Path]) -> list[Row]:
    """Rows of CSV files, numbers as such."""
    rows: list[Row] = []
    for path in paths:
        with path.open(newline="", encoding="utf-8") as file:
            rows += [{k: _value(v) for k, v in row.items()} for row in csv.DictReader(file)]
    return rows


def _value(text: str) -> str | float:
    try:
        return float(text)
    except ValueError:
        return text


def report(rows: list[Row]) -> None:
    """The tables."""
    told = [r for r in rows if r["frechet"] < SPREAD]
    print(f"{len(rows)} targets; of {len(told)} an accuracy is told")
    for name, key in (("suite, network", _suite), ("condition", lambda r: r["condition"]),
                      ("items", _size), ("all", lambda r: "all")):  # fmt: skip
        _errors(name, told, key)
    beyond = [100 * r["accuracy"] for r in rows if r["frechet"] >= SPREAD]
    if beyond:
        print(f"\nnot told: {len(beyond)}, {max(beyond):.0f} % right at most")
    print("\n| verdict | targets | lost: least | mean | most |\n| --- | --- | --- | --- | --- |")
    for name in NAMES:
        lost = [100 * (r["source_accuracy"] - r["accuracy"]) for r in rows if r["verdict"] == name]
        if lost:
            print(
                f"| {name} | {len(lost)} | {min(lost):.1f} | {fmean(lost):.1f} | {max(lost):.1f} |"
            )


def _suite(row: Row) -> str:
    return f"{row['suite']}, {row['network']}"


def _size(row: Row) -> str:
    return next(f"up to {n}" for n in (30, 100, 200, 10**6) if row["items"] <= n)


def _errors(name: str, rows: list[Row], key: Callable[[Row], str]) -> None:
    groups = defaultdict(list)
    for row in rows:
        groups[key(row)].append(row)
    print(f"\n| {name} | targets | off by | of it too high | by agreement | thresholded | holds, % "
          "| half width | 90 % of error / half width |\n" + "| --- " * 9 + "|")  # fmt: skip
    for group, of in groups.items():
        truth = np.array([r["accuracy"] for r in of])
        off = 100 * (np.array([r["expected"] for r in of]) - truth)
        others = [_others(of, k, truth) for k in ("by_agreement", "thresholded")]
        holds = [r["low"] - 1e-9 <= r["accuracy"] <= r["high"] + 1e-9 for r in of]
        half = np.array([50 * (r["high"] - r["low"]) for r in of])
        print(f"| {group} | {len(of)} | {abs(off).mean():.1f} | {off.mean():+.1f} | "
              f"{' | '.join(others)} | {100 * fmean(holds):.0f} | {half.mean():.1f} | "
              f"{np.quantile(abs(off) / half, 0.9):.2f} |")  # fmt: skip


def _others(rows: list[Row], prediction: str, truth: Any) -> str:
    """How far off another prediction is; "–" where one of the models has none."""
    if any(r[prediction] == "" for r in rows):
        return "–"
    return f"{100 * abs(np.array([r[prediction] for r in rows]) - truth).mean():.1f}"


def main() -> None:
    """Measure what the arguments choose, a row of the CSV each; or print tables of such rows."""
    arguments = parser(__doc__, CONDITIONS)
    arguments.add_argument("--table", type=Path, nargs="+", help="CSV files in place of measuring")
    given = arguments.parse_args()
    if given.table:
        report([r for r in read(given.table) if r["part"] == given.part])
        return
    tabulate("shift-suites", given, measure, report)


if __name__ == "__main__":
    main()
