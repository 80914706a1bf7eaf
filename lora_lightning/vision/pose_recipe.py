"""A run that predicts an azimuth from a picture, in other views; the error is an angle.

What is not said here is that of a classification run (`lora_lightning.vision.recipe`):
methods, measuring and report are the same, labels and losses differ.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from lora_lightning.adaptation.closed_form import regressed
from lora_lightning.report.metrics import AZIMUTH_ERROR
from lora_lightning.report.results import Row, Run
from lora_lightning.vision import methods
from lora_lightning.vision.data.folders import Item
from lora_lightning.vision.data.image_domains import ImageDomains
from lora_lightning.vision.data.pose_domains import PoseDomains
from lora_lightning.vision.experiment import Context
from lora_lightning.vision.methods import aligned, check_training, fitted, say
from lora_lightning.vision.pose_regressor import PoseRegressor, angle, circular_error, direction
from lora_lightning.vision.pose_self_training import TransductivePose
from lora_lightning.vision.recipe import Kind, run_kind
from lora_lightning.vision.settings import MirrorTraining

# The method of a pose run that looks at the target's pictures, not at their azimuths.


def label_free(context: Any) -> list[Row]:
    """Low-rank factors, trained on the target's pictures and their mirror images."""
    settings, model = context.config.train.label_free, context.fresh()
    pictures = context.data.on(train=context.data.target)
    task = _task(model, settings, pictures.unlabelled(), pictures.unlabelled(True, settings.jitter))
    rows = fitted(context, model, task, settings.epochs)
    before, after = task.source_.plain, task.answers_.plain
    say(context, task.rounds_, before, after, [None] * len(after))
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


class PoseContext(Context):
    """Answers are vectors (cos, sin); labels are azimuths in degrees."""

    data: PoseDomains
    metric = AZIMUTH_ERROR

    @staticmethod
    def outputs(data: ImageDomains) -> int:
        """Cosine and sine."""
        return 2

    @staticmethod
    def module(model: nn.Module, settings: Any = None) -> PoseRegressor:
        """A `PoseRegressor`."""
        if settings is None:
            return PoseRegressor(model)
        s = settings
        return PoseRegressor(model, s.learning_rate, s.weight_decay, s.schedule)

    def labels(self, items: Sequence[Item]) -> Tensor:
        """The azimuths of pictures."""
        return self.data.azimuths(items)

    def values(self, answers: Tensor, items: Sequence[Item]) -> Tensor:
        """The circular error of each."""
        return circular_error(angle(answers), self.labels(items))

    def label(self, item: Item) -> str:
        """The azimuth in degrees."""
        return f"{float(self.labels([item])):.1f}"

    def said(self, answer: Tensor) -> tuple[str, float]:
        """The azimuth, and the vector's length."""
        return f"{float(angle(answer)):.1f}", round(min(float(answer.norm()), 1.0), 4)


def run(given: DictConfig) -> Run:
    """Run every stage for every seed; the results lie in ``config.out`` afterwards.

    Raises:
        ConfigError: a value that no type could catch, before anything is rendered or trained.
        DataError: the pictures cannot be used, or their azimuths are not known.
    """
    return run_kind(given, Kind(PoseDomains, PoseContext, METHODS, check))


def _regression(name: str, alignment: str) -> Callable[[Context], list[Row]]:
    def answers(source: Tensor, azimuths: Tensor, target: Tensor) -> Tensor:
        return regressed(source, direction(azimuths), target, alignment)

    return aligned(name, answers)


# In the order of the table.
METHODS: dict[str, Callable[[Any], list[Row]]] = {
    "source_only": methods.source_only,
    "ridge": _regression("ridge regression", "none"),
    "subspace": _regression("subspace alignment", "subspace"),
    "nmf_subspace": _regression("NMF subspace", "nmf"),
    "coral": _regression("CORAL", "coral"),
    "batchnorm": methods.batchnorm,
    "label_free": label_free,
    "lora": methods.lora,
    "full": methods.full,
}
