"""What a service answers to recordings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lora_lightning.deploy.answers import Items
from lora_lightning.deploy.intake import RecordingIntake
from lora_lightning.errors import ConfigError
from lora_lightning.model.probing import difference
from lora_lightning.speech.data.utterances import AudioBatch
from lora_lightning.speech.tasks.ctc import CTCRecognition
from lora_lightning.speech.tasks.decoding import greedy
from lora_lightning.speech.tasks.labels import Labels
from lora_lightning.speech.tasks.named_recogniser import NamedRecogniser

NEUTRAL = 1e-5  # difference by padding, relative to the largest output, that is rounding


class RecogniserAnswers:
    """Of a recogniser of speech.

    Args:
        base: The recogniser.
    """

    def __init__(self, base: NamedRecogniser):
        self.base, self.model = base, base.model
        self._task = CTCRecognition(base.model, base.labels).eval()
        self._pads = False
        self._pads = self._neutral()

    def intake(self, most_seconds: float) -> RecordingIntake:
        """Of recordings."""
        return RecordingIntake(self.base.sample_rate, most_seconds)

    def told(self, data: Mapping[str, Any]) -> Labels:
        """The symbols of the classes."""
        rate = data.get("sample_rate", self.base.sample_rate)
        if rate != self.base.sample_rate:
            raise ConfigError(
                f"it takes recordings of {rate} Hz, and the model that is served "
                f"{self.base.sample_rate} Hz: serve it from another folder"
            )
        labels = Labels(**data["labels"]) if "labels" in data else self.base.labels
        labels.must_fit(len(self.base.labels), self.base.name)
        return self.base.labels if labels == self.base.labels else labels  # kept once

    def groups(self, items: Items) -> list[list[int]]:
        """All together; those of a length, where padding changes what the model hears."""
        found: dict[int, list[int]] = {}
        for i, item in enumerate(items):
            found.setdefault(0 if self._pads else len(item), []).append(i)
        return list(found.values())

    def outputs(self, items: Items) -> list[tuple[Tensor, Tensor]]:
        """Log-probabilities (1, F, C), and how many of the frames are no padding (1,)."""
        batch = AudioBatch.of([torch.from_numpy(item) for item in items], [])
        batch = batch.to(next(self.model.parameters()).device)
        log_probs, frames = self._task(batch.waveforms, batch.lengths)
        return list(zip(log_probs.split(1), frames.split(1), strict=True))

    def said(self, output: tuple[Tensor, Tensor], told: Labels, top: int) -> dict[str, Any]:
        """The text."""
        return {"text": greedy(*output, told)[0]}

    @torch.inference_mode()
    def _neutral(self) -> bool:
        """Whether a recording's output is the same beside a longer one.

        Not of wav2vec2-base, whose GroupNorm normalises over the padding as well.
        """
        noise = np.random.default_rng(0).normal(0, 0.1, self.base.sample_rate).astype(np.float32)
        short = noise[: len(noise) // 2]
        (alone, frames), (padded, _) = self.outputs([short])[0], self.outputs([short, noise])[0]
        n = int(frames)
        return difference([padded[:, :n]], [alone[:, :n]]) <= NEUTRAL
