"""`TransducerRecognition`: torchaudio's RNN-T, trained with the transducer loss."""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torchaudio
from torch import Tensor, nn
from torchaudio.models import RNNT, RNNTBeamSearch

from lora_lightning.errors import ConfigError
from lora_lightning.lora.values import check_count
from lora_lightning.speech.data.utterances import AudioBatch
from lora_lightning.speech.tasks.labels import Labels
from lora_lightning.speech.tasks.recognisers import frame_mask
from lora_lightning.speech.tasks.recognition import Recognition


class TransducerRecognition(Recognition):
    """Speech recognition with a transducer; the network is ``self.model``.

    The loss of a recording is −log p(text | sound), all alignments summed; of a batch, the mean.
    Graves 2012, "Sequence transduction with recurrent neural networks", arXiv:1211.3711.

    Args:
        model: ``torchaudio.models.RNNT``, such as ``emformer_rnnt_model(…)``.
        labels: The symbols of its classes; the blank is the last one in torchaudio's models.
        features: From waveforms (B, T) and samples (B,) to (B, n, F) and frames (B,); `RNNTMel`
            by default.
        learning_rate: Peak learning rate of AdamW.
        weight_decay: AdamW's; not applied to biases, norms and other vectors.
        schedule: ``"one-cycle"`` (warm-up, then cosine to near 0), ``"cosine"``, ``"constant"``.
        beam_size: Hypotheses that `torchaudio.models.RNNTBeamSearch` keeps.

    Logs ``train_loss``, ``val_wer``, ``val_cer``, ``test_wer``, ``test_cer``.

    Raises:
        ConfigError: a value is out of range, there are no labels or not one for each class, or
            the features do not fit the model.
        DataError: in training, a recording without a text.
    """

    def __init__(
        self,
        model: RNNT,
        labels: Labels | None = None,
        features: nn.Module | None = None,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.01,
        schedule: str = "one-cycle",
        beam_size: int = 10,
    ):
        super().__init__(model, labels, learning_rate, weight_decay, schedule)
        check_count("beam_size", beam_size)
        self.labels.must_fit(model.joiner.linear.out_features, type(model).__name__)
        self.features = features or RNNTMel()
        self.beam_size = beam_size

    def forward(self, waveforms: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Waveforms (B, T), samples (B,) → what `RNNT.transcribe` takes: (B, F, n), frames (B,).

        Frames are padded to a multiple of the time reduction, followed by the right context.
        """
        features, frames = self.features(waveforms, lengths)
        stride, context = _reduction(self.model)
        _must_take(self.model, features.shape[1], stride)
        frames = torch.div(frames + stride - 1, stride, rounding_mode="floor") * stride
        missing = int(frames.max()) + context - features.shape[2]
        return nn.functional.pad(features, (0, missing)).transpose(1, 2), frames

    def loss(self, batch: AudioBatch) -> Tensor:
        """The transducer loss of a batch.

        Raises:
            DataError: a recording without a text.
        """
        texts = self.targets(batch)
        device = batch.waveforms.device
        sizes = torch.tensor([len(text) for text in texts], dtype=torch.int32, device=device)
        padded = nn.utils.rnn.pad_sequence(texts, batch_first=True).to(device, torch.int32)
        # The predictor's input is the blank, then the text.
        seen = nn.functional.pad(padded, (1, 0), value=self.labels.blank)
        features, frames = self(batch.waveforms, batch.lengths)
        logits, frames, _, _ = self.model(features, frames, seen, sizes + 1)
        loss: Tensor = torchaudio.functional.rnnt_loss(
            logits.float(), padded, frames.int(), sizes, blank=self.labels.blank
        )
        return loss

    @torch.no_grad()
    def transcribe(self, batch: AudioBatch) -> list[str]:
        """The texts by beam search, one recording at a time."""
        search = RNNTBeamSearch(self.model, self.labels.blank)
        features, frames = self(batch.waveforms, batch.lengths)
        _, context = _reduction(self.model)
        # torchaudio's search fails with fewer continuations than the beam size.
        beam = min(self.beam_size, len(self.labels) - 1)
        texts = []
        for row, count in zip(features, frames, strict=True):
            own = row[None, : int(count) + context]
            best = search(own, count[None], beam)[0]
            texts.append(self.labels.decode(best[0]))
        return texts


def _reduction(model: RNNT) -> tuple[int, int]:
    """Time reduction of the encoder, and the frames of right context that must follow."""
    encoder = model.transcriber
    stride = int(getattr(getattr(encoder, "time_reduction", None), "stride", 1))
    inner = getattr(encoder, "transformer", None)
    return stride, stride * int(getattr(inner, "right_context_length", 0))


def _must_take(model: RNNT, bands: int, stride: int) -> None:
    first = getattr(model.transcriber, "input_linear", None)
    # The Conformer reduces time first: its input is the bands of several frames.
    if first is not None and first.in_features not in (bands, bands * stride):
        raise ConfigError(
            f"the features have {bands} bands, which the model's first layer, of "
            f"{first.in_features} inputs, does not take; give features=RNNTMel(n_mels=…)"
        )


class RNNTMel(nn.Module):
    """Mel features as torchaudio's RNN-T pipelines compute them, for a batch.

    Args:
        sample_rate: Of the waveforms, in Hz.
        n_mels: Number of bands.
        n_fft: Samples in a window.
        hop_length: Samples between windows.
        statistics: JSON file with ``mean`` and ``invstddev`` of each band, as the pipeline's
            ``global_stats``; without, mean 0 and deviation 1.

    The mel energies, times 32767² (as of 16-bit samples), are divided by e where they are at most
    e, else their logarithm is taken; then they are normalised.
    """

    mean: Tensor
    inverse: Tensor

    def __init__(
        self,
        sample_rate: int = 16000,
        n_mels: int = 80,
        n_fft: int = 400,
        hop_length: int = 160,
        statistics: Path | str | None = None,
    ):
        super().__init__()
        self.hop = hop_length
        self.mel = torchaudio.transforms.MelSpectrogram(
            sample_rate, n_fft=n_fft, n_mels=n_mels, hop_length=hop_length
        )
        mean, inverse = torch.zeros(n_mels), torch.ones(n_mels)
        if statistics is not None:
            mean, inverse = _statistics(Path(statistics), n_mels)
        self.register_buffer("mean", mean[:, None], persistent=False)
        self.register_buffer("inverse", inverse[:, None], persistent=False)

    def forward(self, waveforms: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T), samples (B,) → (B, n_mels, F), zero in the padding, and frames (B,)."""
        with torch.autocast(waveforms.device.type, enabled=False):  # fp16 ends at 65504
            energy = self.mel(waveforms.float()) * 32767.0**2
        logs = torch.where(energy > math.e, energy.clamp_min(math.e).log(), energy / math.e)
        frames = lengths // self.hop + 1
        features = (logs - self.mean) * self.inverse
        return features * frame_mask(frames, features.shape[2])[:, None], frames


def _statistics(path: Path, n_mels: int) -> tuple[Tensor, Tensor]:
    import json

    try:
        found = json.loads(path.read_text())
        mean, inverse = torch.tensor(found["mean"]), torch.tensor(found["invstddev"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"statistics={path} is no JSON file with the lists mean and invstddev ({error!r})"
        ) from error
    if mean.shape != (n_mels,) or inverse.shape != (n_mels,):
        raise ConfigError(f"statistics={path} has {len(mean)} bands, expected {n_mels}")
    return mean, inverse
