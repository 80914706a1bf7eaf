"""Cost of adapters on a CUDA device: one command, one CSV, one Markdown page.

    python benchmarks/gpu.py --out results                  # under five minutes on an H100
    python benchmarks/gpu.py --out results --only steps profile --models vit_base
    python benchmarks/gpu.py --out results --only thresholds
    python benchmarks/gpu.py --out results --read results/*-gpu*.csv     # the page alone
    python benchmarks/gpu.py --out results --smoke --device cpu          # does it all run?

Parts, in the order in which they run (the last two are left out unless they are named):

- *steps*: training steps of the floor (the frozen model, forward, and backward for activations down
  to the first adapted layer), this library, PEFT and full fine-tuning, AdamW's step included, in
  turns in one process; float32 (TF32 off) and bf16-mixed. By CUDA events around several steps, so
  that launches run ahead as they do in training; the medians over rounds of each round's ratio to
  the floor, with the quartiles. `host` is the time until a step's kernels are launched: where it
  is as long as the step, the interpreter is what counts. `peak` is torch's max_memory_allocated in
  a step, the model, its gradients and the optimizer's state included. "ours, kept" keeps the inputs
  of adapted layers, "ours, plain" computes by the plain formula (`lora_lightning.fused`).
- *bank*: a batch of 64 in which every item has its own adapter of 64 and 512 in the process,
  against one adapter for all and PEFT's mixed batches.
- *label-free*: pictures a second of a fit without labels, its start, its checks and all included.
- *loading*: injection and loading from a file.
- *largest*: the largest batch under 16 GiB, bf16-mixed.
- *compiled*: the steps again under torch.compile. Helper processes fill inductor's cache first.
- *profile*: operators by torch's profiler as text, and the number of kernels in a step.
- *thresholds*: a linear layer's forward and backward pass by every formula that
  `lora_lightning.lora.fused` can choose.

Each row is in the CSV as soon as it is measured. A failure is a row too, and the rest goes on.
After ``--budget`` seconds, or on SIGTERM, what is there is written to the page and the run ends.
"""

from __future__ import annotations

import argparse
import csv
import gc
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import gpu_adapters
import gpu_layers
import gpu_models
import torch
from cases import GPU, available
from gpu_cells import Cells, Stopped
from gpu_page import write
from machine import setting

PARTS = {
    "steps": gpu_models.steps,
    "profile": gpu_layers.profile,
    "thresholds": gpu_layers.thresholds,
    "bank": gpu_adapters.bank,
    "label-free": gpu_adapters.label_free,
    "loading": gpu_adapters.loading,
    "largest": gpu_models.largest_batches,
    "compiled": gpu_models.compiled,
}
USUAL = [part for part in PARTS if part not in ("profile", "thresholds")]
VARIANTS = ("floor", "ours", "peft", "full", "ours, kept", "ours, plain", "ours, triton")


def options_of(arguments: list[str] | None) -> argparse.Namespace:
    """The command line's options, those of ``--smoke`` included."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the CSV and the page")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=[], metavar="PART")
    parser.add_argument("--profile", action="store_true", help="this part as well")
    parser.add_argument("--thresholds", action="store_true", help="this part as well")
    parser.add_argument("--models", nargs="+", default=list(GPU), choices=list(GPU))
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument(
        "--precisions", nargs="+", default=["bf16-mixed", "float32"],
        choices=("bf16-mixed", "float32"),
    )  # fmt: skip
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=3, help="steps between two CUDA events")
    parser.add_argument("--helpers", type=int, help="processes that compile ahead (10; on a CPU 0)")
    parser.add_argument("--budget", type=float, default=285, help="seconds, then it stops")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--smoke", action="store_true", help="tiny models, one round, every part")
    parser.add_argument("--read", type=Path, nargs="+", help="CSVs to make the page of")
    given = parser.parse_args(arguments)
    chosen = given.only or (list(PARTS) if given.smoke else USUAL)
    given.only = [p for p in PARTS if p in chosen or getattr(given, p, False)]
    if given.helpers is None:
        given.helpers = 10 if given.device == "cuda" else 0
    if given.smoke:
        given.rounds, given.repeats = min(given.rounds, 1), 1
        given.variants = [v for v in given.variants if v in ("floor", "ours", "peft", "ours, kept")]
    if given.device == "cuda" and not given.read and not torch.cuda.is_available():
        parser.error("no CUDA device is at hand: --smoke --device cpu shows whether all runs")
    return given


def _stop(number: int, _: Any) -> None:
    # Where it is raised in a callback it is ignored: again then.
    signal.setitimer(signal.ITIMER_REAL, 5, 5)
    raise Stopped(signal.Signals(number).name)


def _prepare(given: argparse.Namespace) -> dict[str, Any]:
    """Set torch and the signals; what every row says of the run."""
    gc.freeze()  # what is imported need not be looked through after every cell
    for name in (signal.SIGTERM, signal.SIGALRM):
        signal.signal(name, _stop)
    signal.setitimer(signal.ITIMER_REAL, given.budget)
    warnings.simplefilter("ignore")  # PEFT's advice, and inductor's to allow TF32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    if "peft" not in available():
        print("peft is not installed (pip install 'lora-lightning[bench]'): its rows are left out")
        given.variants = [v for v in given.variants if v != "peft"]
    where = setting("torchaudio", "peft", "triton")
    del where["precision"]  # each row has its own
    return {**where, "tf32": "off", "rank": given.rank, "rounds": given.rounds}


def run(given: argparse.Namespace) -> list[Path]:
    """Measure the parts until all are done or the time is up; the files with figures."""
    where = _prepare(given)
    cells = Cells("gpu", where, given.out)
    start = time.perf_counter()
    try:
        for part in given.only:
            print(f"== {part} [{time.perf_counter() - start:.0f} s]", flush=True)
            with cells.cell(part=part):
                PARTS[part](cells, given)
        cells.say(part="run", measure="seconds", value=time.perf_counter() - start)
    except Stopped as reason:
        signal.setitimer(signal.ITIMER_REAL, 0)
        cells.say(
            part="run", measure="stopped", value=time.perf_counter() - start, note=str(reason)
        )
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return [cells.path]


def rows_of(files: list[Path]) -> list[dict[str, Any]]:
    """All rows, those of the last file last."""
    found = []
    for path in files:
        with path.open(newline="", encoding="utf-8") as file:
            found += list(csv.DictReader(file))
    return found


def main(arguments: list[str] | None = None) -> int:
    """Measure and write; 1 where a cell of a smoke run failed."""
    given = options_of(arguments)
    files = given.read or run(given)
    rows = rows_of(files)
    print(write(given.out / "gpu.md", rows, files))
    failed = [row for row in rows if row["measure"] in ("failed", "stopped")]
    return int(given.smoke and bool(failed))


if __name__ == "__main__":
    sys.exit(main())
