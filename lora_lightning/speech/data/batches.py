"""Batches of recordings, read as they are asked for, whatever happens to the files meanwhile.

The parts of `SpeechData`: a dataset that takes the indices of a whole
batch, the memory of what was read, and a loader that reports what could not be.
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
Lost = list[tuple[str, str]]  # paths of recordings that could not be read, and which and why
Found = list[tuple[Tensor, Utterance]]


class DataWarning(UserWarning):
    """A recording that was fine before is no longer, and is left out."""


@dataclass(eq=False)
class Recordings(Dataset[tuple[AudioBatch | None, Lost]]):
    """Batches by lists of indices; None where nothing of a batch can be read.

    Args:
        items: The recordings.
        sample_rate: Of the waveforms, in Hz.
        transform: Applied once to what was read.
        augment: Applied each time.
        training: Let another recording stand in for a batch of which nothing can be read.
        cache: Where waveforms stay.
        lost: What was reported; filled where the loader is, not in its workers.
    """

    items: Sequence[Utterance]
    sample_rate: int
    transform: Transform | None
    augment: Transform | None
    training: bool
    cache: Cache
    lost: dict[str, str]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, indices: list[int] | int) -> tuple[AudioBatch | None, Lost]:
        # A single index comes from the sampler that Trainer(overfit_batches=...) puts in.
        wanted = [indices] if isinstance(indices, int) else indices
        found, lost = self._read(wanted)
        if not found and self.training:
            found, more = self._stand_in(wanted)
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

    def _stand_in(self, gone: Sequence[int]) -> tuple[Found, Lost]:
        """The next recording that can be read.

        A training batch less would upset Lightning, which counts them to know when to validate,
        and leave other processes waiting.
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

    def __iter__(self) -> Iterator[AudioBatch]:  # type: ignore[override]
        dataset: Any = self.dataset
        for batch, lost in super().__iter__():
            _report(lost, dataset.lost)
            if batch is not None:
                yield batch


class Cache:
    """Waveforms, up to so many bytes.

    What is in stays in: where each epoch goes through all recordings, throwing out those used
    least recently would throw out each just before it is needed.
    """

    def __init__(self, limit: int):
        self.free = limit
        self.waveforms: dict[Utterance, Tensor] = {}

    def get(self, item: Utterance) -> Tensor | None:
        """The waveform, if it is there."""
        return self.waveforms.get(item)

    def put(self, item: Utterance, waveform: Tensor) -> None:
        """Keep a waveform, if there is room."""
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
    """Warn of what is lost, by one line for each file, once."""
    for path, reason in lost:
        if path not in known:
            known[path] = reason
            # warnings.warn would print a line of this file below the message.
            warnings.warn_explicit(
                f"left out: {reason}", DataWarning, filename="SpeechData", lineno=0
            )


def unchanged(batch: Any) -> Any:
    """The batch as it is: there is nothing left to collate."""
    return batch
