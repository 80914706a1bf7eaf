"""Pictures for a network: how they are prepared, checked once, and read as a dataset."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.transforms import v2

from lora_lightning.errors import DataError
from lora_lightning.vision.data.folders import Item, read_picture

CROP = 0.875  # part of the stored image's side that the network sees
HALF = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class Preparation:
    """From a picture in a file to a network's input: centre square, resized, cropped, scaled."""

    size: int  # side of the input, in pixels
    mean: Sequence[float] = HALF  # mean of each colour channel, as the network expects
    std: Sequence[float] = HALF  # standard deviation of each colour channel, likewise
    interpolation: str = "bicubic"  # of resizing: bicubic, bilinear …
    crop: float = CROP  # part of the resized square's side that the network sees

    @classmethod
    def of(cls, config: Mapping[str, Any], size: int | None = None) -> Preparation:
        """As timm's ``pretrained_cfg``, or the header of an adapter file, has it."""
        given = {key: config[key] for key in ("mean", "std", "interpolation") if config.get(key)}
        side = size or (config.get("input_size") or (3, 224, 224))[-1]
        return cls(side, **given, crop=min(config.get("crop_pct") or CROP, 1.0))

    def describe(self, model: nn.Module, classes: Sequence[str] = ()) -> None:
        """Tell a timm model how its pictures are prepared: files of its adapters say it then."""
        cfg: Any = getattr(model, "pretrained_cfg", None)
        if isinstance(cfg, Mapping):
            told = {
                "input_size": (3, self.size, self.size), "mean": tuple(self.mean),
                "std": tuple(self.std), "interpolation": self.interpolation, "crop_pct": self.crop,
            }  # fmt: skip
            names = {"label_names": tuple(classes)} if classes else {}
            model.pretrained_cfg = {**cfg, **told, **names}  # type: ignore[assignment]

    @property
    def stored_side(self) -> int:
        """Side of the pictures in memory, in pixels."""
        return round(self.size / self.crop)

    def read(self, path: Path) -> Tensor:
        """The picture in a file as it is kept in memory."""
        return read_picture(path, self.stored_side, self.interpolation)

    def transforms(self, flip: bool, jitter: float = 0.0) -> tuple[v2.Compose, v2.Compose]:
        """The transforms of training (random crops, mirrored, jittered) and of testing."""
        # A list, since torchvision refuses the tuples of OmegaConf and timm alike.
        scale = v2.ToDtype(torch.float32, scale=True)
        last = [scale, v2.Normalize(list(self.mean), list(self.std))]
        first = [v2.ColorJitter(jitter, jitter, jitter, jitter / 8)] if jitter else []
        first += [v2.RandomCrop(self.size), *([v2.RandomHorizontalFlip()] if flip else [])]
        return v2.Compose([*first, *last]), v2.Compose([v2.CenterCrop(self.size), *last])


def checked(
    items: Sequence[Item],
    prepared: Preparation,
    root: Path,
    cache_mb: float,
    tick: Callable[[int, int], None],
) -> tuple[list[Item], list[tuple[str, str]], dict[Path, Tensor]]:
    """Decode each picture once.

    Args:
        items: The pictures.
        prepared: How.
        root: To which the paths of those that cannot be read are relative.
        cache_mb: They are kept if all of them take at most so many MiB.
        tick: Called with (done, total) after each.

    Returns:
        Those that can be read, (path, reason) of the others, and the pictures that are kept.
    """
    keep = len(items) * 3 * prepared.stored_side**2 <= cache_mb * 2**20
    readable, skipped, pictures = [], [], {}
    for done, item in enumerate(items, start=1):
        try:
            picture = prepared.read(item.path)
        except DataError as error:
            within = item.path.is_relative_to(root)
            path = item.path.relative_to(root) if within else item.path
            skipped.append((str(path), str(error)))
        else:
            readable.append(item)
            if keep:
                pictures[item.path] = picture
        tick(done, len(items))
    return readable, skipped, pictures


class PictureData(Dataset[tuple[Tensor, int]]):
    """Pictures as (tensor, class index), from memory where cached; −1 for one without a label.

    Args:
        items: The pictures.
        classes: Names of the classes, by index.
        transform: From a stored picture to the network's input.
        pictures: Those in memory, by path.
        prepared: How the others are read.
    """

    def __init__(
        self,
        items: Sequence[Item],
        classes: Sequence[str],
        transform: Any,
        pictures: Mapping[Path, Tensor],
        prepared: Preparation,
    ):
        self.items, self.transform, self.pictures = items, transform, pictures
        self.prepared = prepared
        self.index = {"": -1} | {name: i for i, name in enumerate(classes)}

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        item = self.items[i]
        picture = self.pictures.get(item.path)
        picture = self.prepared.read(item.path) if picture is None else picture
        return self.transform(picture), self.index[item.class_name]
