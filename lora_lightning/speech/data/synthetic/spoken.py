"""Digit strings and commands spoken by eSpeak voices, `<speaker>/<index>.flac`, in a cache.

The set has an `utterances.jsonl`, which `manifests.load_utterances` reads like any manifest.
Source and target speakers are disjoint: see `voices`.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_lightning.errors import ConfigError, MissingDependencyError
from lora_lightning.lora.values import check_count
from lora_lightning.report.versions import versions
from lora_lightning.runner import generated_sets
from lora_lightning.runner.generated_sets import made_set
from lora_lightning.speech.data.synthetic.espeak import Voice, speak_all
from lora_lightning.speech.data.synthetic.phrases import phrases

EDITION = 1  # increment whenever the same settings would give other samples
LISTING = "utterances.jsonl"


def spoken_set(
    root: Path | str | None = None,
    *,
    speakers: Mapping[str, Voice],
    utterances: int,
    sample_rate: int = 16000,
    seed: int = 0,
    progress: bool = True,
) -> Path:
    """Synthesise sentences of each speaker, or reuse a complete set with the same settings.

    Args:
        root: the folder of the set; by default one in the cache, named by the settings
            (`$LORA_LIGHTNING_CACHE`, or else `~/.cache/lora-lightning`).
        speakers: the voice of each speaker, by name.
        utterances: number for each speaker.
        sample_rate: of the files, in Hz.
        seed: of the sentences; each speaker draws its own.
        progress: show a progress bar on standard error.

    Returns:
        The folder. It holds `utterances.jsonl` (path, text, speaker) and `manifest.json`
        (settings, versions, hashes).

    Raises:
        ConfigError: a name, a number or a voice is not valid.
        DataError: `root` holds something other than a spoken set.
        MissingDependencyError: the extra `demo` is needed and not installed.
    """
    settings = _settings(speakers, utterances, sample_rate, seed)
    rows = [
        {"path": f"{name}/{index:04d}.flac", "text": text, "speaker": name}
        for name in speakers
        for index, text in enumerate(_sentences(name, utterances, seed))
    ]

    def make(folder: Path) -> Mapping[str, Any]:
        jobs = [(row["text"], speakers[row["speaker"]]) for row in rows]
        with generated_sets.progress(rows, f"speaking {len(rows)} sentences", progress) as shown:
            for row, (samples, rate) in zip(shown, speak_all(jobs), strict=True):
                _write(folder / row["path"], samples, rate, sample_rate)
        lines = [json.dumps(row) + "\n" for row in rows]
        (folder / LISTING).write_text("".join(lines), encoding="utf-8")
        return {"versions": versions("numpy", "espeakng-loader", "soundfile")}

    files = [*(row["path"] for row in rows), LISTING]
    return made_set(root, "spoken", settings, files, make, own=[*speakers, LISTING])


def _settings(
    speakers: Mapping[str, Voice], utterances: int, sample_rate: int, seed: int
) -> dict[str, Any]:
    """Check the arguments, and return all settings that determine the samples."""
    if not speakers:
        raise ConfigError("speakers is empty: name at least one, with its voice")
    for name in speakers:
        if not name or set(name) & set("/\\:") or name.startswith("."):
            raise ConfigError(f"a speaker's name becomes a folder: {name!r} cannot be one")
    for what, number, least in (
        ("utterances", utterances, 1), ("sample_rate", sample_rate, 4000), ("seed", seed, 0),
    ):  # fmt: skip
        check_count(what, number, least)
    voices = {name: asdict(voice) for name, voice in speakers.items()}
    settings = {"edition": EDITION, "utterances": utterances, "sample_rate": sample_rate}
    return {**settings, "seed": seed, "speakers": voices}


def _sentences(speaker: str, count: int, seed: int) -> list[str]:
    return phrases(count, np.random.default_rng([seed, zlib.crc32(speaker.encode())]))


def _write(path: Path, samples: NDArray[np.int16], rate: int, sample_rate: int) -> None:
    try:
        import soundfile
    except ImportError as error:
        raise MissingDependencyError(
            'audio files need soundfile, which is not installed: pip install "lora-lightning[demo]"'
        ) from error
    import torch
    import torchaudio

    waveform = torch.from_numpy(samples.astype(np.float32) / 32768)
    resampled = torchaudio.functional.resample(waveform, rate, sample_rate).clamp(-1, 1)
    soundfile.write(path, resampled.numpy(), sample_rate, subtype="PCM_16")
