"""`ConformerCTC`: a compact recogniser around torchaudio's Conformer, from waveform to logits.

The output for a recording does not depend on the rest of the batch: padding is zeroed before every
layer that mixes frames.
"""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import torch
import torchaudio
from torch import Tensor, nn
from torchaudio.models import Conformer

from lora_lightning.errors import ConfigError
from lora_lightning.model.adapter_file.data_config import LABELS, RATE
from lora_lightning.model.adapter_file.schema import Leaf, Record, real, whole
from lora_lightning.runner.weights import build, load_built, save_built, weights_of
from lora_lightning.speech.tasks.labels import Labels

_Size = TypeVar("_Size", Tensor, int)
# Trained by `lora-lightning run speaker model.checkpoint=null`.
PACKAGED = Path(__file__).parents[1] / "weights" / "spoken_conformer.safetensors"
_SCHEMA = Record(
    {
        "settings": Record(
            {
                "sample_rate": RATE, "n_mels": whole(1, 1024),
                "dim": whole(1, 8192), "num_layers": whole(1, 200), "num_heads": whole(1, 256),
                "ffn_dim": whole(1, 65_536), "kernel_size": whole(1, 999),
                "channels": whole(1, 8192), "dropout": real(0, 1),
            },
            others=Leaf("no such setting", lambda value: False),
        ),
        "labels": LABELS,
    }
)  # fmt: skip
FLOOR = 1e-6  # energy below it counts as silence; that of a full-scale signal is about 1


class LogMel(nn.Module):
    """Log-mel features, each band with mean 0 and variance 1 over the recording.

    The window is 25 ms, the hop 10 ms; there are no trainable parameters.
    """

    def __init__(self, sample_rate: int = 16000, n_mels: int = 64):
        super().__init__()
        self.hop = sample_rate // 100
        self.window = sample_rate // 40
        n_fft = 1 << (self.window - 1).bit_length()
        # Padded with zeros, not by reflection: the end of a recording must look as in a batch,
        # where zeros follow.
        self.padding = n_fft // 2
        self.mel = torchaudio.transforms.MelSpectrogram(
            sample_rate, n_fft, self.window, self.hop, n_mels=n_mels, center=False
        )

    def forward(self, waveforms: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T) and samples (B,) → (B, n_mels, F), zero in the padding, and frames (B,)."""
        padded = nn.functional.pad(waveforms, (self.padding, self.padding))
        features = (self.mel(padded) + FLOOR).log()
        frames = lengths // self.hop + 1
        mask = frame_mask(frames, features.shape[2])[:, None]
        count = frames[:, None, None]
        mean = (features * mask).sum(2, keepdim=True) / count
        centred = (features - mean) * mask
        deviation = (centred.square().sum(2, keepdim=True) / count).sqrt()
        return centred / (deviation + 1e-2), frames


class ConformerCTC(nn.Module):
    """Log-mel features, two strided convolutions (40 ms a frame), Conformer, linear head.

    Gulati et al. 2020, "Conformer: convolution-augmented Transformer for speech recognition",
    arXiv:2005.08100; the encoder is `torchaudio.models.Conformer`.

    Args:
        labels: The symbols of its classes.
        sample_rate: Of the waveforms, in Hz.
        n_mels: Bands of the features.
        dim: Width of the encoder.
        num_layers: Blocks of the encoder.
        num_heads: Attention heads; must divide `dim`.
        ffn_dim: Hidden width of the feed-forward modules.
        kernel_size: Of the depthwise convolution, in frames of 40 ms; odd.
        dropout: In the encoder.
        channels: Of the two strided convolutions.
        augment: Applied to the features (B, n_mels, F) in training, such as SpecAugment.

    Raises:
        ConfigError: sizes that do not fit each other.
    """

    def __init__(
        self,
        labels: Labels | None = None,
        sample_rate: int = 16000,
        n_mels: int = 64,
        dim: int = 128,
        num_layers: int = 3,
        num_heads: int = 4,
        ffn_dim: int = 512,
        kernel_size: int = 15,
        dropout: float = 0.1,
        channels: int = 16,
        augment: nn.Module | None = None,
    ):
        super().__init__()
        self.settings = {
            "sample_rate": sample_rate, "n_mels": n_mels, "dim": dim, "num_layers": num_layers,
            "num_heads": num_heads, "ffn_dim": ffn_dim, "kernel_size": kernel_size,
            "dropout": dropout, "channels": channels,
        }  # fmt: skip
        if dim % num_heads:
            raise ConfigError(f"num_heads must divide dim; got num_heads={num_heads}, dim={dim}")
        if kernel_size % 2 == 0:
            raise ConfigError(f"kernel_size must be odd, got {kernel_size}")
        self.labels = labels or Labels.english()
        self.sample_rate = sample_rate
        self.labels.describe(self, sample_rate)
        self.features = LogMel(sample_rate, n_mels)
        self.augment = augment
        self.subsampling = _Subsampling(n_mels, channels, dim)
        self.encoder = Conformer(dim, num_heads, ffn_dim, num_layers, kernel_size, dropout)
        for layer in self.encoder.conformer_layers:
            layer.conv_module.sequential[1] = _MaskedGLU(dim=1)
        self.head = nn.Linear(dim, len(self.labels))

    def forward(self, waveforms: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Waveforms (B, T), samples (B,) → logits (B, F, C) and their frames (B,)."""
        if lengths is None:
            lengths = torch.full((len(waveforms),), waveforms.shape[1], device=waveforms.device)
        x, frames = self.features(waveforms, lengths)
        if self.augment is not None and self.training:
            x = self.augment(x)
        x, frames = self.subsampling(x, frames)
        x = x[:, : int(frames.max())]
        gates = [layer.conv_module.sequential[1] for layer in self.encoder.conformer_layers]
        mask = frame_mask(frames, x.shape[1])[:, None]
        for gate in gates:
            gate.mask = mask
        x, frames = self.encoder(x, frames)
        for gate in gates:
            gate.mask = None
        return self.head(x), frames


class _Subsampling(nn.Module):
    """(B, n_mels, F) → (B, F / 4, dim)."""

    def __init__(self, n_mels: int, channels: int, dim: int):
        super().__init__()
        self.conv1 = nn.Conv2d(1, channels, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        self.project = nn.Linear(channels * _half(_half(n_mels)), dim)

    def forward(self, x: Tensor, frames: Tensor) -> tuple[Tensor, Tensor]:
        x = x[:, None]
        for conv in (self.conv1, self.conv2):
            frames = _half(frames)
            x = conv(x).relu()
            x = x * frame_mask(frames, x.shape[3])[:, None, None]
        return self.project(x.flatten(1, 2).transpose(1, 2)), frames


class _MaskedGLU(nn.GLU):
    """GLU that zeroes the padding before the depthwise convolution."""

    mask: Tensor | None = None

    def forward(self, input: Tensor) -> Tensor:
        gated = super().forward(input)
        return gated if self.mask is None else gated * self.mask


def frame_mask(frames: Tensor, most: int) -> Tensor:
    """(B,) → (B, most), false in the padding."""
    return torch.arange(most, device=frames.device) < frames[:, None]


def _half(size: _Size) -> _Size:  # after a stride of 2
    return (size + 1) // 2


def save_recogniser(model: ConformerCTC, path: Path | str, half: bool = True) -> None:
    """Write weights, in half precision if asked for, and the model's settings to safetensors."""
    weights = weights_of(model)
    if half:
        weights = {k: v.half() if v.is_floating_point() else v for k, v in weights.items()}
    labels = model.labels.spelt()
    save_built(path, "recogniser", weights, settings=model.settings, labels=labels)


def load_recogniser(path: Path | str = "package") -> ConformerCTC:
    """A recogniser from a file of `save_recogniser`; "package": the built-in one.

    Raises:
        ConfigError: there is no such file, or it holds something else.
    """
    given, path = path, PACKAGED if path == "package" else Path(path)
    if not path.is_file():
        raise ConfigError(f"there is no recogniser's file {given}; 'package' is the built-in one")
    built, weights = load_built(path, "recogniser", _SCHEMA)
    settings, labels = built["settings"], built["labels"]
    shapes = _shapes(settings, len(labels["symbols"]))
    return build(path, lambda: ConformerCTC(Labels(**labels), **settings), shapes, weights)


def _shapes(settings: dict[str, int], classes: int) -> dict[str, tuple[int, ...]]:
    """Of the weights that take most memory, as `ConformerCTC` makes them."""
    dim, channels = settings["dim"], settings["channels"]
    last = f"encoder.conformer_layers.{settings['num_layers'] - 1}"
    return {
        "features.mel.spectrogram.window": (settings["sample_rate"] // 40,),
        "subsampling.conv2.weight": (channels, channels, 3, 3),
        "subsampling.project.weight": (dim, channels * _half(_half(settings["n_mels"]))),
        f"{last}.ffn1.sequential.1.weight": (settings["ffn_dim"], dim),
        f"{last}.conv_module.sequential.2.weight": (dim, 1, settings["kernel_size"]),
        "head.weight": (classes, dim),
    }
