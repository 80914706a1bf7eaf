"""Which runs a benchmark on the suites makes, by its arguments."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from benchmarks.machine import Table, setting
from benchmarks.suites import DEVELOPMENT, FINAL, SUITES, load, part
from benchmarks.suites.case import CONDITIONS, Case
from benchmarks.suites.networks import NETWORKS, networks

SEEDS = {"development": DEVELOPMENT, "final": FINAL}


def parser(text: str | None, conditions: Sequence[str] = CONDITIONS) -> argparse.ArgumentParser:
    """The arguments that `runs` takes; `text` is the module's own."""
    found = argparse.ArgumentParser(description=text, formatter_class=argparse.RawTextHelpFormatter)
    found.add_argument("--part", default="development", choices=SEEDS)
    found.add_argument("--suites", nargs="+", default=list(SUITES), choices=SUITES)
    found.add_argument("--cases", nargs="+", help="names; default: all of the part")
    found.add_argument("--networks", nargs="+", default=list(NETWORKS))
    found.add_argument("--conditions", nargs="+", default=conditions, choices=conditions)
    return found


def runs(given: argparse.Namespace) -> Iterator[tuple[Case, str, int, str]]:
    """Case, condition, seed and network of each run."""
    seed = SEEDS[given.part]
    for name in given.cases or part(seed, *given.suites):
        case = load(name, seed)
        for network in [n for n in networks(case) if n in given.networks]:
            for condition in given.conditions:
                yield case, condition, seed, network


def tabulate(
    name: str,
    given: argparse.Namespace,
    measure: Callable[..., dict[str, Any]],
    report: Callable[[list[dict[str, Any]]], None],
) -> None:
    """Measure each run without gradients, a row of the CSV `name` each; then report on the rows."""
    table = Table(name, {**setting(), "part": given.part, "seed": SEEDS[given.part]})
    with torch.no_grad():
        for run in runs(given):
            table.add(**measure(*run))
    report(table.rows)
    print(table.path)
