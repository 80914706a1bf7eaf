"""Runs with known figures, for the tests of reports and plots."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np

from lora_lightning.report.results import Prediction, Row, Run

SOURCE, LORA, FULL = "source only", "LoRA, target labels", "full fine-tuning, target labels"
COSTS: dict[str, tuple[int, int | None]] = {SOURCE: (0, None), LORA: (100_000, 412_345)}
DOMAINS = ("source", "dim-1", "dim-2", "low-1", "low-2")


def row(method: str, domain: str, seed: int, value: float, **changes: Any) -> Row:
    parameters, size = COSTS.get(method, (3_400_000, 13_600_000))
    made = Row(method, domain, seed, "accuracy", value, parameters, 12.0, size)
    return dataclasses.replace(made, **changes)


def scored(rows: list[Row], n: int = 1000) -> dict[tuple[str, str, int], np.ndarray]:
    """Scores of `n` items that give these rows' values: the first are right; degrees are alike."""

    def each(value: float) -> np.ndarray:
        values = np.full(n, value) if value > 1 else np.arange(n) < round(value * n)
        return np.stack([values, np.ones(n)], 1)

    return {(r.method, r.domain, r.seed): each(r.value) for r in rows if math.isfinite(r.value)}


def make_run(root: Path, rows: list[Row], **changes: Any) -> Run:
    predictions = [
        Prediction(f"{d}/mug/{i}.png", d, "mug", "mug" if i else "kettle", 0.4, "mug", 0.9, 0)
        for d in ("dim-1", "low-2")
        for i in range(3)
    ]
    made = Run(
        name="lighting",
        title="Lighting",
        metric="accuracy",
        rows=rows,
        predictions=predictions,
        classes=["kettle", "mug"],
        spectra={"blocks.0.fc": [0.5, 0.1], "blocks.1.fc": [0.0, 0.0]},
        config={"rank": 2, "out": Path("somewhere")},
        data_root=root,
        versions={"torch": "2.14.0", "hardware": "two cores"},
        skipped=[("a/b.png", "truncated")],
        notes=["a note"],
        scores=scored(rows),
    )
    return dataclasses.replace(made, **changes)


def three_seeds() -> list[Row]:
    """Severity 1 at 0.8, 2 at 0.6 for the source model; LoRA 0.9; one point apart by seed."""
    base = {"source": 0.95, "dim-1": 0.82, "low-1": 0.78, "dim-2": 0.6, "low-2": 0.6}
    rows = []
    for seed in (0, 1, 2):
        rows += [row(SOURCE, d, seed, base[d]) for d in DOMAINS]
        rows += [row(LORA, d, seed, 0.9 + 0.01 * (seed - 1)) for d in DOMAINS]
        rows += [row(FULL, d, seed, 0.93) for d in DOMAINS]
    return rows
