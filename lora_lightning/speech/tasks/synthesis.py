"""`Tacotron2Synthesis`: text to speech by mel spectrograms, fine-tuned to a voice."""

from __future__ import annotations

import math

import torch
import torchaudio
from torch import Tensor, nn
from torchaudio.models import Tacotron2

from lora_lightning.errors import ConfigError, DataError
from lora_lightning.model.probing import evaluating
from lora_lightning.speech.data.utterances import AudioBatch
from lora_lightning.speech.tasks.audio_task import AudioTask
from lora_lightning.speech.tasks.labels import Labels
from lora_lightning.speech.tasks.recognisers import frame_mask

FLOOR = 1e-5  # of a mel magnitude


class Tacotron2Synthesis(AudioTask):
    """Speech synthesis; the network is ``self.model``. A new voice is a new adapter.

    The loss is the mean squared error of the mel spectrogram, before and after the postnet, over
    all frames but padding, and the binary cross-entropy of the stop token. Shen et al.
    2018, "Natural TTS synthesis by conditioning WaveNet on mel spectrogram predictions",
    arXiv:1712.05884.

    Args:
        model: ``torchaudio.models.Tacotron2``.
        labels: Its symbols; class 0 is padding.
        sample_rate: Of the recordings, in Hz.
        n_fft: Samples in a window.
        hop_length: Samples between windows.
        learning_rate: Peak learning rate of AdamW.
        weight_decay: AdamW's; not applied to biases, norms and other vectors.
        schedule: ``"one-cycle"`` (warm-up, then cosine to near 0), ``"cosine"``, ``"constant"``.

    Features are log mel magnitudes from 0 to 8 kHz at least 1e-5, as in torchaudio's pipelines.

    Logs ``train_loss``, ``val_loss`` and ``test_loss``.

    Raises:
        ConfigError: a value is out of range, the labels do not fit the model, or it has
            ``mask_padding``.
        DataError: a recording without a text.
    """

    def __init__(
        self,
        model: Tacotron2,
        labels: Labels,
        sample_rate: int = 22050,
        n_fft: int = 1024,
        hop_length: int = 256,
        learning_rate: float = 1e-3,
        weight_decay: float = 1e-6,
        schedule: str = "one-cycle",
    ):
        super().__init__(model, {}, learning_rate, weight_decay, schedule)
        if model.mask_padding:
            raise ConfigError(
                "the model has mask_padding=True, which masks in place what the gradient needs; "
                "set model.mask_padding = False: padding has no part in the loss anyway"
            )
        symbols = model.embedding.num_embeddings
        if len(labels) > symbols:
            raise ConfigError(f"labels has {len(labels)} symbols, the model {symbols}")
        self.labels, self.sample_rate = labels, sample_rate
        self.top = min(8000.0, sample_rate / 2)
        self.n_fft, self.hop = n_fft, hop_length
        self.mel = torchaudio.transforms.MelSpectrogram(
            sample_rate, n_fft=n_fft, hop_length=hop_length, n_mels=model.n_mels, f_max=self.top,
            power=1.0, normalized=False, mel_scale="slaney", norm="slaney",
        )  # fmt: skip

    def features(self, waveforms: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T), samples (B,) → log mel (B, n_mels, F), zero in the padding, and frames (B,)."""
        frames = lengths // self.hop + 1
        with torch.autocast(waveforms.device.type, enabled=False):  # FLOOR underflows in fp16
            logs = self.mel(waveforms.float()).clamp_min(FLOOR).log()
        return logs * frame_mask(frames, logs.shape[2])[:, None], frames

    def loss(self, batch: AudioBatch) -> Tensor:
        """The loss of a batch, with teacher forcing.

        Raises:
            DataError: a recording without a text.
        """
        tokens, counts = self._tokens(batch.texts, batch)
        mels, frames = self.features(batch.waveforms, batch.lengths)
        # The encoder packs its input, which must come longest first.
        order = counts.argsort(descending=True, stable=True)
        tokens, counts, mels, frames = tokens[order], counts[order], mels[order], frames[order]
        before, after, gate, _ = self.model(tokens, counts, mels, frames)
        mask = frame_mask(frames, mels.shape[2])
        weight = mask[:, None] / (mask.sum() * self.model.n_mels)
        spectrum = ((before - mels).square() + (after - mels).square()) * weight
        ends = ~frame_mask(frames - 1, mels.shape[2])
        stop = nn.functional.binary_cross_entropy_with_logits(gate, ends.float(), reduction="none")
        loss: Tensor = spectrum.sum() + (stop * mask).sum() / mask.sum()
        return loss

    def _tokens(self, texts: list[str], batch: AudioBatch | None = None) -> tuple[Tensor, Tensor]:
        found = [self.labels.encode(text) for text in texts]
        for index, one in enumerate(found):
            if not one:
                where = batch.items[index].path if batch is not None else "text"
                raise DataError(f"{where}: {texts[index]!r} has no symbol that the model knows")
        counts = torch.tensor([len(one) for one in found], device=self.device)
        rows = [torch.tensor(one, device="cpu") for one in found]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True).to(self.device), counts

    def validation_step(self, batch: AudioBatch, batch_idx: int) -> None:
        """Logs ``val_loss``."""
        self.log("val_loss", self.loss(batch), on_epoch=True, batch_size=len(batch))

    def test_step(self, batch: AudioBatch, batch_idx: int) -> None:
        """Logs ``test_loss``."""
        self.log("test_loss", self.loss(batch), on_epoch=True, batch_size=len(batch))

    @torch.inference_mode()
    def synthesise(self, text: str, vocoder: nn.Module | None = None) -> Tensor:
        """Samples (T,) of a spoken text, by the model in eval mode.

        Args:
            text: The text to speak.
            vocoder: From log mel (1, n_mels, F) to a waveform; by default Griffin-Lim, which
                sounds metallic.
        """
        tokens, counts = self._tokens([text])
        with evaluating(self.model):  # a Trainer leaves it in training mode
            mel, _, _ = self.model.infer(tokens, counts)
        if vocoder is not None:
            spoken: Tensor = vocoder(mel)
            return spoken.reshape(-1)
        bins = self.n_fft // 2 + 1
        inverse = torchaudio.transforms.InverseMelScale(
            bins, self.model.n_mels, self.sample_rate, f_max=self.top, norm="slaney",
            mel_scale="slaney", driver="gelsd",
        )  # fmt: skip
        # At least a window of frames, padded with silence.
        short = max(self.n_fft // self.hop + 1 - mel.shape[2], 0)
        mel = nn.functional.pad(mel, (0, short), value=math.log(FLOOR))
        phases = torchaudio.transforms.GriffinLim(self.n_fft, hop_length=self.hop, power=1.0)
        magnitudes = inverse(mel.exp().cpu()).clamp_min(0)
        waveform: Tensor = phases(magnitudes)[0]
        return waveform / waveform.abs().max().clamp_min(1)
