"""`SpeechData`: recordings for a Lightning Trainer, in batches of like length."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lora_lightning.data.audio import checked, read_audio
from lora_lightning.data.buckets import BucketSampler
from lora_lightning.data.utterances import AudioBatch, Utterance
from lora_lightning.errors import DataError

Transform = Callable[[Tensor, Utterance], Tensor]


class SpeechData(LightningDataModule):
    """Recordings in batches of like length; each batch is an `AudioBatch`.

    What `setup` finds unusable is left out and listed in `skipped`. A file that goes bad after
    that is left out of its batch, with one warning; an epoch goes on without it.

    Args:
        train: Recordings to learn from.
        validation: Recordings to validate on.
        test: Recordings to test on, and to predict.
        sample_rate: At which they are delivered, in Hz.
        batch_seconds: Most sound in a batch, padding included; a longer recording goes alone.
        max_batch: Most recordings in a batch.
        min_seconds: Shorter recordings are left out.
        max_seconds: Longer recordings are left out.
        num_workers: Processes that read; 0 reads in this one.
        cache_mb: Decoded sound stays in memory up to so many MiB, in each process.
        transform: ``(waveform (T,), utterance) -> waveform``, applied to every recording, such
            as an acoustic environment; the same for a recording every time.
        augment: Like `transform`, in training only, and as random as it likes.
        seed: Of the order of the batches.

    Attributes:
        skipped: (path, reason) of each recording that was left out.

    Test and prediction go by length, not in the order given; an `AudioBatch` says what each row
    is.
    """

    def __init__(
        self,
        train: Sequence[Utterance] = (),
        validation: Sequence[Utterance] = (),
        test: Sequence[Utterance] = (),
        *,
        sample_rate: int = 16000,
        batch_seconds: float = 60.0,
        max_batch: int = 32,
        min_seconds: float = 0.1,
        max_seconds: float = 60.0,
        num_workers: int = 0,
        cache_mb: float = 256.0,
        transform: Transform | None = None,
        augment: Transform | None = None,
        seed: int = 0,
    ):
        super().__init__()
        self.items = {"train": list(train), "validation": list(validation), "test": list(test)}
        self.sample_rate, self.seed = sample_rate, seed
        self.batch_seconds, self.max_batch = batch_seconds, max_batch
        self.min_seconds, self.max_seconds = min_seconds, max_seconds
        self.num_workers, self.cache_mb = num_workers, cache_mb
        self.transform, self.augment = transform, augment
        self.skipped: list[tuple[str, str]] = []
        if not self.items["validation"]:
            # An empty list of loaders would make Lightning warn; no method at all does not.
            self.val_dataloader = None  # type: ignore[method-assign, assignment]

    def setup(self, stage: str | None = None) -> None:
        """Look at every recording whose length is not known yet.

        Raises:
            DataError: a split has no usable recording.
        """
        for split, items in self.items.items():
            unknown = [item for item in items if math.isnan(item.seconds)]
            if unknown:
                kept, bad = checked(unknown, self.min_seconds, self.max_seconds)
                self.skipped += bad
                known = [item for item in items if not math.isnan(item.seconds)]
                self.items[split] = known + kept
            if items and not self.items[split]:
                raise DataError(
                    f"none of the {len(items)} recordings of {split} can be used; the first, "
                    f"{self.skipped[0][0]}: {self.skipped[0][1]}"
                )

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled, augmented."""
        return self._loader("train", shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        """By length."""
        return self._loader("validation")

    def test_dataloader(self) -> DataLoader[Any]:
        """By length."""
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader[Any]:
        """The test recordings, by length."""
        return self._loader("test")

    def _loader(self, split: str, shuffle: bool = False) -> DataLoader[Any]:
        items = self.items[split]
        if not items:
            raise DataError(f"SpeechData was given no recordings to {split} on")
        augment = self.augment if split == "train" else None
        batches = _Batches(items, self.sample_rate, self.cache_mb, self.transform, augment)
        lengths = [item.seconds for item in items]
        sampler = BucketSampler(lengths, self.batch_seconds, self.max_batch, shuffle, self.seed)
        return _Loader(batches, sampler=sampler, batch_size=None, num_workers=self.num_workers)


class _Loader(DataLoader[Any]):
    """Leaves out batches of which no recording can be read any more."""

    def __iter__(self) -> Any:
        return (batch for batch in super().__iter__() if batch is not None)


class _Batches(Dataset[AudioBatch | None]):
    """List of indices → a batch of the recordings that can be read; None where none can."""

    def __init__(
        self,
        items: Sequence[Utterance],
        sample_rate: int,
        cache_mb: float,
        transform: Transform | None,
        augment: Transform | None,
    ):
        self.items, self.sample_rate = items, sample_rate
        self.transform, self.augment = transform, augment
        self.room = cache_mb * 2**20
        self.cache: dict[int, Tensor] = {}
        self.told: set[int] = set()

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, indices: Sequence[int]) -> AudioBatch | None:
        found = [(w, self.items[i]) for i in indices if (w := self._read(i)) is not None]
        if self.augment is not None:
            found = [(self.augment(waveform, item), item) for waveform, item in found]
        return AudioBatch.of(*zip(*found, strict=True)) if found else None

    def _read(self, index: int) -> Tensor | None:
        try:
            return self._waveform(index)
        except DataError as error:
            if index not in self.told:
                self.told.add(index)
                warnings.warn(f"left out: {error}", stacklevel=1)
            return None

    def _waveform(self, index: int) -> Tensor:
        if index in self.cache:
            return self.cache[index]
        item = self.items[index]
        waveform = read_audio(item.path, self.sample_rate)
        if self.transform is not None:
            waveform = self.transform(waveform, item)
        # First come, first kept: where not all fit, those that do are a fixed set, while the
        # least recently used would change places all the time and never be there.
        if waveform.nbytes <= self.room:
            self.room -= waveform.nbytes
            self.cache[index] = waveform
        return waveform
