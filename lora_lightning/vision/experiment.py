"""`Pictures`: what runs over domains of pictures have in common, whatever a label is.

One adapter learns all target domains together: there is one case.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from lightning import LightningModule
from lightning.pytorch import seed_everything
from torch import Tensor, nn

from lora_lightning.adaptation.rounds import Round
from lora_lightning.errors import ConfigError
from lora_lightning.report.results import Prediction, Row
from lora_lightning.runner.cases import LABELS, NO_LABELS, Adapted, Case, Unlabelled
from lora_lightning.runner.checks import at_least
from lora_lightning.runner.experiment import Experiment
from lora_lightning.runner.trainer import make_trainer
from lora_lightning.runner.weights import save_weights
from lora_lightning.vision.backbones import create_backbone
from lora_lightning.vision.data.folders import Item
from lora_lightning.vision.data.image_domains import ImageDomains
from lora_lightning.vision.data.recipe_data import read_pictures
from lora_lightning.vision.settings import Config

if TYPE_CHECKING:
    from lora_lightning.vision.methods import Seen

NAME = "LoRA, no labels"


class Pictures(Experiment[Config]):
    """A run over domains of pictures; its answers are (held-out pictures, outputs).

    Attributes:
        domains: reads the pictures.
        data: the pictures.
        looks: what the source model says of them, see `lora_lightning.vision.methods.seen`.
    """

    packages = ("timm",)
    source_each_seed = True
    counts_batches = True
    separator = "_"
    domains: ClassVar[type[ImageDomains]] = ImageDomains
    data: ImageDomains

    # ---- what a label is ---------------------------------------------------------------------

    @abstractmethod
    def outputs(self) -> int:
        """Numbers that the network gives for each picture."""

    @abstractmethod
    def labels(self, items: Sequence[Item]) -> Tensor:
        """The labels of pictures, as numbers."""

    @abstractmethod
    def values(self, answers: Tensor, items: Sequence[Item]) -> Tensor:
        """What each picture contributes to the metric, (N,)."""

    @abstractmethod
    def label(self, item: Item) -> str:
        """What a picture shows, for people."""

    @abstractmethod
    def said(self, answer: Tensor) -> tuple[str, float]:
        """An answer (outputs,) for people, and how sure the network is of it, 0 to 1."""

    @abstractmethod
    def transductive(self, model: nn.Module, target: Any, training: Any = None) -> Any:
        """The task that trains `model` on pictures without labels."""

    # ---- data and source model ---------------------------------------------------------------

    def begin(self, seed: int) -> None:
        """See `Experiment.begin`."""
        super().begin(seed)
        self.looks: dict[str, Seen] = {}

    def check(self) -> None:
        """Raise ConfigError for a value that cannot be."""
        stages, trained = self.config.train, ("source", "lora", "full", "label_free")
        at_least(self.config, 1, (f"train.{name}.epochs" for name in trained))
        for stage in (stages.source, stages.lora, stages.full):
            self.task(nn.Identity(), stage)
        if not 0 <= (jitter := stages.label_free.jitter) <= 1:
            raise ConfigError(f"train.label_free.jitter must lie in [0, 1], got {jitter}")
        self.transductive(nn.Identity(), torch.zeros(1, 1))
        at_least(self.config, 2, ("data.size", "data.batch_size"))

    def load(self) -> None:
        """Read the pictures; without a folder of the user's own they are rendered."""
        # The backbone first: a mistake in its name should not cost the reading of the pictures.
        known: Any = getattr(self._backbone(2, []), "pretrained_cfg", None) or {}
        self.data = data = read_pictures(self.domains, self.config.data, known, self.stages)
        self.run.classes, self.run.data_root = data.classes, data.root
        self.run.skipped = data.skipped
        train, test = (sum(i.split == s for i in data.items) for s in ("train", "test"))
        self.run.notes += [
            f"One adapter for all target domains together; {len(data.classes)} classes, "
            f"{train} training and {test} held-out pictures.",
            "Every method starts from the same source model and is measured on the same held-out "
            "pictures, which no training sees.",
        ]

    def _backbone(self, outputs: int, notices: list[str]) -> nn.Module:
        m = self.config.model
        return create_backbone(m.name, outputs, m.checkpoint, m.pretrained, m.imagenet, notices)

    def source(self) -> nn.Module:
        """Trained on the source domain, for each seed."""
        seed_everything(self.seed, verbose=False)
        notices: list[str] = []
        model = self._backbone(self.outputs(), notices)
        self.run.notes += [n for n in notices if n not in self.run.notes]
        self.train_source(model, self.data.on(train=[self.data.source]))
        # The adapter is of use together with the model that it was made for only.
        save_weights(model, Path(self.config.out) / f"{self.named('source')}.safetensors")
        return model

    # ---- the one case ------------------------------------------------------------------------

    @property
    def adapters(self) -> Path:
        """There are few: beside the report."""
        return Path(self.config.out)

    def cases(self, what: str) -> list[Case]:
        """All target domains together, measured on the source too."""
        given = {LABELS: "target labels", NO_LABELS: "no labels"}.get(what, "")
        return [Case("adapter", self.data.target, [self.data.source, *self.data.target], given)]

    def fit_data(self, case: Case, stage: Any) -> ImageDomains:
        """The labelled training pictures."""
        return self.data.on(train=case.train)

    def unlabelled(self, model: nn.Module, case: Case) -> Unlabelled:
        """See `transductive`."""
        settings, pictures = self.config.train.label_free, self.data.on(train=case.train)
        training = pictures.unlabelled(True, settings.jitter)
        task: LightningModule = self.transductive(model, pictures.unlabelled(), training)
        length = {"max_epochs": settings.epochs}
        return Unlabelled(task, lambda: self.tell(task), trainer=length)

    def measure(self, label: str, case: Case, adapted: Adapted) -> Iterator[tuple[str, str, float]]:
        """The metric on the held-out pictures of the source and of each target domain."""
        bar = self.bar(f"  measuring {label}")
        trainer = make_trainer(self.config, [bar])
        task = self.task(adapted.model, self.config.train.source)
        outputs: Any = trainer.predict(task, datamodule=self.data.on(test=case.tested))
        return self._means(label, case, torch.cat(outputs))

    def _means(self, label: str, case: Case, answers: Tensor) -> Iterator[tuple[str, str, float]]:
        self.answers[label] = answers
        items = self.data.on(test=case.tested).held_out()
        values = self.values(answers, items).double()
        for domain in case.tested:
            of = torch.tensor([i.domain == domain for i in items])
            yield domain, self.metric, float(values[of].mean())

    def score(self, label: str, answers: Tensor, seconds: float) -> list[Row]:
        """The rows of answers that no training was needed for."""
        [case] = self.cases("")
        cost = Adapted(self.source_model, seconds)
        return self.table(label, case, cost, self._means(label, case, answers))

    def shows(self, case: Case, rank: int | str | None) -> bool:
        """At the recipe's own rank."""
        return rank is None

    def title(self, label: str) -> str:
        """A row's name as its progress bar says it."""
        return {
            "LoRA, target labels": "LoRA with target labels",
            "full, target labels": "full fine-tuning with target labels",
        }.get(label, label)

    # ---- examples ----------------------------------------------------------------------------

    def shown(self) -> Sequence[str]:
        """The adapted model that the predictions show."""
        return ("BatchNorm statistics", NAME, "full, target labels", "LoRA, target labels")

    def show(self, before: Tensor, after: Tensor) -> None:
        """The held-out target pictures before and after adaptation."""
        items = self.data.on(test=[self.data.source, *self.data.target]).held_out()
        self.run.predictions += [
            self._prediction(item, old, new)
            for item, old, new in zip(items, before, after, strict=True)
            if item.domain != self.data.source
        ]

    @abstractmethod
    def tell(self, task: Any) -> None:
        """Call `tell_course` with what a task of `transductive` has done."""

    def tell_course(
        self, course: Any, before: Tensor, after: Tensor, changed_in: Sequence[int | None]
    ) -> None:
        """What the target's own pictures were taken for, and how it ended.

        Args:
            course: How it went, such as `lora_lightning.adaptation.rounds.Rounds`.
            before: The source model's answers to the target's training pictures.
            after: Those of the state that was kept.
            changed_in: The round in which each changed, where that is known.
        """
        history: list[Round] = course.history_
        self.run.rounds[self.seed] = [vars(r) for r in history]
        where = "" if self.first else f" (seed {self.seed})"
        self.run.notes.append(
            f"{NAME}{where}: {course.termination_condition_}; the state of round "
            f"{course.accepted_} of {len(history) - 1} is kept."
        )
        pictures = self.data.on(train=self.data.target).training_pictures()
        rows = zip(pictures, before, after, changed_in, strict=True)
        self.run.predictions += [
            self._prediction(item, old, new, "target", NAME, changed)
            for item, old, new, changed in rows
        ]

    def _prediction(self, item: Item, old: Tensor, new: Tensor, *more: Any) -> Prediction:
        name = item.path.relative_to(self.data.root).as_posix()
        said = *self.said(old), *self.said(new)
        return Prediction(name, item.domain, self.label(item), *said, self.seed, *more)
