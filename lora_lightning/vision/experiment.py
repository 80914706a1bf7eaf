"""`Pictures`: base class of the experiments over domains of images.

One adapter is trained on all target domains together: there is one case.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning import LightningModule
from lightning.pytorch import seed_everything
from torch import Tensor, nn

from lora_lightning.adaptation.rounds import Round
from lora_lightning.adaptation.target import Predicted
from lora_lightning.lora.values import check_number
from lora_lightning.report.evidence import of_mean
from lora_lightning.report.results import Prediction, Row
from lora_lightning.runner.cases import LABELS, NO_LABELS, Adapted, Case, Unlabelled
from lora_lightning.runner.checks import at_least
from lora_lightning.runner.experiment import Experiment
from lora_lightning.runner.trainer import make_trainer
from lora_lightning.runner.weights import save_weights
from lora_lightning.vision.data.folders import Item
from lora_lightning.vision.data.image_domains import ImageDomains
from lora_lightning.vision.data.recipe_data import read_pictures
from lora_lightning.vision.settings import Config
from lora_lightning.vision.source_model import backbone, source_model

NAME = "LoRA, no labels"


@dataclass(frozen=True)
class Seen:
    """The source model's features and predictions of some images, and the time that it took.

    The labels (N,) are for methods that may use them.
    """

    said: Predicted
    labels: Tensor
    seconds: float


class Pictures(Experiment[Config]):
    """A run over domains of images; its predictions are (held-out images, outputs)."""

    packages = ("timm",)
    source_each_seed = True
    counts_batches = True
    separator = "_"
    domains: ClassVar[type[ImageDomains]] = ImageDomains
    data: ImageDomains

    @abstractmethod
    def outputs(self) -> int:
        """The number of outputs of the network."""

    def class_names(self) -> Sequence[str]:
        """Of the outputs, where those are classes."""
        return ()

    @abstractmethod
    def labels(self, items: Sequence[Item]) -> Tensor:
        """The labels of images, as numbers."""

    @abstractmethod
    def values(self, answers: Tensor, items: Sequence[Item]) -> Tensor:
        """Each image's value of the metric, (N,)."""

    @abstractmethod
    def label(self, item: Item) -> str:
        """The label of an image, as text."""

    @abstractmethod
    def said(self, answer: Tensor) -> tuple[str, float]:
        """A prediction (outputs,) as text, and its confidence, 0 to 1."""

    @abstractmethod
    def transductive(self, model: nn.Module, target: Any, training: Any = None) -> Any:
        """The task that trains `model` on images without labels."""

    # ---- data and source model ---------------------------------------------------------------

    def begin(self, seed: int) -> None:
        """See `Experiment.begin`."""
        super().begin(seed)
        self.looks: dict[str, Seen] = {}

    def check(self) -> None:
        """Raise ConfigError for an invalid value."""
        stages, trained = self.config.train, ("lora", "full", "label_free")
        at_least(self.config, 1, (f"train.{name}.epochs" for name in trained))
        at_least(self.config, 0, (f"train.{name}.least_steps" for name in ("source", *trained)))
        # A checkpoint can be the source as it is.
        at_least(self.config, int(not self.config.model.checkpoint), ["train.source.epochs"])
        for stage in (stages.source, stages.lora, stages.full):
            self.task(nn.Identity(), stage)
        check_number("train.label_free.jitter", stages.label_free.jitter, "[0, 1]")
        self.transductive(nn.Identity(), torch.zeros(1, 1, device="cpu"))
        at_least(self.config, 2, ("data.size", "data.batch_size"))

    def load(self) -> None:
        """Read the images; without a folder of the user's own they are rendered."""
        # The backbone first: a mistake in its name is found before the images are read.
        known: Any = getattr(backbone(self.config, 2), "pretrained_cfg", None) or {}
        self.data = data = read_pictures(self.domains, self.config.data, known, self.stages)
        run = self.run
        run.classes, run.data_root, run.skipped = data.classes, data.root, data.skipped
        train, test = (sum(i.split == s for i in data.items) for s in ("train", "test"))
        run.notes += [
            f"One adapter for all target domains together; {len(data.classes)} classes, "
            f"{train} training and {test} held-out pictures.",
            "Every method starts from the same source model and is measured on the same held-out "
            "pictures, which no training sees.",
        ]

    def source(self) -> nn.Module:
        """Trained on the source domain, for each seed; or one's own, trained elsewhere."""
        seed_everything(self.seed, verbose=False)
        model, notices = source_model(self.config, self.outputs(), self.data.classes)
        self.run.notes += [n for n in notices if n not in self.run.notes]
        self.data.prepared.describe(model, self.class_names())
        if self.config.train.source.epochs:
            self.train_source(model, self.data.on(train=[self.data.source]))
        # The adapter can be used only with the model that it was trained on.
        save_weights(model, Path(self.config.out) / f"{self.named('source')}.safetensors")
        return model

    # ---- the one case ------------------------------------------------------------------------

    @property
    def adapters(self) -> Path:
        """The report's folder, as there are few."""
        return Path(self.config.out)

    def cases(self, what: str) -> list[Case]:
        """All target domains together, evaluated on the source too."""
        given = {LABELS: "target labels", NO_LABELS: "no labels"}.get(what, "")
        train = self.data.labelled_target if what == LABELS else self.data.target
        return [Case("adapter", train, [self.data.source, *self.data.target], given)]

    def lacks_data(self, case: Case) -> bool:
        """Where labels are asked for and no target domain has any."""
        return not case.train

    def fit_data(self, case: Case, stage: Any) -> ImageDomains:
        """The labelled training images."""
        return self.data.on(train=case.train)

    def unlabelled(self, model: nn.Module, case: Case) -> Unlabelled:
        """See `transductive`."""
        settings, pictures = self.config.train.label_free, self.data.on(train=case.train)
        training = pictures.unlabelled(True, settings.jitter)
        task: LightningModule = self.transductive(model, pictures.unlabelled(), training)
        length = {"max_epochs": settings.passes_over(len(pictures.training_pictures()))}
        targets = getattr(settings, "target_modules", None)  # a pose's training has none
        return Unlabelled(task, lambda: self.tell(task), trainer=length, target_modules=targets)

    def measure(self, label: str, case: Case, adapted: Adapted) -> Iterator[tuple[str, str, float]]:
        """The metric on the held-out images of the source and of each target domain."""
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
            of = torch.tensor([i.domain == domain for i in items], device="cpu")
            found = values[of]
            self.count(label, domain, of_mean(found))
            yield domain, self.metric, float(found.mean())

    def score(self, label: str, answers: Tensor, seconds: float) -> list[Row]:
        """The rows of predictions by a method without training."""
        [case] = self.cases("")
        cost = Adapted(self.source_model, seconds)
        return self.table(label, case, cost, self._means(label, case, answers))

    def shows(self, case: Case, rank: int | str | None) -> bool:
        """Whether this is the recipe's own rank."""
        return rank is None

    def shown(self) -> Sequence[str]:
        """The rows from which predictions are shown."""
        return ("BatchNorm statistics", NAME, "full, target labels", "LoRA, target labels")

    def show(self, before: Tensor, after: Tensor) -> None:
        """The held-out target images before and after adaptation."""
        items = self.data.on(test=[self.data.source, *self.data.target]).held_out()
        self.run.predictions += [
            self._prediction(item, old, new)
            for item, old, new in zip(items, before, after, strict=True)
            if item.domain != self.data.source
        ]

    @abstractmethod
    def tell(self, task: Any) -> None:
        """Call `tell_course` with the result of a task of `transductive`."""

    @property
    def of_seed(self) -> str:
        """The seed, for a note; "" of the first."""
        return "" if self.first else f" (seed {self.seed})"

    def tell_course(
        self, course: Any, before: Tensor, after: Tensor, changed_in: Sequence[int | None]
    ) -> None:
        """Add the predictions of the target's training images to the run, and how it ended."""
        history: list[Round] = course.history_
        self.run.rounds[self.seed] = [vars(r) for r in history]
        self.run.notes.append(
            f"{NAME}{self.of_seed}: {course.termination_condition_}; the state of round "
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
