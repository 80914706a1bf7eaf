"""`CTCRecognition`: a recogniser trained with CTC, measured by word and character error rate."""

from __future__ import annotations

import warnings

import torch
import torchaudio
from torch import Tensor, nn

from lora_lightning.errors import ConfigError
from lora_lightning.lora.values import check_count
from lora_lightning.speech.data.utterances import AudioBatch
from lora_lightning.speech.tasks.decoding import beam_search, greedy
from lora_lightning.speech.tasks.labels import Labels
from lora_lightning.speech.tasks.lexicon import Lexicon, LexiconSearch
from lora_lightning.speech.tasks.recognition import Recognition


class CTCRecognition(Recognition):
    """Speech recognition; the network is ``self.model``, and `LoRACallback` finds it there.

    The loss of a recording is −log p(text | sound), all alignments summed, divided by the number
    of characters; of a batch, the mean. Graves et al. 2006, "Connectionist temporal
    classification", ICML.

    Args:
        model: From waveforms (B, T) and samples (B,) to logits (B, F, C) and frames (B,), as
            `ConformerCTC` and torchaudio's ``Wav2Vec2Model`` do it.
        labels: The symbols of its classes; by default the model's own ``labels``.
        learning_rate: Peak learning rate of AdamW.
        weight_decay: AdamW's; not applied to biases, norms and other vectors.
        schedule: ``"one-cycle"`` (warm-up, then cosine to near 0), ``"cosine"``, ``"constant"``.
        decoder: ``"greedy"`` or ``"beam"``.
        beam_size: Prefixes that the beam search keeps.
        lexicon: Decode to the most likely sentence of its words, in place of `decoder`.

    Logs ``train_loss``, ``val_wer``, ``val_cer``, ``test_wer``, ``test_cer``; rates are errors of
    the whole epoch over its words or characters.

    Raises:
        ConfigError: a value is out of range, there are no labels, not one for each class, or a
            word of the lexicon that they cannot spell.
        DataError: in training, a recording without a text.
    """

    def __init__(
        self,
        model: nn.Module,
        labels: Labels | None = None,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.01,
        schedule: str = "one-cycle",
        decoder: str = "greedy",
        beam_size: int = 16,
        lexicon: Lexicon | None = None,
    ):
        super().__init__(model, labels, learning_rate, weight_decay, schedule)
        if decoder not in ("greedy", "beam"):
            raise ConfigError(f"decoder must be 'greedy' or 'beam', got {decoder!r}")
        check_count("beam_size", beam_size)
        self.decoder, self.beam_size = decoder, beam_size
        self.search: LexiconSearch | None = None
        if lexicon is not None:
            self.search = LexiconSearch(lexicon, self.labels, beam_size)
        self._warned: set[str] = set()

    def forward(self, waveforms: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Waveforms (B, T), samples (B,) → log-probabilities (B, F, C), frames (B,)."""
        logits, frames = self.model(waveforms, lengths)
        if frames is None:
            frames = torch.full((len(logits),), logits.shape[1], device=logits.device)
        self.labels.must_fit(logits.shape[2], type(self.model).__name__)
        return logits.float().log_softmax(dim=2), frames

    def transcribe(self, batch: AudioBatch) -> list[str]:
        """The predicted text of each recording."""
        return self.decode(*self(batch.waveforms, batch.lengths))

    def decode(self, log_probs: Tensor, frames: Tensor) -> list[str]:
        """The texts of log-probabilities (B, F, C), by the lexicon, else by `decoder`."""
        if self.search is not None:
            return self.search.decode(log_probs, frames)
        if self.decoder == "greedy":
            return greedy(log_probs, frames, self.labels)
        return beam_search(log_probs, frames, self.labels, self.beam_size)

    def loss(self, batch: AudioBatch) -> Tensor:
        """CTC's loss of a batch.

        A text with too few frames (one for each character, and one between two equal ones) has no
        alignment: it is left out, with a warning that names its recording.

        Raises:
            DataError: a recording without a text.
        """
        texts = self.targets(batch)
        sizes = torch.tensor([len(text) for text in texts], device="cpu")
        log_probs, frames = self(batch.waveforms, batch.lengths)
        self._warn_too_short(batch, texts, frames)
        return nn.functional.ctc_loss(
            log_probs.transpose(0, 1),
            torch.cat(texts).to(log_probs.device),
            frames,
            sizes.to(log_probs.device),
            blank=self.labels.blank,
            zero_infinity=True,
        )

    def _warn_too_short(self, batch: AudioBatch, texts: list[Tensor], frames: Tensor) -> None:
        needed = torch.tensor([len(t) + int((t[1:] == t[:-1]).sum()) for t in texts], device="cpu")
        for i in (needed > frames.cpu()).nonzero().flatten().tolist():
            path = str(batch.items[i].path)
            if path not in self._warned:
                self._warned.add(path)
                warnings.warn(
                    f"{path} is too short for its text: {int(frames[i])} frames, {int(needed[i])} "
                    "needed; nothing is learnt from it",
                    stacklevel=2,
                )


def spec_augment() -> nn.Module:
    """SpecAugment for features (B, n_mels, F): two masks of each kind, the same for a whole batch.

    Park et al. 2019, "SpecAugment: a simple data augmentation method for automatic speech
    recognition", arXiv:1904.08779. The mask value is 0, the mean of normalised features. A mask
    covers at most 20 mel bands, or 20 frames of 10 ms and a fifth of all.
    """
    bands = (torchaudio.transforms.FrequencyMasking(20) for _ in range(2))
    times = (torchaudio.transforms.TimeMasking(20, p=0.2) for _ in range(2))
    return nn.Sequential(*bands, *times)
