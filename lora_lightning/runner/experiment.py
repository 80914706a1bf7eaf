"""`Experiment`: data, task and methods of one kind of recipe.

A kind is a class that defines its source model, the cases to adapt to, how a model is trained on a
case and evaluated on it. `lora_lightning.runner.methods` has the methods that every kind shares,
`lora_lightning.runner.runner` runs them for every seed.
"""

from __future__ import annotations

import copy
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
from lightning import LightningDataModule, LightningModule
from lightning.pytorch import Callback, seed_everything
from torch import nn

from lora_lightning.lora.config import LoRAConfig
from lora_lightning.registry import Registry
from lora_lightning.report.results import Row, Run
from lora_lightning.runner.cases import Adapted, Case, Unlabelled
from lora_lightning.runner.file_names import adapter_name
from lora_lightning.runner.progress import Losses, Stages, Ticks
from lora_lightning.runner.settings import RunConfig
from lora_lightning.runner.trainer import make_trainer
from lora_lightning.training.lora_callback import LoRACallback

Config = TypeVar("Config", bound=RunConfig)
Method = Callable[..., list[Row]]
SOURCE = "source model"  # the name of its training


class Experiment(ABC, Generic[Config]):
    """One kind of recipe, with the state of one run that its methods read.

    Attributes:
        metric: That the report shows.
        methods: Name → a function from the experiment to rows, in the order of the table.
        packages: Whose versions the report names.
        gradient_clip: The largest norm of a gradient in training; None: any.
        source_each_seed: Whether every seed has a source model of its own.
        counts_batches: Progress bars of methods count batches; else finished cases.
        separator: Between the parts of an adapter's name.
        config: The settings.
        run: The results for the report; a method may add spectra and notes.
        stages: The progress bars.
        seed: Of the methods that are being run.
        source_model: A method works on a copy of it (`fresh`).
        answers: Row's name → predictions of held-out items, stored by `measure`.
    """

    metric: ClassVar[str]
    methods: ClassVar[Registry[Method]]
    packages: ClassVar[Sequence[str]] = ()
    gradient_clip: ClassVar[float | None] = None
    source_each_seed: ClassVar[bool] = False
    counts_batches: ClassVar[bool] = False
    separator: ClassVar[str] = "-"

    def __init__(self, config: Config, run: Run, stages: Stages):
        self.config, self.run, self.stages = config, run, stages
        self.source_model: Any = None
        self.begin(config.seeds[0])

    def begin(self, seed: int) -> None:
        """Set the seed of the methods that follow."""
        self.seed, self.answers = seed, dict[str, Any]()

    # ---- what a kind defines -----------------------------------------------------------------

    @abstractmethod
    def check(self) -> None:
        """Raise ConfigError for invalid values."""

    @abstractmethod
    def load(self) -> None:
        """Read the data, and record them in the run."""

    @abstractmethod
    def source(self) -> nn.Module:
        """The source model, trained or the user's own, saved beside the adapters."""

    def before_methods(self) -> None:
        """Called for each seed, after its source model is made."""

    @abstractmethod
    def cases(self, what: str) -> Iterable[Case]:
        """The cases of a method that uses `NOTHING`, `LABELS` or `NO_LABELS`."""

    @abstractmethod
    def task(self, model: Any, stage: Any) -> LightningModule:
        """The task that trains `model` by a stage's settings; ConfigError for an invalid value."""

    @abstractmethod
    def fit_data(self, case: Case, stage: Any) -> LightningDataModule:
        """The labelled training items of a case."""

    def length(self, case: Case, stage: Any) -> dict[str, int]:
        """The length of a training on a case, as arguments of a trainer."""
        return {"max_epochs": _passes(stage, partial(self.fit_data, case, stage))}

    @abstractmethod
    def unlabelled(self, model: Any, case: Case) -> Unlabelled:
        """The training of `model` on a case without its labels."""

    @abstractmethod
    def measure(self, label: str, case: Case, adapted: Adapted) -> Iterable[tuple[str, str, float]]:
        """Yield (domain, metric, value); stores the predictions by the row's label."""

    def lacks_data(self, case: Case) -> bool:
        """Whether there is nothing to train on: then its rows are without values."""
        return False

    def without_values(self, label: str, case: Case) -> list[Row]:
        """The rows of a case that lacks data."""
        values = [(str(d), self.metric, math.nan) for d in case.tested[1:]]
        return self.table(label, case, Adapted(None), values)

    def shows(self, case: Case, rank: int | str | None) -> bool:
        """Whether the report shows the spectra of this adapter."""
        return not self.run.spectra

    def full_callbacks(self) -> list[Callback]:
        """Callbacks of the training of all weights."""
        return []

    @abstractmethod
    def shown(self) -> Sequence[str]:
        """Rows from which the report shows examples, the preferred ones last."""

    @abstractmethod
    def show(self, before: Any, after: Any) -> None:
        """Add examples to the run, of the source model's predictions and of the shown row's."""

    # ---- used by methods ---------------------------------------------------------------------

    @property
    def first(self) -> bool:
        """Whether this is the first seed, from which the report takes examples."""
        return self.seed == self.config.seeds[0]

    @property
    def adapters(self) -> Path:
        """The folder of the adapters."""
        return Path(self.config.out, "adapters")

    @property
    def batch_norm(self) -> str:
        """The `batch_norm` of an adapter's training with labels."""
        return getattr(self.config, "batch_norm", "frozen")

    def named(self, name: str) -> str:
        """A name for this seed's file: the first seed's is plain."""
        return name if self.first else f"{name}-seed{self.seed}"

    def fresh(self) -> Any:
        """A copy of the source model; resets the random state, the same for every method."""
        seed_everything(self.seed, verbose=False)
        return copy.deepcopy(self.source_model)

    def adapter(self, lora: LoRAConfig, case: Case, *what: str, batch_norm: str) -> LoRACallback:
        """The callback of an adapter for this case, with its own file."""
        name = adapter_name(self.named(self.separator.join((case.name, *what))))
        # An earlier run's: it would pass for this one's where the source model is kept.
        (self.adapters / f"{name}.safetensors").unlink(missing_ok=True)
        return LoRACallback(lora, name=name, batch_norm=batch_norm, output_dir=self.adapters)

    def bar(self, title: str) -> Ticks:
        """A progress bar that counts a trainer's batches."""
        return Ticks(self.stages.stage(title, "batches"))

    def train(
        self,
        task: LightningModule,
        data: LightningDataModule | None,
        callbacks: Sequence[Callback],
        name: tuple[str, str] = ("", ""),
        **settings: Any,
    ) -> float:
        """Fit a task; returns the seconds. The first seed's losses go to the report by `name`."""
        settings["gradient_clip_val"] = self.gradient_clip
        losses = [Losses()] if any(name) and self.first else []
        trainer = make_trainer(self.config, [*callbacks, *losses], **settings)
        start = time.perf_counter()
        trainer.fit(task, datamodule=data)
        seconds = time.perf_counter() - start
        for each in losses:
            self.run.losses[(*name, self.seed)] = each.found()
        return seconds

    def train_source(self, model: nn.Module, data: LightningDataModule) -> None:
        """Fit the source model."""
        stage: Any = self.config.train  # type: ignore[attr-defined]
        bar = self.bar("training the source model")
        passes = _passes(stage.source, lambda: data)
        if passes > stage.source.epochs:
            self.run.notes.append(
                f"The source model is trained for {passes} passes over its few items, in place of "
                f"{stage.source.epochs}: train.source.least_steps={stage.source.least_steps}."
            )
        self.train(self.task(model, stage.source), data, [bar], (SOURCE, ""), max_epochs=passes)

    def count(self, label: str, domain: str, scores: Any) -> None:
        """Keep what each held-out item adds to the metric's sums, (items, sums); no NaN is kept.

        Those of a domain that several adapters are measured on are added up.
        """
        key, numbers = (label, domain, self.seed), np.asarray(scores, dtype=float)
        if len(numbers) and np.isfinite(numbers).all():
            self.run.scores[key] = self.run.scores.get(key, 0.0) + numbers

    def rows(self, label: str, case: Case, adapted: Adapted) -> list[Row]:
        """The measurements of an adapted model, as rows."""
        return self.table(label, case, adapted, self.measure(label, case, adapted))

    def table(
        self,
        label: str,
        case: Case,
        cost: Adapted,
        measured: Iterable[tuple[str, str, float]],
    ) -> list[Row]:
        """Rows of (domain, metric, value)."""
        costs = cost.parameters, cost.seconds, cost.file_bytes, case.items
        return [
            Row(label, domain, self.seed, metric, value, *costs, self._tested(label, domain))
            for domain, metric, value in measured
        ]

    def _tested(self, label: str, domain: str) -> int | None:
        scores = self.run.scores.get((label, domain, self.seed))
        return None if scores is None else len(scores)


def _passes(stage: Any, data: Callable[[], LightningDataModule]) -> int:
    """A stage's epochs, or more for its least number of steps."""
    if not getattr(stage, "least_steps", 0):
        return int(stage.epochs)
    found = data()
    found.setup("fit")
    return int(stage.passes(len(found.train_dataloader())))
