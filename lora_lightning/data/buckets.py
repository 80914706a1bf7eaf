"""`BucketSampler`: batches of recordings of like length, so that little is padding."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch.distributed
from torch.utils.data import DistributedSampler

from lora_lightning.errors import ConfigError


class BucketSampler(DistributedSampler[list[int]]):
    """Lists of indices, each once an epoch: ``DataLoader(…, sampler=…, batch_size=None)``.

    Recordings are sorted by their length, which is first changed by a little at random, and cut
    into batches; the batches come in random order. Unshuffled, they come by length.

    In a distributed run each process takes every n-th batch; where their number does not divide,
    the last ones are filled up from the first, so that all processes do as many steps. (It is a
    `DistributedSampler` so that Lightning sees this, and puts no other in its place.)

    Args:
        seconds: Length of each recording.
        batch_seconds: Most sound in a batch, padding included; a longer recording goes alone.
        max_batch: Most recordings in a batch.
        shuffle: New batches in each epoch (`set_epoch`), the same for the same seed and epoch.
        seed: Of the shuffling.

    Raises:
        ConfigError: a limit that lets no batch be.
    """

    def __init__(
        self,
        seconds: Sequence[float],
        batch_seconds: float = 60.0,
        max_batch: int = 32,
        shuffle: bool = False,
        seed: int = 0,
    ):
        if not batch_seconds > 0:
            raise ConfigError(f"batch_seconds must be above 0, got {batch_seconds}")
        if max_batch < 1:
            raise ConfigError(f"max_batch must be at least 1, got {max_batch}")
        self.seconds = np.asarray(seconds, dtype=np.float64)
        self.batch_seconds, self.max_batch = batch_seconds, max_batch
        self.shuffle, self.seed, self.epoch = shuffle, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Batches of this epoch, in this process."""
        return math.ceil(len(self._batches()) / _world()[1])

    def __iter__(self) -> Iterator[list[int]]:
        """The batches of this epoch, in this process."""
        batches = self._batches()
        rank, world = _world()
        missing = -len(batches) % world
        yield from (batches + (batches * missing)[:missing])[rank::world]

    def _batches(self) -> list[list[int]]:
        keys, rng = self.seconds, np.random.default_rng([self.seed, self.epoch])
        if self.shuffle:
            # By up to a tenth: mixes neighbours, and costs little padding.
            keys = keys * rng.uniform(0.9, 1.1, size=len(keys))
        batches: list[list[int]] = []
        longest = 0.0
        for index in np.argsort(keys, kind="stable").tolist():
            longest = max(longest, float(self.seconds[index]))
            full = batches and (
                len(batches[-1]) == self.max_batch
                or longest * (len(batches[-1]) + 1) > self.batch_seconds
            )
            if full or not batches:
                batches.append([])
                longest = float(self.seconds[index])
            batches[-1].append(index)
        return [batches[i] for i in rng.permutation(len(batches))] if self.shuffle else batches


def _world() -> tuple[int, int]:
    """This process's number, and how many there are."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1
