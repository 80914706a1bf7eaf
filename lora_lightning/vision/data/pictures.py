"""Pictures for a network: how they are prepared, checked once, and read as a dataset."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.transforms import v2

from lora_lightning.errors import DataError
from lora_lightning.report.files import no_file
from lora_lightning.vision.data.folders import Item

CROP = 0.875  # part of the stored image's side that the network sees
HALF = (0.5, 0.5, 0.5)


def read_picture(
    path: Path | BinaryIO,
    side: int,
    interpolation: str = "bicubic",
    formats: tuple[str, ...] | None = None,
    most_pixels: int | None = None,
) -> Tensor:
    """An image as uint8 (3, side, side): the centre square, resized; transparency on white.

    Args:
        path: Of its file, or the open file.
        side: In pixels.
        interpolation: Of resizing, one of Pillow's.
        formats: Pillow's names of those that are read; None: all.
        most_pixels: A picture of more is refused before it is decoded.

    Raises:
        DataError: it cannot be read; says why.
    """
    try:
        if isinstance(path, Path) and (what := no_file(path)):
            raise DataError(f"a {what}, no file")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # harmless oddities of palettes and metadata
            with Image.open(path, formats=formats) as opened:
                width, height = opened.size
                if most_pixels is not None and width * height > most_pixels:
                    raise DataError(f"{width} × {height} pixels, above {most_pixels:,}")
                picture = _rgb(ImageOps.exif_transpose(opened))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        name = path.name if isinstance(path, Path) else "its contents"
        reason = str(error).replace(str(path), name) or type(error).__name__
        raise DataError(f"cannot be read: {reason}") from error
    # timm's training has "random" as well.
    known = Image.Resampling.__members__
    method = known.get(interpolation.upper(), Image.Resampling.BICUBIC)
    picture = ImageOps.fit(picture, (side, side), method)
    pixels: Tensor = v2.functional.pil_to_tensor(picture)
    return pixels


def _rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I"):  # 16 bits a pixel, which convert() would clip
        return picture.convert("F").point(lambda value: value / 256).convert("L").convert("RGB")
    if picture.has_transparency_data:
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture.convert("RGBA")).convert("RGB")
    return picture.convert("RGB")


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

    def read(self, path: Path | BinaryIO, **limits: Any) -> Tensor:
        """The picture in a file as it is kept in memory; `limits` as `read_picture` has them."""
        return read_picture(path, self.stored_side, self.interpolation, **limits)

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
        return self.__getitems__([i])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor, int]]:
        """Several at once, as a DataLoader asks for a batch: they are scaled together."""
        *each, scale, normalise = self.transform.transforms
        chosen = [self.items[i] for i in indices]
        crop = v2.Compose(each)
        cropped = torch.stack([crop(self._stored(item)) for item in chosen])
        inputs = normalise(scale(cropped))
        return [(x, self.index[i.class_name]) for x, i in zip(inputs, chosen, strict=True)]

    def _stored(self, item: Item) -> Tensor:
        picture = self.pictures.get(item.path)
        return self.prepared.read(item.path) if picture is None else picture
