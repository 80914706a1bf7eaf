"""Acoustic environments: noise, rooms and lines applied to clean recordings.

A step maps a waveform (T,) to a waveform (T,); an `Environment` is a sequence of steps, and
`ENVIRONMENTS` names some. The result depends on the environment's seed and the recording's name
alone: the same in every process and every epoch, as the data of a domain should be. A silent
recording stays silent, since no signal-to-noise ratio is defined for it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lora_lightning.errors import ConfigError
from lora_lightning.registry import unknown
from lora_lightning.speech.data.synthetic.noises import NOISES, check_waveform
from lora_lightning.speech.data.synthetic.rooms import impulse_response
from lora_lightning.speech.data.synthetic.steps import BandLimit as BandLimit
from lora_lightning.speech.data.synthetic.steps import Clipping as Clipping
from lora_lightning.speech.data.synthetic.steps import Gain as Gain  # all steps are found here
from lora_lightning.speech.data.synthetic.steps import Step as Step
from lora_lightning.speech.data.synthetic.steps import Telephone as Telephone
from lora_lightning.speech.data.utterances import Utterance

_PLACES = 8  # placements of source and microphone in one room


@dataclass(frozen=True)
class Noise(Step):
    """Noise at a signal-to-noise ratio of `snr_db` over the whole recording.

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
        from torchaudio.functional import add_noise

        noise = NOISES[self.kind](len(waveform), self.sample_rate, rng, self.pool)
        if not noise.any():  # a silent pool, or a recording too short for this noise
            return waveform.clone()
        added: Tensor = add_noise(waveform, noise, torch.tensor(float(self.snr_db), device="cpu"))
        return added


@dataclass(frozen=True)
class Room(Step):
    """A shoebox room of a size in metres, whose sound decays by 60 dB in `rt60` seconds.

    The speaker is `distance_m` from the microphone, in one of eight placements of each seed. The
    direct path is not delayed and the power is kept, so that a transcript's times stay valid.
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
        """Convolve with the impulse response of a random placement."""
        from torchaudio.functional import fftconvolve

        response, direct = self.response(
            int(torch.randint(_PLACES, (), generator=rng, device="cpu"))
        )
        wet: Tensor = fftconvolve(waveform, response)[direct : direct + len(waveform)]
        power = wet.square().mean()
        return wet * (waveform.square().mean() / power).sqrt() if power > 0 else wet

    def response(self, place: int = 0) -> tuple[Tensor, int]:
        """The impulse response (samples,) of one placement, and the sample of its direct path."""
        return impulse_response(
            tuple(self.size_m), self.rt60, self.distance_m, self.sample_rate, self.seed, place
        )


@dataclass(frozen=True, init=False)
class Environment:
    """A sequence of steps; the output is scaled down to [-1, 1] where needed, not clipped.

    Usable as a dataset's transform: ``environment(waveform, utterance)``.
    """

    steps: tuple[Step, ...]

    def __init__(self, *steps: Step):
        object.__setattr__(self, "steps", steps)

    def __call__(self, waveform: Tensor, item: Utterance | str = "") -> Tensor:
        """The waveform (T,) in this environment; deterministic for an item.

        Raises:
            DataError: the waveform is not (T,) of finite floats.
        """
        check_waveform(waveform)
        # Parent folders differ by machine; the last two parts name speaker and recording.
        key = "/".join(item.path.parts[-2:]) if isinstance(item, Utterance) else item
        for i, step in enumerate(self.steps):
            # Before the next step: torchaudio's filters clip beyond 1.
            waveform = _scaled(step(waveform, f"{i}/{key}"))
        return _scaled(waveform)


def _scaled(waveform: Tensor) -> Tensor:
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
        seed: Of the noise and the placements in rooms.
        pool: Speech (T,) that babble is mixed from; without it, noise shaped like speech.

    Raises:
        ConfigError: there is no such environment (the message has the nearest names).
    """
    if name not in ENVIRONMENTS:
        raise ConfigError(f"environment: {unknown('key', name, ENVIRONMENTS)}")
    steps = [replace(s, sample_rate=sample_rate, seed=seed) for s in ENVIRONMENTS[name]]
    return Environment(*(replace(s, pool=pool) if isinstance(s, Noise) else s for s in steps))
