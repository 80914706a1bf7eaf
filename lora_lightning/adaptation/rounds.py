"""`Rounds`: after each round, ask the guard, keep the best accepted state, write down what was.

Used by `TransductiveTask` and `PseudoLabelCallback`, which differ only in how they train; how a
round is told of is that of `PseudoTranscriptCallback` as well.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lora_lightning.adaptation.guard import Guard, Limits, Verdict
from lora_lightning.adaptation.neighbours import nearest
from lora_lightning.adaptation.pseudo_labels import PseudoLabels
from lora_lightning.adaptation.target import Predicted
from lora_lightning.adaptation.teacher import Snapshot
from lora_lightning.errors import DataError

SOURCE_ROUND = 0  # the source model's own predictions
NEIGHBOURS = 5  # of each item, that the guard looks at
NAN = float("nan")
WIDTH = 80  # of a line on the terminal


@dataclass
class Round:
    """One round, as it is reported.

    Attributes:
        index: 0: the source model; then 1, 2, …
        scores: Name → label-free score, as the guard gives them; "agreement" always, but for NaN.
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
        told = f"agreement with the source {self.scores.get('agreement', NAN):.2f}"
        if "nuclear_norm" in self.scores:
            told += f", nuclear norm {self.scores['nuclear_norm']:.2f}"
        verdict = f"rejected, {self.alarms[0]}" if self.alarms else "accepted"
        return f"round {self.index}: {labels}{told}: {verdict}"

    def tell(self, module: LightningModule, items: int) -> None:
        """Log the scores and print the line."""
        trainer = module.trainer
        for logger in trainer.loggers:
            scores = {f"target/{name}": value for name, value in self.scores.items()}
            logger.log_metrics(scores, step=trainer.global_step)
        say(module, self.line(items))


def say(module: LightningModule, text: str) -> None:
    """Print what the guard thinks, in lines that fit a terminal."""
    module.print(textwrap.fill(text, WIDTH, subsequent_indent="  "))


class Rounds:
    """The course of an adaptation without labels.

    Args:
        model: The source model, the state to fall back to.
        source: What it says of the target.
        limits: Of the guard; None: no guard, every round is accepted.
        canary: Gives the accuracy on a few labelled items, by the model as it is; a round that
            loses on them sets off an alarm. None: there are none.

    Attributes:
        history_: the rounds, the source first.
        accepted_: index of the round whose state is kept; 0: the source.
        probabilities_: (N, K) of that round.
        changed_in_: (N,) the accepted round in which each item got the label it has; 0: never.
        termination_condition_: why it ended; "" while it goes on.
    """

    def __init__(
        self,
        model: nn.Module,
        source: Predicted,
        limits: Limits | None,
        canary: Callable[[], float] | None = None,
    ):
        near = nearest(source.features, NEIGHBOURS)[0] if len(source.features) > 1 else None
        self.guard = Guard(source.probabilities, near, limits)
        self.guarded = limits is not None
        self.source = source.probabilities
        self.canary = canary
        self.history_ = [Round(SOURCE_ROUND, self.guard.check(self.source).scores)]
        if canary is not None:
            self.history_[0].scores["canary"] = canary()
        self.accepted_, self.probabilities_ = SOURCE_ROUND, self.source
        self.changed_in_ = torch.zeros(len(self.source), dtype=torch.int64)
        self.termination_condition_ = ""
        self._previous = self.source.argmax(dim=1)
        self._best = Snapshot(model)

    def end_round(
        self,
        model: nn.Module,
        see: Callable[[], Predicted],
        labels: PseudoLabels | None = None,
    ) -> tuple[Round, Predicted | None]:
        """Look at the target and judge what is seen: None where the weights are broken.

        Args:
            model: Its state is kept where the guard accepts it.
            see: Gives the model's predictions.
            labels: Those that the round was trained with.
        """
        try:
            now = see()
        except DataError:  # for the guard to say
            return self._judge(model, torch.full_like(self.source, NAN), labels), None
        return self._judge(model, now.probabilities, labels), now

    def _judge(self, model: nn.Module, probabilities: Tensor, labels: PseudoLabels | None) -> Round:
        before = self.probabilities_ if self.accepted_ != SOURCE_ROUND else None
        verdict = self.guard.check(probabilities, before)
        if not self.guarded:
            verdict = Verdict(verdict.scores)
        if self.canary is not None and verdict.scores:
            verdict = self._tried(verdict, self.canary())
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

    def _tried(self, verdict: Verdict, now: float) -> Verdict:
        """The verdict with what the canary says to it."""
        before = self.history_[SOURCE_ROUND].scores["canary"]
        alarms = [*verdict.alarms]
        if now < before:
            alarms.append(f"the canary's accuracy falls from {before:.1%} to {now:.1%}")
        return Verdict({**verdict.scores, "canary": now}, alarms)

    def restore(self, model: nn.Module) -> None:
        """Bring the best accepted state back."""
        self._best.restore(model)

    def finish(self, model: nn.Module) -> None:
        """The end: the best accepted state, and why it is one."""
        self.restore(model)
        self.termination_condition_ = self.termination_condition_ or "all rounds done"

    def draw(self, path: Path | str, classes: Sequence[str] = ()) -> None:
        """Write a picture of the rounds: scores, alarms, and the classes of the pseudo-labels."""
        from lora_lightning.report.plots.rounds import rounds_figure

        rounds_figure([asdict(r) for r in self.history_], classes).savefig(path, dpi=160)

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
            "best": self._best.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From a checkpoint; the model may have left the source behind."""
        self.source = state["source"]
        self.guard = Guard(self.source, state["neighbours"], self.guard.limits)
        self.history_ = [Round(**r) for r in state["history"]]
        self.accepted_, self.probabilities_ = state["accepted"], state["probabilities"]
        self.changed_in_, self._previous = state["changed_in"], state["previous"]
        self._best.load_state_dict(state["best"])
