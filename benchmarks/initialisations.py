"""Accuracy by epoch for each initialisation of the factors.

    python benchmarks/initialisations.py --out runs/initialisations

The source network of `do_no_harm.py`, its BatchNorm statistics those of the light, is adapted with
labels to four lights (300 pictures each), with every initialisation and the same settings
otherwise; after each epoch it is measured on the light's held-out pictures. Writes a CSV and prints
the means over lights and seeds, with the spread over seeds, the trained numbers and the size of the
adapter's file. "xs" is LoRA-XS, a core between frozen singular vectors; it takes a rank and a
learning rate of its own:

    python benchmarks/initialisations.py --inits xs --rank 16 --learning-rate 0.0015
"""

from __future__ import annotations

import argparse
import copy
import csv
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from torch.utils.data import DataLoader, StackDataset

try:  # from the repository's root, and as a script beside the other
    from benchmarks.do_no_harm import Data, Pictures, evaluated, source_model
except ImportError:
    from do_no_harm import Data, Pictures, evaluated, source_model

from lora_lightning import LoRACallback
from lora_lightning.lora.initialisation import METHODS
from lora_lightning.model.batch_norm import reestimated
from lora_lightning.runner.progress import quiet_lightning
from lora_lightning.vision.classifier import Classifier

TARGETS = ("coloured-2", "dim-2", "low-3", "side-3")
XS = "xs"
FIELDS = (
    "init", "rank", "target", "seed", "epoch", "accuracy", "seconds", "parameters", "bytes",
)  # fmt: skip


class ByEpoch(Callback):
    """Accuracy before training and after each epoch, and the seconds that they took alone."""

    def __init__(self, pictures: torch.Tensor, classes: torch.Tensor):
        self.pictures, self.classes = pictures, classes
        self.accuracies: list[float] = []
        self.seconds: list[float] = []
        self._spent, self._since = 0.0, time.perf_counter()

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """The start: after the factors', which come first in the list of callbacks."""
        self._look(pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """An epoch is over."""
        self._look(pl_module)

    def _look(self, module: Any) -> None:
        self._spent += time.perf_counter() - self._since
        training = module.model.training
        right = evaluated(module.model)(self.pictures).argmax(1) == self.classes
        module.model.train(training)
        self.accuracies.append(100 * float(right.double().mean()))
        self.seconds.append(self._spent)
        self._since = time.perf_counter()


def course(
    source: Any, data: Data, target: str, init: str, seed: int, given: Any
) -> list[dict[str, Any]]:
    """One training, a row for each epoch."""
    seed_everything(seed, verbose=False)
    d = data.domains
    pictures, classes = data.get(target, "test")
    looks = ByEpoch(d.test_transform(pictures), classes)
    model = copy.deepcopy(source)
    # Its statistics taken from the target first, as adapting does it, and then left alone.
    learnt, labels = data.target(target)
    reestimated(model, model, d.test_transform(learnt).split(64))
    items: Any = StackDataset(Pictures(learnt, d.train_transform), labels)
    train = DataLoader(items, 32, shuffle=True)
    adapter = LoRACallback(
        rank=given.rank, alpha=2.0 * given.rank, target_modules="all", exclude_modules=["fc"],
        trainable=[], init="zero" if init == XS else init, xs=init == XS, clamp_rank=True,
        output_dir=given.out, log_spectrum=False,
    )  # fmt: skip
    with quiet_lightning():
        trainer = Trainer(
            max_epochs=given.epochs, accelerator="cpu", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, callbacks=[adapter, looks],
        )  # fmt: skip
        module = Classifier(model.train(), learning_rate=given.learning_rate)
        trainer.fit(module, train)
    assert adapter.report_ is not None
    assert adapter.adapter_path_ is not None
    size = {
        "parameters": adapter.report_.factor_parameters,
        "bytes": adapter.adapter_path_.stat().st_size,
    }
    pairs = zip(looks.accuracies, looks.seconds, strict=True)
    return [
        {"init": init, "rank": given.rank, "target": target, "seed": seed, "epoch": epoch,
         "accuracy": accuracy, "seconds": seconds, **size}
        for epoch, (accuracy, seconds) in enumerate(pairs)
    ]  # fmt: skip


def show(rows: Sequence[dict[str, Any]], inits: Sequence[str], epochs: int) -> None:
    """A line for each initialisation: the mean accuracy by epoch, and the last one's spread."""
    seeds = sorted({r["seed"] for r in rows})
    print("init            " + "".join(f"{e:>7}" for e in range(epochs + 1)) + "   sd  seconds"
          "  trained    bytes")  # fmt: skip
    for init in inits:
        of = [r for r in rows if r["init"] == init]
        by = [fmean(r["accuracy"] for r in of if r["epoch"] == e) for e in range(epochs + 1)]
        last = [r for r in of if r["epoch"] == epochs]
        means = [fmean(r["accuracy"] for r in last if r["seed"] == s) for s in seeds]
        spread = stdev(means) if len(means) > 1 else float("nan")
        seconds = fmean(r["seconds"] for r in last)
        print(f"{init:<16}" + "".join(f"{a:7.1f}" for a in by) + f"{spread:5.1f}{seconds:9.1f}"
              f"{of[0]['parameters']:9}{of[0]['bytes']:9}")  # fmt: skip


def main() -> None:
    """Run what the arguments choose."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/initialisations"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--inits", nargs="+", default=list(METHODS), choices=[*METHODS, XS])
    parser.add_argument("--targets", nargs="+", default=list(TARGETS))
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument("--cache", help="folder for the rendered pictures")
    given = parser.parse_args()
    data = Data(0, given.cache)
    seed_everything(0, verbose=False)
    source = source_model(data, given.out / "source-0.pt")
    rows: list[dict[str, Any]] = []
    with (given.out / "initialisations.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, FIELDS)
        table.writeheader()
        for seed in given.seeds:
            for target in given.targets:
                for init in given.inits:
                    rows += course(source, data, target, init, seed, given)
                    table.writerows(rows[-given.epochs - 1 :])
                    file.flush()
    show(rows, given.inits, given.epochs)


if __name__ == "__main__":
    main()
