"""`TransductiveTask` at its defaults on the suites of pictures, and what labels would bring.

    python -m benchmarks.label_free --part final --cases styles/3d-flat --conditions all "3 classes"

A row of the CSV for each case and condition: accuracy of the source model and of the adapted one on
the target's items, on other items of the same domain ("next"), and of the source model adapted with
the labels of those other items (`--labels`; on the target's items). "Harm": more than one point
below the source model, on the target's items. Development and final part: see `benchmarks.suites`.
"""

from __future__ import annotations

import contextlib
import copy
import io
import tempfile
import time
from statistics import fmean
from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything
from torch import Tensor, nn

from benchmarks.machine import Table, setting
from benchmarks.suites.case import Case, Pictures, under
from benchmarks.suites.choice import SEEDS, parser, runs
from benchmarks.suites.networks import Augmented, augmentation, inputs, source_model
from lora_lightning import LoRACallback, TransductiveTask
from lora_lightning.runner.progress import quiet_lightning
from lora_lightning.vision.classifier import Classifier

RANK, EPOCHS, STEPS, RATE = 4, 4, 12, 2e-3  # as in the recipes
LABELLED_RATE, HARM = 4e-3, 1.0


def fit(task: Any, batches: int, *data: Any, head: bool = False) -> None:
    """Train the factors, and the head where there are labels."""
    trainable = {} if head else {"trainable": []}
    with tempfile.TemporaryDirectory() as folder, quiet_lightning():
        lora = LoRACallback(
            rank=RANK, alpha=2.0 * RANK, output_dir=folder, log_spectrum=False, **trainable
        )
        with contextlib.redirect_stdout(io.StringIO()):
            Trainer(
                max_epochs=max(EPOCHS, -(-STEPS // batches)), accelerator="cpu", logger=False,
                enable_checkpointing=False, enable_progress_bar=False, callbacks=[lora],
                enable_model_summary=False,
            ).fit(task, *data)  # fmt: skip


def accuracy(model: nn.Module, items: Tensor, labels: Tensor) -> float:
    """In percent, of the items that show a class."""
    with torch.no_grad():
        said = torch.cat([model.eval()(batch).argmax(1) for batch in items.split(64)])
    known = labels >= 0
    return 100 * float((said == labels)[known].double().mean()) if known.any() else float("nan")


def measure(case: Case, condition: str, seed: int, network: str, labels: bool) -> dict[str, Any]:
    """One row."""
    source, asked = source_model(case, network), under(case, condition, seed)
    items, truth = inputs(asked.target.pictures, network), asked.target.labels
    other = Pictures(inputs(case.labelled.pictures, network), case.labelled.labels)
    augment = augmentation(case, network)
    seed_everything(seed, verbose=False)
    start = time.process_time()
    views = Augmented(items, truth, augment)  # the labels are not looked at
    task = TransductiveTask(
        copy.deepcopy(source),
        items,
        training=views,
        learning_rate=RATE,
        batch_size=asked.batch_size,
    )
    fit(task, -(-len(items) // asked.batch_size))
    seconds = time.process_time() - start
    rounds: Any = task.rounds_
    before = accuracy(source, items, truth)
    next_before = accuracy(source, *other)
    row = {
        "case": case.name, "condition": condition, "network": network, "items": len(items),
        "source": round(before, 2), "adapted": round(accuracy(task.model, items, truth), 2),
        "next_source": round(next_before, 2), "next": round(accuracy(task.model, *other), 2),
        "labelled": "", "accepted": rounds.accepted_, "rounds": len(rounds.history_) - 1,
        "seconds": round(seconds, 1), "end": rounds.termination_condition_,
    }  # fmt: skip
    if labels:
        model = copy.deepcopy(source)
        data = torch.utils.data.DataLoader(Augmented(*other, augment), 32, shuffle=True)
        fit(Classifier(model, LABELLED_RATE, 0.01, 0.1), len(data), data, head=True)
        row["labelled"] = round(accuracy(model, items, truth), 2)
    return row


def report(rows: list[dict[str, Any]]) -> None:
    """A line for each condition: mean change, harm, runs adapted, what labels bring."""
    print("| condition | runs | source, % | change | next | harm | adapted | with labels |")
    print("| --- " * 8 + "|")
    for condition in dict.fromkeys(r["condition"] for r in rows):
        of = [r for r in rows if r["condition"] == condition]
        known = [r for r in of if r["source"] == r["source"]]
        change = [r["adapted"] - r["source"] for r in known] or [float("nan")]
        cells = [
            condition, len(of), f"{fmean(r['source'] for r in of):.1f}", f"{fmean(change):+.1f}",
            f"{fmean(r['next'] - r['next_source'] for r in of):+.1f}",
            sum(c < -HARM for c in change), sum(r["accepted"] > 0 for r in of),
        ]  # fmt: skip
        told = [r["labelled"] - r["source"] for r in known if r["labelled"] != ""]
        print("|", " | ".join(map(str, cells)), "|", f"{fmean(told):+.1f}" if told else "–", "|")


def main() -> None:
    """Measure what the arguments choose; a row of the CSV each, then the table."""
    arguments = parser(__doc__)
    arguments.add_argument("--labels", action="store_true", help="adapt with labels as well")
    given = arguments.parse_args()
    table = Table("label-free", {**setting(), "part": given.part, "seed": SEEDS[given.part]})
    for case, condition, seed, network in runs(given):
        labels = given.labels and condition == "all"
        table.add(**measure(case, condition, seed, network, labels))
        print({k: table.rows[-1][k] for k in ("case", "condition", "source", "adapted")})
    report(table.rows)
    print(table.path)


if __name__ == "__main__":
    main()
