"""`Classifier`: a timm backbone with cross-entropy, AdamW and a learning-rate schedule."""

from __future__ import annotations

from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor, nn
from torchmetrics.functional.classification import multiclass_accuracy

from lora_lightning.errors import ConfigError

SCHEDULES = ("one-cycle", "cosine", "constant")


class Classifier(LightningModule):
    """Image classification; the network is ``self.model``, and `LoRACallback` finds it there.

    Args:
        model: The network, from pictures (B, 3, H, W) to logits (B, C).
        learning_rate: Peak learning rate of AdamW.
        weight_decay: AdamW's; not applied to biases, norms and other vectors.
        label_smoothing: Part of the target spread over all classes, in [0, 1).
        schedule: ``"one-cycle"`` (warm-up, then cosine to near 0), ``"cosine"``, ``"constant"``.

    Raises:
        ConfigError: a value is out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.01,
        label_smoothing: float = 0.0,
        schedule: str = "one-cycle",
    ):
        super().__init__()
        if not learning_rate > 0:
            raise ConfigError(f"learning_rate must be above 0, got {learning_rate}")
        if weight_decay < 0:
            raise ConfigError(f"weight_decay must be 0 or more, got {weight_decay}")
        if not 0 <= label_smoothing < 1:
            raise ConfigError(f"label_smoothing must lie in [0, 1), got {label_smoothing}")
        if schedule not in SCHEDULES:
            raise ConfigError(f"schedule must be one of {', '.join(SCHEDULES)}; got {schedule!r}")
        # Convolutions run twice as fast on a CPU, and faster on a GPU, with channels last.
        self.model = model.to(memory_format=torch.channels_last)
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        self.label_smoothing, self.schedule = label_smoothing, schedule

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, C) of pictures (B, 3, H, W)."""
        logits: Tensor = self.model(x.contiguous(memory_format=torch.channels_last))
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy of a batch."""
        x, y = batch
        loss = nn.functional.cross_entropy(self(x), y, label_smoothing=self.label_smoothing)
        self.log("train_loss", loss)
        return loss

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Logs ``test_accuracy``."""
        x, y = batch
        logits = self(x)
        accuracy = multiclass_accuracy(logits, y, logits.shape[1], average="micro")
        self.log("test_accuracy", accuracy, on_epoch=True, batch_size=len(y))

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Probabilities (B, C)."""
        probabilities: Tensor = self(batch[0]).softmax(dim=1)
        return probabilities

    def configure_optimizers(self) -> Any:
        """AdamW on what requires a gradient, with the schedule stepped at each batch."""
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
        if self.schedule == "cosine":
            return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        # Momentum stays as it is: cycling it gains nothing in so few steps.
        return torch.optim.lr_scheduler.OneCycleLR(
            optimizer, self.learning_rate, steps, pct_start=0.2, cycle_momentum=False
        )
