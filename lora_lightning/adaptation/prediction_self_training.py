"""Self-training of a classifier in rounds, checked by its predictions."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lora_lightning.adaptation.guard import NAN, Guard, Limits, Verdict
from lora_lightning.adaptation.neighbours import nearest
from lora_lightning.adaptation.pseudo_labels import PseudoLabels
from lora_lightning.adaptation.rounds import SOURCE_ROUND, Check, Round, Rounds
from lora_lightning.adaptation.self_training import SelfTraining
from lora_lightning.adaptation.target import Canary, Predict, Predicted, Target, seen_by
from lora_lightning.model.calling import classifier, logits_of
from lora_lightning.training.steps import run_module

NEIGHBOURS = 5  # of each item, for the guard


class PredictionRounds(Rounds[Tensor]):
    """Rounds of a classifier, by the probabilities (N, K) of the target's items.

    Args:
        limits: Of the guard; None: no guard, every round is accepted.

    Attributes:
        canary: gives the accuracy on a few labelled items, by the model as it is; a round that
            loses on them raises an alarm. None: there are none.
        changed_in_: (N,) the accepted round in which each item got the label it has; 0: never.
        guard: the `Guard`.
    """

    def __init__(self, limits: Limits | None):
        super().__init__(self._check_of)
        self.limits = limits
        self.canary: Callable[[], float] | None = None
        self._begin: tuple[Tensor, bool, Tensor | None] | None = None
        self._near: Tensor | None = None

    @property
    def untrained(self) -> Tensor | None:
        """(N, K) answers that took no training, for where no trained state is kept."""
        return None if self._begin is None else self._begin[2]

    @property
    def probabilities_(self) -> Tensor:
        """(N, K) by the accepted state."""
        found: Tensor = self.answers_
        return found

    def start(self, model: nn.Module, source: Any) -> None:
        """Begin with the source model and its predictions of the target, a `Predicted`."""
        features = source.features
        self._near = nearest(features, NEIGHBOURS)[0] if len(features) > 1 else None
        self._begin = None
        super().start(model, source.probabilities)
        self.changed_in_ = torch.zeros(len(self.source), dtype=torch.int64, device="cpu")

    def end_round(self, model: nn.Module, now: Any, *args: Any, **labelled: Any) -> Round:
        """Check a round by the model's predictions of the target, a `Predicted`."""
        probabilities = None if now is None else now.probabilities
        return super().end_round(model, probabilities, *args, **labelled)

    def keep_last(self, model: nn.Module, now: Any) -> None:
        """See `Rounds.keep_last`; of a `Predicted`."""
        super().keep_last(model, now.probabilities)

    def finish(self, model: nn.Module) -> None:
        """Also take the answers that took no training, where no trained state is kept."""
        super().finish(model)
        if self.untrained is not None and not self.accepted_:
            self.note(self.history_[-1].index, self.untrained)
            self.answers_ = self.untrained
            self.termination_condition_ += "; class centroids answer for these items, untrained"

    def _check_of(self, source: Tensor) -> Check:
        self.guard = Guard(source, self._near, self.limits)
        if self._begin is not None:
            self.guard.begin_at(*self._begin)
        return self._verdict

    def begin_at(
        self, probabilities: Tensor, rises: bool = False, untrained: Tensor | None = None
    ) -> None:
        """Take these predictions for those at the start of training, see `Guard.begin_at`."""
        self._begin = probabilities, rises, untrained
        self.guard.begin_at(*self._begin)

    def _verdict(self, now: Tensor, accepted: Tensor | None) -> Verdict:
        found = self.guard.check(now, accepted)
        alarms = found.alarms if self.limits is not None else []
        final = found.final and bool(alarms)
        if self.canary is None:
            return Verdict(found.scores, alarms, final)
        accuracy = self.canary()
        before = self.history_[SOURCE_ROUND].scores["canary"] if self.history_ else accuracy
        if accuracy < before:
            fall = f"the canary's accuracy falls from {before:.1%} to {accuracy:.1%}"
            alarms = [*alarms, fall]
        return Verdict({**found.scores, "canary": accuracy}, alarms, final)

    def note(self, index: int, now: Tensor) -> None:
        """Record the round in which each item got its present label."""
        labels = now.argmax(dim=1)
        self.changed_in_[labels != self.answers_.argmax(dim=1)] = index
        self.changed_in_[labels == self.source.argmax(dim=1)] = SOURCE_ROUND

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {**super().state_dict(), "neighbours": self._near, "begin": self._begin}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From a checkpoint."""
        self._near, begin = state["neighbours"], state.get("begin")
        self._begin = begin and (*begin, None)[:3]  # of earlier versions without the third
        super().load_state_dict(state)


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

    broken = NAN.format("predictions")
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
