"""Parts of `gpu.py` that look at operators and single layers."""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from gpu_cells import Cells, clock, finish
from gpu_models import case_of, model_of, step_of
from machine import Work, in_turns, quartiles
from torch import Tensor, nn
from torch.autograd import DeviceType

import lora_lightning
from lora_lightning import inject
from lora_lightning.lora.fused.plan import LIMITS

STEPS = 3
ROWS, SIZES, RANKS = (
    (128, 512, 2048, 8192, 32768),
    ((192, 768), (768, 768), (768, 3072), (4096, 4096)),
    (4, 16, 64),
)
# Name → `many` and `reading` of `LIMITS`: W + sBA or two products, the whole gradient or thin ones.
FORMULAS = {
    "thin": (math.inf, 0.0),
    "whole, thin gradients": (0.0, -math.inf),
    "whole, whole gradient": (0.0, math.inf),
}


def profile(cells: Cells, given: argparse.Namespace) -> None:
    """Operators of a step, bf16-mixed, as text beside the CSV, and the number of its kernels."""
    names = [v for v in ("floor", "ours", "peft") if v in given.variants]
    with cells.path.with_suffix(".profile.txt").open("w", encoding="utf-8") as file:
        for key in given.models[:1] if given.smoke else given.models:
            batch = case_of(key, given).batch().to(given.device)
            for name in names:
                where = {"part": "profile", "model": key, "precision": "bf16-mixed"}
                with cells.cell(**where, variant=name):
                    model = model_of(name, key, given)
                    work = step_of(name, model, key, "bf16-mixed", given, batch)
                    found = _profiled(work, given.device)
                    file.write(f"\n=== {key}, {name}, {STEPS} steps\n{_tables(found)}")
                    file.flush()
                    for measure, value in _counts(found).items():
                        cells.say(**where, variant=name, measure=measure, value=value)


def _profiled(work: Work, device: str) -> Any:
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if device == "cuda" else []
    for _ in range(3):
        work()
    finish(device)
    with torch.profiler.profile(activities=activities) as found:
        for _ in range(STEPS):
            work()
        finish(device)
    return found.key_averages()


def _kernels(found: Any) -> list[Any]:
    """What ran on the device; not the ranges that name a piece of the program."""
    return [
        event for event in found
        if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
    ]  # fmt: skip


def _counts(found: Any) -> dict[str, float]:
    """Of one step."""
    kernels = _kernels(found)
    on_cpu = sum(e.self_cpu_time_total for e in found if e.device_type == DeviceType.CPU)
    return {
        "kernels": sum(e.count for e in kernels) / STEPS,
        "device, ms": sum(e.self_device_time_total for e in kernels) / 1e3 / STEPS,
        "CPU, ms": on_cpu / 1e3 / STEPS,
    }


def _tables(found: Any) -> str:
    """The first fifteen operators and kernels by the device's time, and by the CPU's."""
    return "".join(
        f"by {order}\n{found.table(sort_by=order, row_limit=15, max_name_column_width=70)}\n"
        for order in ("self_device_time_total", "self_cpu_time_total")
    )


def thresholds(cells: Cells, given: argparse.Namespace) -> None:
    """Every formula of a linear layer, at several sizes; the floor has neither factor."""
    rows, sizes, ranks = (ROWS, SIZES, RANKS) if not given.smoke else ((8,), ((8, 16),), (2,))
    for precision, number, size, rank in itertools.product(given.precisions, rows, sizes, ranks):
        where = {
            "part": "thresholds", "precision": precision, "mode": f"rank {rank}",
            "model": f"{number} x {size[0]} x {size[1]}",
        }  # fmt: skip
        if number * math.prod(size) > 2**38:  # takes seconds, and shows what smaller ones do
            continue
        with cells.cell(**where):
            works = _formulas(number, size, rank, precision, given.device)
            # Enough calls in a row that the first launch does not count.
            times = in_turns(works, min(given.rounds, 3), clock(given.device, 5 * given.repeats))
            for (variant, measure), own in times.items():
                own = [1e6 * t for t in own]
                cells.spread(quartiles(own), **where, variant=variant, measure=f"{measure}, µs")


def _formulas(
    number: int, size: tuple[int, int], rank: int, precision: str, device: str
) -> dict[tuple[str, str], Work]:
    """(formula, pass) → the work."""
    low = precision == "bf16-mixed"
    with torch.device(device):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(*size))
        inject(model, rank=rank, target_modules=["0"], trainable=[])
        x = torch.randn(number, size[0], dtype=torch.bfloat16 if low else torch.float32)
        g = torch.randn(number, size[1], dtype=x.dtype)
        weight, bias = torch.randn(size[1], size[0]), torch.randn(size[1])
    x.requires_grad_()
    factors = [p for p in model.parameters() if p.requires_grad]
    layers: dict[str, tuple[Any, dict[str, Any], tuple[float, float]]] = {
        "floor": (lambda y: F.linear(y, weight, bias), {}, (0.0, 0.0)),
        "plain": (model, {"enabled": False}, (0.0, 0.0)),
    }
    for name, constants in FORMULAS.items():
        layers[name] = (model, {"smallest": 0}, constants)
    found: dict[tuple[str, str], Work] = {}
    for name, (layer, switches, constants) in layers.items():
        wanted = [x] if name == "floor" else [x, *factors]
        found[name, "forward and backward"] = _pass(layer, x, g, wanted, switches, constants, low)
        if name != "whole, whole gradient":
            found[name, "inference"] = _pass(layer, x, None, [], switches, constants, low)
    return found


def _pass(
    layer: Any, x: Tensor, g: Tensor | None, wanted: list[Tensor],
    switches: dict[str, Any], constants: tuple[float, float], low: bool,
) -> Work:  # fmt: skip
    """A forward pass, and the backward one where g is given."""

    def work() -> None:
        with _constants(*constants), lora_lightning.fused(**switches):
            cast = torch.autocast(x.device.type, torch.bfloat16, enabled=low)
            with torch.set_grad_enabled(g is not None), cast:
                y = layer(x)
            if g is not None:
                torch.autograd.grad(y, wanted, g)

    return work


@contextmanager
def _constants(many: float, reading: float) -> Iterator[None]:
    """Make the choice that the table makes by size."""
    before = dict(LIMITS)
    own = {"many": many, "reading": reading, "cheap": 0}
    LIMITS.update({key: limit._replace(**own) for key, limit in before.items()})
    try:
        yield
    finally:
        LIMITS.update(before)
