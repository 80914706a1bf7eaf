"""`ImageDomains`: a LightningDataModule of images in folders by domain.

Every image is decoded once before training. Unreadable ones are left out and listed in
``skipped``, so that no run fails in the middle of an epoch. The decoded images, small and square,
stay in memory as uint8 as long as they fit.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lora_lightning.errors import DataError
from lora_lightning.lora.values import check_number
from lora_lightning.vision.data.folders import (
    Item,
    common_classes,
    find_domains,
    is_labelled,
    other_files,
    scan,
    split_items,
)
from lora_lightning.vision.data.pictures import PictureData, Preparation, checked


class ImageDomains(LightningDataModule):
    """Image folders by domain: ``root/<domain>/<class>/*`` or ``…/<split>/<class>/*``.

    Training loaders draw from `train_on`, test and predict loaders read the held-out images of
    `test_on`, in order. `on` selects other domains of the same images in memory.

    Args:
        root: Folder of the domains.
        source: Labelled domain that the source model is trained on.
        target: Domains to adapt to; ``None``: every other folder under `root`.
        classes: Classes to use; ``None``: all, which every domain must then have.
        size: Side of the network's input, in pixels.
        mean: Mean of each colour channel, as the backbone expects.
        std: Standard deviation of each colour channel, likewise.
        test_fraction: Part of each class that is held out where the folders have no splits.
        seed: Seed of that split.
        batch_size: Images in a training batch.
        num_workers: Worker processes of the loaders; 0 loads in this process.
        cache_mb: Decoded images stay in memory if they take at most this many MiB.
        horizontal_flip: Mirror training images at random.
        tick: Called with (done, total) while images are checked.

    Raises:
        DataNotFoundError: `root` or a domain is missing.
        DataError: an empty domain, a class that some domain lacks, fewer than two classes.
    """

    fewest_classes = 2
    may_lack_labels = True  # a target domain without folders of classes

    def __init__(
        self,
        root: Path | str,
        source: str = "source",
        target: Sequence[str] | None = None,
        *,
        classes: Sequence[str] | None = None,
        size: int = 112,
        mean: Sequence[float] = (0.5, 0.5, 0.5),
        std: Sequence[float] = (0.5, 0.5, 0.5),
        test_fraction: float = 0.3,
        seed: int = 0,
        batch_size: int = 32,
        num_workers: int = 0,
        cache_mb: float = 1024,
        horizontal_flip: bool = True,
        tick: Callable[[int, int], None] | None = None,
    ):
        super().__init__()
        check_number("test_fraction", test_fraction, "(0, 1)")
        self.root, self.source = Path(root), source
        self.wanted_target, self.wanted_classes = target, classes
        self.size, self.test_fraction, self.seed = size, test_fraction, seed
        self.batch_size, self.num_workers, self.cache_mb = batch_size, num_workers, cache_mb
        self.tick = tick or (lambda done, total: None)
        self.prepared, self.flip = Preparation(size, mean, std), horizontal_flip
        self.train_transform, self.test_transform = self.prepared.transforms(horizontal_flip)
        self.target: list[str] = []
        self.classes: list[str] = []
        self.items: list[Item] = []
        self.skipped: list[tuple[str, str]] = []
        self._pictures: dict[Path, Tensor] = {}
        self.train_on: list[str] = [source]
        self.test_on: list[str] = []

    @property
    def stored_side(self) -> int:
        """Side of the images in memory, in pixels."""
        return self.prepared.stored_side

    def setup(self, stage: str | None = None) -> None:
        """Find, check and split the images; a second call does nothing."""
        if self.items:
            return
        self.target = self._targets()
        domains = [self.source, *self.target]
        found = [
            item
            for d in domains
            for item in scan(
                self.root, d, self.wanted_classes, self.may_lack_labels and d != self.source
            )
        ]
        # Classes are checked before images are read: most mistakes are in the folders.
        common_classes(filter(is_labelled, found), self.wanted_classes, self.fewest_classes)
        readable, unread, self._pictures = checked(
            found, self.prepared, self.root, self.cache_mb, self.tick
        )
        used = None if self.wanted_classes else [item.path for item in found]
        others = [pair for d in domains for pair in other_files(self.root / d, used)]
        self.skipped += [(str(p.relative_to(self.root)), why) for p, why in others]
        self.skipped += unread
        if empty := [d for d in domains if not any(i.domain == d for i in readable)]:
            raise DataError(f"domain {', '.join(map(repr, empty))}: no picture can be read")
        self.classes = common_classes(
            filter(is_labelled, readable), self.wanted_classes, self.fewest_classes
        )
        self.items = split_items(readable, self.test_fraction, self.seed)
        self.test_on = self.test_on or self.target

    @property
    def labelled_target(self) -> list[str]:
        """The target domains that have labels."""
        return [d for d in self.target if any(i.domain == d and i.class_name for i in self.items)]

    def _targets(self) -> list[str]:
        wanted = None if self.wanted_target is None else [self.source, *self.wanted_target]
        domains = find_domains(self.root, wanted)
        find_domains(self.root, [self.source])
        target = [name for name in domains if name != self.source]
        if not target:
            raise DataError(f"there is no target domain beside the source {self.source!r}")
        return target

    def on(self, train: Sequence[str] = (), test: Sequence[str] = ()) -> ImageDomains:
        """The same images, with other domains to train on and to test on."""
        self.setup()
        view = object.__new__(type(self))  # a subclass has labels as well
        view.__dict__.update(self.__dict__)
        view.train_on, view.test_on = list(train) or self.train_on, list(test) or self.test_on
        view.trainer = None  # each trainer has its own
        return view

    def held_out(self) -> list[Item]:
        """The held-out images of `test_on`, in the order of the predictions."""
        return [i for d in self.test_on for i in self.items if (i.domain, i.split) == (d, "test")]

    def training_pictures(self) -> list[Item]:
        """The training images of `train_on`."""
        return [i for i in self.items if i.domain in self.train_on and i.split == "train"]

    def unlabelled(self, augmented: bool = False, jitter: float = 0.0) -> Dataset[Any]:
        """`training_pictures` in order, with the test transform, or augmented as in training.

        Args:
            augmented: Use the training transform.
            jitter: With `augmented`, `ColorJitter` of brightness, contrast and saturation by this
                factor, of the hue by an eighth of it; in [0, 1].
        """
        train, test = self.prepared.transforms(self.flip, jitter)
        return self._dataset(self.training_pictures(), train if augmented else test)

    def train_dataloader(self) -> DataLoader[Any]:
        """Training images of `train_on`, shuffled and augmented."""
        items = self.training_pictures()
        return self._loader(items, self.train_transform, self.batch_size, train=True)

    def unlabelled_dataloader(self) -> DataLoader[Any]:
        """The training images of `train_on`, not augmented, in one fixed shuffled order."""
        items = self.training_pictures()
        mixed = random.Random(self.seed).sample(items, len(items))
        return self._loader(mixed, self.test_transform, 2 * self.batch_size)

    def predict_dataloader(self) -> DataLoader[Any]:
        """Held-out images of `test_on`, in order."""
        return self._loader(self.held_out(), self.test_transform, 2 * self.batch_size)

    test_dataloader = predict_dataloader

    def _loader(
        self, items: list[Item], transform: Any, size: int, train: bool = False
    ) -> DataLoader[Any]:
        dataset = self._dataset(items, transform)
        # A last batch of one would have no variance for BatchNorm.
        drop_last = train and len(items) > 1 and len(items) % size == 1
        # Keywords only: Lightning re-creates the loader with a sampler of its own.
        return DataLoader(
            dataset,
            batch_size=size,
            shuffle=train,
            drop_last=drop_last,
            num_workers=self.num_workers,
        )

    def _dataset(self, items: list[Item], transform: Any) -> Dataset[Any]:
        return PictureData(items, self.classes, transform, self._pictures, self.prepared)
