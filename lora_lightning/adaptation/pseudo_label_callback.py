"""`PseudoLabelCallback`: self-training by the user's own training step, on pseudo-labels."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler

from lora_lightning.adaptation.guard import Limits
from lora_lightning.adaptation.label_propagation import LABELLERS, Labeller
from lora_lightning.adaptation.prediction_self_training import PredictionSelfTraining
from lora_lightning.adaptation.pseudo_labels import PseudoLabels
from lora_lightning.adaptation.resumable_loader import ResumableLoader
from lora_lightning.adaptation.target import Predicted, Target
from lora_lightning.errors import ConfigError, DataError
from lora_lightning.lora.initialisation import METHODS
from lora_lightning.lora.values import check_count, check_number
from lora_lightning.training.lora_callback import LoRACallback

# Items of the target and of the source in one loader, redrawn in each round.


class Mixed(Dataset[Any]):
    """Target items as (input, index), then source items as (input, −1 − class)."""

    def __init__(self, target: Target, source: Any):
        self.target, self.source = target, source

    def __len__(self) -> int:
        return len(self.target) + len(self.source or ())

    def __getitem__(self, index: int) -> tuple[Any, int]:
        if index < len(self.target):
            return self.target[index]
        item = self.source[index - len(self.target)]
        return self.target.prepared(item), -1 - int(item[1])


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
        """Called by Lightning before each epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        draw = random.Random(f"{self.seed} {self.epoch}")
        chosen = draw.sample(range(self.target, self.target + self.source), self._of_source)
        mixed = [*self.accepted, *chosen]
        draw.shuffle(mixed)
        return iter(mixed)


class PseudoLabelCallback(PredictionSelfTraining):
    """Train a classifier by its own ``training_step`` on an unlabelled target.

        pseudo = PseudoLabelCallback(target, labels="centroid")
        trainer = Trainer(callbacks=[LoRACallback(trainable=[]), pseudo])
        trainer.fit(module, pseudo.train_dataloader())

    The module's ``training_step`` receives batches (inputs, labels) as if the target were
    labelled; its forward, or the network's where it has none, gives logits (B, K). Every
    `every_n_epochs` epochs (or `every_n_steps` steps) the labels are updated; then the guard
    compares the predictions with the source model's, stops at the first alarm and restores the
    last accepted state.

    Args:
        target: The items, see `lora_lightning.adaptation.target.Target`.
        labels: ``"threshold"``, ``"class-balanced"``, ``"centroid"``, ``"vote"``,
            ``"reciprocal"``, ``"propagation"``, or a function from (features (N, D), probabilities
            (N, K)) to `PseudoLabels`.
        source: Labelled items of the source, as (input, class), to train on beside the target.
        source_ratio: Source items for each accepted target item.
        augment: Applied to each input in training.
        backbone: Attribute of the module that holds the network; ``""``: the module.
        every_n_epochs: How often labels are updated.
        every_n_steps: The same in optimizer steps, instead.
        canary: A few labelled items of the target, (input, class): a round that does worse on them
            than the source model raises an alarm. They are not trained on.
        forward: From (network, inputs), or from a batch of inputs alone, to logits (B, K); None: as
            `lora_lightning.model.calling` says.
        teacher_decay: Decay of a moving average of what is trained, which then gives the labels;
            None: the model itself does.
        limits: Of the guard; None: no guard.
        plot: A PNG of the rounds, written at the end; None: none.
        batch_size: Items in a batch.
        seed: Of the order of the items.

    Attributes:
        pseudo_labels_: the current pseudo-labels.
        rounds_: the `Rounds`, their history and best state.
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
        forward: Callable[..., Any] | None = None,
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
            if value is not None:
                check_count(name, value)
        check_number("source_ratio", source_ratio, "[0, inf)")
        super().__init__(Target(target), limits, canary, plot, batch_size)
        self.source = source
        self.labeller = labels if callable(labels) else LABELLERS.get(labels)
        self.backbone, self.teacher_decay, self.forward = backbone, teacher_decay, forward
        self.every_n_epochs, self.every_n_steps = every_n_epochs, every_n_steps
        self._items = Mixed(Target(target, augment), source)
        self._sampler = Accepted(len(self.target), len(source or ()), source_ratio, seed)

    def train_dataloader(self, **settings: Any) -> DataLoader[Any]:
        """The loader to give to ``Trainer.fit``: accepted items, and the source's.

        Args:
            **settings: Of the DataLoader, such as ``num_workers``.
        """
        given = {**self.target.settings, "batch_size": self.batch_size, **settings}
        return ResumableLoader(
            position=self.position, dataset=self._items, sampler=self._sampler, **given
        )

    # ---- hooks -----------------------------------------------------------------------------

    def check(self, trainer: Trainer, module: LightningModule) -> None:
        """Refuse callbacks that would need labels before there are any."""
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
        if is_param_in_hook_signature(module.training_step, "dataloader_iter", explicit=True):
            raise ConfigError(
                "training_step(dataloader_iter) gets batches without labels: take (batch, index)"
            )
        super().check(trainer, module)

    def check_loader(self, trainer: Trainer) -> None:
        """Refuse a trainer with another loader, which has no pseudo-labels."""
        loader: Any = trainer.train_dataloader
        if getattr(loader, "dataset", None) is not self._items:
            raise ConfigError(
                "PseudoLabelCallback: the trainer was given another loader; call "
                "trainer.fit(module, callback.train_dataloader()), and give source items as "
                "PseudoLabelCallback(source=…)"
            )

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Replace each item's index by its label."""
        assert self.pseudo_labels_ is not None
        codes = batch[1]
        of_source = codes < 0
        labels = self.pseudo_labels_.labels.to(codes.device)[codes.clamp_min(0)]
        codes.copy_(torch.where(of_source, -1 - codes, labels))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Update the teacher; end a round after `every_n_steps`."""
        super().on_train_batch_end(trainer, pl_module)
        step = trainer.global_step  # the same for each of the batches that a step accumulates
        if self.every_n_steps and step > self._judged_at and step % self.every_n_steps == 0:
            self.end_round(trainer, pl_module)

    def due(self, trainer: Trainer, epochs: int) -> bool:
        """Whether a round ends with this epoch, by `every_n_epochs`."""
        return not self.every_n_steps and epochs % self.every_n_epochs == 0

    # ---- what it does ----------------------------------------------------------------------

    def network(self, module: LightningModule) -> nn.Module:
        """The backbone."""
        return module.get_submodule(self.backbone)

    def label(self, now: Predicted) -> dict[str, Any]:
        """Pseudo-labels of all items, of which some must be accepted."""
        found = self.labeller(now.features, now.probabilities)
        if not bool(found.accepted.any()):
            raise DataError(
                f"none of the {len(self.target)} items of the target gets a pseudo-label, such as "
                f"item 0: {found.reasons[0]}. Ask less of them, or choose other labels="
            )
        return vars(found)

    def use(self, labels: dict[str, Any]) -> None:
        """Sample from the items with a label."""
        self.pseudo_labels_ = found = PseudoLabels(**labels)
        self._sampler.accepted = found.accepted.nonzero().flatten().tolist()
