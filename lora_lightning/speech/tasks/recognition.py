"""`Recognition`: base class of the tasks of speech recognition."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.text import CharErrorRate, WordErrorRate

from lora_lightning.errors import ConfigError, DataError
from lora_lightning.speech.data.utterances import AudioBatch
from lora_lightning.speech.tasks.audio_task import AudioTask
from lora_lightning.speech.tasks.labels import Labels


class Transcription(NamedTuple):
    """The file of a recording, and its predicted text."""

    path: str
    text: str


class Recognition(AudioTask):
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
        labels = labels or getattr(model, "labels", None)
        if labels is None:
            raise ConfigError(
                f"{type(model).__name__} has no labels of its own: give labels=Labels(symbols), "
                "with the symbol of each class"
            )
        metrics: dict[str, Metric] = {"wer": WordErrorRate(), "cer": CharErrorRate()}
        super().__init__(model, metrics, learning_rate, weight_decay, schedule)
        self.labels = labels

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

    def compared(self, batch: AudioBatch) -> tuple[list[str], list[str]]:
        """Transcripts, and what was said."""
        references = [self.labels.normalise(text) for text in batch.texts]
        return self.transcribe(batch), references

    def predict_step(self, batch: AudioBatch, batch_idx: int) -> list[Transcription]:
        """The path and the predicted text of each recording."""
        paths = [str(item.path) for item in batch.items]
        return list(map(Transcription, paths, self.transcribe(batch)))
