"""Cost of a batch in which every item has its own adapter, ours and PEFT's.

    python benchmarks/bank.py                        # ViT-Tiny and wav2vec2-base, an hour
    python benchmarks/bank.py --models vit --runs 5 --numbers 1 16 64 --batch 16
    python benchmarks/bank.py --plot docs/images/bank.png
    python benchmarks/bank.py --read benchmarks/results/*-bank*.csv --plot docs/images/bank.png

Every model gets files of adapters with random factors, the model's own choice of layers
(``"auto"``), rank 8. Then, in one process and in turns, each run starting with another of them:

- *base*: the model without adapters;
- *one adapter*: `set_active` of one, for all items;
- *bank, k*: ``with bank[names]: model(batch)``, the block included, names redrawn for each run
  from k adapters, all different where k is the batch or more;
- *PEFT, k*: ``model(batch, adapter_names=names)``, on the same layers, up to k = batch.

Reported: medians and quartiles, and paired ratios (each run's time over that turn's base). Goals:
the bank's mixed batch at most 1.10 × one adapter for all, its overhead above the base at most a
third of PEFT's, the same time with 512 adapters in the process as with 64.
"""

from __future__ import annotations

import argparse
import copy
import os
import random
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from bank_report import Times, plot, read, save, show
from machine import RESULTS, Work, in_turns, setting
from torch import Tensor, nn

from lora_lightning import AdapterBank, inject, load_adapter, save_adapter

RANK = 8


def vit() -> tuple[nn.Module, tuple[int, ...]]:
    """ViT-Tiny at 224 × 224."""
    import timm

    return timm.create_model("vit_tiny_patch16_224"), (3, 224, 224)


def wav2vec2() -> tuple[nn.Module, tuple[int, ...]]:
    """wav2vec2-base at one second of 16 kHz."""
    from torchaudio.models import wav2vec2_base

    return wav2vec2_base(aux_num_out=32), (16000,)


def small() -> tuple[nn.Module, tuple[int, ...]]:
    """A small model to test this script."""
    import timm

    return timm.create_model("test_vit"), (3, 160, 160)


MODELS = {"vit": vit, "wav2vec2": wav2vec2, "small": small}


def write_files(
    base: nn.Module, folder: Path, number: int, distinct: int | None = None
) -> tuple[list[Path], list[str]]:
    """Adapter files with random factors, and the names of the layers that they adapt; files beyond
    `distinct` are links to the first ones."""
    model = copy.deepcopy(base)
    report = inject(model, rank=RANK, trainable=[], seed=0)
    factors = [p for p in model.parameters() if p.requires_grad]
    paths = []
    for i in range(number):
        path = folder / f"{i:04d}.safetensors"
        if distinct is not None and i >= distinct:
            os.link(paths[i % distinct], path)
            paths.append(path)
            continue
        generator = torch.Generator().manual_seed(i)
        with torch.no_grad():
            for p in factors:
                p.copy_(0.02 * torch.randn(p.shape, generator=generator))
        paths.append(save_adapter(model, path))
    return paths, [row.module for row in report.rows]


def peft_model(base: nn.Module, layers: list[str], number: int) -> Any:
    """The base as a PEFT model, with this many adapters of random factors."""
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
    base: nn.Module,
    x: Tensor,
    numbers: list[int],
    folder: Path,
    peers: bool,
    distinct: int | None = None,
) -> dict[tuple[str, int], Work]:
    """(what, number of adapters) → a run of it."""
    paths, layers = write_files(base, folder, max(numbers), distinct)
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
def measure(works: dict[tuple[str, int], Work], runs: int) -> Times:
    """Milliseconds of each, one for each turn; a first turn, which reads files, is left out."""
    return {key: [1e3 * t for t in own] for key, own in in_turns(works, runs).items()}


def options_of(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["vit", "wav2vec2"])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument(
        "--numbers", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
    )
    parser.add_argument("--runs", type=int, default=11, help="turns (default 11)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--no-peers", action="store_true", help="without PEFT")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSV")
    parser.add_argument("--read", type=Path, nargs="+", help="show and draw these, measure nothing")
    parser.add_argument("--plot", type=Path, help="draw cost against number of adapters here")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Measure, show, save, draw."""
    options = options_of(arguments)
    if options.read:
        results, batch = read(options.read)
        for name, found in results.items():
            show(name, found, batch)
        if options.plot:
            plot(options.plot, results, batch)
        return
    torch.set_num_threads(options.threads)
    where = setting("torchaudio", "peft") | {"threads": str(options.threads)}
    print(", ".join(f"{key} {value}" for key, value in where.items()))
    warnings.filterwarnings("ignore", module="peft")
    results = {}
    for name in options.models:
        torch.manual_seed(0)
        base, shape = MODELS[name]()
        base = base.eval().requires_grad_(False)
        x = torch.randn(options.batch, *shape)
        with tempfile.TemporaryDirectory() as folder:
            works = variants(
                base, x, sorted(set(options.numbers)), Path(folder), not options.no_peers
            )
            results[name] = measure(works, options.runs)
        show(name, results[name], options.batch)
    print(f"saved {save(options.out, results, options.batch, where)}")
    if options.plot:
        plot(options.plot, results, options.batch)


if __name__ == "__main__":
    main()
