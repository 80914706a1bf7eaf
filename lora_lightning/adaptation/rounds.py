"""`Rounds`: history of self-training in rounds, and the best accepted state."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from lightning.pytorch import LightningModule
from torch import nn

from lora_lightning.adaptation.guard import Verdict
from lora_lightning.adaptation.teacher import Snapshot

Answers = TypeVar("Answers")
Check = Callable[[Any, Any], Verdict]  # predictions now, and by the last accepted state
SOURCE_ROUND = 0  # the source model's own predictions
NAN = float("nan")
DONE = "all rounds done"
WIDTH = 80  # of a line on the terminal


@dataclass
class Round:
    """The record of one round.

    Attributes:
        index: 0: the source model; then 1, 2, …
        scores: Name → label-free score, as the guard gives them; "agreement" always, but for NaN.
        alarms: What the guard found wrong; such a round is not kept.
        labelled: Items whose pseudo-label was accepted for the round; None without labels.
        histogram: Those by class.
        final: Whether further training cannot mend what is wrong.
    """

    index: int
    scores: dict[str, float]
    alarms: list[str] = field(default_factory=list)
    labelled: int | None = None
    histogram: list[int] = field(default_factory=list)
    final: bool = False

    def line(self, items: int) -> str:
        """The guard's result as one line of text."""
        labels = "" if self.labelled is None else f"{self.labelled} of {items} labelled, "
        told = f"agreement with the source {self.scores.get('agreement', NAN):.2f}"
        if "nuclear_norm" in self.scores:
            told += f", nuclear norm {self.scores['nuclear_norm']:.2f}"
        verdict = f"rejected, {self.alarms[0]}" if self.alarms else "accepted"
        return f"round {self.index}: {labels}{told}: {verdict}"

    def tell(self, module: LightningModule, items: int) -> None:
        """Log the scores, and print the line wrapped to the terminal."""
        trainer = module.trainer
        for logger in trainer.loggers:
            scores = {f"target/{name}": value for name, value in self.scores.items()}
            logger.log_metrics(scores, step=trainer.global_step)
        print_wrapped(module, self.line(items))


def print_wrapped(module: LightningModule, text: str) -> None:
    """Print a text wrapped to the terminal, on rank 0.

    A callback with a function ``say`` is given it instead: it has a line that says whose it is.
    """
    callbacks = module.trainer.callbacks  # type: ignore[attr-defined]
    say = next((c.say for c in callbacks if hasattr(c, "say")), None)
    if say is None:
        module.print(textwrap.fill(text, WIDTH, subsequent_indent="  "))
    elif module.trainer.is_global_zero:
        say(text)


class Rounds(Generic[Answers]):
    """The rounds of a training without labels: history, and the best accepted state.

    Args:
        guard: From the source model's predictions to a function ``check(now, accepted)`` that
            gives a `Verdict` of a round; accepted: predictions of the last accepted state, None
            before there is one.

    Attributes:
        source: predictions of the source model.
        answers_: predictions of the accepted state.
        history_: the rounds, the source first.
        accepted_: index of the round whose state is kept; 0: the source.
        changed_in_: the accepted round in which each item got the label it has.
        termination_condition_: why it ended; "" before.
    """

    def __init__(self, guard: Callable[[Answers], Check]):
        self._guard_of = guard
        self.source: Any = None
        self.answers_: Any = None
        self.history_: list[Round] = []
        self.accepted_, self.termination_condition_ = SOURCE_ROUND, ""
        self.changed_in_: Any = {}

    def start(self, model: nn.Module, source: Answers) -> None:
        """Begin with the source model and its predictions."""
        self.history_, self.accepted_, self.termination_condition_ = [], SOURCE_ROUND, ""
        self.source = self.answers_ = source
        self.check = self._guard_of(source)
        self.history_ = [Round(SOURCE_ROUND, self.check(source, None).scores)]
        self.changed_in_ = {}
        self._best = Snapshot(model)

    def end_round(
        self,
        model: nn.Module,
        now: Any,
        verdict: Verdict | None = None,
        labelled: int | None = None,
        histogram: Sequence[int] = (),
        keep: bool = True,
    ) -> Round:
        """Check a round; its state is kept where the guard accepts it.

        Args:
            model: Whose state it is.
            now: Its predictions; None: there are no valid ones, and `verdict` has an alarm.
            verdict: In place of the guard's.
            labelled: Items whose pseudo-label the round was trained with.
            histogram: Those by class.
            keep: Whether its state may be kept; if not, `keep_last` may do so.
        """
        accepted = self.answers_ if keep and self.accepted_ != SOURCE_ROUND else None
        verdict = verdict or self.check(now, accepted)
        index = len(self.history_)
        told = verdict.scores, verdict.alarms, labelled, list(histogram), verdict.final
        found = Round(index, *told)
        self.history_.append(found)
        if keep and not found.alarms:
            self._keep(model, now)
        return found

    def _keep(self, model: nn.Module, now: Any) -> None:
        index = self.history_[-1].index
        self.note(index, now)
        self.accepted_, self.answers_ = index, now
        self._best = Snapshot(model)

    def keep_last(self, model: nn.Module, now: Any) -> None:
        """Keep the state of the last round, with these predictions, unless it has an alarm."""
        if not self.history_[-1].alarms:
            self._keep(model, now)

    def restore(self, model: nn.Module) -> None:
        """Restore the best accepted state."""
        self._best.restore(model)

    def finish(self, model: nn.Module) -> None:
        """Restore the best accepted state, and log why training ended."""
        self.restore(model)
        last = self.history_[-1]
        done = f"{DONE}, the last one with an alarm: {last.alarms[0]}" if last.alarms else DONE
        self.termination_condition_ = self.termination_condition_ or done

    def draw(self, path: Path | str, classes: Sequence[str] = ()) -> None:
        """Write a plot of the rounds: scores, alarms, and the classes of the pseudo-labels."""
        from lora_lightning.report.plots.rounds import rounds_figure

        rounds_figure([asdict(r) for r in self.history_], classes).savefig(path, dpi=160)

    # ---- checkpoints -----------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint: plain types and tensors."""
        why = self.termination_condition_
        return {
            "answers": [self.packed(a) for a in (self.source, self.answers_)],
            "history": [asdict(r) for r in self.history_],
            "accepted": self.accepted_,
            "changed_in": self.changed_in_,
            "stopped": "" if why.startswith(DONE) else why,
            "best": self._best.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From a checkpoint; the model need not be at the source's state."""
        self.source, self.answers_ = map(self.unpacked, state["answers"])
        self.check = self._guard_of(self.source)
        self.history_ = [Round(**r) for r in state["history"]]
        self.accepted_, self.termination_condition_ = state["accepted"], state["stopped"]
        self.changed_in_ = state["changed_in"]
        self._best = Snapshot.of(state["best"])

    # ---- what depends on the kind of predictions -------------------------------------------

    def note(self, index: int, now: Answers) -> None:
        """Record which labels changed in an accepted round."""

    def packed(self, answers: Answers) -> Any:
        """Predictions as plain types and tensors."""
        return answers

    def unpacked(self, state: Any) -> Any:
        """The inverse of `packed`."""
        return state
