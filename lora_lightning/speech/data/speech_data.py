"""`SpeechData`: a LightningDataModule of recordings in batches of similar length.

Every file is decoded once before training; unusable ones are left out, listed in `skipped`, and
counted by reason in a warning. A
file that is damaged or removed after that is left out of its batch, listed in `lost`, and reported
by one warning, so that no run fails in the middle of an epoch.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lightning import LightningDataModule
from torch.utils.data import DataLoader

from lora_lightning.errors import ConfigError, DataError
from lora_lightning.lora.values import check_count, check_number
from lora_lightning.speech.data.audio import checked, counted
from lora_lightning.speech.data.batches import BatchLoader, Cache, Recordings, Transform, unchanged
from lora_lightning.speech.data.buckets import BucketSampler
from lora_lightning.speech.data.utterances import Utterance


class SpeechData(LightningDataModule):
    """Recordings for a Trainer; each batch is a `lora_lightning.speech.data.utterances.AudioBatch`.

    Training batches hold recordings of similar length and are redrawn in each epoch by
    `BucketSampler`; validation batches likewise, but always the same. Test and predict loaders
    give `test` in its order. A recording in `lost` is missing there: the `items` of a batch
    identify its rows.

    With several processes each gets as many batches; where they do not divide evenly, some
    recordings are evaluated twice.

    Args:
        train: Recordings to train on.
        validation: Recordings to validate on.
        test: Recordings to test on and to predict. All three as returned by
            `lora_lightning.speech.data.audio.checked`; those whose seconds are NaN are checked by
            `setup`.
        sample_rate: Of the waveforms, in Hz.
        batch_seconds: Most audio in a batch, padding included; a longer recording is a batch.
        max_batch: Most recordings in a batch.
        min_seconds: `setup` leaves out shorter recordings.
        max_seconds: `setup` leaves out longer recordings.
        num_workers: Worker processes of a loader; 0 loads in this process.
        cache_mb: Waveforms stay in memory up to this many MiB, shared among the workers of a
            loader; the others are read each time.
        transform: Called with (waveform (T,), utterance), returns a waveform: the acoustic
            environment. Applied to all recordings; must be deterministic.
        augment: The same for training only; may be random.
        seed: Of the draw of training batches.

    Attributes:
        items: The recordings by split; after `setup`, the usable ones.
        skipped: (path, reason) of each recording that `setup` left out.
        lost: Path → reason for each recording that could not be read later on.

    Raises:
        ConfigError: a setting is out of range.
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
        given = {"train": train, "validation": validation, "test": test}
        _check_items(given)
        self.items = {name: list(items) for name, items in given.items()}
        check_count("sample_rate", sample_rate, 1000)
        check_number("batch_seconds", batch_seconds, "[0.1, inf)")
        check_count("max_batch", max_batch)
        check_count("num_workers", num_workers, 0)
        check_number("cache_mb", cache_mb, "[0, inf)")
        check_count("seed", seed, 0)
        self.sample_rate, self.batch_seconds, self.max_batch = sample_rate, batch_seconds, max_batch
        self.min_seconds, self.max_seconds = min_seconds, max_seconds
        self.num_workers, self.cache_mb, self.seed = num_workers, cache_mb, seed
        self.transform, self.augment = transform, augment
        self.skipped: list[tuple[str, str]] = []
        self.lost: dict[str, str] = {}
        self._cache = Cache(int(cache_mb * 2**20) // max(1, num_workers))
        if not validation:
            # An empty list of loaders would make Lightning warn; no method at all does not.
            self.val_dataloader = None  # type: ignore[method-assign, assignment]

    def setup(self, stage: str | None = None) -> None:
        """Check the recordings that are not checked yet; a second call does nothing.

        Raises:
            DataError: none of a list can be used; gives the reason.
        """
        for name, items in self.items.items():
            fresh = [item for item in items if not item.seconds > 0]
            kept, skipped = checked(fresh, self.min_seconds, self.max_seconds)
            seconds = {item.path: item.seconds for item in kept}
            # In the given order, whether they were checked now or before.
            filled = [replace(i, seconds=seconds.get(i.path, i.seconds)) for i in items]
            self.items[name] = [item for item in filled if item.seconds > 0]
            self.skipped += skipped
            if items and not self.items[name]:
                path, reason = skipped[0]
                raise DataError(
                    f"none of the {len(items)} recordings for {name} can be used; {path}: {reason}"
                )
            if skipped:
                warnings.warn(f"{name}: {counted(skipped)}", stacklevel=2)

    def train_dataloader(self) -> DataLoader[Any]:
        """Training recordings, redrawn in each epoch, and augmented."""
        return self._loader("train", shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        """Validation recordings, from the shortest to the longest."""
        return self._loader("validation")

    def test_dataloader(self) -> DataLoader[Any]:
        """Test recordings, in order."""
        return self._loader("test", by_length=False)

    predict_dataloader = test_dataloader

    def _loader(self, name: str, **order: bool) -> DataLoader[Any]:
        self.setup()
        items = self.items[name]
        if not items:
            raise DataError(f"there are no recordings to load: give SpeechData({name}=[…])")
        training = name == "train"
        augment = self.augment if training else None
        dataset = Recordings(
            items, self.sample_rate, self.transform, augment, training, self._cache, self.lost
        )
        seconds = [item.seconds for item in items]
        sampler = BucketSampler(
            seconds, self.batch_seconds, self.max_batch, seed=self.seed, **order
        )
        # The sampler yields whole batches. As `sampler`, not as `batch_sampler`, Lightning keeps it
        # with several processes too. Keywords only: Lightning re-creates the loader.
        return BatchLoader(
            dataset=dataset,
            sampler=sampler,
            batch_size=None,
            collate_fn=unchanged,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,  # they keep their part of the cache
        )


def _check_items(given: dict[str, Sequence[Utterance]]) -> None:
    for name, items in given.items():
        strange: list[object] = [item for item in items if not isinstance(item, Utterance)]
        if strange:
            raise ConfigError(
                f"{name} must be a list of Utterance, as load_utterances gives it; in it is "
                f"{strange[0]!r}"
            )
