"""Time to load the adapters of a thousand speakers on one model, and to switch between them.

    python benchmarks/switching.py                 # 1,000 adapters, about two minutes
    python benchmarks/switching.py --adapters 100 --out   # writes a dated JSON
    python benchmarks/switching.py --width 144            # twice the parameters

A torchaudio Conformer of six layers and about a million parameters gets one adapter of rank 4 a
speaker, each from a file of its own (goal: under 300 kB). Reported, on one thread: the time to
load an adapter (the first tenth of them and the last, which must not differ), `set_active` at
random (goal: over 200 a second), a forward pass before and after the loading, memory and file
size for each adapter. A sample of the speakers is compared, bit for bit, with a model that loaded
that one file only.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import dated, setting
from torch import Tensor, nn

from lora_lightning import inject, load_adapter, save_adapter, set_active

GOAL_PER_SECOND = 200.0
GOAL_BYTES = 300_000


def build(width: int) -> nn.Module:
    """A Conformer encoder of this width, with random weights; 104 makes a million parameters."""
    from torchaudio.models import Conformer

    torch.manual_seed(0)
    return Conformer(
        input_dim=width,
        num_heads=4,
        ffn_dim=2 * width,
        num_layers=6,
        depthwise_conv_kernel_size=15,
    ).eval()


def write_files(base: nn.Module, folder: Path, number: int, rank: int) -> list[Path]:
    """One adapter file a speaker; every factor is random, as if each had been trained."""
    model = copy.deepcopy(base)
    inject(model, rank=rank, name="speaker", seed=0)
    factors = [p for p in model.parameters() if p.requires_grad]
    paths = []
    for i in range(number):
        generator = torch.Generator().manual_seed(i)
        with torch.no_grad():
            for p in factors:
                p.copy_(0.1 * torch.randn(p.shape, generator=generator))
        paths.append(save_adapter(model, folder / f"{i:05d}.safetensors"))
    return paths


def load_all(model: nn.Module, paths: list[Path], start: int = 0) -> list[float]:
    """Milliseconds of each `load_adapter`; the first file is speaker `start`."""
    return [
        _milliseconds(lambda i=i, path=path: load_adapter(model, path, name_of(i)))
        for i, path in enumerate(paths, start)
    ]


def name_of(speaker: int) -> str:
    """The name of a speaker's adapter."""
    return f"speaker-{speaker:05d}"


def switch(model: nn.Module, adapters: int, times: int) -> list[float]:
    """Milliseconds of each `set_active`, to adapters chosen at random."""
    order = random.Random(0).choices(range(adapters), k=times)
    return [_milliseconds(lambda i=i: set_active(model, name_of(i))) for i in order]


def forwards(model: nn.Module, x: Tensor, times: int) -> list[float]:
    """Milliseconds of each forward pass."""
    output(model, x)
    return [_milliseconds(lambda: output(model, x)) for _ in range(times)]


@torch.no_grad()
def output(model: nn.Module, x: Tensor) -> Tensor:
    """The encoder's output for a batch (B, T, width) without padding."""
    out: Tensor = model(x, torch.full((len(x),), x.shape[1]))[0]
    return out


def spot_check(
    base: nn.Module, model: nn.Module, paths: list[Path], x: Tensor, samples: int = 10
) -> int:
    """Compare a sample of the speakers with models that loaded one file only; how many agreed."""
    chosen = random.Random(1).sample(range(len(paths)), min(samples, len(paths)))
    for i in chosen:
        alone = copy.deepcopy(base)
        load_adapter(alone, paths[i], name_of(i))
        set_active(model, name_of(i))
        if not torch.equal(output(model, x), output(alone, x)):
            raise SystemExit(f"{name_of(i)} gives another output among {len(paths)} than alone")
    return len(chosen)


def _milliseconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - start)


def _resident() -> int:
    """Bytes of memory that this process holds now; 0 where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def measure(adapters: int, switches: int, rank: int, width: int) -> dict[str, Any]:
    """Every figure: lists of milliseconds, and single numbers."""
    base = build(width)
    x = torch.randn(1, 100, width, generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder:
        paths = write_files(base, Path(folder), adapters, rank)
        model = copy.deepcopy(base)
        load_all(model, paths[:1])  # makes the adapted classes, and is no adapter like the others
        found: dict[str, Any] = {"forward, 1 adapter": forwards(model, x, 100)}
        before = _resident()
        loads = load_all(model, paths[1:], start=1)
        memory = _resident() - before
        few = max(len(loads) // 10, 1)
        found |= {
            "load_adapter, first tenth": loads[:few],
            "load_adapter, last tenth": loads[-few:],
        }
        found["set_active"] = switch(model, adapters, switches)
        found[f"forward, {adapters} adapters"] = forwards(model, x, 100)
        return found | {
            "seconds to load an adapter, mean": statistics.mean(loads) / 1e3,
            "bytes of memory per adapter": memory / len(loads),
            "bytes of the largest file": max(path.stat().st_size for path in paths),
            "speakers compared with their file alone, all equal": spot_check(base, model, paths, x),
            "parameters of the base": sum(p.numel() for p in base.parameters()),
        }


def show(found: dict[str, Any]) -> None:
    """Median and quartiles of each list, the numbers, then the goals."""
    print(f"{'milliseconds':55s} {'median':>8s} {'quartiles':>17s} {'runs':>5s}")
    for name, values in found.items():
        if isinstance(values, list):
            low, median, high = statistics.quantiles(values, n=4)
            print(f"{name:55s} {median:8.2f} {low:8.2f} {high:8.2f} {len(values):5d}")
    for name, value in found.items():
        if not isinstance(value, list):
            print(f"{name:55s} {value:14,.4g}" if value < 1 else f"{name:55s} {value:14,.0f}")
    low, median, high = (1e3 / ms for ms in statistics.quantiles(found["set_active"], n=4)[::-1])
    print(f"switches a second: median {median:.0f}, quartiles {low:.0f} and {high:.0f}")
    print(f"goal, over {GOAL_PER_SECOND:.0f} switches a second: {_met(median > GOAL_PER_SECOND)}")
    small = found["bytes of the largest file"] < GOAL_BYTES
    print(f"goal, files under {GOAL_BYTES:,} bytes: {_met(small)}")


def _met(fulfilled: bool) -> str:
    return "met" if fulfilled else "MISSED"


def main() -> None:
    """Measure, show, save where asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--adapters", type=int, default=1000, help="files (default 1000)")
    parser.add_argument("--switches", type=int, default=1000, help="switches (default 1000)")
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--width", type=int, default=104, help="of the model (default 104)")
    parser.add_argument("--out", action="store_true", help="write a dated JSON to results/")
    options = parser.parse_args()
    if options.adapters < 5:
        parser.error("--adapters must be at least 5, to tell the first from the last")
    torch.set_num_threads(1)
    where = setting("torchaudio") | {"threads": "1"}
    print(", ".join(f"{key} {value}" for key, value in where.items()))
    found = measure(options.adapters, options.switches, options.rank, options.width)
    show(found)
    if options.out:
        path = dated(where["date"], "switching", ".json")
        path.write_text(json.dumps({"setting": where | vars(options), **found}, indent=1) + "\n")
        print(f"saved {path}")


if __name__ == "__main__":
    main()
