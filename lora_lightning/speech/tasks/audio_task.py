"""`AudioTask`: base class of the tasks on recordings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torchmetrics import Metric

from lora_lightning.speech.data.utterances import AudioBatch
from lora_lightning.training.optimised_module import Optimised


class AudioTask(Optimised):
    """The network is ``self.model``; logs ``train_loss``, and metrics of whole epochs.

    A subclass defines `loss`, and `compared` for its metrics.

    Args:
        model: The network.
        metrics: Name → metric; it is logged as ``val_…`` and ``test_…``.
        learning_rate: Peak learning rate of AdamW.
        weight_decay: AdamW's; not applied to biases, norms and other vectors.
        schedule: Of the learning rate.
        label_smoothing: For a loss that is a cross-entropy, in [0, 1).

    Raises:
        ConfigError: a value is out of range.
    """

    model: Any
    loss: Callable[..., Tensor]

    def __init__(
        self,
        model: nn.Module,
        metrics: dict[str, Metric],
        learning_rate: float,
        weight_decay: float,
        schedule: str,
        label_smoothing: float = 0.0,
    ):
        super().__init__(learning_rate, weight_decay, schedule, label_smoothing)
        self.model = model
        stages = ("val", "test")
        self.metrics = nn.ModuleDict(
            {f"{stage}_{name}": m.clone() for stage in stages for name, m in metrics.items()}
        )

    def batch_loss(self, batch: AudioBatch) -> Tensor:
        """The loss of a batch."""
        return self.loss(batch)

    def compared(self, batch: AudioBatch) -> tuple[Any, Any]:
        """Predictions of a batch, and what they should be."""
        raise NotImplementedError

    def on_fit_start(self) -> None:
        """Begin with metrics that can be updated; `Trainer.validate` leaves inference tensors."""
        for metric in self.metrics.values():
            metric.reset()  # type: ignore[operator]

    def training_step(self, batch: AudioBatch, batch_idx: int) -> Tensor:
        """The loss of a batch."""
        loss = self.batch_loss(batch)
        self.log("train_loss", loss, batch_size=len(batch))
        return loss

    def validation_step(self, batch: AudioBatch, batch_idx: int) -> None:
        """Adds a batch to the metrics ``val_…``."""
        self._measure(batch, "val")

    def test_step(self, batch: AudioBatch, batch_idx: int) -> None:
        """Adds a batch to the metrics ``test_…``."""
        self._measure(batch, "test")

    def _measure(self, batch: AudioBatch, stage: str) -> None:
        compared = self.compared(batch)
        for name, metric in self.metrics.items():
            if name.startswith(f"{stage}_"):
                metric.update(*compared)  # type: ignore[operator]
                entry: Any = metric
                self.log(name, entry, on_epoch=True, on_step=False, batch_size=len(batch))
