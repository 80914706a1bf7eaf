"""Cost of an adapter above the frozen model: training step, memory and inference.

    python benchmarks/training_step.py                        # all models, half an hour or more
    python benchmarks/training_step.py --models vit_tiny --rounds 5
    python benchmarks/training_step.py --out                  # writes a dated CSV

The floor is the frozen model: its forward pass, and the backward pass for activations from the
output down to the first adapted layer, without any weight's gradient. Above it: this library,
PEFT and loralib with the same layers and rank (extra `bench`), and full fine-tuning; a step of
these holds AdamW's step as well. All run in one process, in turns, on the same batch; reported are
the medians over rounds of each round's ratio to the floor, with the quartiles. `saved` is what the
graph holds between forward and backward, parameters and input left out; `peak` is the largest
resident size of a process that does nothing but five steps, less that of one that stops before
them. Inference is in eval mode, without gradients, over the base's. `gpu.py` measures CUDA devices.
"""

from __future__ import annotations

import argparse
import copy
import multiprocessing
import os
import re
import statistics
from pathlib import Path
from typing import Any

import torch
from cases import CASES, VARIANTS, Case, available, stepper, variant
from machine import in_turns, ratios, save, setting
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


def _peak(name: str, key: str, given: argparse.Namespace, steps: int, to: Any) -> None:
    torch.set_num_threads(given.threads)
    case = CASES[key]
    step = stepper(variant(name, case, given.rank, 0.0), case, batch_of(case, given))
    for _ in range(steps):
        step()
    # Not getrusage's: it starts from what the parent process had.
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    to.put(1024 * int(re.findall(r"VmHWM:\s*(\d+)", status)[0]))


def peak_bytes(name: str, key: str, given: argparse.Namespace) -> int:
    """Of the steps alone."""
    context = multiprocessing.get_context("spawn")
    found = []
    for steps in (0, 5):
        queue = context.Queue()
        process = context.Process(target=_peak, args=(name, key, given, steps, queue))
        process.start()
        found.append(queue.get())
        process.join()
    return found[1] - found[0]


def batch_of(case: Case, given: argparse.Namespace) -> Tensor:
    """The case's own, so many times over."""
    return torch.cat([case.batch() for _ in range(given.times)])


def inference(case: Case, batch: Tensor, rank: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of a forward pass by the base, unmerged and merged adapters."""
    torch.manual_seed(0)
    base = case.build().eval()
    models = {"base": base, "ours": variant("ours", case, rank, 0.0).eval()}
    models["ours merged"] = copy.deepcopy(models["ours"])
    merge(models["ours merged"])
    if "peft" in available():
        models["peft"] = variant("peft", case, rank, 0.0).eval()
    with torch.no_grad():
        return in_turns({n: lambda m=m: m(batch) for n, m in models.items()}, rounds)


def measure(key: str, given: argparse.Namespace) -> list[dict[str, Any]]:
    """All rows of one model."""
    case, rows = CASES[key], []
    batch = batch_of(case, given)
    variants = [v for v in available() if v in given.variants]
    models = {v: variant(v, case, given.rank, given.dropout) for v in variants}
    times = in_turns({v: stepper(m, case, batch) for v, m in models.items()}, given.rounds)

    def say(what: str, name: str, value: float, low: float = 0, high: float = 0) -> None:
        rows.append(
            {"device": "cpu", "model": key, "measure": what, "variant": name,
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
            inference(case, batch, given.rank, given.rounds), "base"
        ).items():
            say("inference", name, middle, low, high)
    if given.peak:
        for name in variants:
            say("peak, MiB", name, peak_bytes(name, key, given) / 2**20)
    return rows


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
        for key in given.models:
            rows += measure(key, given)
    if given.out:
        options = ("times", "rank", "dropout", "threads", "rounds")
        where = {name: getattr(given, name) for name in options}
        where |= setting("torchaudio", "peft", "loralib")
        print(save("training-step", rows, where))


if __name__ == "__main__":
    main()
