"""`PoseDomains`: images in folders by domain, each with the azimuth of its object.

The poses are rows of ``root/labels.csv``, one for each image::

    item,azimuth,elevation
    source/train/car/0000.png,-31.52,17.08

`item` is relative to `root`; angles are in degrees. The azimuth is an angle on the circle, 0 where
the front faces the viewer: 350 is the same as −10. The elevation may be missing; it is not learnt.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lora_lightning.errors import DataError, DataNotFoundError
from lora_lightning.runner.tables import read_text
from lora_lightning.vision.data.folders import Item
from lora_lightning.vision.data.image_domains import ImageDomains

LABELS = "labels.csv"


class Pose(NamedTuple):
    """The viewpoint of an object, in degrees; `elevation` is NaN where unknown."""

    azimuth: float
    elevation: float = math.nan


def write_poses(root: Path, poses: Mapping[str, Pose]) -> None:
    """Write ``root/labels.csv``; keys are paths relative to `root`."""
    with (root / LABELS).open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("item", *Pose._fields))
        for item, pose in poses.items():
            writer.writerow((item, *(f"{angle:.4f}" for angle in pose)))


def read_poses(root: Path) -> dict[str, Pose]:
    """The poses in ``root/labels.csv``.

    Raises:
        DataNotFoundError: there is no such file.
        DataError: a column is missing, or a value is no angle; names the line.
    """
    path = root / LABELS
    if not path.is_file():
        raise DataNotFoundError(
            f"there is no {path}: it tells the azimuth of each picture, in lines such as "
            "'day/chair/1.jpg,-30' below the header 'item,azimuth'"
        )
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""))
    header = list(reader.fieldnames or ())
    if missing := {"item", "azimuth"} - set(header):
        raise DataError(
            f"{path} has no column {', '.join(sorted(missing))}; its header must be 'item,azimuth' "
            f"or 'item,azimuth,elevation', got {','.join(header)!r}"
        )
    return dict(_pose(row, f"{path}, line {reader.line_num}") for row in reader)


def _pose(row: Mapping[str, str | None], where: str) -> tuple[str, Pose]:
    angles = []
    for name in Pose._fields:
        text = (row.get(name) or "").strip()
        try:
            angle = float(text) if text or name == "azimuth" else math.nan
        except ValueError:
            angle = math.inf
        if math.isinf(angle) or (math.isnan(angle) and name == "azimuth"):
            raise DataError(f"{where}: {name} must be an angle in degrees, got {text!r}")
        angles.append(angle)
    return str(row["item"]), Pose(*angles)


class PoseDomains(ImageDomains):
    """Images in folders by domain, each with its azimuth in degrees, (B,) float32.

    The folders are those of `ImageDomains`, whose arguments it takes; a class may be the only one.
    ``labels.csv`` in `root` holds the poses. With `horizontal_flip` each training image is
    mirrored half of the time, with its azimuth negated: valid where objects are as likely as
    their mirror images.

    Raises:
        DataNotFoundError: `root`, a domain or ``labels.csv`` is missing.
        DataError: as `ImageDomains`, or an image has no azimuth.
    """

    may_lack_labels = False
    fewest_classes = 1

    def __init__(self, root: Path | str, *args: Any, horizontal_flip: bool = True, **settings: Any):
        super().__init__(root, *args, **settings, horizontal_flip=False)
        self.mirror = horizontal_flip
        self.poses: dict[str, Pose] = {}

    def setup(self, stage: str | None = None) -> None:
        """Find, check and split the images, and read their poses."""
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
        """An image's path relative to the root, as in the labels."""
        return item.path.relative_to(self.root).as_posix()

    def azimuths(self, items: Sequence[Item]) -> Tensor:
        """The azimuths of items, in degrees."""
        return torch.tensor([self.poses[self.item_name(i)].azimuth for i in items], device="cpu")

    def train_dataloader(self) -> DataLoader[Any]:
        """Training images of `train_on`, shuffled and augmented, with their azimuths."""
        loader = super().train_dataloader()
        loader.dataset.mirror = self.mirror  # type: ignore[attr-defined]
        return loader

    def _dataset(self, items: list[Item], transform: Any) -> Dataset[Any]:
        return _Posed(super()._dataset(items, transform), self.azimuths(items))


class _Posed(Dataset[tuple[Tensor, Tensor]]):
    """Images as (tensor, azimuth in degrees), mirrored at random where `mirror` is set."""

    def __init__(self, pictures: Dataset[Any], azimuths: Tensor):
        self.pictures, self.azimuths, self.mirror = pictures, azimuths, False

    def __len__(self) -> int:
        return len(self.azimuths)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        picture, azimuth = self.pictures[i][0], self.azimuths[i]
        if self.mirror and torch.rand((), device="cpu") < 0.5:
            return picture.flip(-1), -azimuth
        return picture, azimuth
