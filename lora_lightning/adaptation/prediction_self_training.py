"""`PredictionSelfTraining`: self-training of a classifier, checked by its predictions."""

from __future__ import annotations

from functools import partial
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from lora_lightning.adaptation.guard import Limits
from lora_lightning.adaptation.pseudo_labels import PseudoLabels
from lora_lightning.adaptation.rounds import PredictionRounds
from lora_lightning.adaptation.self_training import SelfTraining
from lora_lightning.adaptation.target import Canary, Predict, Predicted, Target, seen_by
from lora_lightning.model.calling import classifier, logits_of
from lora_lightning.training.steps import run_module


class PredictionSelfTraining(SelfTraining):
    """Rounds of a classifier, checked by its predictions of all items of a target.

    Args:
        target: The items.
        limits: Of the guard; None: no guard.
        canary: A few labelled items of the target, (input, class); None: none.
        plot: A PNG of the rounds, written at the end; None: none.
        batch_size: Items in a batch.

    Attributes:
        pseudo_labels_: the current pseudo-labels; None without.
    """

    broken = "the predictions are NaN: the learning rate is too high"
    forward: Any = None
    rounds_: PredictionRounds

    def __init__(
        self, target: Target, limits: Limits | None, canary: Any, plot: Any, batch_size: int
    ):
        super().__init__(PredictionRounds(limits))
        self.target, self.plot, self.batch_size = target, plot, batch_size
        self.canary = None if canary is None else Canary(canary)
        self.pseudo_labels_: PseudoLabels | None = None

    def check(self, trainer: Trainer, module: LightningModule) -> None:
        """Connect the canary to the rounds."""
        if self.canary is not None:
            self.rounds_.canary = partial(self.canary.accuracy, partial(self.look, module))

    def predict(self, module: LightningModule) -> Predict:
        """Logits of a batch of inputs, by `forward`, or else by the module's forward."""
        network = self.network(module)
        if self.forward is not None:
            return classifier(network, self.forward)
        return lambda inputs: logits_of(run_module(module, network, inputs))

    def look(self, module: LightningModule, items: Target | None = None) -> Predicted:
        """The network's predictions of all items of the target, or of these."""
        predict, network = self.predict(module), self.network(module)
        return seen_by(predict, module, network, items or self.target, self.batch_size)

    def labelled(self) -> dict[str, Any]:
        """Numbers of accepted labels, in all and by class."""
        if self.pseudo_labels_ is None:
            return {}
        count, classes = int(self.pseudo_labels_.accepted.sum()), self.rounds_.source.shape[1]
        return {"labelled": count, "histogram": self.pseudo_labels_.histogram(classes).tolist()}
