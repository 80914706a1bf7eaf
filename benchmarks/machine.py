"""Versions, hardware and load of a benchmark's run, and the files of its figures."""

from __future__ import annotations

import csv
import datetime
import importlib.metadata
import os
import platform
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def setting(*others: str) -> dict[str, str]:
    """Versions (of `others` as well), hardware and how busy the machine was."""
    packages = ("lora-lightning", "torch", "lightning", "timm", *others)
    versions = {}
    for name in packages:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "date": datetime.date.today().isoformat(),
        **versions,
        "python": platform.python_version(),
        "precision": "float32",
        "hardware": f"{_processor()}, {os.cpu_count()} cores",
        **_gpu(),
        "load": f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "",
    }


def _gpu() -> dict[str, str]:
    import torch

    return {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, median, high = statistics.quantiles(values, n=4)
    return low, median, high


def dated(date: str, title: str, suffix: str = ".csv", folder: Path = RESULTS) -> Path:
    """A free path for the figures of this day: a second file gets a number."""
    folder.mkdir(parents=True, exist_ok=True)
    path, number = folder / f"{date}-{title}{suffix}", 1
    while path.exists():
        number += 1
        path = folder / f"{date}-{title}-{number}{suffix}"
    return path


def save(
    title: str,
    rows: Iterable[Mapping[str, Any]],
    where: Mapping[str, Any],
    folder: Path = RESULTS,
) -> Path:
    """A dated CSV of these rows, each followed by `where`: options, versions, hardware."""
    path, rows = dated(where["date"], title, folder=folder), list(rows)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*rows[0], *where], lineterminator="\n")
        writer.writeheader()
        writer.writerows({**row, **where} for row in rows)
    return path
