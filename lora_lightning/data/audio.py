"""One audio file: read as a recogniser wants it, or found to be unusable.

torchaudio no longer decodes files; soundfile does: WAV, FLAC, OGG, MP3 and what else libsndfile
knows, with any number of bits.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import soundfile
import torch
import torchaudio
from numpy.typing import NDArray
from torch import Tensor

from lora_lightning.data.utterances import Utterance
from lora_lightning.errors import DataError

SILENCE = 1e-4  # -80 dB below full scale
_BLOCK = 1 << 18  # samples that are looked at together, so that memory is bounded


def read_audio(path: Path | str, sample_rate: int) -> Tensor:
    """Samples (T,), float32 in [-1, 1], mono, at `sample_rate`.

    Raises:
        DataError: the file cannot be read, or holds samples that are no numbers.
    """
    try:
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except (OSError, RuntimeError) as error:  # soundfile's own error is a RuntimeError
        raise DataError(f"{path}: {_reason(Path(path), error)}") from error
    if not np.isfinite(samples).all():
        raise DataError(f"{path}: holds samples that are not finite")
    mono = torch.from_numpy(samples.mean(axis=1))
    return mono if rate == sample_rate else _resampler(rate, sample_rate)(mono)


def check_audio(path: Path | str, min_seconds: float = 0.1, max_seconds: float = 60.0) -> float:
    """How long a recording is, in seconds, when it can be used.

    Every sample is decoded, block by block, unless the header says that it is too long.

    Raises:
        DataError: the file is unreadable, empty, silent, not finite, too short or too long; the
            message is the reason alone.
    """
    try:
        with soundfile.SoundFile(path) as file:
            seconds = float(file.frames / file.samplerate)
            if file.frames == 0:
                raise DataError("empty: it holds no samples")
            if seconds > max_seconds:
                raise DataError(f"{seconds:.1f} s long, more than {max_seconds:g} s")
            if seconds < min_seconds:
                raise DataError(f"{seconds:.2f} s long, less than {min_seconds:g} s")
            count, peak = 0, 0.0
            for block in _blocks(file):
                count += len(block)
                peak = max(peak, float(np.abs(block).max()))
            if count < file.frames:
                raise DataError(f"cut off: {count} of {file.frames} samples can be decoded")
    except (OSError, RuntimeError) as error:
        raise DataError(_reason(Path(path), error)) from error
    if not math.isfinite(peak):
        raise DataError("holds samples that are not finite")
    if peak < SILENCE:
        raise DataError("silent: nothing above -80 dB of full scale")
    return seconds


def _blocks(file: soundfile.SoundFile) -> Iterator[NDArray[np.float32]]:
    while len(block := file.read(_BLOCK, dtype="float32", always_2d=True)):
        # NaN would be lost in a maximum; infinity is not.
        yield np.where(np.isnan(block), np.float32(np.inf), block)


def _reason(path: Path, error: Exception) -> str:
    if not path.exists():
        return "there is no such file"
    if path.is_dir():
        return "a folder, not a file"
    if path.stat().st_size == 0:
        return "empty: 0 bytes"
    # libsndfile begins with the path, which is said already.
    return f"cannot be decoded ({str(error).rpartition(': ')[2].rstrip('.')})"


def checked(
    utterances: Sequence[Utterance],
    min_seconds: float = 0.1,
    max_seconds: float = 60.0,
    tick: Callable[[int, int], None] | None = None,
) -> tuple[list[Utterance], list[tuple[str, str]]]:
    """Look at every file (`check_audio`).

    Args:
        utterances: What to look at.
        min_seconds: Shorter recordings are left out.
        max_seconds: Longer recordings are left out.
        tick: Called with (done, total) after each.

    Returns:
        Those that can be used, with their `seconds`; and (path, reason) of the others.
    """
    kept: list[Utterance] = []
    skipped: list[tuple[str, str]] = []
    for done, utterance in enumerate(utterances, 1):
        try:
            seconds = check_audio(utterance.path, min_seconds, max_seconds)
            kept.append(replace(utterance, seconds=seconds))
        except DataError as error:
            skipped.append((str(utterance.path), str(error)))
        if tick is not None:
            tick(done, len(utterances))
    return kept, skipped


@functools.lru_cache(maxsize=16)
def _resampler(rate: int, sample_rate: int) -> torchaudio.transforms.Resample:
    return torchaudio.transforms.Resample(rate, sample_rate)
