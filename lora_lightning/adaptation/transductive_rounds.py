"""The rounds of a `TransductiveTask`: which statistics it trains on, and what is kept."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn

from lora_lightning.adaptation.class_centroids import (
    LEAST_ITEMS,
    confirmed_centroids,
    spread,
    unhelpful,
)
from lora_lightning.adaptation.loss import Loss
from lora_lightning.adaptation.prediction_self_training import PredictionSelfTraining
from lora_lightning.adaptation.rounds import print_wrapped
from lora_lightning.adaptation.target import Predict, Predicted, Target
from lora_lightning.adaptation.task_rounds import TaskRounds
from lora_lightning.adaptation.teacher import Snapshot
from lora_lightning.adaptation.validators import agreement
from lora_lightning.model.batch_norm import reestimated, tracking
from lora_lightning.model.calling import moved
from lora_lightning.model.introspection import classifier_modules

SOURCE_ITEMS = 8  # weight of the source's statistics, in items of the target
# To train on the source's statistics: a smaller spread of the predictions over the classes has
# nothing to teach.
LEAST_SPREAD = 0.4
# Trained in full without BatchNorm, whose statistics follow a target: factors alone gain little.
WITHOUT_STATISTICS = ("head", "norms")


class TransductiveRounds(TaskRounds, PredictionSelfTraining):
    """The rounds of a `TransductiveTask`, which is the module in training."""

    def __init__(self, loss: Loss, *target: Any):
        super().__init__(*target)
        self.loss = loss

    def predict(self, module: LightningModule) -> Predict:
        """Logits of a batch, by the module."""
        return module  # in whose forward is the user's

    def check(self, trainer: Trainer, module: LightningModule) -> None:
        """Also warn where the classifier is trained, of a model with BatchNorm."""
        super().check(trainer, module)
        network = self.network(module)
        if tracking(network) and any(
            p.requires_grad
            for name in classifier_modules(network)
            for p in network.get_submodule(name).parameters()
        ):
            warnings.warn(
                "the classifier is trained too: without labels it forgets what it knew. Give "
                "LoRACallback trainable=[], and exclude_modules with the classifier's name where "
                'target_modules="all"',
                stacklevel=2,
            )

    def start(self, module: Any, source: Predicted) -> None:
        """Start with the source model's predictions, and choose the statistics."""
        self.loss.begin(source)
        super().start(module, source)
        if len(self.target) < 2:
            self.rounds_.termination_condition_ = (
                "the target has one item: nothing can be learnt from it, the source model stays"
            )
        elif not self._choose_statistics(module, source) and module.batch_norm == "auto":
            self._train_on_sources(module, source)

    def label(self, now: Predicted) -> dict[str, Any]:
        """The pseudo-labels, of when training begins."""
        # Labels are not renewed while it trains: they would follow its mistakes.
        self.loss.begin_round(now, label=not self._judged_at)
        return self.loss.state_dict()

    def use(self, labels: dict[str, Any]) -> None:
        """Hand labels to the loss."""
        self.loss.load_state_dict(labels)
        self.pseudo_labels_ = self.loss.labels

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        self._labels = self.loss.state_dict()  # which changes within a round
        return super().state_dict()

    def _choose_statistics(self, module: Any, source: Predicted) -> bool:
        """Take BatchNorm's statistics from the target, where that helps; whether it did."""
        if module.batch_norm == "source" or not tracking(module.model):
            return False
        asks = module.batch_norm == "auto"
        if not statistics_of(module, self.target):
            return False
        now, rounds = self.look(module), self.rounds_
        rounds.begin_at(now.probabilities)  # neighbours by the source's features agree less on them
        why = self._unhelpful(module, source, now) if asks else ""
        if not why:
            self.judge(module, now)
            return True
        rounds.begin_at(source.probabilities)
        rounds.restore(self.network(module))
        print_wrapped(module, f"BatchNorm keeps the source's statistics: with the target's {why}")
        return False

    def _unhelpful(self, module: Any, source: Predicted, now: Predicted) -> str:
        """Why the target's statistics are not taken, by the guard or else by what they gain."""
        rounds = self.rounds_
        alarms = rounds.guard.check(now.probabilities).alarms if rounds.limits else []
        steadier = partial(self._steadier, module, source, now)
        return alarms[0] if alarms else unhelpful(source, now, steadier)

    def _steadier(self, module: Any, source: Predicted, now: Predicted) -> float:
        """By how much more of the items keep their label as they are trained on, such as cropped.

        Than by the source model, whose statistics are put back for it.
        """
        if not module.augments:
            return 0.0
        after, network = self._steady(module, now), self.network(module)
        own = Snapshot(network)
        self.rounds_.restore(network)
        before = self._steady(module, source)
        own.restore(network)
        return after - before

    def _steady(self, module: Any, now: Predicted) -> float:
        """Part of the items that keep their label in an augmented view."""
        with isolate_rng():  # the same views for all models, and training draws what it would
            torch.manual_seed(0)
            views = self.look(module, module.training_items)
        return agreement(views.probabilities, now.probabilities)

    def _train_on_sources(self, module: Any, source: Predicted) -> None:
        """Leave the source model where it has nothing to teach; else ask for a rise of cohesion."""
        rounds = self.rounds_
        if rounds.limits is None:
            return
        untrained, why = None, ""
        if tracking(module.model):
            why = self._nothing_to_teach(source)
        else:
            found, why = confirmed_centroids(source, rounds.guard)
            # A canary, which is of other items, judges models alone.
            untrained = None if why or self.canary else found
        rounds.begin_at(source.probabilities, True, untrained)
        if why:
            rounds.termination_condition_ = (
                f"{why}; the source model stays. {module.setting} trains all the same"
            )

    def _nothing_to_teach(self, source: Predicted) -> str:
        """Why the source's predictions teach nothing, with BatchNorm; "" where they do."""
        if (count := len(self.target)) < LEAST_ITEMS:
            return f"{count} items are too few to tell a gain from chance, below {LEAST_ITEMS}"
        if (even := spread(source)) < LEAST_SPREAD:
            return (
                f"the source's predictions, smoothed over neighbours, spread over too few classes "
                f"({even:.2f} of an even spread, below {LEAST_SPREAD:g})"
            )
        return ""


def trained_in_full(model: nn.Module) -> tuple[str, ...]:
    """What `LoRACallback` best trains beside the factors, as its ``trainable``."""
    return () if tracking(model) else WITHOUT_STATISTICS


def statistics_of(module: Any, target: Target) -> bool:
    """Re-estimate BatchNorm's statistics on a target; returns whether `module.model` has any."""
    # Mixed: in batches of one class, as folders give them, the features vary too little.
    loader = target.loader(2 * module.batch_size, shuffle=True)
    inputs = (moved(x, module.device) for x, _ in loader)
    return reestimated(module.model, module, inputs, SOURCE_ITEMS)
