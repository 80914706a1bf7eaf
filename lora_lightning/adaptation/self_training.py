"""`SelfTraining`: self-training in rounds as a callback, each round checked by a guard."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lora_lightning.adaptation.guard import Verdict
from lora_lightning.adaptation.resumable_loader import Position, begin_next_epoch
from lora_lightning.adaptation.rounds import Round, print_wrapped
from lora_lightning.adaptation.teacher import Teacher
from lora_lightning.errors import ConfigError, DataError
from lora_lightning.training.launch import LaunchedCallback


def _read(name: str, what: str) -> Any:
    return property(lambda self: getattr(self.rounds_, name), doc=what)


class Course:
    """Attributes of a training in rounds, read from `rounds_`."""

    rounds_: Any
    history_: Any = _read("history_", "The rounds, the source first.")
    accepted_: Any = _read("accepted_", "Index of the round whose state is kept; 0: the source.")
    changed_in_: Any = _read("changed_in_", "The accepted round in which each item got its label.")
    termination_condition_: Any = _read("termination_condition_", 'Why it ended; "" before.')

    @property
    def keeps_source(self) -> bool:
        """Whether the source model was kept: then `LoRACallback` writes no file."""
        return bool(self.history_) and not self.accepted_


class SelfTraining(Course, LaunchedCallback):
    """Rounds within a fit: predict the target, check, keep the best state, label the next round.

    A subclass defines the predictions (`look`), the labels made of them (`label`), their use
    (`use`), and when a round is due. At the first alarm training stops; at the end the last
    accepted state is restored, or else the source model. A checkpoint holds the rounds: a resumed
    fit does not take the adapted model for the source.

    Attributes:
        rounds_: the `Rounds`, their history and best state.
    """

    broken = ""  # the alarm where predictions are invalid; "": the error's message
    # Whether each round may be kept, and an alarm ends the training; else the last round alone is
    # kept or not, and only what further training cannot mend ends it.
    each_counts = True
    teacher_decay: float | None = None
    plot: Any = None

    def __init__(self, rounds: Any, position: Position | None = None):
        self.rounds_ = rounds
        self.position = position or Position()
        self._labels: Any = None
        self._teacher: Teacher | None = None
        self._judged_at = 0
        self._last: Any = None  # predictions at the end of the last round
        self._resumed: dict[str, Any] | None = None

    # ---- what a subclass defines -----------------------------------------------------------

    def check(self, trainer: Trainer, module: LightningModule) -> None:
        """Refuse unsuitable modules and settings, when the fit starts."""

    def check_loader(self, trainer: Trainer) -> None:
        """Refuse another training loader, when training starts."""

    def network(self, module: LightningModule) -> nn.Module:
        """The adapted network."""
        return module.get_submodule("model")

    def look(self, module: LightningModule) -> Any:
        """The model's predictions of the target."""
        raise NotImplementedError

    def label(self, now: Any) -> Any:
        """The next round's labels from these predictions, as plain types and tensors."""

    def use(self, labels: Any) -> None:
        """Hand labels to the training data."""

    def labelled(self) -> dict[str, Any]:
        """Numbers of labels of the round, for `Rounds.end_round`."""
        return {}

    def due(self, trainer: Trainer, epochs: int) -> bool:
        """Whether a round ends with the epoch that ends now, after so many epochs."""
        return True

    def due_at_end(self, trainer: Trainer) -> bool:
        """Whether a round ends with the training."""
        return False

    def start(self, module: LightningModule, source: Any) -> None:
        """Start the rounds with the source model's predictions."""
        self.rounds_.start(self.network(module), source)
        self._learn(source)

    # ---- hooks -----------------------------------------------------------------------------

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Predict the target by the source model, unless the fit is resumed."""
        self.check(trainer, pl_module)
        self._teacher, self._judged_at, self._last = None, 0, None
        if self._resumed is None:
            self.start(pl_module, self.look(pl_module))
            return
        self.rounds_.load_state_dict(self._resumed["rounds"])
        self.position.load_state_dict(self._resumed["position"])
        self._judged_at, self._labels = self._resumed["judged_at"], self._resumed["labels"]
        self.use(self._labels)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the teacher, now that the factors are initialised."""
        self.check_loader(trainer)
        state, self._resumed = self._resumed, None
        self.position.most = trainer.num_training_batches
        if self.teacher_decay is not None:
            self._teacher = Teacher(self.network(pl_module), self.teacher_decay)
            if state is not None and state["teacher"] is not None:
                self._teacher.load_state_dict(state["teacher"])
        if state is not None:
            begin_next_epoch(trainer)
            every = trainer.reload_dataloaders_every_n_epochs  # type: ignore[attr-defined]
            self.position.iterators = 2 if every and trainer.current_epoch % every == 0 else 1
            if self.position.at_last_batch:
                # Lightning is in the next epoch, without having called on_train_epoch_end.
                with self.position.resuming():
                    self._end_epoch(trainer, pl_module, trainer.current_epoch)
        if self.termination_condition_:
            print_wrapped(pl_module, self.termination_condition_)
            trainer.should_stop = True

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that checkpoints from now on are of mid-epoch."""
        self.position.epoch_ended = False

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Update the teacher."""
        if self._teacher is not None:
            self._teacher.update(self.network(pl_module))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End a round, where one is due."""
        self._end_epoch(trainer, pl_module, trainer.current_epoch + 1)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the last round and restore the best state, before an adapter file is written."""
        if self.due_at_end(trainer):
            self.end_round(trainer, pl_module)
        if not self.each_counts and self._judged_at and not self.history_[-1].alarms:
            now = self.look(pl_module) if self._last is None else self._last  # None: resumed
            self.rounds_.keep_last(self.network(pl_module), now)
        self.rounds_.finish(self.network(pl_module))
        if self.plot is not None and trainer.is_global_zero:
            self.rounds_.draw(self.plot)

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        if not self.history_:
            return {}
        return {
            "rounds": self.rounds_.state_dict(),
            "labels": self._labels,
            "judged_at": self._judged_at,
            "position": self.position.state_dict(),
            "teacher": self._teacher.state_dict() if self._teacher else None,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From a checkpoint; applied when the fit starts."""
        self._resumed = state_dict or None

    def held(self) -> dict[str, Any]:
        """For the process that started this one: a checkpoint, and why the training ended."""
        state = tree_map_only(Tensor, lambda t: t.detach().cpu(), self.state_dict())
        return {"state": state, "why": self.termination_condition_}

    def take(self, trainer: Trainer, pl_module: LightningModule, held: dict[str, Any]) -> None:
        """The rounds and labels of the process that was started."""
        if state := held["state"]:
            self.rounds_.load_state_dict(state["rounds"])
            self.rounds_.termination_condition_ = held["why"]
            self._labels = state["labels"]
            self.use(self._labels)

    # ---- rounds ----------------------------------------------------------------------------

    def end_round(self, trainer: Trainer, module: LightningModule) -> None:
        """Check a round; stop at an alarm."""
        self._judged_at = trainer.global_step
        now, verdict = None, None
        try:
            now = self.look(module)
        except (ConfigError, DataError) as error:
            verdict = Verdict({}, [self.broken or str(error)], final=True)
        self._last = now
        found = self.judge(module, now, verdict, self.each_counts)
        if found.alarms and (self.each_counts or found.final):
            self.rounds_.termination_condition_ = f"alarm in round {found.index}: {found.alarms[0]}"
            trainer.should_stop = True

    def judge(
        self, module: LightningModule, now: Any, verdict: Verdict | None = None, keep: bool = True
    ) -> Round:
        """End a round with these predictions; where accepted, they label the next."""
        network, labels = self.network(module), self.labelled()
        found: Round = self.rounds_.end_round(network, now, verdict, keep=keep, **labels)
        found.tell(module, len(self.rounds_.source))
        if found.alarms:
            return found
        if self._teacher is not None:
            with self._teacher.applied(network):
                now = self.look(module)
        self._learn(now)
        return found

    def _end_epoch(self, trainer: Trainer, module: LightningModule, epochs: int) -> None:
        self.position.epoch_ended = True
        if self.due(trainer, epochs):
            self.end_round(trainer, module)

    def _learn(self, now: Any) -> None:
        self._labels = self.label(now)
        self.use(self._labels)
