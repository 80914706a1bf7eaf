"""Acoustic environments: noise, rooms and lines, laid over clean recordings.

A step maps a waveform (T,) to a waveform (T,); an `Environment` is a row of steps, and
`ENVIRONMENTS` names some. What happens to a recording is decided by the environment's seed and
the recording's name alone: the same in every process and every epoch, as the data of a domain
should be. A silent recording stays silent, since no signal-to-noise ratio is defined for it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lora_lightning.errors import ConfigError, MissingDependencyError
from lora_lightning.registry import unknown
from lora_lightning.speech.data.synthetic.noises import NOISES, check_waveform, generator
from lora_lightning.speech.data.synthetic.rooms import impulse_response
from lora_lightning.speech.data.utterances import Utterance

# What a step of an acoustic environment is, and the steps of which a line consists.


try:
    import torchaudio.functional as audio
except ImportError as error:
    raise MissingDependencyError(
        "acoustic environments need torchaudio, which is not installed: "
        'pip install "lora-lightning[demo]"'
    ) from error

_LINE_RATE = 8000  # samples a second on a telephone line
_FRAME_SECONDS = 0.02  # what one lost packet carries


@dataclass(frozen=True, kw_only=True)
class Step:
    """One change to a waveform; `sample_rate` is the waveform's, in hertz."""

    sample_rate: int = 16_000
    seed: int = 0

    def __call__(self, waveform: Tensor, item: torch.Generator | object = "") -> Tensor:
        """The waveform (T,) float32 changed, of the same length.

        Args:
            waveform: Samples in [-1, 1].
            item: A generator, or whatever names the recording (printed, it seeds one).

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
        """`__call__` for a waveform that is sound and not silent."""
        raise NotImplementedError


@dataclass(frozen=True)
class BandLimit(Step):
    """Only what lies between two frequencies in hertz, 12 dB an octave; ``None``: no limit."""

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
        if not 0 <= self.loss < 1:
            raise ConfigError(f"Telephone: loss must lie in [0, 1), got {self.loss!r}")

    def apply(self, waveform: Tensor, rng: torch.Generator) -> Tensor:
        """Down to the line's rate and back, by torchaudio."""
        line = audio.highpass_biquad(
            _resample(waveform, self.sample_rate, _LINE_RATE), _LINE_RATE, 300
        )
        line = audio.mu_law_decoding(audio.mu_law_encoding(line.clamp(-1, 1), 256), 256)
        frame = round(_FRAME_SECONDS * _LINE_RATE)
        kept = torch.rand(math.ceil(len(line) / frame), generator=rng) >= self.loss
        line = line * kept.repeat_interleave(frame)[: len(line)]
        return _resample(line, _LINE_RATE, self.sample_rate)[: len(waveform)]


def _resample(waveform: Tensor, old: int, new: int) -> Tensor:
    # A long filter that ends at the line's 3400 Hz: the usual one lets 3600 Hz through.
    out: Tensor = audio.resample(waveform, old, new, lowpass_filter_width=64, rolloff=0.85)
    return out


@dataclass(frozen=True)
class Gain(Step):
    """Louder by so many decibels, or softer where `db` is below 0."""

    db: float

    def apply(self, waveform: Tensor, rng: torch.Generator) -> Tensor:
        """Amplify."""
        amplified: Tensor = audio.gain(waveform, self.db)
        return amplified


@dataclass(frozen=True)
class Clipping(Step):
    """Samples beyond `level`, a share of the largest one, are cut off."""

    level: float = 0.3

    def __post_init__(self) -> None:
        if not 0 < self.level <= 1:
            raise ConfigError(f"Clipping: level must lie in (0, 1], got {self.level!r}")

    def apply(self, waveform: Tensor, rng: torch.Generator) -> Tensor:
        """Cut."""
        limit = self.level * float(waveform.abs().max())
        return waveform.clamp(-limit, limit)


_PLACES = 8  # placements of source and microphone in one room


@dataclass(frozen=True)
class Noise(Step):
    """Noise at a signal-to-noise ratio of `snr_db`, taken over the whole recording.

    `kind` is ``"white"``, ``"pink"``, ``"hum"`` (mains, 50 Hz and harmonics) or ``"babble"``:
    six talkers from `pool`, waveforms (T,); without a pool noise of speech's spectrum and rhythm.
    """

    snr_db: float
    kind: str = "white"
    pool: Sequence[Tensor] = ()

    def __post_init__(self) -> None:
        if self.kind not in NOISES:
            raise ConfigError(f"Noise: {unknown('key', self.kind, NOISES)}")
        if not math.isfinite(self.snr_db):
            raise ConfigError(f"Noise: snr_db must be a finite number, got {self.snr_db!r}")

    def apply(self, waveform: Tensor, rng: torch.Generator) -> Tensor:
        """Add it by `torchaudio.functional.add_noise`."""
        noise = NOISES[self.kind](len(waveform), self.sample_rate, rng, self.pool)
        if not noise.any():  # a pool of silence, or too short to hold any of this noise
            return waveform.clone()
        added: Tensor = audio.add_noise(waveform, noise, torch.tensor(float(self.snr_db)))
        return added


@dataclass(frozen=True)
class Room(Step):
    """A shoebox room of a size in metres, which decays by 60 dB in `rt60` seconds.

    Who speaks stands `distance_m` from the microphone, in one of eight placements of each seed.
    The direct path arrives at once and the power stays, so that a transcript's times hold.
    Needs pyroomacoustics (image sources; Allen and Berkley, 1979).
    """

    size_m: tuple[float, float, float]
    rt60: float
    distance_m: float = 1.0

    def __post_init__(self) -> None:
        sizes = (*self.size_m, self.rt60, self.distance_m)
        if len(self.size_m) != 3 or not all(0 < s < math.inf for s in sizes):
            raise ConfigError(
                "Room: size_m must be three lengths above 0, and rt60 and distance_m above 0, got "
                f"{self.size_m}, {self.rt60} and {self.distance_m}"
            )

    def apply(self, waveform: Tensor, rng: torch.Generator) -> Tensor:
        """Convolve with the impulse response of a placement."""
        response, direct = self.response(int(torch.randint(_PLACES, (), generator=rng)))
        wet: Tensor = audio.fftconvolve(waveform, response)[direct : direct + len(waveform)]
        power = wet.square().mean()
        return wet * (waveform.square().mean() / power).sqrt() if power > 0 else wet

    def response(self, place: int = 0) -> tuple[Tensor, int]:
        """The impulse response (samples,) of one placement, and when its direct path arrives."""
        return impulse_response(
            tuple(self.size_m), self.rt60, self.distance_m, self.sample_rate, self.seed, place
        )


@dataclass(frozen=True, init=False)
class Environment:
    """Steps in a row; what leaves them keeps within [-1, 1] by being turned down, not cut.

    Usable as a dataset's transform: ``environment(waveform, utterance)``.
    """

    steps: tuple[Step, ...]

    def __init__(self, *steps: Step):
        object.__setattr__(self, "steps", steps)

    def __call__(self, waveform: Tensor, item: Utterance | str = "") -> Tensor:
        """The waveform (T,) as this environment gives it; the same for the same item.

        Raises:
            DataError: the waveform is not (T,) of finite floats.
        """
        check_waveform(waveform)
        # The folder it lies in is a machine's; the last two parts name speaker and recording.
        key = "/".join(item.path.parts[-2:]) if isinstance(item, Utterance) else item
        for i, step in enumerate(self.steps):
            # Before the next step: torchaudio's filters cut off what is beyond 1.
            waveform = _turned_down(step(waveform, f"{i}/{key}"))
        return _turned_down(waveform)


def _turned_down(waveform: Tensor) -> Tensor:
    return waveform / waveform.abs().max().clamp_min(1) if len(waveform) else waveform


ENVIRONMENTS: dict[str, tuple[Step, ...]] = {
    "clean": (),
    "room-small": (Room((3.5, 3.0, 2.5), 0.3),),
    "room-large": (Room((8.0, 6.0, 3.0), 0.6, 2.5),),
    "hall": (Room((20.0, 14.0, 7.0), 1.3, 6.0),),
    "cafe": (Room((10.0, 8.0, 3.2), 0.6), Noise(10, "babble")),
    "street": (Noise(5, "pink"),),
    "machine-room": (Room((8.0, 6.0, 3.0), 0.5), Noise(5, "hum"), Noise(15, "white")),
    "far-and-muffled": (Room((8.0, 6.0, 3.0), 0.6, 4.0), BandLimit(high_hz=1500)),
    "overdriven": (Clipping(0.15),),
    "telephone": (Telephone(),),
    "noisy-telephone": (Noise(10, "babble"), Telephone(loss=0.02)),
}


def environment(
    name: str, sample_rate: int = 16_000, seed: int = 0, pool: Sequence[Tensor] = ()
) -> Environment:
    """The named environment, for recordings of this sample rate in hertz.

    Args:
        name: A key of `ENVIRONMENTS`.
        sample_rate: The recordings' own.
        seed: Another one gives other noise and other places in the rooms.
        pool: Speech (T,) of which babble is made; without it, noise shaped like speech.

    Raises:
        ConfigError: there is no such environment (the message has the nearest names).
    """
    if name not in ENVIRONMENTS:
        raise ConfigError(f"environment: {unknown('key', name, ENVIRONMENTS)}")
    steps = [replace(s, sample_rate=sample_rate, seed=seed) for s in ENVIRONMENTS[name]]
    return Environment(*(replace(s, pool=pool) if isinstance(s, Noise) else s for s in steps))


get = environment
