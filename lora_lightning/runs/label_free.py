"""The methods of a classification run that look at the target's pictures, not at their labels."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from torch import nn

from lora_lightning import merge
from lora_lightning.callback import LoRACallback
from lora_lightning.config import LoRAConfig
from lora_lightning.errors import ConfigError
from lora_lightning.results import Prediction, Row
from lora_lightning.runs.common import make_trainer
from lora_lightning.runs.context import Context, best
from lora_lightning.runs.progress import Ticks
from lora_lightning.runs.settings import LabelFreeSettings
from lora_lightning.structure import classifier_modules
from lora_lightning.transduction.task import TransductiveTask

NAME = "LoRA, no labels"


def label_free(context: Context) -> list[Row]:
    """Low-rank factors, trained on the target's pictures with the labels that it gives itself."""
    config, model = context.config, context.fresh()
    settings = config.train.label_free
    pictures = context.data.on(train=context.data.target)
    task = _task(model, settings, pictures.unlabelled(), pictures.unlabelled(True, settings.jitter))
    callback = LoRACallback(
        without_head(config.lora, model),
        name=context.named("adapter_no_labels"),
        output_dir=Path(config.out),
    )
    tick = context.stages.stage(NAME, "batches")
    trainer = make_trainer(config, [callback, Ticks(tick)], max_epochs=settings.epochs)
    start = time.perf_counter()
    trainer.fit(task)
    seconds = time.perf_counter() - start
    assert task.rounds_ is not None
    assert callback.report_ is not None
    assert callback.adapter_path_ is not None
    context.run.rounds[context.seed] = [vars(r) for r in task.rounds_.history_]
    _say(context, task)
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
    if settings.epochs < 1:
        raise ConfigError(f"train.label_free.epochs must be at least 1, got {settings.epochs}")
    if not 0 <= settings.jitter <= 1:
        raise ConfigError(f"train.label_free.jitter must lie in [0, 1], got {settings.jitter}")
    _task(nn.Identity(), settings, torch.zeros(1, 1))


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


def _say(context: Context, task: TransductiveTask) -> None:
    """What the target's own pictures were taken for, and how it ended."""
    course = task.rounds_
    assert course is not None
    data, where = context.data, f" (seed {context.seed})" if not context.first else ""
    context.run.notes.append(
        f"{NAME}{where}: {course.termination_condition_}; the state of round {course.accepted_} of "
        f"{len(course.history_) - 1} is kept."
    )
    pictures = data.on(train=data.target).training_pictures()
    rows = zip(pictures, course.source, course.probabilities_, course.changed_in_, strict=True)
    context.run.predictions += [
        Prediction(
            item.path.relative_to(data.root).as_posix(),
            item.domain,
            item.class_name,
            *best(old, data.classes),
            *best(new, data.classes),
            context.seed,
            "target",
            NAME,
            int(changed),
        )
        for item, old, new, changed in rows
    ]
