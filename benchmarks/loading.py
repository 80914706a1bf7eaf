"""Time to inject an adapter and to load one from a file, ours and PEFT's.

    pip install 'lora-lightning[bench]'     # for PEFT's rows; without it they are left out
    python benchmarks/loading.py            # about three minutes; writes a dated CSV
    python benchmarks/loading.py --no-save --runs 10

*inject*: ``inject(model, rank=8)`` on ``vit_large_patch16_224``, "auto" and "all", and PEFT's
``inject_adapter_in_model`` and ``get_peft_model`` on the same layers with the head trained as
well. Goal: under 40 ms.

*load*: an adapter of rank 2 on ``vit_base_patch16_224``, a file of 1.2 MB, without a head. "new":
on a model without adapters; "beside": on one that has such an adapter; "overwrite": in its place.
Ours compares the base with that of the training each time; PEFT does not. Goal: under 5 ms.

Each round takes every measure once, in an order that turns, on a structure of its own that shares
the base's tensors; the first round is left out. One thread. Wall and processor time.
"""

from __future__ import annotations

import argparse
import copy
import gc
import importlib.util
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from machine import setting
from startup import save, table, timed, verdict
from torch import nn

from lora_lightning import inject, load_adapter, save_adapter
from lora_lightning.model.state import named_factors

GOAL_MS = {"inject": 40.0, "load_adapter": 5.0}
# Name → (what makes the structure that is worked on, the work).
Measures = dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]]


def twin(model: nn.Module) -> Any:
    """A structure of its own around the same tensors."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model.requires_grad_(True), {id(t): t for t in tensors})


def injecting(base: nn.Module, rank: int) -> Measures:
    """Ours."""
    return {
        f"inject {which}": (
            lambda: twin(base),
            lambda model, which=which: inject(model, rank=rank, target_modules=which),
        )
        for which in ("auto", "all")
    }


def loading(base: nn.Module, path: Path) -> Measures:
    """Ours, from the file at `path`."""

    def occupied() -> nn.Module:
        model = twin(base)
        load_adapter(model, path, "first")
        return model

    return {
        "load_adapter, new": (lambda: twin(base), lambda model: load_adapter(model, path)),
        "load_adapter, beside": (occupied, lambda model: load_adapter(model, path, "second")),
        "load_adapter, overwrite": (
            occupied,
            lambda model: load_adapter(model, path, "first", overwrite=True),
        ),
    }


def peft_injecting(base: nn.Module, targets: list[str], rank: int) -> Measures:
    """PEFT's, on the same layers."""
    import peft

    def config() -> Any:
        return peft.LoraConfig(r=rank, target_modules=targets, modules_to_save=["head"])

    return {
        "PEFT inject_adapter_in_model auto": (
            lambda: twin(base),
            lambda model: peft.inject_adapter_in_model(config(), model),
        ),
        "PEFT get_peft_model auto": (
            lambda: twin(base),
            lambda model: peft.get_peft_model(model, config()),
        ),
    }


def peft_loading(base: nn.Module, targets: list[str], rank: int, folder: Path) -> Measures:
    """PEFT's, from a file that it writes into `folder`."""
    import peft
    from safetensors.torch import load_file

    def occupied() -> Any:
        config = peft.LoraConfig(r=rank, target_modules=targets)
        return peft.get_peft_model(twin(base), config)

    occupied().save_pretrained(str(folder))
    file = folder / "adapter_model.safetensors"
    return {
        "PEFT from_pretrained, new": (
            lambda: twin(base),
            lambda model: peft.PeftModel.from_pretrained(model, str(folder)),
        ),
        "PEFT load_adapter, beside": (
            occupied,
            lambda model: model.load_adapter(str(folder), "second"),
        ),
        "PEFT set_peft_model_state_dict, overwrite": (
            occupied,
            lambda model: peft.set_peft_model_state_dict(model, load_file(file)),
        ),
    }


def rounds(
    measures: Measures, number: int, finish: Callable[[], Any] = lambda: None
) -> dict[str, list[float]]:
    """Milliseconds by measure and clock, one value a round; `finish` waits for a device."""
    found: dict[str, list[float]] = {}
    names = list(measures)
    for i in range(number + 1):
        turned = [*names[i % len(names) :], *names[: i % len(names)]]
        for name in turned:
            make, work = measures[name]
            model = make()
            gc.collect()  # what the one before left behind is no cost of this one
            finish()
            wall, cpu = timed(lambda work=work, model=model: (work(model), finish()))
            if i > 0:  # the first makes classes and fills the disk's cache
                found.setdefault(f"{name} [wall]", []).append(wall)
                found.setdefault(f"{name} [cpu]", []).append(cpu)
        print(f"\r{i}/{number} rounds", end="", file=sys.stderr)
    print("\r", end="", file=sys.stderr)
    return {f"{n} [{c}]": found[f"{n} [{c}]"] for n in names for c in ("wall", "cpu")}


def adapter_file(base: nn.Module, rank: int, folder: Path) -> tuple[Path, list[str]]:
    """A file of an adapter without a head, and the layers that it is for."""
    model = twin(base)
    inject(model, rank=rank, trainable=[], name="adapter")
    layers = [path.rpartition(".")[0] for path in named_factors(model, "adapter")]
    return save_adapter(model, folder / "adapter.safetensors"), layers


def measure(large: str, small: str, runs: int, device: str = "cpu") -> dict[str, list[float]]:
    """Both parts, with PEFT's rows where it is installed."""
    finish = torch.cuda.synchronize if device == "cuda" else lambda: None
    peers = importlib.util.find_spec("peft") is not None
    if not peers:
        print("peft is not installed: pip install 'lora-lightning[bench]' for its rows")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with torch.device(device):
            base = timm.create_model(large)
        measures = injecting(base, rank=8)
        if peers:
            measures |= peft_injecting(base, adapter_file(base, 1, folder)[1], rank=8)
        found = rounds(measures, runs, finish)
        with torch.device(device):
            base = timm.create_model(small, num_classes=10)
        path, layers = adapter_file(base, 2, folder)
        print(f"the adapter's file holds {path.stat().st_size:,} bytes")
        measures = loading(base, path)
        if peers:
            measures |= peft_loading(base, layers, 2, folder / "peft")
        return found | rounds(measures, runs, finish)


def main() -> None:
    """Measure, show, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=30, help="rounds (default 30)")
    parser.add_argument("--inject", default="vit_large_patch16_224", help="timm name")
    parser.add_argument("--load", default="vit_base_patch16_224", help="timm name")
    parser.add_argument("--no-save", action="store_true", help="write no CSV")
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # PEFT's advice
    torch.set_num_threads(1)
    torch.manual_seed(0)
    peers = ("peft",) if importlib.util.find_spec("peft") else ()
    where = setting("safetensors", *peers) | {"threads": "1"}
    print(", ".join(f"{key} {value}" for key, value in where.items()))
    found = measure(options.inject, options.load, options.runs)
    table(found)
    for name, values in found.items():
        goal = GOAL_MS.get(name.partition(" ")[0].rstrip(","))
        if goal is not None and "overwrite" not in name:
            print(f"goal, under {goal:.0f} ms: {verdict(values, goal)} by {name}")
    if not options.no_save:
        print(f"saved {save(found, where, 'loading')}")


if __name__ == "__main__":
    main()
