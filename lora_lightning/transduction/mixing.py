"""Items of the target and of the source in one loader, which are drawn anew in each round."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import Dataset, Sampler

from lora_lightning.transduction.target import Target


class Mixed(Dataset[Any]):
    """Target items as (input, index), then source items as (input, −1 − class)."""

    def __init__(self, target: Target, source: Any, augment: Callable[[Any], Any] | None):
        self.target, self.source, self.augment = target, source, augment

    def __len__(self) -> int:
        return len(self.target) + len(self.source or ())

    def __getitem__(self, index: int) -> tuple[Any, int]:
        if index < len(self.target):
            return self.target[index]
        x, y = self.source[index - len(self.target)][:2]
        return (x if self.augment is None else self.augment(x)), -1 - int(y)


class Accepted(Sampler[int]):
    """Indices of the accepted items, and of as many of the source, in a new order each epoch."""

    def __init__(self, target: int, source: int, ratio: float, seed: int):
        self.accepted = list(range(target))
        self.target, self.source, self.ratio = target, source, ratio
        self.seed, self.epoch = seed, 0

    def __len__(self) -> int:
        return len(self.accepted) + self._of_source

    @property
    def _of_source(self) -> int:
        return min(self.source, round(self.ratio * len(self.accepted)))

    def set_epoch(self, epoch: int) -> None:
        """Lightning says which epoch it is."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        draw = random.Random(f"{self.seed} {self.epoch}")
        chosen = draw.sample(range(self.target, self.target + self.source), self._of_source)
        mixed = [*self.accepted, *chosen]
        draw.shuffle(mixed)
        return iter(mixed)
