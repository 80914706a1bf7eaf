"""Parallel text: `Pair`, files of pairs, and the batches of a translator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from lora_lightning.adaptation.resumable_loader import Position, ResumableLoader
from lora_lightning.errors import DataError
from lora_lightning.runner.tables import read_rows
from lora_lightning.text.subwords import BEGIN, PAD, Subwords

COLUMNS = ("source", "target")


@dataclass(frozen=True)
class Pair:
    """A sentence and its translation.

    Attributes:
        source: the sentence.
        target: its translation; "" where unknown.
        domain: the kind of text.
        split: ``"train"`` or ``"test"``; "" where not yet assigned.
    """

    source: str
    target: str = ""
    domain: str = ""
    split: str = ""


@dataclass
class TextBatch:
    """Token ids of pairs, padded on the right with `PAD`.

    Lightning moves it to the device by `to`.
    """

    source: Tensor  # (B, S) int64, each ending in `END`
    target: Tensor  # (B, T) int64, from `BEGIN` to `END`
    pairs: list[Pair] = field(default_factory=list)  # the pair of each row

    def __len__(self) -> int:
        return len(self.source)

    def to(self, *args: Any, **kwargs: Any) -> TextBatch:
        """A batch with its tensors moved, as by `torch.Tensor.to` with a device."""
        return TextBatch(
            self.source.to(*args, **kwargs), self.target.to(*args, **kwargs), self.pairs
        )

    @classmethod
    def of(cls, pairs: Sequence[Pair], subwords: Subwords) -> TextBatch:
        """Pairs of any lengths as one batch."""
        source = [subwords.encode(p.source) for p in pairs]
        target = [[BEGIN, *subwords.encode(p.target)] for p in pairs]
        return cls(_padded(source), _padded(target), list(pairs))


class ParallelData(LightningDataModule):
    """A LightningDataModule of pairs; training pairs are shuffled in each epoch.

    Args:
        subwords: The tokeniser.
        train: Pairs to train on.
        test: Sentences to translate, in this order.
        batch_size: Pairs in a batch.
        dropped: Probability of dropping a word of a source sentence in training, never all: the
            noise of noisy self-training (He et al. 2020, arXiv:1909.13788).
        seed: Of the order and the noise.
    """

    def __init__(
        self,
        subwords: Subwords,
        train: Sequence[Pair] = (),
        test: Sequence[Pair] = (),
        batch_size: int = 32,
        dropped: float = 0.0,
        seed: int = 0,
    ):
        super().__init__()
        self.subwords, self.train, self.test = subwords, list(train), list(test)
        self.batch_size, self.dropped = batch_size, dropped
        self._order = _Order().manual_seed(seed)
        self._noise = np.random.default_rng(seed)
        order, noise = self._order, self._noise
        self.position = Position(
            (order.get_state, order.set_state), (partial(_state, noise), partial(_set_state, noise))
        )

    def train_dataloader(self) -> DataLoader[Any]:
        """Pairs to learn, shuffled."""
        return ResumableLoader(
            position=self.position,
            dataset=self.train,
            batch_size=self.batch_size,
            collate_fn=self._noisy,
            shuffle=True,
            generator=self._order,
        )

    def predict_dataloader(self) -> DataLoader[Any]:
        """Sentences to translate."""
        found: Any = self.test  # a list will do as a Dataset
        return DataLoader(found, batch_size=self.batch_size, collate_fn=self._batch)

    test_dataloader = predict_dataloader

    def _batch(self, pairs: Sequence[Pair]) -> TextBatch:
        return TextBatch.of(pairs, self.subwords)

    def _noisy(self, pairs: Sequence[Pair]) -> TextBatch:
        if self.dropped:
            pairs = [replace(p, source=self._without_some(p.source)) for p in pairs]
        return self._batch(pairs)

    def _without_some(self, sentence: str) -> str:
        words = sentence.split()
        kept = [w for w in words if self._noise.random() >= self.dropped]
        return " ".join(kept or words)


class _Order(torch.Generator):
    """A generator that a spawned process can be given.

    torch's own hands over memory that is gone by then (pytorch/pytorch#146828).
    """

    def __reduce__(self) -> Any:
        return _order, (self.get_state().numpy(),)


def _order(state: Any) -> _Order:
    order = _Order()
    order.set_state(torch.from_numpy(state))
    return order


# Functions with a name, so that processes which a Trainer spawns can be given them.
def _state(noise: np.random.Generator) -> Any:
    return noise.bit_generator.state


def _set_state(noise: np.random.Generator, state: Any) -> None:
    noise.bit_generator.state = state


def read_pairs(path: Path | str) -> list[Pair]:
    """The pairs of a table, as TSV, CSV or JSON lines.

    Columns: ``source`` and ``target``, the sentence and its translation; ``domain``; and optionally
    ``split`` with ``train`` or ``test``.

    Raises:
        DataError: a column or a cell is missing, or a split that is neither; names the line.
        DataNotFoundError: there is no such file.
    """
    path = Path(path)
    found = []
    for number, row in read_rows(path, COLUMNS):
        where = f"{path}, line {number}"
        cells = {name: str(row.get(name) or "").strip() for name in (*COLUMNS, "domain", "split")}
        empty = [name for name in (*COLUMNS, "domain") if not cells[name]]
        if empty:
            raise DataError(f"{where}: nothing in {' and '.join(map(repr, empty))}")
        if cells["split"] not in ("", "train", "test"):
            raise DataError(f"{where}: 'split' must be train or test, got {cells['split']!r}")
        found.append(Pair(**cells))
    if not found:
        raise DataError(f"{path} has no rows")
    return found


def held_out(pairs: Sequence[Pair], count: int, seed: int = 0) -> list[Pair]:
    """The pairs with a split: `count` sentences of each domain are held out.

    A domain that has a split keeps it. A sentence that occurs more than once is in one split only:
    held-out sentences are removed from the training pairs of every domain.

    Raises:
        DataError: a domain has too few sentences.
    """
    decided = []
    for domain in dict.fromkeys(p.domain for p in pairs):
        own = [p for p in pairs if p.domain == domain]
        if not any(p.split == "test" for p in own):
            names = list(dict.fromkeys(p.source for p in own))
            if len(names) <= count:
                raise DataError(
                    f"{domain} has {len(names)} different sentences, which leaves none to learn "
                    f"when {count} are held out (data.test)"
                )
            chosen = np.random.default_rng(seed).permutation(len(names))[:count]
            test = {names[i] for i in chosen}
            own = [replace(p, split="test" if p.source in test else "train") for p in own]
        decided += [replace(p, split=p.split or "train") for p in own]
    unseen = {p.source for p in decided if p.split == "test"}
    return [p for p in decided if p.split == "test" or p.source not in unseen]


def _padded(rows: Sequence[Sequence[int]]) -> Tensor:
    tensors = [torch.tensor(row, dtype=torch.int64, device="cpu") for row in rows]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=PAD)
