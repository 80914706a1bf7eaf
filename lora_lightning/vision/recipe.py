"""`Classification`: the experiment of classification recipes between image domains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.adaptation.shift.measure import shift
from lora_lightning.adaptation.shift.source_statistics import FEWEST, SourceStatistics
from lora_lightning.adaptation.shift.verdicts import NAMES, Shift
from lora_lightning.adaptation.transductive_rounds import trained_in_full
from lora_lightning.adaptation.transductive_task import TransductiveTask
from lora_lightning.runner.cases import Case, Unlabelled
from lora_lightning.vision.classifier import Classifier, likeliest
from lora_lightning.vision.data.folders import Item
from lora_lightning.vision.experiment import Pictures
from lora_lightning.vision.methods import METHODS

REPEATS = 20  # of the bootstrap


class Classification(Pictures):
    """Predictions are probabilities; labels are indices of classes."""

    metric = "accuracy"
    methods = METHODS

    def outputs(self) -> int:
        """One for each class."""
        return len(self.data.classes)

    def class_names(self) -> Sequence[str]:
        """The classes."""
        return self.data.classes

    def task(self, model: nn.Module, stage: Any) -> Classifier:
        """A `Classifier`."""
        return Classifier(model, **stage.arguments())

    def labels(self, items: Sequence[Item]) -> Tensor:
        """The classes of images, as numbers."""
        index = {"": -1} | {name: i for i, name in enumerate(self.data.classes)}
        return torch.tensor([index[i.class_name] for i in items], device="cpu")

    def values(self, answers: Tensor, items: Sequence[Item]) -> Tensor:
        """Whether each prediction is correct; NaN where there is no label."""
        labels = self.labels(items)
        return (answers.argmax(1) == labels).double().masked_fill(labels < 0, torch.nan)

    def label(self, item: Item) -> str:
        """Its class."""
        return item.class_name

    def said(self, answer: Tensor) -> tuple[str, float]:
        """The predicted class, and its probability."""
        return likeliest(answer, self.data.classes)

    def unlabelled(self, model: nn.Module, case: Case) -> Unlabelled:
        """With what is best trained in full."""
        return replace(super().unlabelled(model, case), trainable=trained_in_full(model))

    def transductive(self, model: nn.Module, target: Any, training: Any = None) -> TransductiveTask:
        """A `TransductiveTask`."""
        settings = self.config.train.label_free
        task = TransductiveTask(model, target, training=training, **settings.arguments())
        task.setting = "train.label_free.batch_norm=source"
        return task

    def tell(self, task: TransductiveTask) -> None:
        """See `tell_course`."""
        course = task.rounds_
        assert course is not None
        changed = course.changed_in_.tolist()
        self.tell_course(course, course.source, course.probabilities_, changed)

    def before_methods(self) -> None:
        """Save the source's statistics beside the source model, and measure each target's shift.

        By held-out images of the source, and training images of each target, without labels.
        """
        data = self.data.on(test=[self.data.source])
        items = data.held_out()
        if len(items) < FEWEST:
            self.run.notes.append(
                f"The source has {len(items)} held-out pictures: with fewer than {FEWEST} it is "
                "not measured how far the targets are."
            )
            return
        model, size = self.fresh(), 2 * data.batch_size
        pictures = data.predict_dataloader().dataset
        source = SourceStatistics.of(model, pictures, self.labels(items), batch_size=size)
        self._check_source(source.accuracy or 0.0, len(items))
        source.save(Path(self.config.out) / f"{self.named('source_statistics')}.safetensors")
        tick = self.stages.stage("how far are the targets?", "domains")
        found = {}
        for done, domain in enumerate(data.target, start=1):
            target = data.on(train=[domain]).unlabelled()
            found[domain] = shift(model, source, target, batch_size=size, repeats=REPEATS)
            tick(done, len(data.target))
        self.run.shifts[self.seed] = {name: s.as_dict() for name, s in found.items()}
        if far := {name: s for name, s in found.items() if s.verdict == NAMES[-1]}:
            self._warn(far)

    def _check_source(self, accuracy: float, count: int) -> None:
        """Warn of a poor source model, by its own held-out pictures."""
        chance = 1 / self.outputs()
        if accuracy >= (1 + chance) / 2:
            return
        text = (
            f"The source model is poor{self.of_seed}: {accuracy:.0%} of its own {count} held-out "
            f"pictures are right, where chance is {chance:.0%}. What it teaches without labels is "
            "no better. Give it more pictures, train it longer (train.source.epochs, "
            "train.source.least_steps), or start from a trained one (model.checkpoint)."
        )
        self._note(text)

    def _note(self, text: str) -> None:
        self.run.notes.append(text)
        self.stages.console.print(text, style="yellow")

    def _warn(self, far: dict[str, Shift]) -> None:
        self._note(
            f"May be too far to adapt to without labels{self.of_seed}: {', '.join(far)}. Label "
            f"some items, or do not answer there. {next(iter(far.values())).caveat}"
        )
