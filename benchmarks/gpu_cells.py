"""The rows of `gpu.py`, its clock and the memory of its device."""

from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from machine import Table, Work, quartiles, seconds
from torch import Tensor

COLUMNS = ("part", "model", "precision", "mode", "variant", "measure")
Figures = tuple[float, float, float]


class Stopped(BaseException):
    """The time is up, or the process was asked to end."""


class Cells(Table):
    """Rows with the columns of `gpu.py`."""

    def say(
        self, *, value: float | str = "", low: float | str = "", high: float | str = "",
        note: str = "", **key: str,
    ) -> None:  # fmt: skip
        """Write and print a row."""
        row: dict[str, Any] = {column: key.get(column, "") for column in COLUMNS}
        row |= {"value": _short(value), "lower": _short(low), "upper": _short(high), "note": note}
        self.add(**row)
        print("  ".join(f"{v}" for v in row.values() if v != ""), flush=True)

    def spread(self, figures: Figures, **key: str) -> None:
        """Write lower quartile, median and upper quartile."""
        low, middle, high = figures
        self.say(value=middle, low=low, high=high, **key)

    @contextmanager
    def cell(self, **key: str) -> Iterator[None]:
        """What fails in the block becomes a row, and the run goes on."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            text = " ".join(str(error).split())[:300]
            self.say(**key, measure="failed", note=f"{type(error).__name__}: {text}")
        finally:
            free()


def _short(value: float | str) -> float | str:
    return float(f"{value:.5g}") if isinstance(value, float) else value


def free() -> None:
    """Give back what nothing refers to."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def finish(device: str) -> None:
    """Wait for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def clock(device: str, repeats: int) -> Callable[[Work], float]:
    """Seconds of one call, of so many in a row, by the device's own events."""

    def measured(work: Work) -> float:
        if device == "cpu":
            return seconds(work)
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        first.record()
        for _ in range(repeats):
            work()
        last.record()
        torch.cuda.synchronize()
        return float(first.elapsed_time(last)) / 1e3 / repeats

    return measured


def host(work: Work, device: str, times: int) -> Figures:
    """Milliseconds until a call returns, with nothing queued before."""
    found = []
    for _ in range(times):
        finish(device)
        start = time.perf_counter()
        work()
        found.append(1e3 * (time.perf_counter() - start))
    finish(device)
    return quartiles(found)


def allocated(device: str) -> int:
    """Bytes of the device that tensors take."""
    return torch.cuda.memory_allocated() if device == "cuda" else 0


def peak(work: Work, device: str) -> int:
    """The most bytes that tensors take during a call."""
    if device == "cpu":
        work()
        return 0
    torch.cuda.reset_peak_memory_stats()
    work()
    return torch.cuda.max_memory_allocated()


def warm(device: str) -> None:
    """Make torch allocate what the libraries keep: cuBLAS's workspaces, of both passes' threads."""
    x = torch.randn(64, 3, 16, 16, device=device, requires_grad=True)
    weight = torch.randn(32, 3, 3, 3, device=device, requires_grad=True)
    matrix, bias = torch.randn(64, 32, device=device, requires_grad=True), None
    for low in (False, True):
        with torch.autocast(device, torch.bfloat16, enabled=low):
            y: Tensor = torch.nn.functional.conv2d(x, weight).mean((2, 3))
            for bias in (None, torch.zeros(64, device=device)):
                z = torch.nn.functional.linear(y, matrix, bias)
                loss = z.sum() + torch.bmm(z[None], z.T[None]).sum()
                loss.backward(retain_graph=True)
    finish(device)
