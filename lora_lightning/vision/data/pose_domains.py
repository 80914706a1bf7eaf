"""`PoseDomains`: pictures in folders by domain, each with the azimuth that it shows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lora_lightning.data.folders import Item
from lora_lightning.data.images import ImageDomains
from lora_lightning.data.poses import LABELS, Pose, read_poses
from lora_lightning.errors import DataError


class PoseDomains(ImageDomains):
    """Pictures in folders by domain, each with its azimuth in degrees, (B,) float32.

    The folders are those of `ImageDomains`, whose arguments it takes; a class may be the only one.
    ``labels.csv`` in `root` holds the poses. With `horizontal_flip` each training picture is
    mirrored half of the time, its azimuth negated then: right where objects are as likely as
    their mirror images.

    Raises:
        DataNotFoundError: `root`, a domain or ``labels.csv`` is missing.
        DataError: as `ImageDomains`, or a picture has no azimuth.
    """

    fewest_classes = 1

    def __init__(self, root: Path | str, *args: Any, horizontal_flip: bool = True, **settings: Any):
        super().__init__(root, *args, **settings, horizontal_flip=False)
        self.mirror = horizontal_flip
        self.poses: dict[str, Pose] = {}

    def setup(self, stage: str | None = None) -> None:
        """Find, check and split the pictures, and find their poses."""
        if self.items:
            return
        found = read_poses(self.root) if self.root.is_dir() else {}
        super().setup(stage)
        lacking = [name for item in self.items if (name := self.item_name(item)) not in found]
        if lacking:
            raise DataError(
                f"{self.root / LABELS} has no line for {len(lacking)} of {len(self.items)} "
                f"pictures, such as {lacking[0]}; add them, or leave their class or domain out"
            )
        self.poses = found

    def item_name(self, item: Item) -> str:
        """A picture's path relative to the root, as the labels have it."""
        return item.path.relative_to(self.root).as_posix()

    def azimuths(self, items: Sequence[Item]) -> Tensor:
        """Of pictures, in degrees."""
        return torch.tensor([self.poses[self.item_name(i)].azimuth for i in items])

    def train_dataloader(self) -> DataLoader[Any]:
        """Training pictures of `train_on`, shuffled and augmented, with their azimuths."""
        loader = super().train_dataloader()
        loader.dataset.mirror = self.mirror  # type: ignore[attr-defined]
        return loader

    def _dataset(self, items: list[Item], transform: Any) -> Dataset[Any]:
        return _Posed(super()._dataset(items, transform), self.azimuths(items))


class _Posed(Dataset[tuple[Tensor, Tensor]]):
    """Pictures as (tensor, azimuth in degrees), mirrored by chance where `mirror` is set."""

    def __init__(self, pictures: Dataset[Any], azimuths: Tensor):
        self.pictures, self.azimuths, self.mirror = pictures, azimuths, False

    def __len__(self) -> int:
        return len(self.azimuths)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        picture, azimuth = self.pictures[i][0], self.azimuths[i]
        if self.mirror and torch.rand(()) < 0.5:
            return picture.flip(-1), -azimuth
        return picture, azimuth
