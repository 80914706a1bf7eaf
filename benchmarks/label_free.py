"""`TransductiveTask` at its defaults on the suites of pictures, beside other methods and labels.

    python -m benchmarks.label_free --part final --cases styles/3d-flat --conditions all "3 classes"
    python -m benchmarks.label_free --part final --networks vit --methods ours tent shot nrc pseudo

A row of the CSV for each case, condition and method: accuracy of the source model and of the
adapted one on the target's items, on other items of the same domain ("next"), and of the source
model adapted with the labels of those other items (`--labels`; on the target's items, in the row of
ours). "Harm": more than one point below the source model, on the target's items. The other methods
are as their papers define them (`benchmarks.rivals`). Development and final part: see
`benchmarks.suites`.
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
from benchmarks.rivals import RIVALS, Predictor, evaluated
from benchmarks.suites.case import Case, Pictures, under
from benchmarks.suites.choice import SEEDS, parser, runs
from benchmarks.suites.networks import Augmented, augmentation, inputs, source_model
from lora_lightning import LoRACallback, TransductiveTask
from lora_lightning.adaptation.transductive_rounds import trained_in_full
from lora_lightning.runner.progress import quiet_lightning
from lora_lightning.vision.classifier import Classifier

RANK, EPOCHS, STEPS, RATE = 4, 4, 12, 2e-3  # as in the recipes
LABELLED_RATE, HARM = 4e-3, 1.0
NEXT: dict[tuple[str, str], float] = {}  # of a case and network, the source model's accuracy there
LEAST_GAP = 5.0  # that labels bring, in points: of a smaller one no part is told


def fit(task: Any, batches: int, *data: Any, head: bool = False) -> None:
    """Train the factors, and in full the head where there are labels, else what is best."""
    trainable = {} if head else {"trainable": trained_in_full(task.model)}
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


def accuracy(predict: Predictor, items: Tensor, labels: Tensor) -> float:
    """In percent, of the items that show a class."""
    said = predict(items).argmax(1)
    known = labels >= 0
    return 100 * float((said == labels)[known].double().mean()) if known.any() else float("nan")


def ours(model: nn.Module, items: Tensor, case: Case, augment: Any) -> tuple[Predictor, Any]:
    """A `TransductiveTask` at its defaults."""
    views = Augmented(items, case.target.labels, augment)  # the labels are not looked at
    task = TransductiveTask(
        model, items, training=views, learning_rate=RATE, batch_size=case.batch_size
    )
    fit(task, -(-len(items) // case.batch_size))
    after = evaluated(task.model)
    # Of the target's own items the answers are the task's, which need not be those of a model.
    answers = task.probabilities_
    return lambda x: answers if x is items else after(x), task.rounds_


def another(name: str, model: nn.Module, items: Tensor, augment: Any) -> Predictor:
    """One of `RIVALS`."""
    return RIVALS[name](model, items, lambda index: torch.stack([augment(items[i]) for i in index]))


def measure(
    case: Case, condition: str, seed: int, network: str, method: str, labels: bool
) -> dict[str, Any]:
    """One row."""
    source, asked = source_model(case, network), under(case, condition, seed)
    items, truth = inputs(asked.target.pictures, network), asked.target.labels
    other = Pictures(inputs(case.labelled.pictures, network), case.labelled.labels)
    augment, model = augmentation(case, network), copy.deepcopy(source)
    rounds: Any = None
    seed_everything(seed, verbose=False)
    start = time.process_time()
    if method == "ours":
        after, rounds = ours(model, items, asked, augment)
    else:
        after = another(method, model, items, augment)
    seconds, before = time.process_time() - start, evaluated(source)
    if (case.name, network) not in NEXT:
        NEXT[case.name, network] = round(accuracy(before, *other), 2)
    next_before = NEXT[case.name, network]
    same = rounds is not None and not rounds.accepted_  # the model is the source model
    row = {
        "case": case.name, "condition": condition, "network": network, "method": method,
        "items": len(items), "source": round(accuracy(before, items, truth), 2),
        "adapted": round(accuracy(after, items, truth), 2),
        "next_source": next_before,
        "next": next_before if same else round(accuracy(after, *other), 2),
        "labelled": "", "accepted": rounds.accepted_ if rounds else "",
        "rounds": len(rounds.history_) - 1 if rounds else "", "seconds": round(seconds, 1),
        "by": answered_by(rounds) if rounds else method,
        "end": rounds.termination_condition_ if rounds else "",
    }  # fmt: skip
    if labels:
        row["labelled"] = round(labelled(copy.deepcopy(source), other, augment, items, truth), 2)
    return row


def answered_by(rounds: Any) -> str:
    """What gives the answers for the target's own items."""
    kept = "training" if rounds.accepted_ else "source"
    return "centroids" if kept == "source" and rounds.untrained is not None else kept


def labelled(
    model: nn.Module, other: Pictures, augment: Any, items: Tensor, truth: Tensor
) -> float:
    """Accuracy of the model adapted with the labels of other items of the target's domain."""
    data = torch.utils.data.DataLoader(Augmented(*other, augment), 32, shuffle=True)
    fit(Classifier(model, LABELLED_RATE, 0.01, 0.1), len(data), data, head=True)
    return accuracy(evaluated(model), items, truth)


def report(rows: list[dict[str, Any]]) -> None:
    """A line for each network, suite, condition and method."""
    print(
        "| network, suite | condition | method | runs | source, % | change | next | harm ", end=""
    )
    print("| adapted | with labels | gap closed, % |\n" + "| --- " * 11 + "|")
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        suite = f"{row['network']}, {row['case'].partition('/')[0]}"
        groups.setdefault((suite, row["condition"], row["method"]), []).append(row)
    for names, of in groups.items():
        print("|", " | ".join([*names, *map(str, cells(of))]), "|")


def cells(of: list[dict[str, Any]]) -> list[Any]:
    """Mean change, harm, runs adapted, what labels bring and the part of it that is reached."""
    known = [r for r in of if r["source"] == r["source"]]
    change = [r["adapted"] - r["source"] for r in known] or [float("nan")]
    told = [(r["adapted"] - r["source"], r["labelled"] - r["source"]) for r in known
            if r["labelled"] != ""]  # fmt: skip
    closed = [100 * a / b for a, b in told if b >= LEAST_GAP]
    return [
        len(of), f"{fmean(r['source'] for r in of):.1f}", f"{fmean(change):+.1f}",
        f"{fmean(r['next'] - r['next_source'] for r in of):+.1f}",
        sum(c < -HARM for c in change), sum(r["by"] != "source" for r in of),
        f"{fmean(b for _, b in told):+.1f}" if told else "–",
        f"{fmean(closed):.0f} ({len(closed)})" if closed else "–",
    ]  # fmt: skip


def main() -> None:
    """Measure what the arguments choose; a row of the CSV each, then the table."""
    arguments = parser(__doc__)
    arguments.add_argument("--labels", action="store_true", help="adapt with labels as well")
    arguments.add_argument("--methods", nargs="+", default=["ours"], choices=["ours", *RIVALS])
    given = arguments.parse_args()
    table = Table("label-free", {**setting(), "part": given.part, "seed": SEEDS[given.part]})
    for case, condition, seed, network in runs(given):
        for method in given.methods:
            labels = given.labels and condition == "all" and method == "ours"
            table.add(**measure(case, condition, seed, network, method, labels))
            print(
                {k: table.rows[-1][k] for k in ("case", "condition", "method", "source", "adapted")}
            )
    report(table.rows)
    print(table.path)


if __name__ == "__main__":
    main()
