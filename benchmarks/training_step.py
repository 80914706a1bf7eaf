"""Cost of an adapter above the frozen model: training step, memory and inference.

    python benchmarks/training_step.py                        # all models, half an hour or more
    python benchmarks/training_step.py --models vit_tiny --rounds 5
    python benchmarks/training_step.py --out                  # writes a dated CSV
    python benchmarks/training_step.py --devices cuda --times 16

The floor is the frozen model: its forward pass, and the backward pass for activations from the
output down to the first adapted layer, without any weight's gradient. Above it: this library,
PEFT and loralib with the same layers and rank (extra `bench`), and full fine-tuning; a step of
these holds AdamW's step as well. All run in one process, in turns, on the same batch; reported are
the medians over rounds of each round's ratio to the floor, with the quartiles. `saved` is what the
graph holds between forward and backward, parameters and input left out; `peak` is the largest
resident size of a process that does nothing but five steps, less that of one that stops before
them; on CUDA, of the memory that tensors take. Inference is in eval mode, without gradients, over
the base's. Where a CUDA device is at hand, all is measured there as well; batches that keep a CPU
busy leave such a device waiting for the interpreter: see `--times`.
"""

from __future__ import annotations

import argparse
import copy
import multiprocessing
import os
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cases import CASES, VARIANTS, Case, available, stepper, variant
from machine import quartiles, save, setting
from torch import Tensor, nn

import lora_lightning
from lora_lightning import merge


def saved_bytes(model: nn.Module, case: Case, batch: Tensor) -> int:
    """What the graph of a forward pass holds, parameters, buffers and the batch left out."""
    own = [*model.parameters(), *model.buffers(), batch]
    known = {t.untyped_storage().data_ptr() for t in own}
    loss = case.out(model(batch)).square().mean()
    todo, seen, total = [loss.grad_fn], set(), 0
    while todo:
        node: Any = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        todo += [n for n, _ in node.next_functions]
        kept = [getattr(node, a) for a in dir(node) if a.startswith("_saved_")]
        kept += list(getattr(node, "saved_tensors", ()))
        for tensor in kept:
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in known:
                known.add(tensor.untyped_storage().data_ptr())
                total += tensor.untyped_storage().nbytes()
    return total


def _peak(name: str, key: str, given: argparse.Namespace, device: str, steps: int, to: Any) -> None:
    torch.set_num_threads(given.threads)
    case = CASES[key]
    model, batch = variant(name, case, given.rank, 0.0).to(device), batch_of(case, given, device)
    step = stepper(model, case, batch)
    for _ in range(steps):
        step()
    if device != "cpu":
        to.put(torch.cuda.max_memory_allocated())
        return
    # Not getrusage's: it starts from what the parent process had.
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    to.put(1024 * int(re.findall(r"VmHWM:\s*(\d+)", status)[0]))


def peak_bytes(name: str, key: str, given: argparse.Namespace, device: str) -> int:
    """Of the steps alone."""
    context = multiprocessing.get_context("spawn")
    found = []
    for steps in (0, 5):
        queue = context.Queue()
        process = context.Process(target=_peak, args=(name, key, given, device, steps, queue))
        process.start()
        found.append(queue.get())
        process.join()
    return found[1] - found[0]


def batch_of(case: Case, given: argparse.Namespace, device: str) -> Tensor:
    """The case's own, so many times over."""
    return torch.cat([case.batch() for _ in range(given.times)]).to(device)


def in_turns(
    steps: dict[str, Callable[[], Any]], rounds: int, device: str = "cpu"
) -> dict[str, list[float]]:
    """Seconds of each, round by round; the order rotates between rounds."""
    found: dict[str, list[float]] = {name: [] for name in steps}
    order = list(steps)
    for number in range(rounds + 1):
        for name in order[number % len(order) :] + order[: number % len(order)]:
            start = time.perf_counter()
            steps[name]()
            if device != "cpu":
                torch.cuda.synchronize()
            if number:  # the first round warms up
                found[name].append(time.perf_counter() - start)
    return found


def inference(
    case: Case, batch: Tensor, rank: int, rounds: int, device: str
) -> dict[str, list[float]]:
    """Seconds of a forward pass by the base, unmerged and merged adapters."""
    torch.manual_seed(0)
    base = case.build().eval().to(device)
    models = {"base": base, "ours": variant("ours", case, rank, 0.0).eval().to(device)}
    models["ours merged"] = copy.deepcopy(models["ours"])
    merge(models["ours merged"])
    if "peft" in available():
        models["peft"] = variant("peft", case, rank, 0.0).eval().to(device)
    with torch.no_grad():
        return in_turns({n: lambda m=m: m(batch) for n, m in models.items()}, rounds, device)


def ratios(times: dict[str, list[float]], base: str) -> dict[str, tuple[float, float, float]]:
    """Lower quartile, median, upper quartile of each round's ratio to the base's."""
    found = {}
    for name, own in times.items():
        each = [a / b for a, b in zip(own, times[base], strict=True)]
        found[name] = quartiles(each)
    return found


def measure(key: str, given: argparse.Namespace, device: str) -> list[dict[str, Any]]:
    """All rows of one model on one device."""
    case, rows = CASES[key], []
    batch = batch_of(case, given, device)
    variants = [v for v in available() if v in given.variants]
    models = {v: variant(v, case, given.rank, given.dropout).to(device) for v in variants}
    times = in_turns({v: stepper(m, case, batch) for v, m in models.items()}, given.rounds, device)

    def say(what: str, name: str, value: float, low: float = 0, high: float = 0) -> None:
        rows.append(
            {"device": device, "model": key, "measure": what, "variant": name,
             "value": round(value, 4), "lower": round(low, 4), "upper": round(high, 4)}
        )  # fmt: skip
        print(f"{key:20} {what:14} {name:12} {value:9.3f}   {low:.3f} to {high:.3f}", flush=True)

    for name, (low, middle, high) in ratios(times, "floor").items():
        say("step", name, middle, low, high)
        say("step, ms", name, 1e3 * statistics.median(times[name]))
    for name, model in models.items():
        say("saved, MiB", name, saved_bytes(model, case, batch) / 2**20)
    del models
    if given.inference:
        for name, (low, middle, high) in ratios(
            inference(case, batch, given.rank, given.rounds, device), "base"
        ).items():
            say("inference", name, middle, low, high)
    if given.peak:
        for name in variants:
            say("peak, MiB", name, peak_bytes(name, key, given, device) / 2**20)
    return rows


def found() -> list[str]:
    """The devices of this machine."""
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def main() -> None:
    """Measure and print; with --out, keep it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--variants", nargs="+", default=available(), choices=VARIANTS)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--dropout", type=float, default=0.0, help="of the adapters")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--devices", nargs="+", default=found(), choices=("cpu", "cuda"))
    parser.add_argument("--times", type=int, default=1, help="so many times the batch")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-inference", dest="inference", action="store_false")
    parser.add_argument("--no-peak", dest="peak", action="store_false")
    parser.add_argument("--no-recompute", dest="recompute", action="store_false")
    parser.add_argument("--out", action="store_true", help="write a dated CSV")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    print(
        f"torch {torch.__version__}, {given.threads} threads, rank {given.rank}, "
        f"load {os.getloadavg()[0]:.1f}"
    )
    rows = []
    with lora_lightning.fused(recompute=given.recompute):
        for device in given.devices:
            for key in given.models:
                rows += measure(key, given, device)
    if not torch.cuda.is_available():
        print("no CUDA device is at hand: that part was left out")
    if given.out:
        options = ("times", "rank", "dropout", "threads", "rounds")
        where = {name: getattr(given, name) for name in options}
        where |= setting("torchaudio", "peft", "loralib")
        print(save("training-step", rows, where))


if __name__ == "__main__":
    main()
