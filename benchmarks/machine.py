"""Versions, hardware and load of a benchmark's run, its clock, and the files of its figures."""

from __future__ import annotations

import csv
import datetime
import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable, Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

RESULTS = Path(__file__).parent / "results"
K = TypeVar("K", bound=Hashable)
Work = Callable[[], Any]


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


def seconds(work: Work) -> float:
    """Of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def in_turns(
    works: Mapping[K, Work], rounds: int, clock: Callable[[Work], float] = seconds
) -> dict[K, list[float]]:
    """What the clock says of each, round by round; the order rotates between rounds."""
    found: dict[K, list[float]] = {name: [] for name in works}
    order = list(works)
    for number in range(rounds + 1):
        for name in order[number % len(order) :] + order[: number % len(order)]:
            taken = clock(works[name])
            if number:  # the first round warms up
                found[name].append(taken)
    return found


def ratios(times: Mapping[K, list[float]], base: K) -> dict[K, tuple[float, float, float]]:
    """Lower quartile, median, upper quartile of each round's ratio to the base's."""
    return {
        name: quartiles([a / b for a, b in zip(own, times[base], strict=True)])
        for name, own in times.items()
    }


def dated(date: str, title: str, suffix: str = ".csv", folder: Path = RESULTS) -> Path:
    """A free path for the figures of this day: a second file gets a number."""
    folder.mkdir(parents=True, exist_ok=True)
    path, number = folder / f"{date}-{title}{suffix}", 1
    while path.exists():
        number += 1
        path = folder / f"{date}-{title}-{number}{suffix}"
    return path


class Table:
    """A dated CSV that is complete after each row.

    Args:
        title: In the name of the file.
        where: Options, versions, hardware: the same in each row.
        folder: Of the file.
    """

    def __init__(self, title: str, where: Mapping[str, Any], folder: Path = RESULTS):
        self.path, self.where = dated(where["date"], title, folder=folder), where
        self.rows: list[dict[str, Any]] = []

    def add(self, **row: Any) -> None:
        """Write one row; the first one names the columns."""
        with self.path.open("a", newline="", encoding="utf-8") as file:
            columns = [*(self.rows or [row])[0], *self.where]
            writer = csv.DictWriter(file, columns, lineterminator="\n")
            if not self.rows:
                writer.writeheader()
            writer.writerow({**row, **self.where})
        self.rows.append(row)


def save(
    title: str,
    rows: Iterable[Mapping[str, Any]],
    where: Mapping[str, Any],
    folder: Path = RESULTS,
) -> Path:
    """A dated CSV of these rows, each followed by `where`: options, versions, hardware."""
    table = Table(title, where, folder)
    for row in rows:
        table.add(**row)
    return table.path
