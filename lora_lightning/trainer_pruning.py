"""`RankSchedule`: pruning of ranks by a trainer's steps."""

from __future__ import annotations

import math
from typing import Any

from lightning.pytorch import Trainer
from torch import nn

from lora_lightning import state as states
from lora_lightning.compression import report_anew
from lora_lightning.errors import ConfigError
from lora_lightning.pruning import Pruner

BEGIN, END = 0.1, 0.7  # parts of all steps between which ranks fall


class RankSchedule:
    """Lets `lora_lightning.pruning.Pruner` act at the right steps of a fit; idle without `to`.

    Args:
        to: Mean rank at the end; None: nothing is pruned.
    """

    def __init__(self, to: float | None):
        self.to = to
        self._pruner: Pruner | None = None
        self._restored: dict[str, Any] | None = None
        self._acted = -1

    def start(self, trainer: Trainer, backbone: nn.Module, name: str) -> None:
        """Begin, or go on from a checkpoint.

        Raises:
            ConfigError: the trainer does not say how many steps it will take.
        """
        if self.to is None:
            return
        steps = trainer.estimated_stepping_batches
        if not math.isfinite(steps):
            raise ConfigError(
                "prune_to lowers ranks by a schedule over all steps, and this trainer sets no end: "
                "give it max_steps or max_epochs"
            )
        factors = states.named_factors(backbone, name)
        self._pruner = Pruner(factors, self.to, math.ceil(BEGIN * steps), math.ceil(END * steps))
        if self._restored is not None:
            self._acted = self._restored["acted"]
            self._pruner.load_state_dict(self._restored)
            self._restored = None

    def before_step(self, trainer: Trainer) -> None:
        """The gradients are whole, and not scaled."""
        if self._pruner is not None:
            self._pruner.observe(trainer.global_step)

    def after_batch(self, trainer: Trainer) -> dict[str, float]:
        """What to log: the mean rank, where it may have changed."""
        step = trainer.global_step
        # With accumulated gradients several batches end at one step.
        if self._pruner is None or step == self._acted:
            return {}
        self._acted = step
        if not self._pruner.act(step, trainer.optimizers):
            return {}
        ranks = self._pruner.ranks()
        return {"lora/mean_rank": sum(ranks.values()) / len(ranks)}

    def finish(self, backbone: nn.Module, name: str) -> None:
        """Take out what was dropped, and bring the report up to date."""
        if self._pruner is None:
            return
        # Another callback may have put factors of another rank in the old ones' place.
        self._pruner.factors = states.named_factors(backbone, name)
        self._pruner.finish()
        self._pruner = None
        state = states.state_of(backbone)
        assert state is not None
        report_anew(state, name, states.named_factors(backbone, name))

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint; empty where nothing is pruned."""
        return {"acted": self._acted, **self._pruner.state_dict()} if self._pruner else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What `state_dict` gave; used by the next `start`."""
        self._restored = state or None
