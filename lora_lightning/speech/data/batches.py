"""The parts of `SpeechData`: dataset, cache and loader of batches of recordings.

The dataset takes the indices of a whole batch. Files that have become unreadable since they were
checked are left out, and the loader reports them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from lora_lightning.adaptation.resumable_loader import ResumableLoader
from lora_lightning.errors import ConfigError, DataError
from lora_lightning.speech.data.audio import read_audio
from lora_lightning.speech.data.utterances import AudioBatch, Utterance

Transform = Callable[[Tensor, Utterance], Tensor]
Lost = list[tuple[str, str]]  # (path, reason) of recordings that could not be read
Found = list[tuple[Tensor, Utterance]]


class DataWarning(UserWarning):
    """A recording has become unreadable since it was checked, and is left out."""


@dataclass(eq=False)
class Recordings(Dataset[tuple[AudioBatch | None, Lost]]):
    """Batches by lists of indices; None where no recording of a batch can be read."""

    items: Sequence[Utterance]  # the recordings
    sample_rate: int  # of the waveforms, in Hz
    transform: Transform | None  # applied once, after reading
    augment: Transform | None  # applied each time
    training: bool  # replace a batch of which nothing can be read by another recording
    cache: Cache  # of waveforms
    # Path → reason of what was reported; filled in the loader's process, not in workers
    lost: dict[str, str]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, indices: list[int] | int) -> tuple[AudioBatch | None, Lost]:
        # A single index comes from the sampler of Trainer(overfit_batches=...).
        wanted = [indices] if isinstance(indices, int) else indices
        found, lost = self._read(wanted)
        if not found and self.training:
            found, more = self._substitute(wanted)
            lost += more
        return AudioBatch.of(*zip(*found, strict=True)) if found else None, lost

    def _read(self, indices: Sequence[int]) -> tuple[Found, Lost]:
        found, lost = [], []
        for item in (self.items[i] for i in indices):
            try:
                found.append((self._waveform(item), item))
            except DataError as error:
                lost.append((str(item.path), str(error)))
        return found, lost

    def _substitute(self, gone: Sequence[int]) -> tuple[Found, Lost]:
        """The next recording that can be read.

        Lightning counts training batches to schedule validation, and other processes would wait
        for a missing one.
        """
        lost: Lost = []
        for step in range(1, len(self.items)):
            found, more = self._read([(gone[-1] + step) % len(self.items)])
            lost += more
            if found:
                return found, lost
        raise DataError(
            f"none of the {len(self.items)} training recordings can be read any more, such as "
            f"{self.items[gone[0]].path}: is the disk still there?"
        )

    def _waveform(self, item: Utterance) -> Tensor:
        waveform = self.cache.get(item)
        if waveform is None:
            waveform = _applied(self.transform, read_audio(item.path, self.sample_rate), item)
            self.cache.put(item, waveform)
        return waveform if self.augment is None else _applied(self.augment, waveform.clone(), item)


class BatchLoader(ResumableLoader):
    """Reports what could not be read, in the process that trains, and steps over empty batches."""

    at_once = False  # but when it is asked for a batch

    def __iter__(self) -> Iterator[AudioBatch]:  # type: ignore[override]
        dataset: Any = self.dataset
        for batch, lost in super().__iter__():
            _report(lost, dataset.lost)
            if batch is not None:
                yield batch


class Cache:
    """Waveforms in memory, up to a number of bytes.

    Nothing is evicted: as each epoch visits all recordings, evicting the least recently used one
    would evict each just before it is needed.
    """

    def __init__(self, limit: int):
        self.free = limit
        self.waveforms: dict[Utterance, Tensor] = {}

    def get(self, item: Utterance) -> Tensor | None:
        """The waveform, if cached."""
        return self.waveforms.get(item)

    def put(self, item: Utterance, waveform: Tensor) -> None:
        """Cache a waveform, if there is room."""
        size = waveform.untyped_storage().nbytes()
        if size <= self.free and item not in self.waveforms:
            self.waveforms[item] = waveform
            self.free -= size


def _applied(function: Transform | None, waveform: Tensor, item: Utterance) -> Tensor:
    out = waveform if function is None else function(waveform, item)
    if not isinstance(out, Tensor) or out.dim() != 1 or not len(out) or not out.is_floating_point():
        got = f"{tuple(out.shape)} of {out.dtype}" if isinstance(out, Tensor) else repr(out)[:80]
        raise ConfigError(
            f"{function!r} must return a waveform (T,) of floats for {item.path.name}, got {got}"
        )
    return out.detach().float()


def _report(lost: Lost, known: dict[str, str]) -> None:
    """Warn once for each recording that could not be read."""
    for path, reason in lost:
        if path not in known:
            known[path] = reason
            # warnings.warn would print a line of this file below the message.
            warnings.warn_explicit(
                f"left out: {reason}", DataWarning, filename="SpeechData", lineno=0
            )


def unchanged(batch: Any) -> Any:
    """The batch itself: it is collated already."""
    return batch
