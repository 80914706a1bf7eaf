"""A batch in which every item has its own adapter: what it costs, ours and PEFT's.

    python benchmarks/bank.py                        # ViT-Tiny and wav2vec2-base, an hour
    python benchmarks/bank.py --models vit --runs 5 --numbers 1 16 64 --batch 16
    python benchmarks/bank.py --plot docs/images/bank.png

Every model gets files of adapters with random factors, the model's own choice of layers
(``"auto"``), rank 8. Then, in one process and in turns, each run starting with another of them:

- *base*: the model without adapters;
- *one adapter*: `set_active` of one, for all items;
- *bank, k*: ``with bank[names]: model(batch)``, the block included, names drawn anew for each run
  from k adapters, all different where k is the batch or more;
- *PEFT, k*: ``model(batch, adapter_names=names)``, on the same layers, up to k = batch.

Reported: medians and quartiles, and paired ratios (each run's time over that turn's base). Goals:
the bank's mixed batch at most 1.10 × one adapter for all, its overhead above the base at most a
third of PEFT's, the same time with 512 adapters in the process as with 64.
"""

from __future__ import annotations

import argparse
import copy
import csv
import random
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from startup import setting
from torch import Tensor, nn

from lora_lightning import AdapterBank, inject, load_adapter, save_adapter

RESULTS = Path(__file__).parent / "results"
RANK = 8
Work = Callable[[], Any]


def vit() -> tuple[nn.Module, tuple[int, ...]]:
    """ViT-Tiny at 224 × 224."""
    import timm

    return timm.create_model("vit_tiny_patch16_224"), (3, 224, 224)


def wav2vec2() -> tuple[nn.Module, tuple[int, ...]]:
    """wav2vec2-base at one second of 16 kHz."""
    from torchaudio.models import wav2vec2_base

    return wav2vec2_base(aux_num_out=32), (16000,)


def small() -> tuple[nn.Module, tuple[int, ...]]:
    """A model to see whether this script runs."""
    import timm

    return timm.create_model("test_vit"), (3, 160, 160)


MODELS = {"vit": vit, "wav2vec2": wav2vec2, "small": small}


def write_files(base: nn.Module, folder: Path, number: int) -> tuple[list[Path], list[str]]:
    """Adapter files with random factors, and the names of the layers that they adapt."""
    model = copy.deepcopy(base)
    report = inject(model, rank=RANK, trainable=[], seed=0)
    factors = [p for p in model.parameters() if p.requires_grad]
    paths = []
    for i in range(number):
        generator = torch.Generator().manual_seed(i)
        with torch.no_grad():
            for p in factors:
                p.copy_(0.02 * torch.randn(p.shape, generator=generator))
        paths.append(save_adapter(model, folder / f"{i:04d}.safetensors"))
    return paths, [row.module for row in report.rows]


def peft_model(base: nn.Module, layers: list[str], number: int) -> Any:
    """The base in PEFT's hands, with this many adapters of random factors."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=layers, init_lora_weights=False)
    model = get_peft_model(copy.deepcopy(base), config, adapter_name="0000")
    for i in range(1, number):
        model.add_adapter(f"{i:04d}", config)
    return model.eval()


def names_of(draw: random.Random, number: int, batch: int) -> list[str]:
    """Names for a batch, out of so many adapters; no name twice where there are enough."""
    chosen = draw.sample(range(number), min(number, batch))
    chosen += draw.choices(range(number), k=batch - len(chosen))
    return [f"{i:04d}" for i in chosen]


def variants(
    base: nn.Module, x: Tensor, numbers: list[int], folder: Path, peers: bool
) -> dict[tuple[str, int], Work]:
    """(what, number of adapters) → a run of it."""
    paths, layers = write_files(base, folder, max(numbers))
    one = copy.deepcopy(base)
    load_adapter(one, paths[0], "one")
    bank = AdapterBank(copy.deepcopy(base), paths, capacity=max(numbers), example=x[:2])
    for path in paths:  # read before the clock starts: what is measured is a bank that holds them
        with bank[path.stem]:
            pass
    draw, batch = random.Random(0), len(x)
    found: dict[tuple[str, int], Work] = {
        ("base", 0): lambda: base(x),
        ("one adapter", 1): lambda: one(x),
    }

    def ours(number: int) -> None:
        with bank[names_of(draw, number, batch)] as model:
            model(x)

    for number in numbers:
        found["bank", number] = lambda number=number: ours(number)
    few = [n for n in numbers if n <= batch] if peers else []
    if few:
        peer = peft_model(base, layers, max(few))
        for number in few:
            found["PEFT", number] = lambda number=number: peer(
                x, adapter_names=names_of(draw, number, batch)
            )
    return found


@torch.no_grad()
def measure(
    works: dict[tuple[str, int], Work], runs: int, device: str = "cpu"
) -> dict[tuple[str, int], list[float]]:
    """Milliseconds of each, one for each turn; a first turn, which reads files, is left out."""
    found: dict[tuple[str, int], list[float]] = {key: [] for key in works}
    keys = list(works)
    for turn in range(runs + 1):
        for key in keys[turn % len(keys) :] + keys[: turn % len(keys)]:
            start = time.perf_counter()
            works[key]()
            if device != "cpu":
                torch.cuda.synchronize()
            if turn:
                found[key].append(1e3 * (time.perf_counter() - start))
        print(f"\r{turn}/{runs} turns", end="", file=sys.stderr)
    print("\r", end="", file=sys.stderr)
    return found


def ratios(found: dict[tuple[str, int], list[float]], key: tuple[str, int]) -> list[float]:
    """Each run's time over that of the base in the same turn."""
    return [a / b for a, b in zip(found[key], found["base", 0], strict=True)]


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, median, high = statistics.quantiles(values, n=4)
    return low, median, high


def show(model: str, found: dict[tuple[str, int], list[float]], batch: int) -> None:
    """Medians, quartiles and ratios to the base, then the goals."""
    print(
        f"\n{model}: {'':18s} {'ms':>9s} {'quartiles':>19s} {'over base':>10s} {'quartiles':>15s}"
    )
    for (what, number), values in found.items():
        low, median, high = quartiles(values)
        a, b, c = quartiles(ratios(found, (what, number)))
        print(
            f"{what:14s} {number or '':>6} {median:14.1f} {low:9.1f} {high:9.1f} {b:10.3f} "
            f"{a:7.3f} {c:7.3f}"
        )
    mixed = [key for key in found if key[0] == "bank" and key[1] >= batch]
    if not mixed:
        return
    one = statistics.median(ratios(found, ("one adapter", 1)))
    for key in mixed:
        own = statistics.median(ratios(found, key))
        print(f"goal, {key[1]} adapters at most 1.10 × one for all: {own / one:.3f}")
    if ("PEFT", batch) in found:
        peer = statistics.median(ratios(found, ("PEFT", batch))) - 1
        own = statistics.median(ratios(found, ("bank", batch))) - 1
        print(f"goal, overhead at most a third of PEFT's: {own / peer:.3f} ({own:.3f}, {peer:.3f})")


def save(path: Path, rows: list[list[Any]], where: dict[str, str]) -> Path:
    """A dated CSV, one row a run; a second file of the same day gets a number."""
    path.mkdir(parents=True, exist_ok=True)
    file, number = path / f"{where['date']}-bank.csv", 1
    while file.exists():
        number += 1
        file = path / f"{where['date']}-bank-{number}.csv"
    with file.open("w", newline="", encoding="utf-8") as out:
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(["model", "batch", "what", "adapters", "run", "milliseconds", *where])
        writer.writerows([*row, *where.values()] for row in rows)
    return file


def plot(path: Path, results: dict[str, dict[tuple[str, int], list[float]]], batch: int) -> None:
    """Cost over the base against the number of adapters, quartiles as a band."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        1, len(results), figsize=(5 * len(results), 3.6), squeeze=False, layout="constrained"
    )
    for axis, (model, found) in zip(axes[0], results.items(), strict=True):
        for what, colour in (("bank", "C0"), ("PEFT", "C1")):
            numbers = [n for w, n in found if w == what]
            if numbers:
                low, mid, high = zip(
                    *(quartiles(ratios(found, (what, n))) for n in numbers), strict=True
                )
                axis.plot(numbers, mid, "o-", color=colour, label=f"{what}, mixed batch")
                axis.fill_between(numbers, low, high, color=colour, alpha=0.2, lw=0)
        one = statistics.median(ratios(found, ("one adapter", 1)))
        axis.axhline(one, color="C2", ls="--", label="one adapter for all")
        axis.axhline(1, color="0.4", ls=":", label="base")
        drawn = sorted({n for _, n in found if n})
        axis.set_xscale("log", base=2)
        axis.set_xticks(drawn, [str(n) for n in drawn])
        axis.set(title=model, xlabel=f"adapters (batch of {batch})", ylabel="time / base")
        axis.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def options_of(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["vit", "wav2vec2"])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument(
        "--numbers", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
    )
    parser.add_argument("--runs", type=int, default=11, help="turns (default 11)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--no-peers", action="store_true", help="without PEFT")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSV")
    parser.add_argument("--plot", type=Path, help="draw cost against number of adapters here")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Measure, show, save, draw."""
    options = options_of(arguments)
    torch.set_num_threads(options.threads)
    where = setting("torchaudio", "peft") | {"threads": str(options.threads)}
    print(", ".join(f"{key} {value}" for key, value in where.items()))
    warnings.filterwarnings("ignore", module="peft")
    results, rows = {}, []
    for name in options.models:
        torch.manual_seed(0)
        base, shape = MODELS[name]()
        base = base.eval().requires_grad_(False).to(options.device)
        x = torch.randn(options.batch, *shape).to(options.device)
        with tempfile.TemporaryDirectory() as folder:
            works = variants(
                base, x, sorted(set(options.numbers)), Path(folder), not options.no_peers
            )
            found = results[name] = measure(works, options.runs, options.device)
        show(name, found, options.batch)
        rows += [
            [name, options.batch, what, number, run, f"{value:.3f}"]
            for (what, number), values in found.items()
            for run, value in enumerate(values, start=1)
        ]
    print(f"saved {save(options.out, rows, where)}")
    if options.plot:
        plot(options.plot, results, options.batch)


if __name__ == "__main__":
    main()
