"""`Classifier`: a timm backbone with cross-entropy, AdamW and a learning-rate schedule."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchmetrics.functional.classification import multiclass_accuracy

from lora_lightning.training.optimised_module import Optimised


class Classifier(Optimised):
    """Image classification; the network is ``self.model``, and `LoRACallback` finds it there.

    Args:
        model: The network, from images (B, 3, H, W) to logits (B, C).
        learning_rate: Peak learning rate of AdamW.
        weight_decay: AdamW's; not applied to biases, norms and other vectors.
        label_smoothing: Of the cross-entropy, in [0, 1).
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
        super().__init__(learning_rate, weight_decay, schedule, label_smoothing)
        # Convolutions run twice as fast on a CPU, and faster on a GPU, with channels last.
        self.model = model.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, C) of images (B, 3, H, W)."""
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


def likeliest(probabilities: Tensor, classes: Sequence[str]) -> tuple[str, float]:
    """The most probable class (K,), and its probability with four places."""
    index = int(probabilities.argmax())
    return classes[index], round(float(probabilities[index]), 4)
