"""`BucketSampler`: batches of recordings of similar length, bounded by seconds, not number."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch.distributed
from torch.utils.data.distributed import DistributedSampler

from lora_lightning.errors import ConfigError
from lora_lightning.lora.values import check_count, check_number

SIMILAR = 0.5  # the shortest of a bucket is at least this part of the longest
BATCHES = 16  # of one bucket at most


class BucketSampler(DistributedSampler[list[int]]):
    """Batches, as lists of indices, whose padded length stays within a budget of seconds.

    Recordings are sorted by length and cut, from the longest down, into buckets of similar
    length. Each epoch redraws the batches of each bucket, and then the order of all batches; the
    draw depends on (seed, epoch) alone. The number of batches is the same in every epoch, as
    Lightning assumes.

    Use it as ``DataLoader(dataset, sampler=BucketSampler(...), batch_size=None)``, with a dataset
    that takes a list of indices. As it is a `DistributedSampler`, Lightning then keeps it and calls
    its `set_epoch`. Each process gets the same number of batches; where they do not divide evenly,
    some are repeated. ``DataLoader(dataset, batch_sampler=...)`` works as well, but there Lightning
    needs ``Trainer(use_distributed_sampler=False)`` with several processes (it says so), and
    `set_epoch` has to be called by hand.

    Args:
        seconds: Length of each recording.
        batch_seconds: Upper bound of a batch: its longest recording times their number. A longer
            recording is a batch of its own.
        max_batch: Most recordings in a batch.
        shuffle: Redraw in each epoch; otherwise from the shortest to the longest.
        seed: Of the draw.
        drop_last: Leave out the batch that is not full, and those that do not divide evenly among
            processes.
        by_length: False: batches of neighbours in the given order, as predictions need it; only
            without `shuffle`.
        num_replicas: Number of processes; by default that of `torch.distributed`, or 1.
        rank: Of this process; likewise.

    Raises:
        ConfigError: a length, a limit or the seed is not valid.
    """

    def __init__(
        self,
        seconds: Sequence[float],
        batch_seconds: float,
        max_batch: int,
        shuffle: bool = False,
        seed: int = 0,
        drop_last: bool = False,
        *,
        by_length: bool = True,
        num_replicas: int | None = None,
        rank: int | None = None,
    ):
        _check(seconds, batch_seconds, max_batch, seed)
        if shuffle and not by_length:
            raise ConfigError("by_length=False keeps the order given: it needs shuffle=False")
        world, own = _processes()
        world, own = num_replicas or world, own if rank is None else rank
        if not 0 <= own < world:
            raise ConfigError(f"rank must be one of 0 to {world - 1}, got {own}")
        dataset: Any = seconds  # only its length is used
        super().__init__(dataset, world, own, shuffle, seed, drop_last)
        self.seconds, self.batch_seconds, self.max_batch = seconds, batch_seconds, max_batch
        # Batches of neighbours are fixed; buckets are drawn from in each epoch.
        self._buckets = self._by_length() if by_length else self._neighbours()

    def __len__(self) -> int:
        rounded = math.floor if self.drop_last else math.ceil
        batches = sum(rounded(len(bucket) / size) for bucket, size in self._buckets)
        return rounded(batches / self.num_replicas)

    def __iter__(self) -> Iterator[list[int]]:
        batches = self.batches()
        for i in range(self.rank, len(self) * self.num_replicas, self.num_replicas):
            yield batches[i % len(batches)]

    def batches(self) -> list[list[int]]:
        """The batches of this epoch, for all processes together."""
        rng = np.random.default_rng([self.seed, self.epoch])
        found: list[list[int]] = []
        for bucket, size in self._buckets:
            order = rng.permutation(bucket).tolist() if self.shuffle else bucket
            rest = len(order) % size
            # The incomplete batch first: sorted, it has the shortest recordings of all.
            found += [order[:rest]] if rest and not self.drop_last else []
            found += [order[i : i + size] for i in range(rest, len(order), size)]
        return [found[i] for i in rng.permutation(len(found))] if self.shuffle else found

    def _by_length(self) -> list[tuple[list[int], int]]:
        """Buckets (indices, batch size), shortest first; only the first is not full."""
        rest = sorted(range(len(self.seconds)), key=lambda i: self.seconds[i])
        found = []
        while rest:
            longest = self.seconds[rest[-1]]
            size = max(1, min(self.max_batch, int(self.batch_seconds // longest)))
            similar = sum(self.seconds[i] >= SIMILAR * longest for i in rest[-BATCHES * size :])
            # One batch is filled whatever the lengths. All buckets but the last hold whole batches.
            whole = max(1, similar // size) * size
            count = len(rest) if similar == len(rest) else min(len(rest), whole)
            found.append((rest[len(rest) - count :], size))
            del rest[len(rest) - count :]
        return found[::-1]

    def _neighbours(self) -> list[tuple[list[int], int]]:
        """Batches in the given order, each as a bucket of its own."""
        found: list[list[int]] = []
        longest = 0.0
        for i, seconds in enumerate(self.seconds):
            longest = max(longest, seconds)
            number = len(found[-1]) + 1 if found else 0
            if not number or number > self.max_batch or number * longest > self.batch_seconds:
                found.append([])
                longest = seconds
            found[-1].append(i)
        return [(batch, len(batch)) for batch in found]


def _processes() -> tuple[int, int]:
    """World size and rank of this process."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size(), torch.distributed.get_rank()
    return 1, 0


def _check(seconds: Sequence[float], batch_seconds: float, max_batch: int, seed: int) -> None:
    for i, length in enumerate(seconds):
        if not 0 < length < math.inf:  # NaN included
            raise ConfigError(
                f"seconds[{i}] must be a length in seconds, got {length}: check the recordings "
                "first, as lora_lightning.speech.data.audio.checked does"
            )
    check_number("batch_seconds", batch_seconds, "(0, inf)")
    check_count("max_batch", max_batch)
    check_count("seed", seed, 0)
