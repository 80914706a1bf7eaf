"""`TaskInRounds`, a task with self-training of its own, and `TaskRounds`, its callback."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from lora_lightning.adaptation.self_training import SelfTraining
from lora_lightning.training.launch import COURSE
from lora_lightning.training.optimised_module import Optimised


class TaskRounds(SelfTraining):
    """A `SelfTraining` that belongs to one task, the module in training."""

    def check(self, trainer: Trainer, module: Any) -> None:
        """Also let the last round decide where the learning rate falls: its peak is too early."""
        super().check(trainer, module)
        self.each_counts = module.schedule == "constant"

    def due_at_end(self, trainer: Trainer) -> bool:
        """Whether the last round decides, and is still to be ended."""
        return not self.each_counts and trainer.global_step > self._judged_at

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave a trainer that goes on with another module; Lightning would keep it there."""
        if getattr(pl_module, COURSE, None) is self:
            super().setup(trainer, pl_module, stage)
        else:
            trainer.callbacks = [c for c in _callbacks(trainer) if c is not self]  # type: ignore[attr-defined]


class TaskInRounds(Optimised):
    """A module whose rounds are run by the callback ``_course``."""

    _course: Any

    def configure_callbacks(self) -> Any:
        """The callback that runs the rounds."""
        return [self._course]

    def setup(self, stage: str) -> None:
        """Add the rounds where a subclass's own `configure_callbacks` leaves them out."""
        callbacks = _callbacks(self.trainer)
        if self._course not in callbacks:
            last = [c for c in callbacks if isinstance(c, Checkpoint)]  # after a round's end
            others = [c for c in callbacks if c not in last]
            self.trainer.callbacks = [*others, self._course, *last]  # type: ignore[attr-defined]


def _callbacks(trainer: Trainer) -> list[Callback]:
    found: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return found
