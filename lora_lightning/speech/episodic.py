"""`SingleUtterance`: episodic test-time adaptation of a recogniser (SUTA)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lora_lightning.adaptation.teacher import Snapshot
from lora_lightning.errors import ConfigError
from lora_lightning.lora.values import check_count, check_number, finite
from lora_lightning.model.probing import evaluating, training_only, without_cudnns_rnn
from lora_lightning.speech.ctc_objectives import non_blank_rate, suta
from lora_lightning.speech.data.utterances import AudioBatch
from lora_lightning.speech.tasks.ctc import CTCRecognition
from lora_lightning.speech.transcript_guard import SpeechLimits

NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)


class SingleUtterance:
    """Transcribe recordings, each by a model that adapted to it alone.

        transcribe = SingleUtterance(CTCRecognition(model))
        for batch in data.test_dataloader():
            texts = transcribe(batch)

    For each recording the weights and biases of the norms take `steps` steps of `suta`, the text
    is decoded, and the norms are restored, bit for bit. If the adapted model has fewer or many more
    non-blank frames than the source, the source's text is kept. Lin et al. 2022, arXiv:2203.14222
    (SUTA), who adapt wav2vec 2.0's feature extractor as well.

    Args:
        module: The recogniser.
        steps: Optimizer steps for each recording.
        learning_rate: Of AdamW.
        weight: Of the entropy in the loss, see `suta`.
        temperature: See `suta`.
        limits: Of the rate of frames that are no blank; None: no guard.

    Raises:
        ConfigError: a value is out of range, or the model has no norm with weights.
    """

    def __init__(
        self,
        module: CTCRecognition,
        steps: int = 10,
        learning_rate: float = 1e-3,
        weight: float = 0.3,
        temperature: float = 2.5,
        limits: SpeechLimits | None = SpeechLimits(),  # noqa: B008 - frozen
    ):
        check_count("steps", steps)
        check_number("learning_rate", learning_rate, "(0, inf)")
        self.module, self.steps, self.learning_rate = module, steps, learning_rate
        self.weight, self.temperature, self.limits = weight, temperature, limits
        self.norms = [
            p for m in module.model.modules() if isinstance(m, NORMS) for p in m.parameters(False)
        ]
        if not self.norms:
            raise ConfigError("the model has no norm with weights of its own: nothing can adapt")

    def __call__(self, batch: AudioBatch) -> list[str]:
        """The transcript of each recording of a batch."""
        return [self._one(_single(batch, i)) for i in range(len(batch))]

    def _one(self, batch: AudioBatch) -> str:
        with evaluating(self.module.model), self._only_norms():
            with torch.no_grad():
                before = self._heard(batch)
            optimizer = torch.optim.AdamW(self.norms, lr=self.learning_rate, weight_decay=0.0)
            for _ in range(self.steps):
                with torch.enable_grad(), without_cudnns_rnn(self.module.model.modules()):
                    log_probs, frames = self.module(batch.waveforms, batch.lengths)
                    loss = suta(log_probs, frames, self._blank, self.weight, self.temperature)
                    optimizer.zero_grad()
                    loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
            with torch.no_grad():
                after = self._heard(batch)
        return (after if self._fine(before[1], after[1]) else before)[0]

    @property
    def _blank(self) -> int:
        return self.module.labels.blank

    def _heard(self, batch: AudioBatch) -> tuple[str, float]:
        """The text, and the part of non-blank frames."""
        log_probs, frames = self.module(batch.waveforms, batch.lengths)
        if not finite(log_probs):
            return "", float("nan")
        text = self.module.decode(log_probs, frames)[0]
        return text, non_blank_rate(log_probs, frames, self._blank)

    def _fine(self, before: float, after: float) -> bool:
        if self.limits is None:
            return True
        return self.limits.least_rate * before <= after <= self.limits.most_rate * before

    @contextmanager
    def _only_norms(self) -> Iterator[None]:
        """Within the block only the norms are trained; afterwards all is restored."""
        model = self.module.model
        with training_only(model, self.norms):
            before = Snapshot(model)
            try:
                yield
            finally:
                before.restore(model)


def _single(batch: AudioBatch, index: int) -> AudioBatch:
    length: Tensor = batch.lengths[index : index + 1]
    waveform = batch.waveforms[index : index + 1, : int(length)]
    return AudioBatch(waveform, length, batch.items[index : index + 1])
