"""AAC and other formats that libsndfile does not read, decoded by PyAV (extra ``m4a``)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_lightning.errors import DataError, MissingDependencyError

COMPRESSED = {".3gp", ".aac", ".amr", ".m4a", ".m4b", ".webm", ".wma"}


class Compressed:
    """The sound of a file, with the attributes of a `soundfile.SoundFile` that are used.

    Raises:
        DataError: it cannot be read, or holds no sound.
        MissingDependencyError: PyAV is not installed.
    """

    def __init__(self, path: Path):
        try:
            import av
        except ImportError as error:
            raise MissingDependencyError(
                f"{path.suffix} files are decoded by PyAV, which is not installed: "
                'pip install "lora-lightning[m4a]"'
            ) from error
        try:
            self._file: Any = av.open(str(path))
            stream = next(iter(self._file.streams.audio), None)
        except (OSError, ValueError) as error:  # PyAV's errors are some of these
            raise DataError(f"cannot be read: {_said(error)}") from error
        if stream is None:
            self._file.close()
            raise DataError("empty: it holds no sound")
        self.samplerate = int(stream.rate)
        length = 0 if stream.duration is None else stream.duration * stream.time_base
        self.frames = int(length * self.samplerate)
        self._resample = av.AudioResampler(format="fltp", rate=self.samplerate)
        self._blocks = self._decoded(stream)

    def __enter__(self) -> Compressed:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self, frames: int, **_: Any) -> NDArray[np.float32]:
        """The next block (T, channels) of any length; none at the end."""
        try:
            return next(self._blocks, np.zeros((0, 1), np.float32))
        except (OSError, ValueError) as error:
            raise DataError(f"cannot be read: {_said(error)}") from error

    def _decoded(self, stream: Any) -> Iterator[NDArray[np.float32]]:
        for frame in self._file.decode(stream):
            for block in self._resample.resample(frame):
                yield block.to_ndarray().T


def _said(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)
