"""Noises of any length, and the seeded generators that they are drawn from."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lora_lightning.errors import DataError

_TALKERS = 6


def generator(*parts: object) -> torch.Generator:
    """A generator seeded by these parts, the same in every process."""
    return torch.Generator().manual_seed(zlib.crc32("/".join(map(str, parts)).encode()))


def _shaped(
    length: int, sample_rate: int, rng: torch.Generator, tilt: float, corner: float
) -> Tensor:
    """White noise whose power falls with f^-tilt above `corner` hertz."""
    size = max(length, sample_rate // 4)  # a shorter one has no low frequencies
    spectrum = torch.fft.rfft(torch.randn(size, generator=rng, device="cpu"))
    hertz = torch.fft.rfftfreq(size, 1 / sample_rate, device="cpu").clamp_min(corner)
    spectrum[0] = 0
    shaped: Tensor = torch.fft.irfft(spectrum * hertz ** (-tilt / 2), size)[:length]
    return shaped


def white(length: int, sample_rate: int, rng: torch.Generator, pool: Sequence[Tensor]) -> Tensor:
    """The same power at every frequency, (length,)."""
    return torch.randn(length, generator=rng, device="cpu")


def pink(length: int, sample_rate: int, rng: torch.Generator, pool: Sequence[Tensor]) -> Tensor:
    """The same power in every octave, (length,): wind, distant traffic."""
    return _shaped(length, sample_rate, rng, tilt=1.0, corner=20.0)


def hum(length: int, sample_rate: int, rng: torch.Generator, pool: Sequence[Tensor]) -> Tensor:
    """Mains hum at 50 Hz with nine harmonics, (length,)."""
    harmonics = torch.arange(1, 11, device="cpu")[:, None]
    phases = 2 * math.pi * torch.rand(len(harmonics), 1, generator=rng, device="cpu")
    angle = 2 * math.pi * 50 * harmonics * torch.arange(length, device="cpu") / sample_rate
    return (torch.sin(angle + phases) / harmonics).sum(0)


def babble(length: int, sample_rate: int, rng: torch.Generator, pool: Sequence[Tensor]) -> Tensor:
    """Six talkers from `pool`, (length,); without a pool noise of speech's spectrum and rhythm."""
    spoken = [talk for talk in pool if len(talk) and talk.any()]
    if spoken:
        return torch.stack([_talker(spoken, length, rng) for _ in range(_TALKERS)]).sum(0)
    # Flat up to 500 Hz and falling by 9 dB an octave; speech swells and fades at some 4 Hz.
    noise = _shaped(length, sample_rate, rng, tilt=3.0, corner=500.0)
    phase = 2 * math.pi * torch.rand((), generator=rng, device="cpu")
    return noise * (
        1 + 0.5 * torch.sin(8 * math.pi * torch.arange(length, device="cpu") / sample_rate + phase)
    )


def _talker(spoken: list[Tensor], length: int, rng: torch.Generator) -> Tensor:
    talk = spoken[int(torch.randint(len(spoken), (), generator=rng, device="cpu"))].float()
    start = int(torch.randint(len(talk), (), generator=rng, device="cpu"))
    talk = torch.roll(talk / talk.square().mean().sqrt(), -start)
    return talk.repeat(math.ceil(length / len(talk)))[:length]


_Maker = Callable[[int, int, torch.Generator, Sequence[Tensor]], Tensor]
NOISES: dict[str, _Maker] = {"babble": babble, "hum": hum, "pink": pink, "white": white}


def check_waveform(waveform: Tensor) -> None:
    """Raise `DataError` unless this is one waveform (T,) of finite floats."""
    if waveform.dim() != 1 or not waveform.is_floating_point():
        raise DataError(
            f"expected one waveform of shape (T,) in floats, got shape {tuple(waveform.shape)} "
            f"and {waveform.dtype}; take one channel, or the channels' mean"
        )
    if not waveform.isfinite().all():
        raise DataError("the waveform holds NaN or infinity; decode the recording again")
