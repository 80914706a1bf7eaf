"""Audio files: formats, rates, channels, and unusable files."""

from __future__ import annotations

import sys
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch

from lora_lightning.errors import ConfigError, DataError, MissingDependencyError
from lora_lightning.speech.data import audio
from lora_lightning.speech.data.audio import check_audio, checked, counted, read_audio
from lora_lightning.speech.data.utterances import Utterance


def tone(seconds=0.5, rate=16000, hertz=440.0, level=0.3):
    return level * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)


def written(path, samples=None, rate=16000, **options):
    soundfile.write(path, tone(rate=rate) if samples is None else samples, rate, **options)
    return path


@pytest.mark.parametrize(
    ("name", "subtype", "off"),
    [
        ("x.wav", "PCM_16", 2**-15),
        ("x.wav", "PCM_24", 2**-23),
        ("x.wav", "FLOAT", 1e-7),
        ("x.wav", "PCM_U8", 2**-7),
        ("x.flac", "PCM_16", 2**-15),
        ("x.flac", "PCM_24", 2**-23),
        ("x.aiff", "PCM_16", 2**-15),
        ("x.ogg", "VORBIS", 0.02),
        ("x.mp3", "MPEG_LAYER_III", 0.05),
    ],
)
def test_formats_give_back_what_was_written(tmp_path, name, subtype, off):
    if subtype not in soundfile.available_subtypes():
        pytest.skip(f"this libsndfile has no {subtype}")
    path = written(tmp_path / name, subtype=subtype)
    waveform = read_audio(path, 16000)
    assert waveform.dtype == torch.float32
    assert waveform.shape == (8000,)
    assert (waveform - torch.from_numpy(tone())).abs().max() <= off
    assert check_audio(path) == 0.5


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 48000, 44101])
def test_any_rate_becomes_the_one_asked_for(tmp_path, rate):
    path = written(tmp_path / "x.wav", tone(0.5, rate), rate, subtype="FLOAT")
    waveform = read_audio(path, 16000)
    assert abs(len(waveform) - 8000) <= 1
    # The ends lack a neighbour to interpolate with.
    middle = slice(500, 7500)
    assert (waveform - torch.from_numpy(tone())[: len(waveform)])[middle].abs().max() < 5e-3
    assert check_audio(path) == pytest.approx(0.5, abs=1e-4)


def test_filters_are_made_once_and_stay_small():
    audio._resampler.cache_clear()
    assert audio._resampler(48000, 16000) is audio._resampler(48000, 16000)
    assert audio._resampler(44101, 16000).kernel.nbytes < 16e6  # of the exact ratio: 2.8 GB


def test_channels_are_averaged(tmp_path):
    left, right = tone(hertz=440.0), tone(hertz=700.0)
    path = written(tmp_path / "x.wav", np.stack([left, right, 0 * left], 1), subtype="FLOAT")
    expected = torch.from_numpy(((left + right) / 3).astype(np.float32))
    assert torch.allclose(read_audio(path, 16000), expected, atol=1e-7)


def test_blocks_join_without_a_seam(tmp_path, monkeypatch):
    path = written(tmp_path / "x.flac")
    whole = read_audio(path, 16000)
    monkeypatch.setattr(audio, "BLOCK", 999)
    assert torch.equal(read_audio(path, 16000), whole)
    assert check_audio(path) == 0.5


def with_value(value):
    samples = tone()
    samples[4000] = value
    return samples


BAD = {
    "text.wav": ("cannot be read", lambda p: p.write_text("no sound")),
    "zero.wav": ("empty: 0 bytes", lambda p: p.touch()),
    "empty.wav": ("empty: no sound", lambda p: written(p, np.zeros(0))),
    "folder.wav": ("a folder, not a file", lambda p: p.mkdir()),
    "gone.wav": ("there is no such file", lambda p: None),
    "x.raw": ("headerless", lambda p: p.write_bytes(b"1234")),
    ("n" * 300): ("cannot be read", lambda p: None),
    "silent.wav": ("silent: all zero", lambda p: written(p, np.zeros(8000))),
    "faint.flac": ("silent: peak at -8[45]", lambda p: written(p, tone(level=6e-5))),
    "nan.wav": ("NaN or inf", lambda p: written(p, with_value(np.nan), subtype="FLOAT")),
    "loud.wav": ("samples of 3e.38", lambda p: written(p, with_value(3e38), subtype="FLOAT")),
    "inf.wav": ("NaN or inf", lambda p: written(p, with_value(np.inf), subtype="FLOAT")),
    "short.wav": (r"too short: 0.090 s, below 0.1 s", lambda p: written(p, tone(0.09))),
    "long.wav": (r"too long: 61.0 s, above 60 s", lambda p: written(p, tone(61, 8000), 8000)),
    "rate.wav": ("sampling rate of 100 Hz", lambda p: written(p, tone(9, 8000), 100)),
}
UNREADABLE = [n for n in BAD if n.split(".")[0] not in ("silent", "faint", "short", "long")]


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_said(tmp_path, name):
    reason, make = BAD[name]
    make(tmp_path / name)
    with pytest.raises(DataError, match=reason) as found:
        check_audio(tmp_path / name)
    assert name not in str(found.value)  # whoever lists it knows the path
    assert len(str(found.value)) < 120


@pytest.mark.parametrize("name", UNREADABLE)
def test_reading_refuses_what_cannot_be_used(tmp_path, name):
    reason, make = BAD[name]
    make(tmp_path / name)
    with pytest.raises(DataError, match=f"{name[-20:]}: .*{reason}"):
        read_audio(tmp_path / name, 16000)


@pytest.mark.parametrize("name", ["x.flac", "x.ogg", "x.mp3"])
def test_half_a_file_is_refused(tmp_path, name):
    path = written(tmp_path / name, tone(3))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match=r"cannot be read|cut short"):
        check_audio(path)


def test_a_stream_without_a_length_is_refused(tmp_path):
    path = written(tmp_path / "x.flac")
    raw = bytearray(path.read_bytes())
    raw[21] &= 0xF0  # the 36 bits of STREAMINFO that hold the number of samples
    raw[22:26] = bytes(4)
    path.write_bytes(raw)
    with pytest.raises(DataError, match="no length in its header"):
        check_audio(path)


def test_a_long_file_is_not_decoded(tmp_path, monkeypatch):
    path = written(tmp_path / "x.flac", tone(3))
    monkeypatch.setattr(audio, "_blocks", lambda file: pytest.fail("decoded"))
    with pytest.raises(DataError, match=r"too long: 3.0 s, above 2 s"):
        check_audio(path, max_seconds=2)


def test_limits_can_be_set(tmp_path):
    assert check_audio(written(tmp_path / "x.wav", tone(0.05)), min_seconds=0.01) == 0.05
    with pytest.raises(DataError, match="too short"):
        check_audio(written(tmp_path / "x.wav"), min_seconds=1)


@pytest.mark.parametrize("rate", [0, -1, 10**7])
def test_a_rate_that_is_none(tmp_path, rate):
    with pytest.raises(ConfigError, match=r"sample_rate must lie in \[1000, 768000\] Hz"):
        read_audio(written(tmp_path / "x.wav"), rate)


def test_checked_keeps_the_good_and_lists_the_bad(tmp_path):
    good = [Utterance(written(tmp_path / f"{i}.wav", tone(0.2 * i)), f"t{i}") for i in (2, 1)]
    bad = Utterance(tmp_path / "gone.wav")
    seen = []
    kept, skipped = checked([good[0], bad, good[1]], tick=lambda *done: seen.append(done))
    assert [(u.path, u.text, u.seconds) for u in kept] == [
        (good[0].path, "t2", 0.4),
        (good[1].path, "t1", 0.2),
    ]
    assert skipped == [(str(bad.path), "there is no such file")]
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert checked(good, 0.3, 0.5)[0] == [kept[0]]


def test_aac_needs_pyav_or_is_left_out(tmp_path, monkeypatch):
    path = tmp_path / "memo.m4a"
    path.write_bytes(b"no sound")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MissingDependencyError, match=r"\.m4a files are decoded by PyAV.*\[m4a\]"):
        read_audio(path, 16000)
    kept, skipped = checked([Utterance(path)])
    assert not kept
    assert "1 × .m4a files are decoded by PyAV" in counted(skipped)


def test_aac_is_decoded_by_pyav(tmp_path, monkeypatch):
    """With a stand-in of PyAV's attributes: two frames of two channels."""
    path = tmp_path / "memo.m4a"
    path.write_bytes(b"sound")
    frames = [np.stack([np.full(800, v), np.zeros(800)]).astype(np.float32) for v in (0.5, 0.25)]
    stream = SimpleNamespace(rate=16000, duration=1600, time_base=Fraction(1, 16000))

    class File:
        streams = SimpleNamespace(audio=[stream])

        def decode(self, given):
            return iter(frames) if given is stream else iter(())

        def close(self):
            self.closed = True

    def opened(name):
        if not Path(name).read_bytes().startswith(b"sound"):
            raise ValueError("Invalid data found")
        return File()

    resampler = SimpleNamespace(resample=lambda f: [SimpleNamespace(to_ndarray=lambda: f)])
    monkeypatch.setitem(
        sys.modules, "av", SimpleNamespace(open=opened, AudioResampler=lambda **_: resampler)
    )
    assert check_audio(path) == 0.1
    waveform = read_audio(path, 16000)
    assert torch.equal(waveform, torch.tensor([0.25] * 800 + [0.125] * 800))
    frames.pop()
    with pytest.raises(DataError, match="cut short"):
        check_audio(path, 0.01)
    path.write_bytes(b"damaged")
    with pytest.raises(DataError, match="cannot be read: Invalid data"):
        check_audio(path)
