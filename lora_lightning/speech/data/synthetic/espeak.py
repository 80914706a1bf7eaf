"""eSpeak NG as a function from text and voice to samples (extra ``demo``).

The library comes in the package espeakng-loader and is called through ctypes, in this process: a
few hundred sentences a second, without files.
"""

from __future__ import annotations

import ctypes
import functools
import json
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from lora_lightning.errors import ConfigError, DataError, LoRALightningError, MissingDependencyError

# Values of enums and flags in espeak-ng/speak_lib.h.
_RETRIEVE_SYNCHRONOUSLY = 2
_NO_EXIT = 0x8000
_UTF8 = 1
_AT_CHARACTER = 1
_RATE, _PITCH, _RANGE = 1, 3, 4
_LIMITS = {"rate": (80, 450), "pitch": (0, 100), "pitch_range": (0, 100)}

_Callback = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
)
_HEAD = struct.Struct("=II")  # number of samples, samples a second
_lock = threading.Lock()  # the library has one voice and one synthesizer for the whole process


@dataclass(frozen=True)
class Voice:
    """A speaker of eSpeak NG.

    Raises:
        ConfigError: a number is out of range.
    """

    # Of the pronunciation rules, such as "en-us"; another language than the text's gives an accent
    language: str
    variant: str = ""  # Timbre, a file name in eSpeak's voices/!v, such as "f2"; "": the default
    pitch: int = 50  # 0 to 100
    pitch_range: int = 50  # 0 (monotonous) to 100
    rate: int = 175  # words a minute, 80 to 450

    def __post_init__(self) -> None:
        for name, (low, high) in _LIMITS.items():
            if not low <= getattr(self, name) <= high:
                given = getattr(self, name)
                raise ConfigError(f"{name} of a voice must lie in {low} to {high}, got {given}")

    @property
    def espeak_name(self) -> str:
        """eSpeak's name of the voice."""
        return f"{self.language}+{self.variant}" if self.variant else self.language


def speak(text: str, voice: Voice) -> tuple[NDArray[np.int16], int]:
    """Samples (T,) of a spoken text, and their rate in Hz.

    eSpeak keeps state between calls (phases, noise), so that the samples depend slightly on
    earlier calls in this process; `speak_all` is deterministic.

    Raises:
        ConfigError: eSpeak has no such voice.
        DataError: eSpeak gives no samples.
        MissingDependencyError: the package is not installed.
    """
    with _lock:
        library, rate = _library()
        chunks: list[NDArray[np.int16]] = []

        def take(samples: Any, count: int, events: Any) -> int:
            if samples and count > 0:
                chunks.append(np.ctypeslib.as_array(samples, shape=(count,)).copy())
            return 0

        callback = _Callback(take)  # kept alive until the text is spoken
        library.espeak_SetSynthCallback(callback)
        _choose(library, voice)
        data = text.encode()
        library.espeak_Synth(data, len(data) + 1, 0, _AT_CHARACTER, 0, _UTF8, None, None)
        library.espeak_Synchronize()
    if not chunks:
        raise DataError(f"eSpeak spoke nothing for {text!r} with the voice {voice.espeak_name}")
    return np.concatenate(chunks), rate


def speak_all(jobs: Sequence[tuple[str, Voice]]) -> Iterator[tuple[NDArray[np.int16], int]]:
    """`speak` for each of `jobs`, in a process of its own, so that the result is deterministic.

    Raises:
        ConfigError, DataError, MissingDependencyError: as `speak`.
    """
    command = [sys.executable, "-m", "lora_lightning.speech.data.synthetic.espeak"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            child.stdin.write(json.dumps([(text, asdict(voice)) for text, voice in jobs]).encode())
            child.stdin.close()
            for text, voice in jobs:
                yield _received(child.stdout, text, voice)
        finally:
            child.kill()  # the caller may stop early


def _received(pipe: IO[bytes], text: str, voice: Voice) -> tuple[NDArray[np.int16], int]:
    head = pipe.read(_HEAD.size)
    count, rate = _HEAD.unpack(head) if len(head) == _HEAD.size else (0, 0)
    data = pipe.read(2 * count)
    if not data or len(data) < 2 * count:
        speak(text, voice)  # raises the error in this process
        raise DataError(f"eSpeak stopped at {text!r} with the voice {voice.espeak_name}")
    return np.frombuffer(data, dtype=np.int16), rate


def _serve() -> None:
    """The worker process: reads jobs as JSON, writes samples, each after their count."""
    for text, voice in json.load(sys.stdin):
        samples, rate = speak(text, Voice(**voice))
        sys.stdout.buffer.write(_HEAD.pack(len(samples), rate) + samples.tobytes())


def _choose(library: ctypes.CDLL, voice: Voice) -> None:
    chosen = library.espeak_SetVoiceByName(voice.espeak_name.encode()) == 0
    # eSpeak ignores a variant that does not exist.
    if not chosen or (voice.variant and not Path(_data(), "voices/!v", voice.variant).is_file()):
        raise ConfigError(
            f"eSpeak has no voice {voice.espeak_name!r}; the languages are such as en-us, de, hi, "
            "the variants the files of espeak-ng-data/voices/!v, such as m3, f2, croak"
        )
    library.espeak_SetParameter(_RATE, voice.rate, 0)
    library.espeak_SetParameter(_PITCH, voice.pitch, 0)
    library.espeak_SetParameter(_RANGE, voice.pitch_range, 0)


def _data() -> str:
    import espeakng_loader

    path: str = espeakng_loader.get_data_path()
    return path


@functools.cache
def _library() -> tuple[ctypes.CDLL, int]:
    try:
        import espeakng_loader
    except ImportError as error:
        raise MissingDependencyError(
            "spoken data need eSpeak NG, which is not installed: "
            'pip install "lora-lightning[demo]" (or pip install espeakng-loader)'
        ) from error
    library = ctypes.CDLL(espeakng_loader.get_library_path())
    library.espeak_Synth.argtypes = [
        ctypes.c_char_p, ctypes.c_size_t, ctypes.c_uint, ctypes.c_int, ctypes.c_uint,
        ctypes.c_uint, ctypes.c_void_p, ctypes.c_void_p,
    ]  # fmt: skip
    rate = library.espeak_Initialize(_RETRIEVE_SYNCHRONOUSLY, 0, _data().encode(), _NO_EXIT)
    if rate <= 0:
        raise DataError(f"eSpeak NG could not be started (its code {rate}); reinstall it")
    library.espeak_ng_SetRandSeed(1)  # else breath and whisper are noise seeded by the clock
    return library, rate


if __name__ == "__main__":
    try:
        _serve()
    except (LoRALightningError, BrokenPipeError):
        sys.exit(1)  # the parent process raises the error
