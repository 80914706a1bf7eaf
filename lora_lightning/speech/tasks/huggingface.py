"""`HuggingFaceCTC`: a recogniser of the library transformers, as `CTCRecognition` calls it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.errors import ConfigError
from lora_lightning.speech.tasks.labels import Labels

NORMALISED = 1e-7  # added to the variance, as Wav2Vec2FeatureExtractor does


class HuggingFaceCTC(nn.Module):
    """``Wav2Vec2ForCTC``, ``HubertForCTC``, ``WavLMForCTC`` and the like, from waveforms to logits.

        model = HuggingFaceCTC(HubertForCTC.from_pretrained(name), tokenizer.get_vocab())
        task = CTCRecognition(model.train())

    Padding is masked where the model was trained so (``feat_extract_norm="layer"``), else zero, as
    the library's own processors have it.

    Args:
        model: The model, with ``config``, ``logits`` in its output, and a convolutional front end.
        vocabulary: Symbol → class, as a tokenizer's ``get_vocab()`` gives it.
        blank: The symbol of the blank.
        separator: The symbol between words.
        normalize: Make each waveform's mean 0 and variance 1: ``do_normalize`` of the model's
            feature extractor.
        sample_rate: Of the waveforms, in Hz.

    Attributes:
        labels: The symbols, in the order of the classes.

    Raises:
        ConfigError: the vocabulary is no numbering from 0, or lacks a symbol.
    """

    def __init__(
        self,
        model: nn.Module,
        vocabulary: Mapping[str, int],
        blank: str = "<pad>",
        separator: str = "|",
        normalize: bool = True,
        sample_rate: int = 16000,
    ):
        super().__init__()
        symbols = sorted(vocabulary, key=vocabulary.__getitem__)
        if sorted(vocabulary.values()) != list(range(len(symbols))) or blank not in vocabulary:
            raise ConfigError(
                f"a vocabulary must number its symbols from 0, the blank {blank!r} among them; "
                f"got {dict(vocabulary)}"
            )
        self.model: Any = model
        self.labels = Labels(symbols, vocabulary[blank], separator)
        self.labels.must_fit(model.config.vocab_size, type(model).__name__)  # type: ignore[union-attr, arg-type]
        self.labels.describe(self, sample_rate)
        self.normalize, self.sample_rate = normalize, sample_rate

    def forward(self, waveforms: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Waveforms (B, T), samples (B,) → logits (B, F, C), frames (B,)."""
        if lengths is None:
            lengths = torch.full((len(waveforms),), waveforms.shape[1], device=waveforms.device)
        mask = torch.arange(waveforms.shape[1], device=waveforms.device) < lengths[:, None]
        if self.normalize:
            waveforms = _normalised(waveforms, mask)
        masked = self.model.config.feat_extract_norm == "layer"
        found = self.model(waveforms, attention_mask=mask.long() if masked else None)
        return found.logits, self.model._get_feat_extract_output_lengths(lengths)


def _normalised(waveforms: Tensor, mask: Tensor) -> Tensor:
    """Each waveform with mean 0 and variance 1; padding is 0."""
    samples = mask.sum(1, keepdim=True)
    centred = (waveforms - (waveforms * mask).sum(1, keepdim=True) / samples) * mask
    variance = centred.square().sum(1, keepdim=True) / samples
    scaled: Tensor = centred / (variance + NORMALISED).sqrt()
    return scaled
