"""`FirstLook`: when adapters are verified on the first training batch."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import nn


class FirstLook:
    """Holds a `FirstBatch` until it has verified."""

    def __init__(self) -> None:
        self._first: Any = None

    def start(self, backbone: nn.Module) -> None:
        """Record the next input of the backbone."""
        from lora_lightning.training.first_batch import FirstBatch

        self._first = FirstBatch(backbone)

    def after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Verify, where that backward pass was the backbone's.

        With manual optimization, a module may begin with a step that does not use the backbone.
        """
        first = self._first
        if first is not None and (first.reached or pl_module.automatic_optimization):
            self.at_end(trainer)

    def at_end(self, trainer: Trainer) -> None:
        """Verify, if that was not done."""
        first, self._first = self._first, None
        if first is not None:
            first.verify(trainer)

    def close(self) -> None:
        """Stop recording, where the fit ended before its first backward pass."""
        first, self._first = self._first, None
        if first is not None:
            first.close()
