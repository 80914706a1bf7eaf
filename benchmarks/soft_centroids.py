"""Answers without training on the suites, and what tells without labels which one is better.

    python -m benchmarks.soft_centroids --part development --networks efficientnet convnext

For each case and condition: accuracy in % of the source model, of the source model with BatchNorm's
statistics of the target, of LAME, of the head's probabilities times the cosine to soft centroids
and then LAME, and of `soft_centroids` on either statistics; the signals of the rule; and what
`trusted_centroids` answers. Features are kept in the cache, so that a second run costs little.
Choices were made on the development part alone; the final part has other source styles, other
corruptions and other items.
"""

from __future__ import annotations

from collections import defaultdict
from statistics import fmean
from typing import Any

from torch import Tensor

from benchmarks.suites.case import Case
from benchmarks.suites.choice import parser, tabulate
from benchmarks.suites.features import of_case
from lora_lightning.adaptation.class_centroids import (
    complete,
    soft_centroids,
    statistics_gain,
    trusted_centroids,
    unhelpful,
)
from lora_lightning.adaptation.label_propagation import lame
from lora_lightning.adaptation.neighbours import unit_rows
from lora_lightning.adaptation.target import Predicted
from lora_lightning.adaptation.validators import agreement, thresholded_confidence

CONDITIONS = ("all", "3 classes", "5 classes", "10 to 1", "30 items", "open set", "upside down")
HARM = 1.0  # points below the source model


def product(said: Predicted) -> Tensor:
    """The head's probabilities times the cosine to soft centroids."""
    z = unit_rows(said.features)
    q = said.probabilities * (z @ unit_rows(said.probabilities.T @ z).T).clamp_min(1e-6)
    return q / q.sum(dim=1, keepdim=True)


def measure(case: Case, condition: str, seed: int, network: str) -> dict[str, Any]:
    """One row."""
    found = of_case(case, condition, seed, network)
    features, probabilities, again = found["target"]
    source = Predicted(probabilities, features)
    restated = None if again is None else Predicted(again[1], again[0])
    held, labels = found["held"][1], found["labels"]
    right = float((held.argmax(1) == found["held_labels"]).double().mean())

    def accuracy(q: Tensor) -> float:
        known = labels >= 0
        return round(100 * float((q.argmax(1) == labels)[known].double().mean()), 2)

    answers, by = trusted_centroids(source, restated)
    row = {
        "case": case.name, "condition": condition, "network": network, "items": len(labels),
        "held_out": round(100 * right, 2), "source": accuracy(probabilities),
        "lame": accuracy(lame(features, probabilities)),
        "product_lame": accuracy(lame(features, product(source))),
        "centroids": accuracy(soft_centroids(features, probabilities)),
        "statistics": "", "statistics_centroids": "", "gain": "", "statistics_help": "",
        "agreement": "", "complete": complete(source),
        "confidence": round(100 * float(probabilities.amax(1).mean()), 2),
        "expected": round(
            100 * thresholded_confidence(probabilities.amax(1), held.amax(1), right), 2
        ),
        "by": by, "trusted": accuracy(answers),
    }  # fmt: skip
    if restated is not None:
        row |= {
            "statistics": accuracy(restated.probabilities),
            "statistics_centroids": accuracy(
                soft_centroids(restated.features, restated.probabilities)
            ),
            "gain": round(statistics_gain(source, restated), 3),
            "statistics_help": not unhelpful(source, restated),
            "agreement": round(100 * agreement(probabilities, restated.probabilities), 2),
        }
    return row


def report(rows: list[dict[str, Any]]) -> None:
    """Mean change against the source and runs that lost more than a point, as Markdown."""
    methods = ["lame", "product_lame", "centroids", "statistics", "statistics_centroids", "trusted"]
    groups = defaultdict(list)
    for row in rows:
        suite = row["case"].partition("/")[0]
        groups[suite, row["network"], row["condition"]].append(row)
    print("| suite, network | condition | runs | source |", " | ".join(methods), "|")
    print("| --- " * (4 + len(methods)) + "|")
    for (suite, network, condition), of in groups.items():
        cells = [f"{suite}, {network}", condition, str(len(of))]
        cells.append(f"{fmean(r['source'] for r in of):.1f}")
        for method in methods:
            changes = [r[method] - r["source"] for r in of if r[method] != ""]
            harm = sum(c < -HARM for c in changes)
            cells.append(f"{fmean(changes):+.1f} ({harm})" if changes else "–")
        print("|", " | ".join(cells), "|")


def main() -> None:
    """Measure what the arguments choose; a row of the CSV each, then the table."""
    tabulate("soft-centroids", parser(__doc__, CONDITIONS).parse_args(), measure, report)


if __name__ == "__main__":
    main()
