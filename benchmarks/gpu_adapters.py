"""Parts of `gpu.py` that serve, fit without labels, inject and load."""

from __future__ import annotations

import argparse
import functools
import tempfile
from pathlib import Path

import bank as banks
import label_free_cost
import loading as loadings
import torch
from gpu_cells import Cells, clock
from machine import Work, in_turns, quartiles, ratios


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
