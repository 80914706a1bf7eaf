"""The training of an adapter on one target's pictures, without labels or from labels."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from lora_lightning.adaptation.target import Target, predicted
from lora_lightning.adaptation.transductive_rounds import trained_in_full
from lora_lightning.adaptation.transductive_task import TransductiveTask
from lora_lightning.lora.config import LoRAConfig
from lora_lightning.model.switching import disabled
from lora_lightning.model.targets import without_head
from lora_lightning.report.evidence import by_chance
from lora_lightning.runner.each_target import Tick
from lora_lightning.runner.progress import Ticks
from lora_lightning.runner.settings import RunConfig, TrainSettings
from lora_lightning.runner.trainer import make_trainer
from lora_lightning.training.cross_fitting import cross_fit
from lora_lightning.training.lora_callback import LoRACallback
from lora_lightning.vision.classifier import Classifier
from lora_lightning.vision.data.folder_targets import Found
from lora_lightning.vision.named_classifier import NamedClassifier
from lora_lightning.vision.settings import LabelFreeSettings

FEW = 100  # labelled pictures up to which their adapter is fitted by `cross_fit`
HELD_OUT = 0.2  # part of more that decides whether the adapter is kept


@dataclass
class ImageSettings:
    """How `adapt_images` adapts.

    Args:
        lora: The adapter.
        training: Without labels, see `TransductiveTask`.
        labelled_training: With labels.
        canary: A few labelled pictures of the target: a round that does worse on them than the
            source model is not kept.
        labels: Labelled pictures of the target, to learn from.
        statistics: File of the source's `SourceStatistics`: tells how far each target is.
        seed: Of factors, order, and what is held out.
        accelerator: cpu, gpu, mps or auto, as Lightning has it.
    """

    lora: LoRAConfig = field(
        default_factory=lambda: LoRAConfig(rank=4, alpha=8.0, target_modules="all")
    )
    training: LabelFreeSettings = field(default_factory=LabelFreeSettings)
    labelled_training: TrainSettings = field(
        default_factory=lambda: TrainSettings(learning_rate=4e-3, epochs=10, label_smoothing=0.1)
    )
    canary: Found | None = None
    labels: Found | None = None
    statistics: Path | None = None
    seed: int = 0
    accelerator: str = "auto"


@dataclass
class Learnt:
    """The result of a training."""

    method: str  # what was trained, a row's name
    kept: bool  # whether the adapter is kept
    verdict: str  # how the training ended, in words
    before: Tensor  # (N, K) the source model's probabilities of the target's pictures
    after: Tensor  # (N, K) those of the adapted model; of the source where that is kept
    items: int = 0  # labelled pictures that decided
    accuracies: tuple[float, float] | None = None  # on those, before and after
    # Whether the answer to each of those is right, (items,), before and after
    right: list[Tensor] = field(default_factory=list)
    rounds: list[Any] = field(default_factory=list)  # of a training without labels
    # The round in which each answer changed, likewise
    changed_in: list[int | None] = field(default_factory=list)
    learnt: int = 0  # number of pictures that were learnt from
    parameters: int = 0  # trainable ones
    seconds: float = 0.0  # of training


@dataclass
class Fit:
    """Trains an adapter on a task; its files go into a temporary folder."""

    config: RunConfig
    adapter: str
    tick: Tick

    def __call__(self, task: Any, data: Any, lora: LoRAConfig, epochs: int) -> LoRACallback:
        """Train, and return the callback."""
        # The callback's own file is not kept: its adapter is not accepted yet.
        callback = LoRACallback(lora, name=self.adapter, output_dir=self.config.out)
        trainer = make_trainer(self.config, [callback, Ticks(self.tick)], max_epochs=epochs)
        trainer.fit(task, data)
        return callback


def without_labels(
    base: NamedClassifier, found: Found, settings: ImageSettings, fit: Fit
) -> Learnt:
    """Train an adapter on a target's pictures without labels, see `TransductiveTask`."""
    how = settings.training
    canary = settings.canary
    task = TransductiveTask(
        base.model,
        found.data(base.prepared, base.classes),
        training=found.data(base.prepared, base.classes, augmented=True, jitter=how.jitter),
        canary=canary and canary.data(base.prepared, base.classes),
        **how.arguments(),
    )
    task.setting = "--batch-norm source"
    task.print = lambda *_, **__: None  # type: ignore[method-assign]  # the table has it
    start = time.perf_counter()
    passes = how.passes_over(len(found.items))
    whole = trained_in_full(base.model)
    lora = without_head(settings.lora, base.model, how.target_modules, whole)
    callback = fit(task, None, lora, passes)
    seconds = time.perf_counter() - start
    course = task.rounds_
    assert course is not None
    history, report = course.history_, callback.report_
    kept = course.accepted_ > 0
    result = Learnt(
        "LoRA, no labels", kept, course.termination_condition_, course.source, task.probabilities_,
        rounds=history, changed_in=course.changed_in_.tolist(), learnt=len(found.items),
        parameters=report.trainable_parameters if report else 0, seconds=seconds,
    )  # fmt: skip
    if kept:
        turned = int((result.before.argmax(1) != result.after.argmax(1)).sum())
        result.verdict = (
            f"{result.verdict}; round {course.accepted_} of {len(history) - 1} is kept, "
            f"{turned} of {len(found.items)} answers changed"
        )
    if canary is not None:
        scores = [history[i].scores["canary"] for i in (0, course.accepted_)]
        result.items, result.accuracies = len(canary.items), (scores[0], scores[1])
    return result


def from_labels(base: NamedClassifier, found: Found, settings: ImageSettings, fit: Fit) -> Learnt:
    """Train an adapter on labelled pictures, few of them by `cross_fit`; answer the target's."""
    labels = settings.labels
    assert labels is not None
    how = settings.labelled_training
    plain = labels.data(base.prepared, base.classes)
    augmented = labels.data(base.prepared, base.classes, augmented=True)
    module = Classifier(base.model.train(), **how.arguments())
    callbacks: list[LoRACallback] = []

    def train(task: Any, items: Any) -> None:
        # A last batch of one would have no variance for BatchNorm.
        size = settings.training.batch_size
        loader = DataLoader(
            items, size, shuffle=True, drop_last=len(items) % size == 1 < len(items)
        )
        callbacks.append(fit(task, loader, settings.lora, how.epochs))

    start = time.perf_counter()
    result = Learnt("LoRA, target labels", True, "", *2 * (torch.empty(0, device="cpu"),))
    if len(labels.items) <= FEW:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "cross_fit: ")  # the table has it
            choice = cross_fit(
                module, augmented, train, looked_at=plain, loss=_losses, mistakes=_mistakes,
                seed=settings.seed,
            )  # fmt: skip
        result.kept, result.verdict = choice.share > 0, choice.reason
        result.learnt = len(labels.items)
    else:
        _judged(base, plain, augmented, train, module, settings.seed, result)
    result.seconds = time.perf_counter() - start
    report = callbacks[-1].report_
    result.parameters = report.trainable_parameters if report else 0
    pictures = found.data(base.prepared, base.classes)
    with disabled(base.model):
        result.before = result.after = _probabilities(base.model, pictures)
    if result.kept:
        result.after = _probabilities(base.model, pictures)
    return result


def _judged(
    base: NamedClassifier,
    plain: Any,
    augmented: Any,
    train: Callable[[Any, Any], None],
    module: Classifier,
    seed: int,
    result: Learnt,
) -> None:
    """Train on most of many labelled pictures; the others decide."""
    order = np.random.default_rng(seed).permutation(len(plain)).tolist()
    count = round(HELD_OUT * len(plain))
    train(module, Subset(augmented, order[count:]))
    test = Subset(plain, order[:count])
    labels = torch.tensor([test[i][1] for i in range(count)], device="cpu")

    def right() -> Tensor:
        return (_probabilities(base.model, test).argmax(1) == labels).double()

    with disabled(base.model):
        result.right = [right()]
    result.right.append(right())
    before, after = (float(r.mean()) for r in result.right)
    result.kept, result.items, result.accuracies = after >= before, count, (before, after)
    result.learnt = len(plain) - count
    told = f"{100 * before:.1f} to {100 * after:.1f} % right of {count} held-out pictures"
    told += by_chance(*(r.numpy() for r in reversed(result.right)))
    result.verdict = told if result.kept else f"{told}: worse"


def _losses(module: Any, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(module(batch[0]), batch[1], reduction="none")


def _mistakes(module: Any, batch: Any) -> Tensor:
    found: Tensor = module(batch[0]).argmax(1) != batch[1]
    return found.float()


def _probabilities(model: nn.Module, data: Any) -> Tensor:
    loader = Target(data).loader(64, shuffle=False)
    return predicted(model, model, loader, next(model.parameters()).device).probabilities
