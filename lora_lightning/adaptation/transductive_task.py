"""`TransductiveTask`: unsupervised adaptation of a classifier to the items of a target."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lora_lightning.adaptation.guard import Limits
from lora_lightning.adaptation.loss import Function, Loss
from lora_lightning.adaptation.objectives import Objective
from lora_lightning.adaptation.prediction_self_training import PredictionRounds
from lora_lightning.adaptation.target import Target
from lora_lightning.adaptation.task_rounds import TaskInRounds
from lora_lightning.adaptation.transductive_rounds import TransductiveRounds
from lora_lightning.errors import ConfigError
from lora_lightning.lora.values import check_count
from lora_lightning.model.calling import classifier

BATCH_NORM = ("auto", "source", "target")


class TransductiveTask(TaskInRounds):
    r"""Adapt `model` to the items of `target` without their labels.

        task = TransductiveTask(model, target)
        Trainer(max_epochs=4, callbacks=[LoRACallback(trainable=[])]).fit(task)
        task.probabilities_  # of each item of the target

    The loss of a batch is
    :math:`\frac1B\sum_i H(p_i) + d\,KL(\bar p \| \pi) + w\,CE(p_i, \hat y_i)`: low entropy of each
    prediction, their mean near the prior π, and cross-entropy to pseudo-labels ŷ, those of
    `soft_centroids` when training begins, weighted by their probability. As SHOT, Liang et al.
    2020, arXiv:2002.08546, which renews its labels in each epoch. Train the factors only: the
    source model's head is the fixed reference for its features. (Without BatchNorm, whose
    statistics follow the target, factors alone gain little: train what `trained_in_full` says.)

    After each epoch a round ends: the `Guard` compares the predictions of all items with the
    source model's. Where the learning rate falls, the last round decides, and only a collapse of
    the predictions ends the training before; if it has an alarm, what was there when training began
    is restored: the source model, or that with BatchNorm's statistics of the target. Where it is
    constant, the first alarm ends the training, and the last accepted state is restored.

    Args:
        model: The network, a classifier; `LoRACallback` finds it as ``model``.
        target: The items, see `lora_lightning.adaptation.target.Target`. Labels that come with
            them are ignored.
        objective: ``"information-maximisation"``, ``"neighbour-consistency"`` (NRC's, with the
            diversity term), ``"minimum-class-confusion"``, ``"entropy"`` (TENT's, which
            collapses easily), another name in `OBJECTIVES`, an `Objective`, or a function from
            logits to a loss.
        training: The same items for training, where those differ (by random
            crops, for example); None: `target`.
        augment: Applied to each input in training, not in predictions of the target.
        pseudo_label_weight: w; 0: no pseudo-labels.
        diversity: d; 0 where the target lacks classes, or holds items of no class.
        source_weight: v of :math:`v\,KL(p^s_i \| p_i)`, which holds to the source's predictions.
        pull: λ of :math:`\lambda\sum_l\|s_l B_l A_l\|_F^2`, which holds to the source's weights.
        canary: A few labelled items of the target, (input, class): a round that does worse on them
            than the source model raises an alarm. They are not trained on.
        forward: From (model, inputs), or from a batch of inputs alone, to logits (B, K); None: as
            `lora_lightning.model.calling` says.
        prior: π, the share of each class in the target; None: uniform.
        batch_norm: ``"target"`` re-estimates BatchNorm's statistics on the target before
            training, ``"source"`` keeps them. ``"auto"`` re-estimates them where the predictions
            gain information by it, and the guard accepts them. Where not, it trains on the
            source's, if there are 50 items and the predictions spread over some classes; without
            BatchNorm, if `confirmed_centroids` are trusted, which then answer unless a trained
            state does better. The result is kept only if neighbours agree more than by the source
            model, by `Limits.rise`. They are frozen during training.
        limits: Of the guard; None: no guard.
        plot: A PNG of the rounds, written at the end; None: none.
        batch_size: Items in a batch.
        learning_rate: Peak learning rate of AdamW.
        weight_decay: AdamW's; not applied to biases, norms and other vectors.
        schedule: ``"one-cycle"`` (warm-up, then cosine to near 0), ``"cosine"``, ``"constant"``.

    Attributes:
        rounds_: the `Rounds`, their history and best state.

    Raises:
        ConfigError: a value is out of range, or items of another kind than expected.
        DataError: the target is empty, or the model gives NaN for some of it.
    """

    #: What a user sets to train on the source's statistics all the same, in their interface.
    setting = 'batch_norm="source"'

    def __init__(
        self,
        model: nn.Module,
        target: Any,
        objective: str | Objective | Function = "information-maximisation",
        *,
        training: Any = None,
        augment: Callable[[Any], Any] | None = None,
        pseudo_label_weight: float = 0.3,
        diversity: float = 1.0,
        source_weight: float = 0.0,
        pull: float = 0.0,
        canary: Any = None,
        forward: Callable[..., Any] | None = None,
        prior: Tensor | None = None,
        batch_norm: str = "auto",
        limits: Limits | None = Limits(),  # noqa: B008 - frozen
        plot: Path | str | None = None,
        batch_size: int = 32,
        learning_rate: float = 4e-3,
        weight_decay: float = 0.01,
        schedule: str = "one-cycle",
    ):
        super().__init__(learning_rate, weight_decay, schedule)
        check_settings(batch_norm, batch_size)
        self.loss = Loss(
            objective, prior, diversity, pseudo_label_weight, source_weight, pull, batch_size
        )
        # In training mode, as a Trainer expects it; predictions are made in eval mode.
        self.model = model.train()
        self.target = Target(target)
        self.training_items = Target(target if training is None else training, augment)
        self.augments = training is not None or augment is not None
        if len(self.target) != len(self.training_items):
            raise ConfigError(
                f"target and training must be the same items in the same order, got "
                f"{len(self.target)} and {len(self.training_items)}"
            )
        self.batch_norm, self.batch_size, self._call = batch_norm, batch_size, forward
        self._course = TransductiveRounds(self.loss, self.target, limits, canary, plot, batch_size)

    @property
    def rounds_(self) -> PredictionRounds | None:
        """The `Rounds`; None before the fit."""
        return self._course.rounds_ if self._course.history_ else None

    @property
    def probabilities_(self) -> Tensor:
        """(N, K) of the target's items, in its order, by the accepted state."""
        if self.rounds_ is None:
            raise ConfigError("nothing was adapted yet: Trainer.fit(task) first")
        return self.rounds_.probabilities_

    def forward(self, x: Any) -> Tensor:
        """A batch of inputs → logits (B, K)."""
        return classifier(self.model, self._call)(x)

    def train_dataloader(self) -> Any:
        """The target's items with their indices, shuffled."""
        return self.training_items.loader(self.batch_size, True, self._course.position)

    def training_step(self, batch: tuple[Any, Tensor], batch_idx: int) -> Tensor:
        """The loss of a batch."""
        x, indices = batch
        loss = self.loss(self(x), indices.cpu(), self.model)
        self.log("train_loss", loss, batch_size=len(indices))
        return loss


def check_settings(batch_norm: str, batch_size: int) -> None:
    """Raise ConfigError for invalid settings."""
    if batch_norm not in BATCH_NORM:
        raise ConfigError(f"batch_norm must be one of {', '.join(BATCH_NORM)}; got {batch_norm!r}")
    check_count("batch_size", batch_size, 2)
