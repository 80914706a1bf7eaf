"""`RankSchedule`: rank pruning on the steps of a Trainer."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.optim import Optimizer

from lora_lightning.errors import ConfigError
from lora_lightning.model import state as states
from lora_lightning.model.compression import update_report
from lora_lightning.training.injection import state_in
from lora_lightning.training.steps import gradient_scale

if TYPE_CHECKING:
    from lora_lightning.model.data_driven.prune import Pruner

BEGIN, END = 0.1, 0.7  # parts of all steps between which ranks fall


class RankSchedule:
    """Runs `Pruner` at the right steps of a fit; does nothing without `to`.

    Args:
        to: Mean rank at the end; None: nothing is pruned.
    """

    def __init__(self, to: float | None):
        self.to = to
        self._pruner: Pruner | None = None
        self._restored: dict[str, Any] | None = None
        self._steps = 0  # of the schedule
        self._acted = 0  # how many of them were over at the last pruning
        self._stepped = 0  # the optimizers' steps then
        self._optimizers: list[Optimizer] = []

    def start(self, trainer: Trainer, backbone: nn.Module, name: str) -> None:
        """Begin, or resume from a checkpoint.

        Raises:
            ConfigError: the trainer cannot say how many steps it will take.
        """
        if self.to is None:
            return
        from lora_lightning.model.data_driven.prune import Pruner

        steps = trainer.estimated_stepping_batches
        if not 0 <= steps < math.inf:  # -1: batches without end, and no max_steps
            raise ConfigError(
                "prune_to lowers ranks by a schedule over all steps, and this trainer sets no end: "
                "give it max_steps or max_epochs, and with max_epochs a loader that has a length"
            )
        factors = states.named_factors(backbone, name)
        self._steps, self._optimizers = int(steps), trainer.optimizers
        self._acted, self._stepped = self._over(trainer), trainer.global_step
        self._pruner = Pruner(factors, self.to, math.ceil(BEGIN * steps), math.ceil(END * steps))
        if self._restored is not None:
            self._acted = self._restored["acted"]
            self._pruner.load_state_dict(self._restored)
            self._restored = None

    def _over(self, trainer: Trainer) -> int:
        """How many of the schedule's steps are over.

        The schedule counts batches, or groups of batches with accumulated gradients. With manual
        optimization there may be several optimizer steps in one batch, or none.
        """
        over = [0]
        batches = trainer.num_training_batches * max(trainer.max_epochs or 0, 0)
        if 0 < batches < math.inf:
            progress: Any = trainer.fit_loop.epoch_loop.batch_progress.total
            over.append(self._steps * progress.processed // int(batches))
        if trainer.max_steps > 0:
            over.append(self._steps * trainer.global_step // trainer.max_steps)
        return max(over)

    def before_step(self, trainer: Trainer, optimizer: Any) -> None:
        """Called with accumulated gradients."""
        if self._pruner is not None:
            self._pruner.observe(self._acted, gradient_scale(trainer, optimizer))

    def after_batch(self, trainer: Trainer) -> dict[str, float]:
        """What to log: the mean rank, where it may have changed."""
        # Between steps there may be partly accumulated gradients of the present directions.
        if self._pruner is None or trainer.global_step == self._stepped:
            return {}
        self._stepped = trainer.global_step
        since, self._acted = self._acted, self._over(trainer)
        if not self._pruner.act(self._acted, trainer.optimizers, since):
            return {}
        ranks = self._pruner.ranks()
        return {"mean_rank": sum(ranks.values()) / len(ranks)}

    def finish(self, backbone: nn.Module, name: str) -> None:
        """Remove the pruned directions, and update the report."""
        if self._pruner is None:
            return
        # Another callback may have put factors of another rank in the old ones' place.
        self._pruner.factors = states.named_factors(backbone, name)
        ranks = self._pruner.finish(self._optimizers)
        if sum(ranks.values()) > self._pruner.wanted(self._pruner.last):
            rank_zero_warn(
                f"prune_to={self.to}: the fit ended at a mean rank of "
                f"{sum(ranks.values()) / len(ranks):.3g}. Ranks fall between {BEGIN:.0%} and "
                f"{END:.0%} of the steps that the trainer announces: let it take them, or give it "
                "no more than it will take (max_epochs, max_steps)"
            )
        from lora_lightning.model.data_driven.prune import rescale

        state = state_in(backbone)
        # A checkpoint holds ranks and no scalings: loading computes the scaling from the rank.
        scale = state.configs[name].scale
        for f in self._pruner.factors.values():
            rescale(f, scale(f.spec.rank, f.spec.alpha), self._optimizers)
        update_report(state, name, self._pruner.factors)
        self._pruner, self._optimizers = None, []

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint; empty where nothing is pruned."""
        return {"acted": self._acted, **self._pruner.state_dict()} if self._pruner else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keep what `state_dict` gave for the next `start`."""
        self._restored = state or None
