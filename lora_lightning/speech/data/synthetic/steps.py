"""Steps of acoustic environments: the base class, band limits, telephone lines, clipping."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_lightning.errors import ConfigError, MissingDependencyError
from lora_lightning.lora.values import check_number
from lora_lightning.speech.data.synthetic.noises import check_waveform, generator

try:
    import torchaudio.functional as audio
except ImportError as error:
    raise MissingDependencyError(
        "acoustic environments need torchaudio, which is not installed: "
        'pip install "lora-lightning[demo]"'
    ) from error

_LINE_RATE = 8000  # of a telephone line, in Hz
_FRAME_SECONDS = 0.02  # of a packet


@dataclass(frozen=True, kw_only=True)
class Step:
    """One change to a waveform; `sample_rate` is the waveform's, in hertz."""

    sample_rate: int = 16_000
    seed: int = 0

    def __call__(self, waveform: Tensor, item: torch.Generator | object = "") -> Tensor:
        """The changed waveform (T,) float32, of the same length.

        Args:
            waveform: Samples in [-1, 1].
            item: A generator, or the recording's name or object, whose string seeds one.

        Raises:
            DataError: the waveform is not (T,) of finite floats.
        """
        check_waveform(waveform)
        if not waveform.any():
            return waveform.clone()
        own = isinstance(item, torch.Generator)
        rng = item if own else generator(self.seed, type(self).__name__, item)
        return self.apply(waveform, rng)  # type: ignore[arg-type]

    def apply(self, waveform: Tensor, rng: torch.Generator) -> Tensor:
        """`__call__` for a waveform that is valid and not silent."""
        raise NotImplementedError


@dataclass(frozen=True)
class BandLimit(Step):
    """Band-pass between two frequencies in hertz, 12 dB an octave; ``None``: no limit."""

    low_hz: float | None = None
    high_hz: float | None = None

    def apply(self, waveform: Tensor, rng: torch.Generator) -> Tensor:
        """Filter by torchaudio's biquads."""
        for hertz, biquad in (
            (self.low_hz, audio.highpass_biquad),
            (self.high_hz, audio.lowpass_biquad),
        ):
            if hertz is not None and not 0 < hertz < self.sample_rate / 2:
                raise ConfigError(
                    f"BandLimit: {hertz} Hz is not between 0 and half the sample rate of "
                    f"{self.sample_rate} Hz"
                )
            waveform = waveform if hertz is None else biquad(waveform, self.sample_rate, hertz)
        return waveform


@dataclass(frozen=True)
class Telephone(Step):
    """A telephone line: 300 to 3400 Hz, 8 kHz, mu-law in 8 bits; `loss` of the packets missing."""

    loss: float = 0.0

    def __post_init__(self) -> None:
        check_number("Telephone: loss", self.loss, "[0, 1)")

    def apply(self, waveform: Tensor, rng: torch.Generator) -> Tensor:
        """Down to the line's rate and back, by torchaudio."""
        line = audio.highpass_biquad(
            _resample(waveform, self.sample_rate, _LINE_RATE), _LINE_RATE, 300
        )
        line = audio.mu_law_decoding(audio.mu_law_encoding(line.clamp(-1, 1), 256), 256)
        frame = round(_FRAME_SECONDS * _LINE_RATE)
        kept = torch.rand(math.ceil(len(line) / frame), generator=rng, device="cpu") >= self.loss
        line = line * kept.repeat_interleave(frame)[: len(line)]
        return _resample(line, _LINE_RATE, self.sample_rate)[: len(waveform)]


def _resample(waveform: Tensor, old: int, new: int) -> Tensor:
    # A long filter that ends at the line's 3400 Hz: the default one passes 3600 Hz.
    out: Tensor = audio.resample(waveform, old, new, lowpass_filter_width=64, rolloff=0.85)
    return out


@dataclass(frozen=True)
class Gain(Step):
    """Amplification by `db` decibels, or attenuation where it is below 0."""

    db: float

    def apply(self, waveform: Tensor, rng: torch.Generator) -> Tensor:
        """Amplify."""
        amplified: Tensor = audio.gain(waveform, self.db)
        return amplified


@dataclass(frozen=True)
class Clipping(Step):
    """Clips samples at `level`, a share of the peak."""

    level: float = 0.3

    def __post_init__(self) -> None:
        check_number("Clipping: level", self.level, "(0, 1]")

    def apply(self, waveform: Tensor, rng: torch.Generator) -> Tensor:
        """Clip."""
        limit = self.level * float(waveform.abs().max())
        return waveform.clamp(-limit, limit)
