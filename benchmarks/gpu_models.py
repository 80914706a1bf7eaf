"""Parts of `gpu.py` that train whole models."""

from __future__ import annotations

import argparse
import functools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from cases import GPU, SMOKE, stepper, variant
from gpu_cells import Cells, allocated, clock, free, host, peak, warm
from machine import Work, in_turns, quartiles, ratios
from torch import Tensor, nn

import lora_lightning
from lora_lightning.lora.fused import kernels

SWITCHES = {"ours, kept": {"recompute": False}, "ours, plain": {"enabled": False}}
GIB = 2**30
LIMIT = 16 * GIB


def case_of(key: str, given: argparse.Namespace) -> Any:
    """The model and its batch."""
    return (SMOKE if given.smoke else GPU)[key]


def model_of(name: str, key: str, given: argparse.Namespace) -> nn.Module:
    """A new model, as this variant trains it."""
    with torch.device(given.device):
        return variant(name, case_of(key, given), given.rank, 0.0)


def step_of(
    name: str, model: nn.Module, key: str, precision: str, given: argparse.Namespace, batch: Tensor
) -> Work:
    """A training step."""
    step = stepper(model, case_of(key, given), batch, precision == "bf16-mixed")

    def switched() -> None:
        kernels.use_triton = name == "ours, triton"  # read while a graph is compiled
        with lora_lightning.fused(**SWITCHES.get(name, {})):
            step()

    return switched


def steps(cells: Cells, given: argparse.Namespace) -> None:
    """Eager steps of all models in all precisions."""
    warm(given.device)
    for precision in given.precisions:
        for key in given.models:
            _turns(
                cells,
                key,
                precision,
                "eager",
                [v for v in given.variants if v != "ours, triton"],
                given,
            )


def _turns(
    cells: Cells, key: str, precision: str, mode: str, names: list[str], given: argparse.Namespace
) -> None:
    """Time and peak of one model's variants."""
    where = {"part": "steps", "model": key, "precision": precision, "mode": mode}
    works: dict[str, Work] = {}
    batch = case_of(key, given).batch().to(given.device)
    for name in names:
        with cells.cell(**where, variant=name):
            before = allocated(given.device)
            model = model_of(name, key, given)
            if mode == "compiled":  # inductor asks a CPU's machine for a C++ compiler
                model.compile(backend="inductor" if given.device == "cuda" else "aot_eager")
            work = step_of(name, model, key, precision, given, batch)
            for _ in range(2):
                work()
            bytes_ = peak(work, given.device) - before
            if given.device == "cuda":
                cells.say(**where, variant=name, measure="peak, MiB", value=bytes_ / 2**20)
            works[name] = work
    if not given.rounds:
        return
    with cells.cell(**where):
        times = in_turns(works, given.rounds, clock(given.device, given.repeats))
        over = ratios(times, "floor") if "floor" in times else {}
        for name, own in times.items():
            own = [1e3 * t for t in own]
            cells.spread(quartiles(own), **where, variant=name, measure="step, ms")
            if name in over:
                cells.spread(over[name], **where, variant=name, measure="step over floor")
            launching = host(works[name], given.device, given.rounds)
            cells.spread(launching, **where, variant=name, measure="host, ms")


def compiled(cells: Cells, given: argparse.Namespace) -> None:
    """The steps of floor, ours and PEFT under torch.compile, bf16-mixed first."""
    names = [v for v in ("floor", "ours", "ours, triton", "peft") if v in given.variants]
    if given.helpers:
        with tempfile.TemporaryDirectory(prefix="inductor-") as folder:
            os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", folder)
            _all_compiled(cells, given, names)
    else:
        _all_compiled(cells, given, names)


def _all_compiled(cells: Cells, given: argparse.Namespace, names: list[str]) -> None:
    warm(given.device)
    for precision in given.precisions:
        _compile_ahead(given, precision, names)
        for key in given.models[:1] if given.smoke else given.models:
            torch._dynamo.reset()
            _turns(cells, key, precision, "compiled", names, given)


def _compile_ahead(given: argparse.Namespace, precision: str, names: list[str]) -> None:
    """Run this part without clocks in processes beside each other, for what they leave in the
    cache."""
    if not given.helpers:
        return
    jobs = [["--models", key, "--variants", name] for key in given.models for name in names]
    own = [sys.executable, str(Path(__file__).with_name("gpu.py")), "--only", "compiled"]
    own += ["--helpers", "0", "--rounds", "0", "--rank", str(given.rank), "--device", given.device]
    own += ["--precisions", precision, *(["--smoke"] if given.smoke else [])]
    environment = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "1", "OMP_NUM_THREADS": "1"}
    running: list[subprocess.Popen[bytes]] = []
    quiet = subprocess.DEVNULL  # what fails there fails here too
    with tempfile.TemporaryDirectory() as folder:
        own += ["--out", folder]
        try:
            while jobs or running:
                running = [process for process in running if process.poll() is None]
                while jobs and len(running) < given.helpers:
                    running.append(
                        subprocess.Popen(
                            own + jobs.pop(0), env=environment, stdout=quiet, stderr=quiet
                        )
                    )
                time.sleep(0.2)
        finally:
            for process in running:
                process.kill()
                process.wait()


def largest_batches(cells: Cells, given: argparse.Namespace) -> None:
    """The largest batch of each variant in 16 GiB, two models, bf16-mixed."""
    for key in [k for k in ("vit_base", "convnext_tiny") if k in given.models]:
        for name in [v for v in ("floor", "ours", "peft", "full") if v in given.variants]:
            where = {"part": "largest", "model": key, "precision": "bf16-mixed", "variant": name}
            with cells.cell(**where), _limit(given.device):
                model = model_of(name, key, given)
                found = largest(functools.partial(_fits, name, model, key, given), 64)
                cells.say(**where, measure="largest batch", value=found)


@contextmanager
def _limit(device: str) -> Iterator[None]:
    """16 GiB, for what torch allocates."""
    if device == "cpu":
        yield
        return
    whole = torch.cuda.get_device_properties(0).total_memory
    free()
    torch.cuda.set_per_process_memory_fraction(min(1.0, LIMIT / whole))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def _fits(name: str, model: nn.Module, key: str, given: argparse.Namespace, number: int) -> bool:
    if given.device == "cpu":
        return number < 3
    try:
        one = case_of(key, given).batch()[:1].to(given.device)
        batch = one.expand(number, *one.shape[1:]).contiguous()
        work = step_of(name, model, key, "bf16-mixed", given, batch)
        work()
        work()  # the optimizer's state is there
    except torch.OutOfMemoryError:
        return False
    finally:
        work = batch = None
        model.zero_grad()
        free()
    return True


def largest(fits: Callable[[int], bool], start: int, most: int = 4096) -> int:
    """The largest number that fits, to a thirty-second part; 0 where none does."""
    low, high = 0, start
    while high <= most and fits(high):
        low, high = high, 2 * high
    while high - low > max(1, low // 32):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
