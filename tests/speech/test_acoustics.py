"""Acoustic environments: measured effects on waveforms, determinism, errors."""

from __future__ import annotations

import inspect
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from lora_lightning.errors import ConfigError, DataError, MissingDependencyError
from lora_lightning.speech.data.synthetic import rooms
from lora_lightning.speech.data.synthetic.acoustics import (
    ENVIRONMENTS,
    BandLimit,
    Clipping,
    Environment,
    Gain,
    Noise,
    Room,
    Telephone,
    environment,
)
from lora_lightning.speech.data.utterances import Utterance

RATE = 16_000
ROOM = Room((4.0, 3.0, 2.6), 0.3)


def white(seconds: float = 1.0, seed: int = 0) -> torch.Tensor:
    noise = torch.randn(int(seconds * RATE), generator=torch.Generator().manual_seed(seed))
    return 0.05 * noise


def tone(hertz: float, amplitude: float = 0.5) -> torch.Tensor:
    return amplitude * torch.sin(2 * math.pi * hertz * torch.arange(RATE) / RATE)


def power(x: torch.Tensor) -> float:
    return float(x.double().square().mean())


def decibels(ratio: float) -> float:
    return 10 * math.log10(ratio)


def band_power(x: torch.Tensor, low: float, high: float) -> float:
    spectrum = torch.fft.rfft(x.double() * torch.hann_window(len(x), dtype=torch.float64))
    hertz = torch.fft.rfftfreq(len(x), 1 / RATE)
    return float(spectrum.abs().square()[(hertz >= low) & (hertz < high)].sum())


@pytest.mark.parametrize("kind", ["babble", "white", "pink", "hum"])
@pytest.mark.parametrize("snr", [-5, 0, 17.5])
def test_the_ratio_is_the_one_asked_for(kind, snr):
    clean = white()
    noise = Noise(snr, kind)(clean, "a") - clean
    assert decibels(power(clean) / power(noise)) == pytest.approx(snr, abs=0.1)


def test_babble_is_made_of_the_pool_and_of_nothing_else():
    clean, pool = white(), [tone(700), tone(1100)]
    noise = Noise(0, "babble", pool)(clean, "a") - clean
    # The seam where a talk starts again leaks; nearly all lies at the two tones.
    at_tones = band_power(noise, 690, 710) + band_power(noise, 1090, 1110)
    assert at_tones > 0.99 * band_power(noise, 0, RATE)


def test_pink_noise_has_as_much_in_every_octave():
    clean = white(4.0)
    noise = Noise(0, "pink")(clean, "a") - clean
    octaves = [band_power(noise, f, 2 * f) for f in (250, 500, 1000, 2000)]
    assert max(octaves) < 1.25 * min(octaves)


def test_hum_is_mains():
    clean = white()
    noise = Noise(0, "hum")(clean, "a") - clean
    assert band_power(noise, 0, 510) > 0.999 * band_power(noise, 0, RATE)


def test_a_telephone_lets_nothing_through_above_3600_hertz():
    clean = white()
    line = Telephone()(clean, "a")
    assert decibels(band_power(clean, 3600, 8000) / band_power(line, 3600, 8000)) >= 30
    assert abs(decibels(band_power(clean, 500, 3000) / band_power(line, 500, 3000))) < 1


def test_lost_packets_are_silent_and_as_many_as_asked_for():
    # At a frequency that the line passes; a frame is 20 ms.
    frames = Telephone(loss=0.3)(tone(1000).repeat(8), "a").view(-1, 320)
    silent = (frames.square().mean(1) < 0.01).float().mean()
    assert 0.2 < float(silent) < 0.4


def test_band_limits_pass_and_stop():
    step = BandLimit(300, 1500)
    assert abs(decibels(power(step(tone(700), "a")) / power(tone(700)))) < 1
    assert decibels(power(step(tone(75), "a")) / power(tone(75))) < -20
    assert decibels(power(step(tone(6000), "a")) / power(tone(6000))) < -20
    assert torch.equal(BandLimit()(tone(700), "a"), tone(700))


def test_gain_is_in_decibels():
    assert torch.allclose(Gain(-20)(tone(440), "a"), 0.1 * tone(440), atol=1e-6)


def test_clipping_cuts_at_a_share_of_the_peak():
    clean = tone(440)
    cut = Clipping(0.25)(clean, "a")
    limit = 0.25 * float(clean.abs().max())
    assert float(cut.abs().max()) == limit
    inside = clean.abs() < limit
    assert torch.equal(cut[inside], clean[inside])


@pytest.mark.parametrize(
    ("size", "rt60"),
    [
        ((4.0, 3.0, 2.6), 0.3),
        ((8.0, 6.0, 3.0), 0.6),
        pytest.param((20.0, 14.0, 7.0), 1.3, marks=pytest.mark.slow),
    ],
)
def test_rooms_decay_as_asked_for(size, rt60):
    for place in (0, 1):
        response = Room(size, rt60, 1.0).response(place)[0].double().numpy()
        left = np.cumsum(response[::-1] ** 2)[::-1]  # Schroeder, 1965
        level = 10 * np.log10(left / left[0] + 1e-12)
        part = np.flatnonzero((level <= -5) & (level >= -35))
        slope = np.polyfit(part / RATE, level[part], 1)[0]
        assert -60 / slope == pytest.approx(rt60, rel=0.25)


def test_a_room_keeps_time_and_power():
    click = torch.zeros(RATE)
    click[4000] = 0.5
    for place in range(4):
        wet = ROOM(click, place)
        # Two reflections that meet may be louder than the direct path, but none is earlier.
        first = int((wet.abs() > 0.3 * wet.abs().max()).nonzero()[0])
        assert abs(first - 4000) <= 1
        assert power(wet) == pytest.approx(power(click), rel=1e-4)


def test_a_room_is_simulated_once(monkeypatch):
    Room((3.0, 4.0, 2.5), 0.25).response(0)
    monkeypatch.setattr(rooms, "_simulate", lambda *a: pytest.fail("simulated again"))
    Room((3.0, 4.0, 2.5), 0.25).response(0)


def test_placements_are_of_the_distance_asked_for():
    for place in range(8):
        source, microphone = rooms._placement((4.0, 3.0, 2.6), 1.5, 0, place)
        assert np.linalg.norm(source - microphone) == pytest.approx(1.5)
        for point in (source, microphone):
            assert ((point > 0) & (point < (4.0, 3.0, 2.6))).all()


def test_rooms_say_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyroomacoustics", None)
    with pytest.raises(MissingDependencyError, match="pyroomacoustics"):
        Room((3.1, 4.0, 2.5), 0.25)(white(), "a")


@pytest.mark.parametrize("name", ENVIRONMENTS)
@pytest.mark.parametrize("samples", [0, 1, 2, 50, RATE])
def test_every_environment_is_safe(name, samples):
    fn = environment(name)
    item = Utterance(Path("/data/anna/1.wav"))
    for clean in (torch.zeros(samples), torch.ones(samples), white()[:samples]):
        before = clean.clone()
        out = fn(clean, item)
        assert out.shape == (samples,)
        assert out.dtype == torch.float32
        assert (out.abs() <= 1).all()  # NaN is not
        assert torch.equal(clean, before)
    assert not fn(torch.zeros(samples), item).any()


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_each_environment_but_clean_changes_what_is_heard(name):
    clean = white()
    out = environment(name)(clean, "a")
    assert torch.equal(out, clean) == (name == "clean")


def test_the_item_and_the_seed_decide():
    fn, clean = environment("street"), white()
    here, there = Utterance(Path("/here/anna/1.wav")), Utterance(Path("/there/anna/1.wav"))
    assert torch.equal(fn(clean, here), fn(clean, there))
    assert not torch.equal(fn(clean, here), fn(clean, Utterance(Path("/here/otto/1.wav"))))
    assert not torch.equal(fn(clean, here), environment("street", seed=1)(clean, here))


def test_two_noises_of_one_environment_differ():
    clean = white()
    twice = Environment(Noise(0), Noise(0))(clean, "a") - clean
    assert power(twice) < 3.5 * power(clean)  # 3 of two noises, 5.8 of one twice


def sums() -> str:
    x = 0.1 * torch.sin(torch.arange(4000) / 9)
    names = ("street", "room-small", "noisy-telephone")
    return str([environment(n)(x, "a").double().sum().item() for n in names])


def test_another_process_hears_the_same():
    program = "import torch; torch.set_num_threads(1)\n"
    program += "from lora_lightning.speech.data.synthetic.acoustics import environment\n"
    program += f"{inspect.getsource(sums)}print(sums())"
    out = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        check=True, capture_output=True, text=True,
        env={"PYTHONHASHSEED": "1", "OMP_NUM_THREADS": "1", "PATH": ""},
    )  # fmt: skip
    assert out.stdout.strip() == sums()


def test_the_sample_rate_reaches_every_step():
    assert all(s.sample_rate == 8000 for s in environment("noisy-telephone", 8000).steps)
    assert environment("telephone", 22_050)(white(), "a").shape == (RATE,)


WRONG = {
    "kind": (lambda: Noise(0, "pinc"), "did you mean 'pink'"),
    "ratio": (lambda: Noise(float("nan")), "finite"),
    "room": (lambda: Room((3, 3, 0), 0.3), "three lengths above 0"),
    "too dry": (lambda: Room((20.0, 20.0, 20.0), 0.05).response(), "longer rt60"),
    "too far": (lambda: Room((3.0, 3.0, 3.0), 0.3, 9.0).response(), "does not fit"),
    "band": (lambda: BandLimit(high_hz=9000)(white(), "a"), "half the sample rate"),
    "level": (lambda: Clipping(0), "level"),
    "loss": (lambda: Telephone(1.0), "loss"),
    "name": (lambda: environment("telefone"), "did you mean 'telephone'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_settings_are_explained(case):
    make, message = WRONG[case]
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize(
    "waveform",
    [torch.zeros(1, 5), torch.zeros(5, dtype=torch.int16), torch.tensor([0.0, float("nan")])],
)
def test_what_is_no_waveform_is_refused(waveform):
    for fn in (environment("clean"), environment("street")):
        with pytest.raises(DataError):
            fn(waveform, "a")
