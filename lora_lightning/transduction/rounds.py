"""`Rounds`: after each round, ask the guard, keep the best accepted state, write down what was.

Used by `TransductiveTask` and `PseudoLabelCallback`, which differ only in how they train.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.transduction.guard import Guard, Limits, Verdict
from lora_lightning.transduction.pseudo_labels import PseudoLabels
from lora_lightning.transduction.teacher import Snapshot

SOURCE_ROUND = 0  # the source model's own predictions


@dataclass
class Round:
    """One round, as it is reported.

    Attributes:
        index: 0: the source model; then 1, 2, …
        scores: Name → label-free score, as the guard gives them.
        alarms: What the guard found wrong; such a round is not kept.
        labelled: Items whose pseudo-label was accepted for the round; None without labels.
        histogram: Those by class.
        agreement_before: Part of the items that keep the label of the round before.
    """

    index: int
    scores: dict[str, float]
    alarms: list[str] = field(default_factory=list)
    labelled: int | None = None
    histogram: list[int] = field(default_factory=list)
    agreement_before: float = 1.0

    def line(self, items: int) -> str:
        """What the guard thinks, in a line."""
        labels = "" if self.labelled is None else f"{self.labelled} of {items} labelled, "
        text = (
            f"round {self.index}: {labels}agreement with the source "
            f"{self.scores.get('agreement', float('nan')):.2f}, nuclear norm "
            f"{self.scores.get('nuclear_norm', float('nan')):.2f}: "
        )
        return text + (f"rejected, {self.alarms[0]}" if self.alarms else "accepted")


class Rounds:
    """The course of an adaptation without labels.

    Args:
        source: (N, K) probabilities by the source model.
        neighbours: (N, k) for the guard; None: unknown.
        limits: Of the guard; None: no guard, every round is accepted.

    Attributes:
        history_: the rounds, the source first.
        accepted_: index of the round whose state is kept; 0: the source.
        probabilities_: (N, K) of that round.
        changed_in_: (N,) the accepted round in which each item got the label it has; 0: never.
        termination_condition_: why it ended; "" while it goes on.
    """

    def __init__(self, source: Tensor, neighbours: Tensor | None, limits: Limits | None):
        self.guard = Guard(source, neighbours, limits)
        self.guarded = limits is not None
        self.source = source
        self.history_ = [Round(SOURCE_ROUND, self.guard.check(source).scores)]
        self.accepted_, self.probabilities_ = SOURCE_ROUND, source
        self.changed_in_ = torch.zeros(len(source), dtype=torch.int64)
        self.termination_condition_ = ""
        self._previous = source.argmax(dim=1)
        self._best: Snapshot | None = None

    def keep_source(self, model: nn.Module) -> None:
        """The state to fall back to."""
        self._best = Snapshot(model)

    def judge(
        self, model: nn.Module, probabilities: Tensor, labels: PseudoLabels | None = None
    ) -> Round:
        """Take a round in; `labels` are those that it was trained with."""
        verdict = self.guard.check(probabilities)
        if not self.guarded:
            verdict = Verdict(verdict.scores)
        now = torch.nan_to_num(probabilities).argmax(dim=1)
        found = Round(
            len(self.history_),
            verdict.scores,
            verdict.alarms,
            None if labels is None else int(labels.accepted.sum()),
            [] if labels is None else labels.histogram(probabilities.shape[1]).tolist(),
            float((now == self._previous).double().mean()),
        )
        self.history_.append(found)
        self._previous = now
        if verdict.accepted:
            self.changed_in_[now != self.probabilities_.argmax(dim=1)] = found.index
            self.changed_in_[now == self.source.argmax(dim=1)] = SOURCE_ROUND
            self.accepted_, self.probabilities_ = found.index, probabilities
            self._best = Snapshot(model)
        else:
            self.termination_condition_ = f"alarm in round {found.index}: {found.alarms[0]}"
        return found

    def restore(self, model: nn.Module) -> None:
        """Bring the best accepted state back."""
        if self._best is not None:
            self._best.restore(model)
        self.termination_condition_ = self.termination_condition_ or "all rounds done"

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint: plain types and tensors."""
        return {
            "source": self.source,
            "neighbours": self.guard.neighbours,
            "history": [asdict(r) for r in self.history_],
            "accepted": self.accepted_,
            "probabilities": self.probabilities_,
            "changed_in": self.changed_in_,
            "previous": self._previous,
            "best": self._best.state_dict() if self._best else None,
        }

    def load_state_dict(self, state: dict[str, Any], model: nn.Module) -> None:
        """From a checkpoint; the model may have left the source behind."""
        self.source = state["source"]
        self.guard = Guard(self.source, state["neighbours"], self.guard.limits)
        self.history_ = [Round(**r) for r in state["history"]]
        self.accepted_, self.probabilities_ = state["accepted"], state["probabilities"]
        self.changed_in_, self._previous = state["changed_in"], state["previous"]
        if state["best"] is not None:
            self._best = Snapshot(model)
            self._best.load_state_dict(state["best"])
