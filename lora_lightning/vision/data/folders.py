"""Image folders by domain: finding and splitting their images.

Two layouts are supported, as Office-31, Office-Home, DomainNet, PACS and VisDA have them::

    root/<domain>/<class>/*.png
    root/<domain>/<split>/<class>/*.png         split: train and test (or val, validation)

Below a class, folders may be nested. `Office-31`'s extra folder ``images`` under each domain is
skipped. Names that begin with a dot are ignored.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lora_lightning.errors import DataError, DataNotFoundError
from lora_lightning.runner.walking import files_below

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}
TEST_NAMES = ("test", "val", "validation")  # the first that exists is the held-out part


@dataclass(frozen=True)
class Item:
    """One image: its file and its labels."""

    path: Path
    domain: str
    class_name: str  # "" without a label
    split: str  # "train", "test", or "" where the layout has no splits


def find_domains(root: Path, wanted: Iterable[str] | None = None) -> list[str]:
    """The folders under `root` that are domains: all, or those in `wanted`, which must exist.

    Raises:
        DataNotFoundError: `root` or a wanted domain is missing; names the folders there are.
    """
    if not root.is_dir():
        near = _subfolders(root.parent) if root.parent.is_dir() else []
        hint = f"; {root.parent} holds: {_names(near)}" if near else ""
        raise DataNotFoundError(f"data.root: there is no folder {root}{hint}")
    there = [p.name for p in _subfolders(root)]
    if not there:
        raise DataNotFoundError(f"{root} holds no folders; expected {root}/<domain>/<class>/*.png")
    missing = [name for name in wanted or () if name not in there]
    if missing:
        raise DataNotFoundError(
            f"no domain {', '.join(map(repr, missing))} under {root}; it holds: {', '.join(there)}"
        )
    return there if wanted is None else list(dict.fromkeys(wanted))


def scan(
    root: Path, domain: str, classes: Sequence[str] | None = None, unlabelled: bool = False
) -> list[Item]:
    """Every image of a domain, sorted by path.

    Args:
        root: Folder of the domains.
        domain: Its name.
        classes: Those to use; None: all.
        unlabelled: Where there are no folders of classes, take the pictures in the domain's own
            folder; their class is "".

    Raises:
        DataError: there is none.
    """
    top = root / domain
    children = _subfolders(top)
    if [p.name for p in children] == ["images"]:
        top, children = children[0], _subfolders(children[0])
    splits = _splits({p.name for p in children})
    items = []
    for split, name in splits.items():
        for folder in _subfolders(top / name):
            if classes is None or folder.name in classes:
                items += [Item(p, domain, folder.name, split) for p in pictures_below(folder)]
    if not items and unlabelled and not any(map(pictures_below, children)):
        items = [Item(p, domain, "", "") for p in pictures_below(top)]
    if not items:
        raise DataError(
            f"domain {domain!r} is empty: no pictures ({', '.join(sorted(SUFFIXES))}) under "
            f"{top}/<class>/" + (f" for data.classes={list(classes)}" if classes else "")
        )
    return items


def pictures_below(folder: Path) -> list[Path]:
    """The pictures in a folder, flat or nested, sorted."""
    return [p for p in files_below(folder).files if p.suffix.lower() in SUFFIXES]


def other_files(folder: Path, used: Iterable[Path] | None = None) -> list[tuple[Path, str]]:
    """The files in a folder that are not read, and why; without hidden ones.

    Args:
        folder: Searched at any depth.
        used: The pictures that are; None: all.
    """
    known = None if used is None else set(used)
    files, found = files_below(folder)
    for path in files:
        if path.suffix.lower() not in SUFFIXES:
            ending = path.suffix.lower() or "missing"
            found.append((path, f"ending {ending}: not read as a picture"))
        elif known is not None and path not in known:
            found.append((path, "in no folder of a class"))
    return found


def is_labelled(item: Item) -> bool:
    """Whether it has a class."""
    return bool(item.class_name)


def split_items(items: Sequence[Item], fraction: float, seed: int) -> list[Item]:
    """Assign a split to images without one: `fraction` of each class is held out, by seed.

    Raises:
        DataError: a class has a single image, or lacks one in a split that is on disk.
    """
    out = []
    for (domain, name), group in _grouped(items).items():
        if not group[0].split:
            if len(group) < 2:
                if not name:
                    raise DataError(f"domain {domain!r} has one readable picture: add some")
                raise DataError(
                    f"class {name!r} of domain {domain!r} has one readable picture; training "
                    "and held-out part need one each: add pictures, or leave the class out "
                    "with data.classes=[...]"
                )
            # Seeded by name, so that another domain or class does not change this one's split.
            shuffled = random.Random(f"{seed}/{domain}/{name}").sample(group, len(group))
            held = min(max(1, round(fraction * len(group))), len(group) - 1)
            test = {item.path for item in shuffled[:held]}
            group = [replace(i, split="test" if i.path in test else "train") for i in group]
        for split in ("train", "test"):
            if not any(item.split == split for item in group):
                raise DataError(
                    f"class {name!r} of domain {domain!r} has no readable picture in {split!r}; "
                    "add some, or leave the class out with data.classes=[...]"
                )
        out += group
    return out


def common_classes(
    items: Iterable[Item], wanted: Sequence[str] | None = None, fewest: int = 2
) -> list[str]:
    """The classes, sorted; every domain must have every one, and there must be `fewest`.

    Raises:
        DataError: a class is missing from a domain, or there are too few; says what to set.
    """
    items = list(items)
    domains = list(dict.fromkeys(item.domain for item in items))
    having = {d: {i.class_name for i in items if i.domain == d} for d in domains}
    known = set(wanted) if wanted else set[str]().union(*having.values())
    lacking = {name: [d for d in domains if name not in having[d]] for name in sorted(known)}
    lacking = {name: absent for name, absent in lacking.items() if absent}
    shared = sorted(known - set(lacking))
    if lacking:
        lines = "\n".join(f"  {name!r} is not in {', '.join(d)}" for name, d in lacking.items())
        raise DataError(
            f"these classes are not in every domain:\n{lines}\n"
            f"use the shared ones only: data.classes=[{','.join(shared)}]"
        )
    if len(shared) < fewest:
        raise DataError(f"classification needs at least two classes, got {shared}")
    return shared


def _splits(names: set[str]) -> dict[str, str]:
    """Split → name of its folder; ``{"": ""}`` where the layout has none."""
    test = next((name for name in TEST_NAMES if name in names), None)
    if "train" in names and test and names <= {"train", *TEST_NAMES}:
        return {"train": "train", "test": test}
    return {"": ""}


def _grouped(items: Iterable[Item]) -> dict[tuple[str, str], list[Item]]:
    groups: dict[tuple[str, str], list[Item]] = {}
    for item in items:
        groups.setdefault((item.domain, item.class_name), []).append(item)
    return groups


def _subfolders(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def _names(folders: list[Path], most: int = 12) -> str:
    names = [p.name for p in folders[:most]]
    return ", ".join(names) + (", …" if len(folders) > most else "")
