"""Folders of rendered objects, `root/<domain>/<split>/<class>/<index>.png`, kept in a cache.

A domain is a light (`lighting.LIGHTINGS`). Test objects never occur in training, and they
are the same in every domain: between two test sets only the light changes. Training
objects are drawn anew for each domain, as they would be in the world.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_lightning.data import cache
from lora_lightning.data.backgrounds import Background
from lora_lightning.data.cache import made_set
from lora_lightning.data.lighting import LIGHTINGS, Lighting
from lora_lightning.data.meshes import CLASSES, make_mesh
from lora_lightning.data.scene import Camera, Renderer
from lora_lightning.errors import ConfigError

EDITION = 2  # raise it whenever the same settings would give other pictures
SPLITS = ("train", "test")
DEFAULT_DOMAINS: Mapping[str, Mapping[str, int]] = {
    name: {"train": 60, "test": 20} if name == "source" else {"train": 14, "test": 8}
    for name in LIGHTINGS
}


@dataclass(frozen=True)
class _Item:
    """One picture of the set."""

    domain: str
    split: str
    class_name: str
    index: int

    @property
    def path(self) -> str:
        return f"{self.domain}/{self.split}/{self.class_name}/{self.index:04d}.png"

    def draw(self, renderer: Renderer, lighting: Lighting, seed: int) -> NDArray[np.uint8]:
        """Draw the picture; the domain enters a test object's light and nothing else."""
        words = [self.split, self.class_name, self.domain if self.split == "train" else ""]
        scene = [seed, self.index, *(zlib.crc32(word.encode()) for word in words)]
        rng = np.random.default_rng(scene)
        light_rng = np.random.default_rng([*scene, zlib.crc32(self.domain.encode())])
        parts, camera = make_mesh(self.class_name, rng), Camera.random(rng)
        background, light = Background.random(rng), lighting.jittered(light_rng)
        return renderer.render(parts, camera, light, background, rng)


def render_domains(
    root: Path | str | None = None,
    *,
    domains: Mapping[str, Mapping[str, int]] = DEFAULT_DOMAINS,
    size: int = 112,
    seed: int = 0,
    lightings: Mapping[str, Lighting] = LIGHTINGS,
    progress: bool = True,
) -> Path:
    """Render the pictures of each domain, or reuse a complete set with the same settings.

    Args:
        root: the folder of the set; by default one in the cache, named by the settings
            (`$LORA_LIGHTNING_CACHE`, or else `~/.cache/lora-lightning`).
        domains: pictures per class, such as `{"source": {"train": 60, "test": 20}}`.
        size: width and height in pixels.
        seed: of shapes, views, backgrounds and lights; the same seed gives the same pixels.
        lightings: the light of each domain, by its name.
        progress: show a progress bar on standard error.

    Returns:
        The folder. It holds a `manifest.json` as well: settings, versions and hashes.

    Raises:
        ConfigError: a domain, a split, a count, the size or the seed is not valid.
        DataError: `root` holds something else than a rendered set.
        MissingDependencyError: something is to be rendered without the extra `demo`.
    """
    settings = _settings(domains, size, seed, lightings)
    items = list(_items(settings))

    def make(folder: Path) -> Mapping[str, Any]:
        return _write(folder, items, Renderer(size), settings, lightings, progress)

    files = [item.path for item in items]
    return made_set(root, "rendered", settings, files, make, own=lightings)


def _settings(
    domains: Mapping[str, Mapping[str, int]],
    size: int,
    seed: int,
    lightings: Mapping[str, Lighting],
) -> dict[str, Any]:
    """Check what was asked for, and return all that decides on the pixels."""
    if not domains:
        raise ConfigError("domains is empty: name at least one, such as 'source'")
    if size < 16:
        raise ConfigError(f"size must be at least 16 pixels, got {size}")
    if seed < 0:
        raise ConfigError(f"seed must not be negative, got {seed}")
    for domain, counts in domains.items():
        if domain not in lightings:
            near = difflib.get_close_matches(domain, lightings, 1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ConfigError(f"unknown domain {domain!r}; {hint}known: {', '.join(lightings)}")
        for split, count in counts.items():
            if split not in SPLITS:
                raise ConfigError(f"unknown split {split!r} of {domain!r}: use 'train' or 'test'")
            if count < 1:
                raise ConfigError(f"{domain}/{split} needs at least 1 picture a class, got {count}")
    lights = {name: asdict(lightings[name]) for name in domains}
    settings = {"edition": EDITION, "size": size, "seed": seed, "classes": CLASSES}
    settings |= {"domains": {name: dict(counts) for name, counts in domains.items()}}
    # Through JSON, so that it equals what a manifest says.
    plain: dict[str, Any] = json.loads(json.dumps({**settings, "lightings": lights}))
    return plain


def _items(settings: Mapping[str, Any]) -> Iterator[_Item]:
    for domain, counts in settings["domains"].items():
        for split in SPLITS:
            for class_name in settings["classes"]:
                for index in range(counts.get(split, 0)):
                    yield _Item(domain, split, class_name, index)


def _write(
    folder: Path,
    items: Sequence[_Item],
    renderer: Renderer,
    settings: Mapping[str, Any],
    lightings: Mapping[str, Lighting],
    progress: bool,
) -> Mapping[str, Any]:
    from PIL import Image

    pixels = hashlib.sha256()
    with cache.progress(items, f"rendering {len(items)} images", progress) as shown:
        for item in shown:
            picture = item.draw(renderer, lightings[item.domain], settings["seed"])
            pixels.update(picture.tobytes())
            # Noise does not repeat: to search for matches would cost time, and even bytes.
            Image.fromarray(picture).save(folder / item.path, compress_type=zlib.Z_HUFFMAN_ONLY)
    versions = cache.versions("numpy", "panda3d", "pillow", "trimesh")
    return {"versions": versions, "pixels_sha256": pixels.hexdigest()}
