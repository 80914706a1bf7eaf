"""Mutated recipes and overrides, through ``lora-lightning run`` up to the data.

    python benchmarks/fuzz_recipes.py              # 1,500 configurations
    python benchmarks/fuzz_recipes.py --train 100  # the first 100 of pictures accepted: run whole

Each is a recipe of the package in which one to three things are changed: a value in the file
(another type, out of range, not finite, removed, repeated 20,000 times, a reference or a call of a
resolver), a name, characters of the file's text, or a ``key=value`` behind it. All is run that
comes before the training: reading, types, the checks of settings, the trainer, the output's folder,
and for pictures in folders the data. Counted as in fuzz.py. With ``--train`` such a run trains and
measures as well, on 16 pictures of 8 x 8, with at most one epoch of each training; one that takes
more than a minute counts as a fault.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import yaml
from fuzz import Fuzz, cli
from machine import save as save_figures
from machine import setting
from mutants import ODD
from PIL import Image

from lora_lightning.runner import runner
from lora_lightning.runner.loading import list_recipes, load_recipe, settings

KINDS = ("configurations", "accepted", "trained", "foreign exceptions")
TEXTS = (
    "[", "{", "[1,2", "{a: 1}", "[[1]]", "[null]", "null", "~", "yes", "???", "${out}", "${x}",
    "${", "${oc.env:HOME}", "${oc.env:NOT_THERE}", "'[/]'", '"\\e[31m"', '"a\\0b"', "1e400",
    ".nan", "-.inf",
    "-1", "0", "1", "3", "0.5", "1e-30", "99999999999999999999", "2147483648", "1:30", "2026-11-28",
    "!!python/object:os.system x", "&a [*a]", "李明", "''", "' '", "x" * 300, "a b", "cpu",
    "gpu", "auto",
    "lora@0", "[lora,lora]", "[lora@99999999999]", "[source_only]", "[0,0]", "[-1]", "[1.5]", "[a]",
    "=", "a=b", "#", "{a: {b: {c: [1]}}}", "{1: 2}", "{null: 1}", "@a", "%", "\t", "/dev/null",
    "nowhere/at/all", "'\\ud800'",
)  # fmt: skip


class Recipes:
    """The package's recipes, and mutants of them."""

    def __init__(self, folder: Path, draw: random.Random):
        self.draw, self.path = draw, folder / "recipe.yaml"
        self.names = list(list_recipes())
        self.keys = {name: list(settings(load_recipe(name))) for name in self.names}
        self.photos = folder / "photos"
        for domain in ("source", "night"):
            for i in range(8):
                path = self.photos / domain / "ab"[i % 2] / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (8, 8), (i, i, i)).save(path)

    def mutant(self) -> tuple[str, list[str]]:
        """What was changed, and the arguments behind ``run``."""
        name = self.draw.choice(self.names)
        given = yaml.safe_load((list_recipes()[name] / "recipe.yaml").read_text())
        overrides = ["accelerator=cpu", "out=out"]
        if given["kind"] == "classification":
            overrides += [f"data.root={self.photos}", "model.name=test_vit", "model.imagenet=none"]
        told = []
        for _ in range(self.draw.choice([1, 1, 2, 3])):
            if self.draw.random() < 0.5:
                key = self._key(name)
                overrides.append(f"{key}{self.draw.choice(['='] * 20 + ['', '=='])}{self._text()}")
                told.append(overrides[-1])
            else:
                told.append(self._change(given))
        text = yaml.safe_dump(given, allow_unicode=True)
        if self.draw.random() < 0.2:
            at = self.draw.randrange(len(text))
            text = text[:at] + self._text() + text[at + self.draw.randrange(9) :]
            told.append("text")
        self.path.write_text(text, encoding="utf-8", errors="surrogatepass")
        return f"{name}: {', '.join(t[:80] for t in told)}", [str(self.path), *overrides]

    def _key(self, name: str) -> str:
        key = self.draw.choice(self.keys[name])
        odd = [key + ".a", key + "[0]", key.upper(), key.rpartition(".")[0] or "x", "", "." + key]
        return self.draw.choice([key] * 20 + odd)

    def _text(self) -> str:
        return self.draw.choice(TEXTS)

    def _change(self, node: Any) -> str:
        path = []
        while True:
            keys = list(node) if isinstance(node, dict) else range(len(node))
            key = self.draw.choice(list(keys))
            path.append(str(key))
            if not isinstance(node[key], dict | list) or not node[key] or self.draw.random() < 0.2:
                break
            node = node[key]
        how = self.draw.choice(["odd", "text", "text", "gone", "many", "renamed"])
        if how == "odd":
            node[key] = self.draw.choice([v for v in ODD if v != "\ud800"])
        elif how == "text":
            with contextlib.suppress(yaml.YAMLError):
                node[key] = yaml.safe_load(self._text())
        elif how == "gone":
            del node[key]
        elif how == "many":
            node[key] = [node[key]] * 20_000
        elif isinstance(node, dict):
            node[f"{key}s"] = node.pop(key)
        return f"{'.'.join(path)} {how}"


class Training:
    """Runs the first accepted configurations of pictures whole, of later ones the data."""

    def __init__(self, left: int):
        self.left, self.trained, self._whole = left, 0, runner._run

    def __call__(self, experiment: Any, *rest: Any) -> None:
        """In place of the runner's own."""
        config = experiment.config
        if config.kind != "classification" or not config.data.root:
            return
        if self.trained >= self.left:
            experiment.load()
            return
        self.trained += 1
        for stage in vars(config.train).values():
            if hasattr(stage, "epochs"):
                stage.epochs, stage.least_steps = min(stage.epochs, 1), 0
        signal.alarm(60)
        try:
            self._whole(experiment, *rest)
        finally:
            signal.alarm(0)


def _too_long(*_: Any) -> None:
    raise TimeoutError("more than a minute")


def run(count: int, seed: int, train: int, folder: Path) -> Fuzz:
    """Mutants, each through the command."""
    recipes, fuzz, training = Recipes(folder, random.Random(seed)), Fuzz(), Training(train)
    signal.signal(signal.SIGALRM, _too_long)
    with mock.patch.object(runner, "_run", training):
        for _ in range(count):
            if train and training.trained >= train:
                break
            what, arguments = recipes.mutant()
            fuzz.call("run", what, lambda a=arguments: cli("run", *a))
            fuzz.counts["configurations"] += 1
            fuzz.counts["trained"] = training.trained
            if fuzz.counts["configurations"] % 50 == 0:
                print(row(fuzz), *fuzz.faults[:40], sep="\n", file=sys.stderr, flush=True)
    return fuzz


def row(fuzz: Fuzz) -> dict[str, Any]:
    """The figures."""
    return {
        **{key: fuzz.counts[key] for key in KINDS},
        "slowest call, s": round(fuzz.slowest[0], 2),
        "which": fuzz.slowest[1],
        "memory, MB": round(fuzz.memory),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train", type=int, default=0)
    parser.add_argument("--no-save", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["HF_HUB_OFFLINE"] = "1"  # a mutant may ask for weights from a hub
    here = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # a mutant's `out` may lie anywhere below
        fuzz = run(options.count, options.seed, options.train, Path(folder))
        os.chdir(here)
    found = {**row(fuzz), "seed": options.seed}
    for line in [*fuzz.faults[:40], *(f"{key}: {value}" for key, value in found.items())]:
        print(line)
    if not options.no_save:
        print(save_figures("fuzz_recipes", [found], setting("omegaconf")))
    slow = 60 if options.train else 5
    return 0 if not fuzz.faults and fuzz.slowest[0] < slow and fuzz.memory < 1000 else 1


if __name__ == "__main__":
    sys.exit(main())
