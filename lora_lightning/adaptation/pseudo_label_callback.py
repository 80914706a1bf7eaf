"""`PseudoLabelCallback`: the user's own training step, on target items with pseudo-labels."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from lora_lightning.adaptation import pseudo_labels as labelling
from lora_lightning.adaptation.guard import Limits
from lora_lightning.adaptation.label_propagation import propagate
from lora_lightning.adaptation.pseudo_labels import PseudoLabels
from lora_lightning.adaptation.rounds import Rounds
from lora_lightning.adaptation.target import Canary, Predicted, Target, seen_by
from lora_lightning.adaptation.teacher import Teacher
from lora_lightning.errors import ConfigError, DataError
from lora_lightning.lora.initialisation import METHODS
from lora_lightning.training.lora_callback import LoRACallback

# Items of the target and of the source in one loader, which are drawn anew in each round.


class Mixed(Dataset[Any]):
    """Target items as (input, index), then source items as (input, −1 − class)."""

    def __init__(self, target: Target, source: Any, augment: Callable[[Any], Any] | None):
        self.target, self.source, self.augment = target, source, augment

    def __len__(self) -> int:
        return len(self.target) + len(self.source or ())

    def __getitem__(self, index: int) -> tuple[Any, int]:
        if index < len(self.target):
            return self.target[index]
        x, y = self.source[index - len(self.target)][:2]
        return (x if self.augment is None else self.augment(x)), -1 - int(y)


class Accepted(Sampler[int]):
    """Indices of the accepted items, and of as many of the source, in a new order each epoch."""

    def __init__(self, target: int, source: int, ratio: float, seed: int):
        self.accepted = list(range(target))
        self.target, self.source, self.ratio = target, source, ratio
        self.seed, self.epoch = seed, 0

    def __len__(self) -> int:
        return len(self.accepted) + self._of_source

    @property
    def _of_source(self) -> int:
        return min(self.source, round(self.ratio * len(self.accepted)))

    def set_epoch(self, epoch: int) -> None:
        """Lightning says which epoch it is."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        draw = random.Random(f"{self.seed} {self.epoch}")
        chosen = draw.sample(range(self.target, self.target + self.source), self._of_source)
        mixed = [*self.accepted, *chosen]
        draw.shuffle(mixed)
        return iter(mixed)


Labeller = Callable[[Tensor, Tensor], PseudoLabels]  # features, probabilities → labels
LABELLERS: dict[str, Labeller] = {
    "threshold": lambda features, p: labelling.threshold(p),
    "class-balanced": lambda features, p: labelling.class_balanced(p, 0.5),
    "centroid": lambda features, p: labelling.centroid(features, p),
    "vote": lambda features, p: labelling.vote(features, p),
    "reciprocal": lambda features, p: labelling.reciprocal(features, p),
    "propagation": lambda features, p: propagate(features, p),
}


class PseudoLabelCallback(Callback):
    """Train a classifier by its own ``training_step`` on an unlabelled target.

        pseudo = PseudoLabelCallback(target, labels="centroid")
        trainer = Trainer(callbacks=[LoRACallback(trainable=[]), pseudo])
        trainer.fit(module, pseudo.train_dataloader())

    The module's ``training_step`` receives batches (inputs, labels) as if the target were
    labelled; ``module(inputs)`` must give logits (B, K). Every `every_n_epochs` epochs (or
    `every_n_steps` steps) the labels are taken anew; then the guard compares the predictions with
    the source model's, stops at the first alarm and brings the last accepted state back.

    Args:
        target: The items, see `lora_lightning.adaptation.target.Target`.
        labels: ``"threshold"``, ``"class-balanced"``, ``"centroid"``, ``"vote"``,
            ``"reciprocal"``, ``"propagation"``, or a function from (features (N, D), probabilities
            (N, K)) to `PseudoLabels`.
        source: Labelled items of the source, as (input, class), to train on beside the target.
        source_ratio: Source items for each accepted target item.
        augment: Applied to each input in training.
        backbone: Attribute of the module that holds the network; ``""``: the module.
        every_n_epochs: How often labels are taken anew.
        every_n_steps: How often instead, in optimizer steps.
        canary: A few labelled items of the target, (input, class): a round that does worse on them
            than the source model sets off an alarm. They are not trained on.
        teacher_decay: Decay of a moving average of what is trained, which then gives the labels;
            None: the model itself does.
        limits: Of the guard; None: no guard.
        plot: A PNG of the rounds, written at the end; None: none.
        batch_size: Items in a batch.
        seed: Of the order of the items.

    Attributes:
        pseudo_labels_: the labels that are trained with.
        rounds_: the course of it, a `Rounds`.
        accepted_: the round whose state is kept; 0: the source.
        termination_condition_: why it ended.

    Raises:
        ConfigError: a value is out of range, or the trainer was given another loader.
        DataError: no item of the target gets a label.
    """

    def __init__(
        self,
        target: Any,
        labels: str | Labeller = "centroid",
        *,
        source: Any = None,
        source_ratio: float = 1.0,
        augment: Callable[[Any], Any] | None = None,
        backbone: str = "model",
        every_n_epochs: int = 1,
        every_n_steps: int | None = None,
        canary: Any = None,
        teacher_decay: float | None = None,
        limits: Limits | None = Limits(),  # noqa: B008 - frozen
        plot: Path | str | None = None,
        batch_size: int = 32,
        seed: int = 0,
    ):
        if not callable(labels) and labels not in LABELLERS:
            raise ConfigError(
                f"labels must be one of {', '.join(LABELLERS)}, or a function; got {labels!r}"
            )
        for name, value in (("every_n_epochs", every_n_epochs), ("every_n_steps", every_n_steps)):
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        if source_ratio < 0:
            raise ConfigError(f"source_ratio must be 0 or more, got {source_ratio}")
        self.target, self.source = Target(target), source
        self.label = labels if callable(labels) else LABELLERS[labels]
        self.backbone, self.limits, self.batch_size = backbone, limits, batch_size
        self.every_n_epochs, self.every_n_steps = every_n_epochs, every_n_steps
        self.teacher_decay = teacher_decay
        self.plot = plot
        self.canary = None if canary is None else Canary(canary, batch_size)
        self._items = Mixed(Target(target, augment), source, augment)
        self._sampler = Accepted(len(self.target), len(source or ()), source_ratio, seed)
        self.pseudo_labels_: PseudoLabels | None = None
        self.rounds_: Rounds | None = None
        self._teacher: Teacher | None = None
        self._resumed: dict[str, Any] | None = None

    @property
    def accepted_(self) -> int:
        """Index of the round whose state is kept; 0: the source."""
        return 0 if self.rounds_ is None else self.rounds_.accepted_

    @property
    def termination_condition_(self) -> str:
        """Why it ended; "" while it goes on."""
        return "" if self.rounds_ is None else self.rounds_.termination_condition_

    def train_dataloader(self, **settings: Any) -> DataLoader[Any]:
        """The loader to give to ``Trainer.fit``: accepted items, and the source's.

        Args:
            **settings: Of the DataLoader, such as ``num_workers``.
        """
        given = {**self.target.settings, "batch_size": self.batch_size, **settings}
        return DataLoader(self._items, sampler=self._sampler, **given)

    # ---- hooks -----------------------------------------------------------------------------

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Label the target with the source model."""
        for other in trainer.callbacks:  # type: ignore[attr-defined]
            if (
                isinstance(other, LoRACallback)
                and METHODS[other.config.init].needs == "gradient"
                and other.loss is None
            ):
                raise ConfigError(
                    f"init={other.config.init!r} would start from batches without labels yet: give "
                    "LoRACallback(data=…, loss=…), or another init"
                )
        before = self._predicted(pl_module)
        network = self._network(pl_module)
        look = self.canary.accuracy if self.canary is not None else None
        canary = None if look is None else partial(look, pl_module, network)
        self.rounds_ = Rounds(network, before, self.limits, canary)
        self._take(before)
        if self._resumed is not None:
            self.rounds_.load_state_dict(self._resumed["rounds"])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A loader without our labels would train on something else."""
        loader: Any = trainer.train_dataloader
        if getattr(loader, "dataset", None) is not self._items:
            raise ConfigError(
                "PseudoLabelCallback: the trainer was given another loader; call "
                "trainer.fit(module, callback.train_dataloader()), and give source items as "
                "PseudoLabelCallback(source=…)"
            )
        if self.teacher_decay is not None:  # now that the factors have started
            self._teacher = Teacher(self._network(pl_module), self.teacher_decay)
            if self._resumed is not None and self._resumed["teacher"] is not None:
                self._teacher.load_state_dict(self._resumed["teacher"])
        self._resumed = None

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """In place of each item's index comes its label."""
        assert self.pseudo_labels_ is not None
        codes = batch[1]
        of_source = codes < 0
        labels = self.pseudo_labels_.labels.to(codes.device)[codes.clamp_min(0)]
        codes.copy_(torch.where(of_source, -1 - codes, labels))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """The teacher follows; after so many steps a round ends."""
        if self._teacher is not None:
            self._teacher.update(self._network(pl_module))
        if self.every_n_steps and trainer.global_step % self.every_n_steps == 0:
            self._end_round(pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After so many epochs a round ends."""
        due = (trainer.current_epoch + 1) % self.every_n_epochs == 0
        if not self.every_n_steps and due:
            self._end_round(pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The best accepted state comes back, before any file is written of it."""
        assert self.rounds_ is not None
        self.rounds_.finish(self._network(pl_module))
        if self.plot is not None and trainer.is_global_zero:
            self.rounds_.draw(self.plot)

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        if self.rounds_ is None:
            return {}
        teacher = self._teacher.state_dict() if self._teacher else None
        return {"rounds": self.rounds_.state_dict(), "teacher": teacher}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From a checkpoint; put in place when the fit starts."""
        self._resumed = state_dict or None

    # ---- what it does ----------------------------------------------------------------------

    def _end_round(self, pl_module: LightningModule) -> None:
        assert self.rounds_ is not None
        network = self._network(pl_module)
        found, now = self.rounds_.end_round(
            network, lambda: self._predicted(pl_module), self.pseudo_labels_
        )
        if now is not None and not found.alarms:
            if self._teacher is not None:
                with self._teacher.applied(network):
                    now = self._predicted(pl_module)
            self._take(now)
        found.tell(pl_module, len(self.target))
        pl_module.trainer.should_stop |= bool(found.alarms)

    def _take(self, now: Predicted) -> None:
        found = self.label(now.features, now.probabilities)
        if not bool(found.accepted.any()):
            raise DataError(
                f"none of the {len(self.target)} items of the target gets a pseudo-label, such as "
                f"item 0: {found.reasons[0]}. Ask less of them, or choose other labels="
            )
        self.pseudo_labels_ = found
        self._sampler.accepted = found.accepted.nonzero().flatten().tolist()

    def _network(self, pl_module: LightningModule) -> Any:
        return pl_module.get_submodule(self.backbone)

    def _predicted(self, pl_module: LightningModule) -> Predicted:
        return seen_by(pl_module, self._network(pl_module), self.target, self.batch_size)
