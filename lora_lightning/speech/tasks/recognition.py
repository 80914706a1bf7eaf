"""`Recognition`: base class of the tasks of speech recognition."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchmetrics.text import CharErrorRate, WordErrorRate

from lora_lightning.errors import ConfigError, DataError
from lora_lightning.speech.data.utterances import AudioBatch
from lora_lightning.speech.tasks.labels import Labels
from lora_lightning.training.optimised_module import Optimised


class Transcription(NamedTuple):
    """The file of a recording, and its predicted text."""

    path: str
    text: str


class Recognition(Optimised):
    """A recogniser in ``self.model``; subclasses implement `loss` and `transcribe`.

    Args:
        model: The network.
        labels: The symbols of its classes; by default the model's own ``labels``.
        learning_rate: Peak learning rate of AdamW.
        weight_decay: AdamW's; not applied to biases, norms and other vectors.
        schedule: Of the learning rate.

    Raises:
        ConfigError: a value is out of range, or there are no labels.
    """

    def __init__(
        self,
        model: nn.Module,
        labels: Labels | None,
        learning_rate: float,
        weight_decay: float,
        schedule: str,
    ):
        super().__init__(learning_rate, weight_decay, schedule)
        labels = labels or getattr(model, "labels", None)
        if labels is None:
            raise ConfigError(
                f"{type(model).__name__} has no labels of its own: give labels=Labels(symbols), "
                "with the symbol of each class"
            )
        self.model, self.labels = model, labels
        self.rates = nn.ModuleDict(
            {
                f"{stage}_{name}": metric()
                for stage in ("val", "test")
                for name, metric in (("wer", WordErrorRate), ("cer", CharErrorRate))
            }
        )

    def loss(self, batch: AudioBatch) -> Tensor:
        """The loss of a batch."""
        raise NotImplementedError

    def transcribe(self, batch: AudioBatch) -> list[str]:
        """The predicted text of each recording."""
        raise NotImplementedError

    def targets(self, batch: AudioBatch) -> list[Tensor]:
        """The classes of each text.

        Raises:
            DataError: a recording without a text.
        """
        for item in batch.items:
            if not self.labels.encode(item.text or ""):
                raise DataError(f"{item.path} has no text to learn from (text={item.text!r})")
        return [torch.tensor(self.labels.encode(text), device="cpu") for text in batch.texts]

    def training_step(self, batch: AudioBatch, batch_idx: int) -> Tensor:
        """The loss of a batch."""
        loss = self.loss(batch)
        self.log("train_loss", loss, batch_size=len(batch))
        return loss

    def validation_step(self, batch: AudioBatch, batch_idx: int) -> None:
        """Adds a batch to ``val_wer`` and ``val_cer``."""
        self._measure(batch, "val")

    def test_step(self, batch: AudioBatch, batch_idx: int) -> None:
        """Adds a batch to ``test_wer`` and ``test_cer``."""
        self._measure(batch, "test")

    def predict_step(self, batch: AudioBatch, batch_idx: int) -> list[Transcription]:
        """The path and the predicted text of each recording."""
        paths = [str(item.path) for item in batch.items]
        return list(map(Transcription, paths, self.transcribe(batch)))

    def _measure(self, batch: AudioBatch, stage: str) -> None:
        references = [self.labels.normalise(text) for text in batch.texts]
        predicted = self.transcribe(batch)
        for name in (f"{stage}_wer", f"{stage}_cer"):
            rate: Any = self.rates[name]
            rate.update(predicted, references)
            self.log(name, rate, on_epoch=True, on_step=False, batch_size=len(batch))
