"""Tasks with one output per recording: `AudioClassification` and `AudioRegression`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchmetrics import MeanAbsoluteError, Metric, PearsonCorrCoef
from torchmetrics.classification import MulticlassAccuracy

from lora_lightning.errors import ConfigError, DataError
from lora_lightning.lora.values import check_choice
from lora_lightning.registry import unknown
from lora_lightning.speech.data.utterances import AudioBatch, Utterance
from lora_lightning.speech.tasks.audio_task import AudioTask
from lora_lightning.speech.tasks.recognisers import frame_mask


class Pooled(nn.Module):
    """An encoder, the mean over the frames of its output, and a linear head.

    Args:
        encoder: From waveforms (B, T) and samples (B,) to features (B, F, D), or to those and
            their frames (B,), as torchaudio's ``Wav2Vec2Model`` and `ConformerCTC`; or to
            features (B, D) of the whole recording.
        dim: D.
        outputs: Width of the head's output.

    Raises:
        ConfigError: the encoder's features have another width.
    """

    def __init__(self, encoder: nn.Module, dim: int, outputs: int):
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(dim, outputs)

    def forward(self, waveforms: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Waveforms (B, T), samples (B,) → (B, outputs)."""
        found = self.encoder(waveforms, lengths)
        features, frames = found if isinstance(found, tuple) else (found, None)
        if features.shape[-1] != self.head.in_features:
            raise ConfigError(
                f"{type(self.encoder).__name__} gives {features.shape[-1]} features, the head "
                f"takes {self.head.in_features}; give dim={features.shape[-1]}"
            )
        if features.ndim == 2:
            return self.head(features)  # type: ignore[no-any-return]
        if frames is None:
            return self.head(features.mean(dim=1))  # type: ignore[no-any-return]
        mask = frame_mask(frames, features.shape[1])[:, :, None]
        mean = (features * mask).sum(dim=1) / frames[:, None].clamp_min(1)
        return self.head(mean)  # type: ignore[no-any-return]


class _UtteranceTask(AudioTask):
    """Base class of both tasks."""

    def forward(self, waveforms: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Waveforms (B, T), samples (B,) → the model's output (B, outputs)."""
        found: Tensor = self.model(waveforms, lengths)
        return found

    def answer(self, output: Tensor) -> Tensor:
        """The predictions, which the metrics compare with the targets."""
        raise NotImplementedError

    def targets(self, items: Sequence[Utterance]) -> Tensor:
        """The targets (B,) of recordings."""
        raise NotImplementedError

    def loss(self, output: Tensor, targets: Tensor) -> Tensor:
        """The loss of an output (B, outputs)."""
        raise NotImplementedError

    def batch_loss(self, batch: AudioBatch) -> Tensor:
        """The loss of a batch."""
        return self.loss(*self._with_targets(batch))

    def compared(self, batch: AudioBatch) -> tuple[Tensor, Tensor]:
        """Predictions and targets."""
        output, targets = self._with_targets(batch)
        return self.answer(output), targets

    def _with_targets(self, batch: AudioBatch) -> tuple[Tensor, Tensor]:
        output = self(batch.waveforms, batch.lengths)
        return output, self.targets(batch.items).to(output.device)


class AudioClassification(_UtteranceTask):
    """A class for each recording (a keyword, a speaker), from ``Utterance.target``.

    Args:
        model: From waveforms (B, T) and samples (B,) to logits (B, C), such as `Pooled`.
        classes: Their names, in the order of the logits.
        learning_rate: Peak learning rate of AdamW.
        weight_decay: AdamW's; not applied to biases, norms and other vectors.
        schedule: ``"one-cycle"`` (warm-up, then cosine to near 0), ``"cosine"``, ``"constant"``.
        label_smoothing: Of the cross-entropy, in [0, 1).

    Logs ``train_loss`` (cross-entropy), ``val_accuracy`` and ``test_accuracy``.

    Raises:
        ConfigError: a value is out of range, there are fewer than two classes, or the model
            has more or fewer.
        DataError: a recording's target is none of the classes.
    """

    def __init__(
        self,
        model: nn.Module,
        classes: Sequence[str],
        learning_rate: float = 1e-3,
        weight_decay: float = 0.01,
        schedule: str = "one-cycle",
        label_smoothing: float = 0.0,
    ):
        if len(set(classes)) < 2 or len(set(classes)) < len(classes):
            raise ConfigError(f"classes must be two or more different names, got {list(classes)}")
        metrics: dict[str, Metric] = {"accuracy": MulticlassAccuracy(len(classes), average="micro")}
        super().__init__(model, metrics, learning_rate, weight_decay, schedule, label_smoothing)
        self.classes = list(classes)

    def forward(self, waveforms: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Waveforms (B, T), samples (B,) → logits (B, C)."""
        logits = super().forward(waveforms, lengths)
        if logits.shape[1] != len(self.classes):
            raise ConfigError(
                f"{type(self.model).__name__} gives {logits.shape[1]} numbers for each recording, "
                f"expected one for each of the {len(self.classes)} classes"
            )
        return logits

    def loss(self, output: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy of logits (B, C)."""
        return nn.functional.cross_entropy(output, targets, label_smoothing=self.label_smoothing)

    def answer(self, output: Tensor) -> Tensor:
        """The most likely class."""
        return output.argmax(dim=1)

    def targets(self, items: Sequence[Utterance]) -> Tensor:
        """The class index of each recording."""
        for item in items:
            if item.target not in self.classes:
                what = unknown("class", str(item.target), self.classes)
                raise DataError(f"{item.path}: {what}" if item.target else f"{item.path}: no class")
        return torch.tensor([self.classes.index(str(item.target)) for item in items], device="cpu")

    def predict_step(self, batch: AudioBatch, batch_idx: int) -> Tensor:
        """Probabilities (B, C)."""
        found: Tensor = self(batch.waveforms, batch.lengths).softmax(dim=1)
        return found


class AudioRegression(_UtteranceTask):
    """A number for each recording (an age, a quality), from ``Utterance.target``.

    Args:
        model: From waveforms (B, T) and samples (B,) to (B, 1) or (B,), such as `Pooled`.
        learning_rate: Peak learning rate of AdamW.
        weight_decay: AdamW's; not applied to biases, norms and other vectors.
        schedule: ``"one-cycle"`` (warm-up, then cosine to near 0), ``"cosine"``, ``"constant"``.
        error: ``"squared"`` or ``"absolute"``.

    Logs ``train_loss``, and the mean absolute error and Pearson's correlation as ``val_mae``,
    ``val_correlation``, ``test_mae`` and ``test_correlation``.

    Raises:
        ConfigError: a value is out of range.
        DataError: a recording's target is no finite number.
    """

    def __init__(
        self,
        model: nn.Module,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.01,
        schedule: str = "one-cycle",
        error: str = "squared",
    ):
        check_choice("error", error, ("squared", "absolute"))
        metrics: dict[str, Metric] = {"mae": MeanAbsoluteError(), "correlation": PearsonCorrCoef()}
        super().__init__(model, metrics, learning_rate, weight_decay, schedule)
        self.error = error

    def loss(self, output: Tensor, targets: Tensor) -> Tensor:
        """The mean squared or absolute error."""
        compare = nn.functional.mse_loss if self.error == "squared" else nn.functional.l1_loss
        return compare(self.answer(output), targets)

    def answer(self, output: Tensor) -> Tensor:
        """The numbers (B,)."""
        return output.reshape(len(output), -1)[:, 0]

    def targets(self, items: Sequence[Utterance]) -> Tensor:
        """The number of each recording."""
        for item in items:
            number = isinstance(item.target, (int, float)) and math.isfinite(item.target)
            if not number:
                raise DataError(f"{item.path}: target must be a finite number, got {item.target!r}")
        return torch.tensor([float(item.target or 0.0) for item in items], device="cpu")

    def predict_step(self, batch: AudioBatch, batch_idx: int) -> Tensor:
        """The numbers (B,)."""
        return self.answer(self(batch.waveforms, batch.lengths))
