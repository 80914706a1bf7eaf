"""`Target`: an unlabelled dataset with indices, and predictions of its items."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from lora_lightning.adaptation.resumable_loader import Position, ResumableLoader
from lora_lightning.errors import ConfigError, DataError
from lora_lightning.lora.module_tree import find
from lora_lightning.model.calling import logits_of, moved
from lora_lightning.model.introspection import classifier_modules
from lora_lightning.model.probing import evaluating

Predict = Callable[[Any], Tensor]  # a batch of inputs → logits (B, K)


class Target(Dataset[Any]):
    """Items of the target, each with its index; labels, if any, are dropped.

    With the index an item keeps its pseudo-label in whatever order, and from whatever worker
    process, it comes.

    Args:
        items: A dataset of known length that is read by index, also one that streams (litdata's
            ``StreamingDataset``); an item is the input (a tensor, or a mapping of several), or
            begins with it, as in a tuple. Or a DataLoader of one, whose dataset is used, with as
            many workers, and its ``collate_fn``, if it has one of its own, for whole items.
        augment: Applied to each input of a training batch on its own.

    Raises:
        ConfigError: items of another kind, without a known length, or that are not read by index.
        DataError: there is no item.
    """

    def __init__(self, items: Any, augment: Callable[[Any], Any] | None = None):
        self.settings: dict[str, Any] = {}
        self.whole = False  # whether a collate function is given whole items
        if isinstance(items, DataLoader):
            self.settings = {n: getattr(items, n) for n in ("num_workers", "pin_memory")}
            if items.batch_size is None:
                raise ConfigError(
                    "the target's DataLoader batches by its sampler (batch_size=None); give the "
                    "dataset of single items instead"
                )
            self.whole = items.collate_fn is not default_collate
            if self.whole:
                self.settings["collate_fn"] = _Indexed(items.collate_fn)
            items = items.dataset
        if isinstance(items, Tensor):
            items = list(items)
        if not _by_index(items):
            raise ConfigError(
                f"target must be a dataset of a known length that is read by index, so that each "
                f"item can keep its label; got {type(items).__name__}. Collect a stream into a "
                "list first, or take one with random access, such as litdata's StreamingDataset"
            )
        if not len(items):
            raise DataError("the target is empty: there is nothing to adapt to")
        self.items, self.augment = items, augment

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.prepared(self.items[index]), index

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Any, int]]:
        """Several at once, where the items can be read so, as a DataLoader does."""
        several = getattr(self.items, "__getitems__", None)
        if several is None or self.augment is not None:  # which may draw random numbers in turn
            return [self[i] for i in indices]
        return [(self.prepared(x), i) for x, i in zip(several(indices), indices, strict=True)]

    def prepared(self, item: Any) -> Any:
        """What is collated of an item, augmented."""
        x = item if self.whole else input_of(item)
        if self.augment is None:
            return x
        return [self.augment(x[0]), *x[1:]] if isinstance(x, (tuple, list)) else self.augment(x)

    def loader(
        self, batch_size: int, shuffle: bool, position: Position | None = None
    ) -> DataLoader[Any]:
        """Batches of (inputs, indices); `position`: of a training loader, see `ResumableLoader`."""
        # A last batch of one is too small for the diversity term and for BatchNorm.
        drop = shuffle and len(self) > 1 and len(self) % batch_size == 1
        return ResumableLoader(
            position=position,
            dataset=self,
            batch_size=batch_size,
            shuffle=shuffle,
            drop_last=drop,
            **self.settings,
        )


def _by_index(items: Any) -> bool:
    """Whether ``items[i]`` is always the same item; streams that have no such access inherit it."""
    streams = isinstance(items, IterableDataset)
    return hasattr(items, "__len__") and not (
        streams and type(items).__getitem__ is IterableDataset.__getitem__
    )


class _Indexed:
    """A collate function for (item, index): the user's for the items. It can be pickled."""

    def __init__(self, collate: Callable[[list[Any]], Any]):
        self.collate = collate

    def __call__(self, pairs: list[tuple[Any, int]]) -> tuple[Any, Tensor]:
        items, indices = zip(*pairs, strict=True)
        return self.collate(list(items)), torch.tensor(indices, device="cpu")


def input_of(item: Any) -> Any:
    """The network's input in an item.

    Raises:
        ConfigError: it is no tensor, no mapping with one, and no tuple or list that begins so.
    """
    first = item[0] if isinstance(item, (tuple, list)) and len(item) else item
    parts = first.values() if isinstance(first, Mapping) else [first]
    if not any(isinstance(x, Tensor) for x in parts):
        raise ConfigError(
            "an item of the target must be a tensor, a mapping of several, such as "
            '{"waveforms": x, "lengths": n}, or a tuple that begins so; got '
            f"{type(item).__name__}. A DataLoader with a collate_fn can hold any items"
        )
    return first


class Canary:
    """A few labelled items of the target, to detect an adaptation that does harm.

    Raises:
        ConfigError: items of another kind, or without a known length.
        DataError: there is no item.
    """

    def __init__(self, items: Any):
        self.target = Target(items)
        found = [self.target.items[i] for i in range(len(self.target))]
        if any(not isinstance(x, (tuple, list)) or len(x) < 2 for x in found):
            raise ConfigError("an item of the canary must be (input, class); some have no class")
        self.labels = torch.tensor([int(x[1]) for x in found], device="cpu")

    def accuracy(self, look: Callable[[Target], Predicted]) -> float:
        """The accuracy of the predictions that `look` gives of these items."""
        found = look(self.target).probabilities
        return float((found.argmax(dim=1) == self.labels).double().mean())


@dataclass(frozen=True)
class Predicted:
    """A model's predictions of all items of the target, in the dataset's order."""

    probabilities: Tensor  # (N, K), float32, on the CPU
    # (N, D), the classifier's input; the log-probabilities where the model has no classifier of its
    # own
    features: Tensor


class HeadInput:
    """Within the block, `batches` collects the inputs of the model's classifier."""

    def __init__(self, model: nn.Module):
        heads = sorted(classifier_modules(model))
        self._head = find(model, heads[0]) if heads else None
        self.batches: list[Tensor] = []

    def __enter__(self) -> HeadInput:
        def keep(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            if inputs and isinstance(inputs[0], Tensor):
                self.batches.append(inputs[0].detach())

        self._hook = self._head.register_forward_pre_hook(keep) if self._head else None
        return self

    def __exit__(self, *error: object) -> None:
        if self._hook is not None:
            self._hook.remove()

    def of(self, logits: Tensor) -> Tensor:
        """The features (B, D) of the last forward, whose logits these are."""
        found, self.batches = self.batches, []
        if len(found) != 1 or len(found[0]) != len(logits):
            return logits.log_softmax(dim=1)
        return found[0] if found[0].ndim <= 2 else found[0].flatten(2).mean(2)


def seen_by(
    predict: Predict, module: LightningModule, network: nn.Module, target: Target, batch_size: int
) -> Predicted:
    """Predictions of the whole target by a module in training, in its trainer's precision."""
    loader = target.loader(2 * batch_size, shuffle=False)
    with module.trainer.strategy.precision_plugin.forward_context():
        return predicted(predict, network, loader, module.device)


@torch.no_grad()
def predicted(
    predict: Predict, model: nn.Module, loader: DataLoader[Any], device: torch.device
) -> Predicted:
    """Predictions of the whole target, in eval mode; the model's modes stay as they were.

    Raises:
        ConfigError: the outputs are not (B, K), see `lora_lightning.model.calling.logits_of`.
        DataError: they are not finite numbers; names the items.
    """
    rows: dict[int, tuple[Tensor, Tensor]] = {}
    with evaluating(model), HeadInput(model) as head:
        for inputs, indices in loader:
            logits = logits_of(predict(moved(inputs, device))).float()
            features = head.of(logits).float().cpu()
            logits = logits.cpu()
            for row, index in enumerate(indices.tolist()):
                rows[index] = logits[row], features[row]
    order = sorted(rows)
    logits = torch.stack([rows[i][0] for i in order])
    features = torch.stack([rows[i][1] for i in order])
    bad = ~(logits.isfinite().all(dim=1) & features.isfinite().all(dim=1))
    if bool(bad.any()):
        named = ", ".join(map(str, bad.nonzero().flatten()[:5].tolist()))
        raise DataError(
            f"the model's output is NaN or infinite for {int(bad.sum())} of {len(logits)} items of "
            f"the target (indices {named}…): look at those items, or at the model's weights"
        )
    return Predicted(logits.softmax(dim=1), features)
