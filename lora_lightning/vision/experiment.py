"""`Context`: what the methods of a run over pictures have in common; here for classification."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from lightning.pytorch import Callback, seed_everything
from torch import Tensor, nn

from lora_lightning.adaptation.target import Predicted, Target, predicted
from lora_lightning.report.results import Row, Run
from lora_lightning.runner.progress import Stages, Ticks
from lora_lightning.runner.settings import TrainSettings
from lora_lightning.runner.trainer import make_trainer
from lora_lightning.vision.classifier import Classifier
from lora_lightning.vision.data.folders import Item
from lora_lightning.vision.data.image_domains import ImageDomains
from lora_lightning.vision.settings import Config


@dataclass(frozen=True)
class Seen:
    """What the source model says of some pictures.

    Attributes:
        said: its answers and features.
        labels: (N,), for those who may look at them.
        seconds: that it took.
    """

    said: Predicted
    labels: Tensor
    seconds: float


@dataclass
class Context:
    """What a method may use: the data, the trained source model, and ways to train and measure.

    Attributes:
        source: the source model; a method works on a copy of it (`fresh`).
        answers: method → (held-out items, outputs), as `measure` leaves them: probabilities.
        run: what the report is made of; a method may add spectra and notes.
    """

    metric: ClassVar[str] = "accuracy"

    config: Config
    data: ImageDomains
    source: nn.Module
    seed: int
    stages: Stages
    run: Run
    answers: dict[str, Tensor] = field(default_factory=dict)
    _seen: dict[str, Seen] = field(default_factory=dict)

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
        module = self.module(model, settings)
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
        """The metric on the held-out pictures of the source and of each target domain."""
        data = self.data.on(test=self.domains)
        tick = self.stages.stage(f"  measuring {method}", "batches")
        trainer = make_trainer(self.config, [Ticks(tick)])
        outputs: Any = trainer.predict(self.module(model), datamodule=data)
        return self.score(method, torch.cat(outputs), seconds, parameters, file_bytes)

    # ---- what another kind of run does otherwise ----------------------------------------------

    @staticmethod
    def outputs(data: ImageDomains) -> int:
        """Numbers that the network gives for each picture."""
        return len(data.classes)

    @staticmethod
    def module(model: nn.Module, settings: Any = None) -> Any:
        """The LightningModule that trains `model` by these settings, and predicts."""
        return Classifier(model) if settings is None else classifier(model, settings)

    def labels(self, items: Sequence[Item]) -> Tensor:
        """The classes of pictures, as numbers."""
        return torch.tensor([self.data.classes.index(i.class_name) for i in items])

    def values(self, answers: Tensor, items: Sequence[Item]) -> Tensor:
        """What each picture contributes to the metric, (N,)."""
        return answers.argmax(1) == self.labels(items)

    def label(self, item: Item) -> str:
        """What a picture shows, for people."""
        return item.class_name

    def said(self, answer: Tensor) -> tuple[str, float]:
        """An answer (outputs,) for people, and how sure the network is of it, 0 to 1."""
        return best(answer, self.data.classes)

    # --------------------------------------------------------------------------------------------

    def seen(self, which: str) -> Seen:
        """The source model on the source's training pictures ("learnt"), or on the held-out ones
        of the "source" or of all targets ("target"); looked at once.
        """
        if which not in self._seen:
            data = self.data.on(train=[self.data.source])
            pictures, items = data.unlabelled(), data.training_pictures()
            if which != "learnt":
                data = data.on(test=[data.source] if which == "source" else data.target)
                pictures, items = data.predict_dataloader().dataset, data.held_out()
            start = time.perf_counter()
            model = self.fresh()
            loader = Target(pictures).loader(2 * data.batch_size, shuffle=False)
            said = predicted(model, model, loader, next(model.parameters()).device)
            self._seen[which] = Seen(said, self.labels(items), time.perf_counter() - start)
        return self._seen[which]

    def score(
        self,
        method: str,
        answers: Tensor,
        seconds: float,
        parameters: int = 0,
        file_bytes: int | None = None,
    ) -> list[Row]:
        """The rows of answers (held-out pictures of `domains` in order, outputs)."""
        data = self.data.on(test=self.domains)
        items = data.held_out()
        self.answers[method] = answers
        values = self.values(answers, items).double()
        rows = []
        for domain in self.domains:
            value = float(values[torch.tensor([i.domain == domain for i in items])].mean())
            rows.append(
                Row(method, domain, self.seed, self.metric, value, parameters, seconds, file_bytes)
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
