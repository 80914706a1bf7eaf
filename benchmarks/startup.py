"""Time that lora-lightning adds to the start of a program: the import, and injecting an adapter.

    python benchmarks/startup.py            # both, about two minutes; writes a dated CSV
    python benchmarks/startup.py --no-save

*import*: pairs of fresh processes, in turns, the order within a pair alternating: one imports
torch and lightning, the other lora_lightning as well and touches `LoRACallback`. Reported are
the paired differences, and what the second process took for lora_lightning alone; wall time and
processor time, since wall time suffers where the machine is shared. Goal: under 50 ms.

*inject*: ``inject(model, rank=8)`` ("auto") on fresh copies of ``vit_base_patch16_224``. The
first run makes the adapted classes and is listed apart. Goal: a median under 20 ms.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import machine

GOAL_MS = {"import": 50.0, "inject": 20.0}

_CLOCK = "import json, time; now = lambda: (time.perf_counter(), time.process_time()); t = [now()]"
_BASE = "import torch, lightning; t.append(now())"
_OURS = "import lora_lightning; lora_lightning.LoRACallback; t.append(now())"
_PRINT = "print(json.dumps(t))"


def imports(pairs: int) -> dict[str, list[float]]:
    """Milliseconds by measure, one value a pair."""
    found: dict[str, list[float]] = {}
    for pair in range(pairs + 1):
        order = (False, True) if pair % 2 else (True, False)
        times = {ours: _process(ours) for ours in order}
        if pair == 0:
            continue  # fills the disk cache and writes the .pyc files
        for i, clock in enumerate(("wall", "cpu")):
            base, both = times[False][-1][i], times[True][-1][i]
            before, after = times[True][1][i], times[True][2][i]
            values = {
                f"import torch, lightning [{clock}]": base,
                f"import torch, lightning, lora_lightning [{clock}]": both,
                f"import: paired difference [{clock}]": both - base,
                f"import: lora_lightning after the others [{clock}]": after - before,
            }
            for name, seconds in values.items():
                found.setdefault(name, []).append(1e3 * seconds)
        print(f"\r{pair}/{pairs} pairs", end="", file=sys.stderr)
    print("\r", end="", file=sys.stderr)
    return found


def _process(ours: bool) -> list[list[float]]:
    """Clock readings of one fresh process, relative to its first."""
    code = "; ".join([_CLOCK, _BASE, *([_OURS] if ours else []), _PRINT])
    out = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], check=True, capture_output=True, text=True
    )
    readings = json.loads(out.stdout.splitlines()[-1])
    return [[wall - readings[0][0], cpu - readings[0][1]] for wall, cpu in readings]


def injections(runs: int, name: str, rank: int) -> dict[str, list[float]]:
    """Milliseconds of `inject` on fresh copies of a timm model."""
    import timm
    import torch

    from lora_lightning import inject

    torch.manual_seed(0)
    base = timm.create_model(name)
    found: dict[str, list[float]] = {}
    for run in range(runs + 1):
        model = copy.deepcopy(base)
        gc.collect()  # the copy before this one, which is no cost of ours
        wall, cpu = timed(lambda model=model: inject(model, rank=rank))
        for clock, value in (("wall", wall), ("cpu", cpu)):
            which = "first" if run == 0 else "later"
            found.setdefault(f"inject {name} rank {rank}, {which} [{clock}]", []).append(value)
    return found


def timed(work: Callable[[], Any]) -> tuple[float, float]:
    """Milliseconds of wall and of processor time."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return 1e3 * (time.perf_counter() - wall), 1e3 * (time.process_time() - cpu)


def show(found: dict[str, list[float]]) -> None:
    """Median and quartiles of each measure, then the goals."""
    table(found)
    for name, values in found.items():
        goal = GOAL_MS["import" if name.startswith("import: ") else "inject"]
        if name.startswith("import: ") or ", later" in name:
            print(f"goal, under {goal:.0f} ms: {verdict(values, goal)} by {name}")


def table(found: dict[str, list[float]]) -> None:
    """Median and quartiles of each measure, its least value, how often it was taken."""
    print(f"{'milliseconds':62s} {'median':>8s} {'quartiles':>17s} {'least':>8s} {'runs':>5s}")
    for name, values in found.items():
        low, median, high = machine.quartiles(values)
        print(
            f"{name:62s} {median:8.1f} {low:8.1f} {high:8.1f} {min(values):8.1f} {len(values):5d}"
        )


def verdict(values: list[float], goal: float) -> str:
    """Whether the goal is met; undecided where the quartiles lie too far apart."""
    low, median, high = machine.quartiles(values)
    if low > goal:
        return "MISSED"
    if high - low > goal:
        return "not decided (the quartiles lie further apart than the goal)"
    return "met" if median < goal else "MISSED"


def save(found: dict[str, list[float]], where: dict[str, str], title: str = "startup") -> Path:
    """A dated CSV, one row a run."""
    rows = (
        {"measure": name, "run": run, "milliseconds": f"{value:.3f}"}
        for name, values in found.items()
        for run, value in enumerate(values, start=1)
    )
    return machine.save(title, rows, where)


def main() -> None:
    """Measure, show, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=15, help="pairs of processes (default 15)")
    parser.add_argument("--runs", type=int, default=25, help="injections (default 25)")
    parser.add_argument("--model", default="vit_base_patch16_224", help="any timm name")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--no-save", action="store_true", help="write no CSV")
    options = parser.parse_args()
    where = machine.setting()
    print(", ".join(f"{key} {value}" for key, value in where.items()))
    found = imports(options.pairs) if options.pairs > 0 else {}
    found |= injections(options.runs, options.model, options.rank) if options.runs > 0 else {}
    show(found)
    if not options.no_save:
        print(f"saved {save(found, where)}")


if __name__ == "__main__":
    main()
