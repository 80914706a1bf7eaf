"""The methods of a classification run that look at the target's pictures, not at their labels."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from lightning import LightningModule
from torch import Tensor, nn

from lora_lightning import merge
from lora_lightning.callback import LoRACallback
from lora_lightning.config import LoRAConfig
from lora_lightning.errors import ConfigError
from lora_lightning.results import Prediction, Row
from lora_lightning.runs.common import make_trainer
from lora_lightning.runs.context import Context
from lora_lightning.runs.progress import Ticks
from lora_lightning.runs.settings import LabelFreeSettings
from lora_lightning.structure import classifier_modules
from lora_lightning.transduction.rounds import Round
from lora_lightning.transduction.task import TransductiveTask

NAME = "LoRA, no labels"


def label_free(context: Context) -> list[Row]:
    """Low-rank factors, trained on the target's pictures with the labels that it gives itself."""
    settings, model = context.config.train.label_free, context.fresh()
    pictures = context.data.on(train=context.data.target)
    task = _task(model, settings, pictures.unlabelled(), pictures.unlabelled(True, settings.jitter))
    rows = fitted(context, model, task, settings.epochs)
    course = task.rounds_
    assert course is not None
    say(context, course, course.source, course.probabilities_, course.changed_in_.tolist())
    return rows


def fitted(context: Context, model: nn.Module, task: LightningModule, epochs: int) -> list[Row]:
    """Fit a task that needs no labels by an adapter that leaves the head alone, and measure."""
    config = context.config
    callback = LoRACallback(
        without_head(config.lora, model),
        name=context.named("adapter_no_labels"),
        output_dir=Path(config.out),
    )
    tick = context.stages.stage(NAME, "batches")
    trainer = make_trainer(config, [callback, Ticks(tick)], max_epochs=epochs)
    start = time.perf_counter()
    trainer.fit(task)
    seconds = time.perf_counter() - start
    assert callback.report_ is not None
    assert callback.adapter_path_ is not None
    merge(model)
    return context.measure(
        NAME,
        model,
        seconds,
        callback.report_.trainable_parameters,
        callback.adapter_path_.stat().st_size,
    )


def check(settings: LabelFreeSettings) -> None:
    """Raise ConfigError for a value that cannot be."""
    check_training(settings.epochs, settings.jitter)
    _task(nn.Identity(), settings, torch.zeros(1, 1))


def check_training(epochs: int, jitter: float) -> None:
    """Raise ConfigError for what no task checks."""
    if epochs < 1:
        raise ConfigError(f"train.label_free.epochs must be at least 1, got {epochs}")
    if not 0 <= jitter <= 1:
        raise ConfigError(f"train.label_free.jitter must lie in [0, 1], got {jitter}")


def _task(
    model: nn.Module, settings: LabelFreeSettings, target: object, training: object = None
) -> TransductiveTask:
    return TransductiveTask(
        model,
        target,
        settings.objective,
        training=training,
        pseudo_label_weight=settings.pseudo_label_weight,
        diversity=settings.diversity,
        batch_norm=settings.batch_norm,
        batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        schedule=settings.schedule,
    )


def without_head(lora: LoRAConfig, model: nn.Module) -> LoRAConfig:
    """The same adapter with the head left alone: the features are measured by it."""
    left = [*lora.exclude_modules, *sorted(classifier_modules(model))]
    return LoRAConfig.make(lora, trainable=[], exclude_modules=left)


class Course(Protocol):
    """How an adaptation without labels went; see `lora_lightning.transduction.rounds.Rounds`."""

    history_: list[Round]
    accepted_: int
    termination_condition_: str


def say(
    context: Context,
    course: Course,
    before: Tensor,
    after: Tensor,
    changed_in: Sequence[int | None],
) -> None:
    """What the target's own pictures were taken for, and how it ended.

    Args:
        context: Whose run is told.
        course: How it went.
        before: The source model's answers to the target's training pictures.
        after: Those of the state that was kept.
        changed_in: The round in which each changed, where that is known.
    """
    context.run.rounds[context.seed] = [vars(r) for r in course.history_]
    data, where = context.data, f" (seed {context.seed})" if not context.first else ""
    context.run.notes.append(
        f"{NAME}{where}: {course.termination_condition_}; the state of round {course.accepted_} of "
        f"{len(course.history_) - 1} is kept."
    )
    pictures = data.on(train=data.target).training_pictures()
    rows = zip(pictures, before, after, changed_in, strict=True)
    context.run.predictions += [
        Prediction(
            item.path.relative_to(data.root).as_posix(),
            item.domain,
            context.label(item),
            *context.said(old),
            *context.said(new),
            context.seed,
            "target",
            NAME,
            changed,
        )
        for item, old, new, changed in rows
    ]
