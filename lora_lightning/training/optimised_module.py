"""`Optimised`: base class of the tasks, with AdamW and a learning-rate schedule."""

from __future__ import annotations

from typing import Any

import torch
from lightning import LightningModule

from lora_lightning.errors import ConfigError
from lora_lightning.lora.values import check_number

SCHEDULES = ("one-cycle", "cosine", "constant")


class Optimised(LightningModule):
    """A LightningModule with AdamW on what requires a gradient, the schedule stepped each batch.

    Args:
        learning_rate: Peak learning rate of AdamW.
        weight_decay: AdamW's; not applied to biases, norms and other vectors.
        schedule: ``"one-cycle"`` (warm-up, then cosine to near 0), ``"cosine"``, ``"constant"``.
        label_smoothing: For a loss that is a cross-entropy, in [0, 1).

    Raises:
        ConfigError: a value is out of range.
    """

    def __init__(
        self,
        learning_rate: float,
        weight_decay: float,
        schedule: str,
        label_smoothing: float = 0.0,
    ):
        super().__init__()
        check_number("learning_rate", learning_rate, "(0, inf)")
        check_number("weight_decay", weight_decay, "[0, inf)")
        if schedule not in SCHEDULES:
            raise ConfigError(f"schedule must be one of {', '.join(SCHEDULES)}; got {schedule!r}")
        check_number("label_smoothing", label_smoothing, "[0, 1)")
        self.learning_rate, self.weight_decay, self.schedule = learning_rate, weight_decay, schedule
        self.label_smoothing = label_smoothing

    def configure_optimizers(self) -> Any:
        """AdamW, with the schedule."""
        live = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in live if p.ndim > 1], "weight_decay": self.weight_decay},
            {"params": [p for p in live if p.ndim <= 1], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=self.learning_rate)
        if self.schedule == "constant":
            return optimizer
        scheduler = self._scheduler(optimizer, int(self.trainer.estimated_stepping_batches))
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def _scheduler(
        self, optimizer: torch.optim.Optimizer, steps: int
    ) -> torch.optim.lr_scheduler.LRScheduler:
        # One-cycle's warm-up needs at least two steps; with so few, it would not matter.
        if self.schedule == "cosine" or steps < 10:
            return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        # Momentum stays as it is: cycling it gains nothing in so few steps.
        return torch.optim.lr_scheduler.OneCycleLR(
            optimizer, self.learning_rate, steps, pct_start=0.2, cycle_momentum=False
        )
