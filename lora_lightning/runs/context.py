"""`Context`: what the methods of a classification run have in common."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import Callback, seed_everything
from torch import Tensor, nn

from lora_lightning.data.images import ImageDomains
from lora_lightning.results import Row, Run
from lora_lightning.runs.common import make_trainer
from lora_lightning.runs.progress import Stages, Ticks
from lora_lightning.runs.settings import Config, TrainSettings
from lora_lightning.tasks.classification import Classifier


@dataclass
class Context:
    """What a method may use: the data, the trained source model, and ways to train and measure.

    Attributes:
        source: the source model; a method works on a copy of it (`fresh`).
        probabilities: method → (held-out items, classes), as `measure` leaves them.
        run: what the report is made of; a method may add spectra and notes.
    """

    config: Config
    data: ImageDomains
    source: nn.Module
    seed: int
    stages: Stages
    run: Run
    probabilities: dict[str, Tensor] = field(default_factory=dict)

    @property
    def first(self) -> bool:
        """Whether this is the first seed, which the report shows where it shows one."""
        return self.seed == self.config.seeds[0]

    @property
    def domains(self) -> list[str]:
        """The source and each target domain, in the order in which they are measured."""
        return [self.data.source, *self.data.target]

    def named(self, name: str) -> str:
        """A name for this seed's file: the first seed's is plain."""
        return name if self.first else f"{name}-seed{self.seed}"

    def fresh(self) -> nn.Module:
        """A copy of the source model, and the random numbers that every method starts with."""
        seed_everything(self.seed, verbose=False)
        return copy.deepcopy(self.source)

    def fit(
        self,
        model: nn.Module,
        settings: TrainSettings,
        domains: Sequence[str],
        title: str,
        callbacks: Sequence[Callback] = (),
    ) -> float:
        """Train `model` on the labelled training pictures of `domains`; returns the seconds."""
        module = classifier(model, settings)
        tick = self.stages.stage(title, "batches")
        trainer = make_trainer(self.config, [*callbacks, Ticks(tick)], max_epochs=settings.epochs)
        start = time.perf_counter()
        trainer.fit(module, datamodule=self.data.on(train=domains))
        return time.perf_counter() - start

    def measure(
        self,
        method: str,
        model: nn.Module,
        seconds: float,
        parameters: int = 0,
        file_bytes: int | None = None,
    ) -> list[Row]:
        """Accuracy on the held-out pictures of the source and of each target domain."""
        data = self.data.on(test=self.domains)
        tick = self.stages.stage(f"  measuring {method}", "batches")
        trainer = make_trainer(self.config, [Ticks(tick)])
        outputs: Any = trainer.predict(Classifier(model), datamodule=data)
        return self.score(method, torch.cat(outputs), seconds, parameters, file_bytes)

    def score(
        self,
        method: str,
        probabilities: Tensor,
        seconds: float,
        parameters: int = 0,
        file_bytes: int | None = None,
    ) -> list[Row]:
        """The rows of answers (held-out pictures of `domains` in order, classes)."""
        data = self.data.on(test=self.domains)
        items = data.held_out()
        self.probabilities[method] = probabilities
        labels = torch.tensor([data.classes.index(i.class_name) for i in items])
        right = probabilities.argmax(1) == labels
        rows = []
        for domain in self.domains:
            here = torch.tensor([i.domain == domain for i in items])
            value = float(right[here].double().mean())
            rows.append(
                Row(method, domain, self.seed, "accuracy", value, parameters, seconds, file_bytes)
            )
        return rows


def classifier(model: nn.Module, settings: TrainSettings) -> Classifier:
    """The module that trains `model` in this way; raises ConfigError for a bad value."""
    s = settings
    return Classifier(model, s.learning_rate, s.weight_decay, s.label_smoothing, s.schedule)


def best(probabilities: Tensor, classes: Sequence[str]) -> tuple[str, float]:
    """The likeliest class of (K,) probabilities, and how likely it is."""
    index = int(probabilities.argmax())
    return classes[index], round(float(probabilities[index]), 4)
