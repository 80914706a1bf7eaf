"""Pictures of targets outside a recipe: folders, flat or nested, and manifests."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from lora_lightning.errors import DataError, DataNotFoundError
from lora_lightning.runner.tables import SUFFIXES as TABLES
from lora_lightning.runner.tables import read_rows
from lora_lightning.vision.data.folders import SUFFIXES, Item, other_files, pictures_below
from lora_lightning.vision.data.pictures import PictureData, Preparation, checked

CACHE_MB = 1024  # decoded pictures of a target stay in memory if they take at most so many MiB
Skipped = list[tuple[str, str]]


@dataclass
class Found:
    """The pictures of a target."""

    name: str  # of the target
    items: list[Item]  # the pictures; a label is empty where there is none
    root: Path  # the folder that their names are relative to
    skipped: Skipped = field(default_factory=list)  # (path, reason) of each file that is left out
    # Those in memory, once they were `read`
    pictures: dict[Path, Tensor] = field(default_factory=dict)

    def read(self, prepared: Preparation, tick: Callable[[int, int], None]) -> None:
        """Decode each picture once; those that cannot be read are left out.

        Raises:
            DataError: none can be read.
        """
        items, unread, self.pictures = checked(self.items, prepared, self.root, CACHE_MB, tick)
        self.items, self.skipped = items, [*self.skipped, *unread]
        if not items:
            why = f" (the first: {self.skipped[0][1]})" if self.skipped else ""
            raise DataError(f"{self.name}: no picture can be read{why}")

    def data(
        self,
        prepared: Preparation,
        classes: Sequence[str],
        augmented: bool = False,
        jitter: float = 0.0,
    ) -> PictureData:
        """The pictures as the network takes them, as in training if `augmented`."""
        train, test = prepared.transforms(flip=True, jitter=jitter)
        chosen = train if augmented else test
        return PictureData(self.items, classes, chosen, self.pictures, prepared)

    def told(self, item: Item) -> str:
        """A picture's name: its path, relative to the root where it lies below that."""
        within = item.path.is_relative_to(self.root)
        return (item.path.relative_to(self.root) if within else item.path).as_posix()


def unlabelled_targets(paths: Sequence[Path]) -> dict[str, Found]:
    """Name → pictures of each folder, or of each domain of a manifest.

    Args:
        paths: Folders, flat or nested, each a target; or tables (.csv, .tsv, .jsonl) with the
            columns ``path``, relative to the table's folder, and, for several, ``domain``.

    Raises:
        DataNotFoundError: one is missing.
        DataError: there are no pictures, or a row without a path; names the line.
    """
    found: dict[str, Found] = {}
    for path in paths:
        for target in [_folder(path)] if path.is_dir() else _manifest(path):
            if target.name in found:  # two folders of one name
                target.name = str(path) if path.is_dir() else f"{path.stem}/{target.name}"
            found[target.name] = target
    return found


def labelled(path: Path) -> Found:
    """Pictures in folders of their classes, or a table with the columns ``path`` and ``label``.

    Raises:
        DataNotFoundError: it is missing.
        DataError: there are no pictures, or a row without a label; names the line.
    """
    if not path.is_dir():
        [found] = _manifest(path, "label")
        return found
    found = _folder(path)
    loose = [i for i in found.items if i.path.parent == path]
    names = [(i, i.path.relative_to(path).parts[0]) for i in found.items if i not in loose]
    found.items = [Item(i.path, i.domain, name, i.split) for i, name in names]
    found.skipped += [(i.path.name, "in no folder of a class") for i in loose]
    if not found.items:
        raise DataError(f"{path}: no pictures in folders of their classes, {path}/<class>/*.png")
    return found


def _folder(path: Path) -> Found:
    name = os.path.basename(os.path.realpath(path)) or str(path)
    items = [Item(p, name, "", "train") for p in pictures_below(path)]
    skipped = [(p.relative_to(path).as_posix(), why) for p, why in other_files(path)]
    if not items:
        there = f"; it holds {len(skipped)} other files" if skipped else ""
        endings = ", ".join(sorted(SUFFIXES))
        raise DataError(f"{path} holds no pictures ({endings}){there}")
    return Found(name, items, path, skipped)


def _manifest(path: Path, label: str = "") -> list[Found]:
    if not path.exists():
        raise DataNotFoundError(f"there is no file or folder {path}")
    if path.suffix.lower() not in TABLES:
        raise DataError(
            f"{path} is no folder and no table ({', '.join(TABLES)}); give a folder of pictures, "
            f"or a table with the columns 'path'{f' and {label!r}' if label else ''}"
        )
    found: dict[str, Found] = {}
    for number, row in read_rows(path, ["path"]):
        if missing := [name for name in ("path", label) if name and not row.get(name)]:
            raise DataError(f"{path}, line {number}: no {missing[0]}")
        name = path.stem if label else str(row.get("domain") or path.stem)
        item = Item(path.parent / str(row["path"]), name, str(row.get(label, "")), "train")
        found.setdefault(name, Found(name, [], path.parent)).items.append(item)
    if not found:
        raise DataError(f"{path} has no rows: give a line for each picture")
    return list(found.values())


def single_pictures(paths: Sequence[Path]) -> tuple[list[Path], Skipped]:
    """The pictures in files and folders, in order, and (path, reason) of what is none."""
    found: list[Path] = []
    skipped: Skipped = []
    for path in paths:
        if path.is_dir():
            found += pictures_below(path)
            skipped += [(str(p), why) for p, why in other_files(path)]
        elif path.suffix.lower() in TABLES:
            found += [item.path for target in _manifest(path) for item in target.items]
        else:
            found.append(path)  # its reading says why not
    return found, skipped
