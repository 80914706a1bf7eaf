"""Harm of adapting to 5, 10, 20 or 50 labelled items, with `cross_fit` and with plain LoRA.

    python benchmarks/few_labels.py --out runs/few_labels

The source network of `do_no_harm.py` is adapted to one light at a time, with a few labelled
pictures drawn at random from the light's 300: as they come, whatever their classes. Plain LoRA has
the recipe `lighting`'s settings and as many steps for each number of pictures. The guard is
`cross_fit` around the very same fit, so that what it changes is the share alone. All three are
measured on the light's 200 held-out pictures. Writes a CSV and prints, for each number of pictures,
the means, how often either is more than a point below the source model, and the worst case.
"""

from __future__ import annotations

import argparse
import copy
import csv
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything
from torch.utils.data import DataLoader, StackDataset

try:  # from the repository's root, and as a script beside the other
    from benchmarks.do_no_harm import Data, Pictures, accuracy, evaluated, source_model
except ImportError:
    from do_no_harm import Data, Pictures, accuracy, evaluated, source_model

from lora_lightning import LoRACallback, cross_fit
from lora_lightning.runner.progress import quiet_lightning
from lora_lightning.vision.classifier import Classifier

TARGETS = ("coloured-1", "side-1", "side-3", "coloured-3", "dim-3")  # the nearest first
FIELDS = ("target", "seed", "items", "source", "plain", "guarded", "share", "p_value", "seconds")


def doubt(module: Any, batch: Any) -> torch.Tensor:
    """1 - p of the true class, (B,): near to what is measured, the share of mistakes.

    Cross-entropy would praise a model that is as wrong, but less sure of itself.
    """
    return 1 - module(batch[0]).softmax(1).gather(1, batch[1][:, None])[:, 0]


def mistakes(module: Any, batch: Any) -> torch.Tensor:
    """1 where the predicted class is wrong, (B,)."""
    return (module(batch[0]).argmax(1) != batch[1]).double()


def case(source: Any, data: Data, target: str, count: int, seed: int, given: Any) -> dict[str, Any]:
    """One light, so many pictures: a row."""
    d = data.domains
    pictures, classes = data.target(target)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(pictures), generator=generator)[:count]
    tests = data.get(target, "test")
    inputs = d.test_transform(tests[0])
    row: dict[str, Any] = {"target": target, "seed": seed, "items": count}

    def measured(model: Any) -> float:
        return round(accuracy(evaluated(model), inputs, tests[1]), 2)

    row["source"] = measured(source)

    def fit(module: Any, items: Any) -> None:
        seed_everything(seed, verbose=False)
        adapter = LoRACallback(
            rank=4, alpha=8.0, target_modules="all", batch_norm="adapt", output_dir=given.out,
            log_spectrum=False, verify=False,
        )  # fmt: skip
        trainer = Trainer(
            max_steps=given.steps, max_epochs=-1, accelerator="cpu", logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            callbacks=[adapter],
        )  # fmt: skip
        module.train()
        trainer.fit(module, DataLoader(items, 16, shuffle=True))
        if len(items) == count:  # the last fit is the plain one, before it is shrunk
            row["plain"] = measured(module.model)

    def dataset(transform: Any) -> Any:
        return StackDataset(Pictures(pictures[chosen], transform), classes[chosen])

    module = Classifier(copy.deepcopy(source), 4e-3, 0.01, label_smoothing=0.1)
    start = time.perf_counter()
    with quiet_lightning(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the source is kept is in the table
        seen = dataset(d.test_transform)
        items = dataset(d.train_transform)
        choice = cross_fit(
            module, items, fit, looked_at=seen, loss=doubt, mistakes=mistakes, folds=4
        )
    row |= {"share": choice.share, "p_value": round(choice.p_value, 5)}
    row["guarded"] = measured(module.model)
    return row | {"seconds": round(time.perf_counter() - start, 1)}


def show(rows: Sequence[dict[str, Any]]) -> None:
    """A line for each number of pictures, and one for all."""
    print("                mean accuracy            | harmed         | worst           |")
    print("items  cases  source   plain  guarded  | plain guarded  | plain  guarded  | adapted")
    for count in [*sorted({r["items"] for r in rows}), None]:
        of = [r for r in rows if count in (None, r["items"])]
        change = {m: [r[m] - r["source"] for r in of] for m in ("plain", "guarded")}
        harmed = {m: sum(c < -1 for c in change[m]) for m in change}
        means = [fmean(r[m] for r in of) for m in ("source", "plain", "guarded")]
        line = f"{count or 'all':>5}{len(of):7}{means[0]:8.1f}{means[1]:8.1f}{means[2]:9.1f}  |"
        line += f"{harmed['plain']:6}{harmed['guarded']:8}  |"
        line += f"{min(change['plain']):6.1f}{min(change['guarded']):9.1f}  |"
        print(line + f"{sum(r['share'] > 0 for r in of):8}")


def main() -> None:
    """Run what the arguments choose."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/few_labels"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--items", type=int, nargs="+", default=[5, 10, 20, 50])
    parser.add_argument("--targets", nargs="+", default=list(TARGETS))
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--cache", help="folder for the rendered pictures")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    data = Data(0, given.cache)
    seed_everything(0, verbose=False)
    source = source_model(data, given.out / "source-0.pt")
    rows: list[dict[str, Any]] = []
    with (given.out / "few_labels.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, FIELDS)
        table.writeheader()
        for seed in given.seeds:
            for target in given.targets:
                for count in given.items:
                    rows.append(case(source, data, target, count, seed, given))
                    table.writerow(rows[-1])
                    file.flush()
                    print(*rows[-1].values(), flush=True)
    show(rows)


if __name__ == "__main__":
    main()
