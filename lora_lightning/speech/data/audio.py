"""Audio files: `read_audio` decodes and resamples one, `check_audio` and `checked` validate them.

Files are decoded by libsndfile (WAV, FLAC, OGG, Opus, MP3, AIFF and more), AAC by PyAV, block by
block, so that neither a long file nor a wrong header takes more memory than the sound itself.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lora_lightning.errors import DataError, MissingDependencyError
from lora_lightning.lora.values import check_number
from lora_lightning.report.files import no_file
from lora_lightning.report.sentences import by_reason
from lora_lightning.speech.data.compressed import COMPRESSED, Compressed
from lora_lightning.speech.data.utterances import Utterance

try:
    import soundfile
except (ImportError, OSError) as error:  # OSError: the package is installed, libsndfile is not
    raise MissingDependencyError(
        f"audio files need soundfile, which cannot be imported ({error}): pip install soundfile"
    ) from error

AUDIO = {
    ".aif", ".aiff", ".au", ".caf", ".flac", ".mp3", ".oga", ".ogg", ".opus", ".sph", ".w64",
    ".wav", *COMPRESSED,
}  # fmt: skip
SILENCE_DBFS = -80.0  # a recording whose peak lies below counts as silent
RATES = (1000, 768_000)  # Hz; what lies outside is a damaged header
BLOCK = 2**16  # frames decoded at a time
LOUDEST = 2.0**31  # of integers that were not scaled; what is larger overflows in a spectrum
UNKNOWN = 2**48  # frames; more means that the length was unknown when the file was written
CUT_SHORT = 0.95  # with less than this part of the length in the header the end is missing


def read_audio(
    path: Path | str | BinaryIO,
    sample_rate: int,
    min_seconds: float = 0.0,
    max_seconds: float = math.inf,
) -> Tensor:
    """Read a file as one channel at the given rate.

    Args:
        path: Of any format and sampling rate; several channels are averaged. Or the open file, of
            a format that libsndfile reads.
        sample_rate: Of the output, in Hz.
        min_seconds: A shorter one is refused.
        max_seconds: A longer one is refused, by its header before it is decoded.

    Returns:
        (T,) float32, where full scale is 1.

    Raises:
        ConfigError: `sample_rate` is not a sampling rate.
        DataError: the file cannot be read, is empty, too short or too long, or holds NaN or
            infinity; names the file and the reason.
        MissingDependencyError: it is AAC or the like, and the extra ``m4a`` is not installed.
    """
    check_number("sample_rate", sample_rate, f"[{RATES[0]}, {RATES[1]}]", unit="Hz")
    source = Path(path) if isinstance(path, (str, Path)) else path
    try:
        with _opened(source) as file:
            blocks = list(_within(file, min_seconds, max_seconds))
            waveform, rate = torch.from_numpy(np.concatenate(blocks)), file.samplerate
    except DataError as error:
        where = f"{path}: " if isinstance(source, Path) else ""
        raise DataError(f"{where}{error}") from error
    return _resampled(waveform, rate, sample_rate)


def check_audio(path: Path | str, min_seconds: float = 0.1, max_seconds: float = 60.0) -> float:
    """Decode a file completely and return its length.

    A file that is too long is refused by its header, before it is decoded.

    Returns:
        Its length in seconds.

    Raises:
        DataError: it cannot be read, is empty, silent, too short or too long, or holds NaN or
            infinity; gives the reason, without the path.
    """
    with _opened(Path(path)) as file:
        frames, peak = 0, 0.0
        for block in _within(file, min_seconds, max_seconds):
            frames, peak = frames + len(block), max(peak, float(np.abs(block).max()))
        rate = int(file.samplerate)
    if peak < 10 ** (SILENCE_DBFS / 20):
        level = f"peak at {20 * math.log10(peak):.0f} dBFS" if peak > 0 else "all zero"
        raise DataError(f"silent: {level}")
    return frames / rate


def checked(
    utterances: Sequence[Utterance],
    min_seconds: float = 0.1,
    max_seconds: float = 60.0,
    tick: Callable[[int, int], None] | None = None,
) -> tuple[list[Utterance], list[tuple[str, str]]]:
    """Decode every recording once, and leave out those that cannot be used.

    Returns:
        The usable ones, with their seconds; and (path, reason) of the others.
    """
    kept, skipped = [], []
    for done, item in enumerate(utterances, start=1):
        try:
            seconds = check_audio(item.path, min_seconds, max_seconds)
        except (DataError, MissingDependencyError) as error:
            skipped.append((str(item.path), str(error)))
        else:
            kept.append(replace(item, seconds=seconds))
        if tick is not None:
            tick(done, len(utterances))
    return kept, skipped


def counted(skipped: Sequence[tuple[str, str]]) -> str:
    """(path, reason) of what was left out, counted by reason, with an example of each."""
    example = {reason.partition(":")[0]: f"{path}: {reason}" for path, reason in reversed(skipped)}
    told = "; ".join(
        f"{n} × {reason}, such as {example[reason]}"
        for reason, n in by_reason(skipped).most_common()
    )
    return f"{len(skipped)} recordings are left out: {told}"


@contextmanager
def _opened(path: Path | BinaryIO) -> Iterator[Any]:
    """The open file; any error in reading it becomes a DataError."""
    try:
        with _open(path) as file:
            if not RATES[0] <= file.samplerate <= RATES[1]:
                raise DataError(f"a sampling rate of {file.samplerate} Hz in its header")
            if file.frames > UNKNOWN:
                raise DataError("no length in its header: rewrite it to a file, not to a pipe")
            yield file
    except soundfile.SoundFileError as error:
        reason = getattr(error, "error_string", str(error)).strip().removeprefix("Error : ")
        raise DataError(f"cannot be read: {reason.rstrip('.')}") from error
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror or error}") from error


def _open(path: Path | BinaryIO) -> Any:
    if not isinstance(path, Path):
        return soundfile.SoundFile(path)
    if not path.exists():  # libsndfile says "System error" here
        raise DataError("there is no such file")
    if what := no_file(path):
        raise DataError(f"a {what}, not a file")
    if path.stat().st_size == 0:
        raise DataError("empty: 0 bytes")
    if path.suffix.lower() in COMPRESSED:
        return Compressed(path)
    try:
        return soundfile.SoundFile(path)
    except TypeError as error:  # a headerless file needs a rate
        raise DataError("cannot be read: headerless audio; write it as WAV or FLAC") from error


def _within(file: Any, least: float, most: float) -> Iterator[NDArray[np.float32]]:
    """The blocks of a file that is so many seconds long; a longer one is not read to its end."""
    rate, frames = int(file.samplerate), 0
    _check_length(file.frames / rate, 0.0, most)
    for block in _blocks(file):
        frames += len(block)
        _check_length(frames / rate, 0.0, most)  # a header may be wrong
        yield block
    _check_length(frames / rate, least, most)


def _blocks(file: Any) -> Iterator[NDArray[np.float32]]:
    """The samples of one channel in blocks; at least one, and none empty.

    Raises:
        DataError: there is no sound, it ends early, or it is not finite.
    """
    total = 0
    for count in itertools.count():
        block = file.read(BLOCK, dtype="float32", always_2d=True).mean(axis=1, dtype=np.float32)
        if not len(block):
            break
        if not np.isfinite(block).all():
            raise DataError(f"holds NaN or infinity within its block {count} of {BLOCK} frames")
        if (peak := float(np.abs(block).max())) > LOUDEST:
            raise DataError(f"holds samples of {peak:.0e}; those of a sound lie in [-1, 1]")
        total += len(block)
        yield block
    if not total:
        raise DataError("empty: no sound after the header")
    if total < CUT_SHORT * file.frames:
        there, promised = total / file.samplerate, file.frames / file.samplerate
        raise DataError(f"cut short: {there:.2f} s of the {promised:.2f} s in its header")


def _check_length(seconds: float, least: float, most: float) -> None:
    if seconds < least:
        raise DataError(f"too short: {seconds:.3f} s, below {least:g} s")
    if seconds > most:
        raise DataError(f"too long: {seconds:.1f} s, above {most:g} s")


def _resampled(waveform: Tensor, rate: int, sample_rate: int) -> Tensor:
    if rate == sample_rate:
        return waveform
    with torch.no_grad():
        out: Tensor = _resampler(rate, sample_rate)(waveform)
    return out


@functools.lru_cache(maxsize=32)
def _resampler(rate: int, sample_rate: int) -> Any:
    """The resampler of a pair of rates; its filter is computed once.

    The filter's size grows with the terms of the reduced ratio: 44,101 Hz to 16,000 Hz would take
    gigabytes. Such a ratio is approximated to within a millionth, which is inaudible.
    """
    import torchaudio

    ratio = Fraction(sample_rate, rate)
    near = ratio.limit_denominator(1000)
    return torchaudio.transforms.Resample(near.denominator, near.numerator)
