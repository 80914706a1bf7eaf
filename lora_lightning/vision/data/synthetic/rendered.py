"""Folders of rendered objects, `root/<domain>/<split>/<class>/<index>.png`, kept in a cache.

A domain is a world (`worlds.WORLDS`): a light, a range of views, an environment. Where the objects
of a world face the viewer, `root/labels.csv` holds the pose of each (`pose_domains`). Test objects
never occur in training, and they are the same in every domain: between two test sets only the
world changes. Each domain has training objects of its own, as in reality.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lora_lightning.errors import ConfigError
from lora_lightning.lora.values import check_count
from lora_lightning.report.versions import versions
from lora_lightning.runner import generated_sets
from lora_lightning.runner.generated_sets import made_set
from lora_lightning.vision.data.pose_domains import LABELS, Pose, write_poses
from lora_lightning.vision.data.synthetic.drawing import Item, drawn
from lora_lightning.vision.data.synthetic.meshes import CLASSES, FRONTS
from lora_lightning.vision.data.synthetic.scene import Renderer
from lora_lightning.vision.data.synthetic.worlds import WORLDS, World

EDITION = 2  # increment whenever the same settings would give other images
SPLITS = ("train", "test")


def render_domains(
    root: Path | str | None,
    domains: Mapping[str, Mapping[str, int]],
    *,
    shift: str = "lighting",
    size: int = 112,
    seed: int = 0,
    progress: bool = True,
) -> Path:
    """Render the images of each domain, or reuse a complete set with the same settings.

    Args:
        root: the folder of the set; None: one in the cache, named by the settings
            (`$LORA_LIGHTNING_CACHE`, or else `~/.cache/lora-lightning`).
        domains: images per class, such as `{"source": {"train": 60, "test": 20}}`.
        shift: kind of shift, a key of `WORLDS`; its worlds are the domains.
        size: width and height in pixels.
        seed: of shapes, views, backgrounds and lights; the same seed gives the same pixels.
        progress: show a progress bar on standard error.

    Returns:
        The folder. It holds a `manifest.json` as well: settings, versions and hashes.

    Raises:
        ConfigError: the kind of shift, a domain, a split, a count, the size or the seed is not
            valid.
        DataError: `root` holds something else than a rendered set.
        MissingDependencyError: something is to be rendered without the extra `demo`.
    """
    worlds = worlds_of(shift)
    settings = _settings(domains, size, seed, worlds)
    items = list(_items(settings))

    def make(folder: Path) -> Mapping[str, Any]:
        return _write(folder, items, Renderer(size), settings, worlds, progress)

    files = [item.path for item in items] + [LABELS] * _faces(settings)
    return made_set(root, "rendered", settings, files, make, own=[*worlds, LABELS])


def worlds_of(shift: str) -> Mapping[str, World]:
    """The worlds of a kind of shift; raises ConfigError where there is no such kind."""
    if shift not in WORLDS:
        raise ConfigError(f"shift must be one of {', '.join(WORLDS)}; got {shift!r}")
    return WORLDS[shift]


def _faces(settings: Mapping[str, Any]) -> bool:
    """Whether the objects of the set face the viewer, so that their pose is known."""
    return any(world["facing"] for world in settings["worlds"].values())


def _settings(
    domains: Mapping[str, Mapping[str, int]],
    size: int,
    seed: int,
    worlds: Mapping[str, World],
) -> dict[str, Any]:
    """Check the arguments, and return all settings that determine the pixels."""
    if not domains:
        raise ConfigError("domains is empty: name at least one, such as 'source'")
    check_count("size", size, 16, unit="pixels")
    check_count("seed", seed, 0)
    for domain, counts in domains.items():
        if domain not in worlds:
            near = difflib.get_close_matches(domain, worlds, 1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ConfigError(f"unknown domain {domain!r}; {hint}known: {', '.join(worlds)}")
        for split, count in counts.items():
            if split not in SPLITS:
                raise ConfigError(f"unknown split {split!r} of {domain!r}: use 'train' or 'test'")
            check_count(f"{domain}/{split}", count, unit="picture a class")
    used = {name: asdict(worlds[name]) for name in domains}
    facing = any(worlds[name].facing for name in domains)
    classes = sorted(FRONTS) if facing else list(CLASSES)
    settings: dict[str, Any] = {"edition": EDITION, "size": size, "seed": seed, "classes": classes}
    settings |= {"domains": {name: dict(counts) for name, counts in domains.items()}}
    # Through JSON, so that it equals what a manifest holds.
    plain: dict[str, Any] = json.loads(json.dumps({**settings, "worlds": used}))
    return plain


def _items(settings: Mapping[str, Any]) -> Iterator[Item]:
    for domain, counts in settings["domains"].items():
        for split in SPLITS:
            for class_name in settings["classes"]:
                for index in range(counts.get(split, 0)):
                    yield Item(domain, split, class_name, index)


def _write(
    folder: Path,
    items: Sequence[Item],
    renderer: Renderer,
    settings: Mapping[str, Any],
    worlds: Mapping[str, World],
    progress: bool,
) -> Mapping[str, Any]:
    pixels, poses = hashlib.sha256(), dict[str, Pose]()
    with (
        closing(drawn(items, renderer, worlds, settings["seed"])) as images,
        generated_sets.progress(items, f"rendering {len(items)} images", progress) as shown,
    ):
        for item, image in zip(shown, images, strict=True):
            found, png = image
            poses[item.path] = Pose(found.azimuth, found.elevation)
            pixels.update(found.pixels.tobytes())
            (folder / item.path).write_bytes(png)
    if _faces(settings):
        write_poses(folder, poses)
    made_with = versions("numpy", "panda3d", "pillow", "trimesh")
    return {"versions": made_with, "pixels_sha256": pixels.hexdigest()}
