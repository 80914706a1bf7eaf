"""The method of a pose run that looks at the target's pictures, not at their azimuths."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lora_lightning.results import Row
from lora_lightning.runs.label_free import check_training, fitted, say
from lora_lightning.runs.pose_settings import MirrorTraining
from lora_lightning.transduction.poses import TransductivePose


def label_free(context: Any) -> list[Row]:
    """Low-rank factors, trained on the target's pictures and their mirror images."""
    settings, model = context.config.train.label_free, context.fresh()
    pictures = context.data.on(train=context.data.target)
    task = _task(model, settings, pictures.unlabelled(), pictures.unlabelled(True, settings.jitter))
    rows = fitted(context, model, task, settings.epochs)
    before, after = task.source_.plain, task.answers_.plain
    say(context, task, before, after, [None] * len(after))
    return rows


def check(settings: MirrorTraining) -> None:
    """Raise ConfigError for a value that cannot be."""
    check_training(settings.epochs, settings.jitter)
    _task(nn.Identity(), settings, torch.zeros(1, 1))


def _task(
    model: nn.Module, settings: MirrorTraining, target: object, training: object = None
) -> TransductivePose:
    return TransductivePose(
        model,
        target,
        training=training,
        tolerance=settings.tolerance,
        batch_norm=settings.batch_norm,
        batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        schedule=settings.schedule,
    )
