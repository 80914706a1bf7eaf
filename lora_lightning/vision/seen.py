"""`seen`: the source model's features and predictions, for methods without training."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from lora_lightning.adaptation.target import Predicted, Target, predicted

if TYPE_CHECKING:
    from lora_lightning.vision.experiment import Pictures


@dataclass(frozen=True)
class Seen:
    """The source model's features and predictions of some images.

    Attributes:
        said: predictions and features.
        labels: (N,), for methods that may use them.
        seconds: time of the forward passes.
    """

    said: Predicted
    labels: Tensor
    seconds: float


def seen(experiment: Pictures, which: str) -> Seen:
    """The source model on a set of images, computed once for each seed.

    The sets: the source's training images ("learnt"), held-out ones of the "source", or of all
    targets ("target").
    """
    if which not in experiment.looks:
        data = experiment.data.on(train=[experiment.data.source])
        pictures, items = data.unlabelled(), data.training_pictures()
        if which != "learnt":
            data = data.on(test=[data.source] if which == "source" else data.target)
            pictures, items = data.predict_dataloader().dataset, data.held_out()
        start = time.perf_counter()
        model = experiment.fresh()
        loader = Target(pictures).loader(2 * data.batch_size, shuffle=False)
        said = predicted(model, model, loader, next(model.parameters()).device)
        seconds = time.perf_counter() - start
        experiment.looks[which] = Seen(said, experiment.labels(items), seconds)
    return experiment.looks[which]
