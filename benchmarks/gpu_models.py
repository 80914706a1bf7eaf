"""Parts of `gpu.py` that run whole models."""

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

import bank as banks
import label_free_cost
import loading as loadings
import torch
from cases import GPU, SMOKE, stepper, variant
from gpu_cells import Cells, allocated, clock, free, host, peak, warm
from machine import Work, in_turns, quartiles, ratios
from torch import Tensor, nn

import lora_lightning

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
        with lora_lightning.fused(**SWITCHES.get(name, {})):
            step()

    return switched


def steps(cells: Cells, given: argparse.Namespace) -> None:
    """Eager steps of all models in all precisions."""
    warm(given.device)
    for precision in given.precisions:
        for key in given.models:
            _turns(cells, key, precision, "eager", given.variants, given)


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
        over = ratios(times, "floor")
        for name, own in times.items():
            own = [1e3 * t for t in own]
            cells.spread(quartiles(own), **where, variant=name, measure="step, ms")
            cells.spread(over[name], **where, variant=name, measure="step over floor")
            launching = host(works[name], given.device, given.rounds)
            cells.spread(launching, **where, variant=name, measure="host, ms")


def compiled(cells: Cells, given: argparse.Namespace) -> None:
    """The steps of floor, ours and PEFT under torch.compile, bf16-mixed first."""
    names = [v for v in ("floor", "ours", "peft") if v in given.variants]
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


def bank(cells: Cells, given: argparse.Namespace) -> None:
    """Mixed batches of ViT-B/16, out of 64 and 512 adapters."""
    import timm

    name, count, numbers = "vit_base_patch16_224", 64, [64, 512]
    if given.smoke:
        name, count, numbers = "test_vit", 4, [4, 8]
    with torch.device(given.device):
        torch.manual_seed(0)
        base = timm.create_model(name).eval().requires_grad_(False)
    x = torch.randn(count, *base.default_cfg["input_size"], device=given.device)
    with tempfile.TemporaryDirectory() as folder:
        works = banks.variants(base, x, numbers, Path(folder), "peft" in given.variants, count)
        for precision in given.precisions:
            _bank(cells, works, precision, given)


@torch.no_grad()
def _bank(
    cells: Cells, works: dict[tuple[str, int], Work], precision: str, given: argparse.Namespace
) -> None:
    def lowered(work: Work) -> None:
        with torch.autocast(given.device, torch.bfloat16, enabled=precision == "bf16-mixed"):
            work()

    where = {"part": "bank", "model": "vit_base", "precision": precision}
    found = in_turns(
        {key: functools.partial(lowered, work) for key, work in works.items()},
        given.rounds, clock(given.device, given.repeats),
    )  # fmt: skip
    over = ratios(found, ("one adapter", 1))
    for (what, number), own in found.items():
        name = what if number < 2 else f"{what} {number}"
        own = [1e3 * t for t in own]
        cells.spread(quartiles(own), **where, variant=name, measure="batch, ms")
        cells.spread(over[what, number], **where, variant=name, measure="over one adapter")


def label_free(cells: Cells, given: argparse.Namespace) -> None:
    """A fit without labels, its start and checks included."""
    names = ("efficientnet_b0", "vit_base_patch16_224")
    count, size, epochs, batch = 512, 224, 4, 64
    if given.smoke:
        names, count, size, epochs, batch = ("test_efficientnet",), 16, 64, 1, 8
    pictures = torch.rand(count, 3, size, size)
    kinds = {"bf16-mixed": "bf16-mixed", "float32": "32-true"}
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            for precision in given.precisions:
                where = {"part": "label-free", "model": name, "precision": precision}
                with cells.cell(**where):
                    taken = label_free_cost.seconds(
                        name, pictures, epochs, folder, batch, precision=kinds[precision],
                        accelerator="gpu" if given.device == "cuda" else "cpu", devices=1,
                    )  # fmt: skip
                    cells.say(**where, measure="seconds", value=taken)
                    rate = count * epochs / taken
                    cells.say(**where, measure="pictures a second", value=rate)


def loading(cells: Cells, given: argparse.Namespace) -> None:
    """Injection and loading from a file, of a model on the device."""
    large, small, runs = "vit_large_patch16_224", "vit_base_patch16_224", 5
    if given.smoke:
        large, small, runs = "test_vit", "test_vit", 1
    for measure, own in loadings.measure(large, small, runs, given.device).items():
        if measure.endswith(" [wall]"):
            where = {"part": "loading", "variant": measure.removesuffix(" [wall]")}
            cells.spread(quartiles(own), **where, measure="wall, ms")


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
