"""Folders of rendered objects, `root/<domain>/<split>/<class>/<index>.png`, kept in a cache.

A domain is a light (`lighting.LIGHTINGS`). Test objects never occur in training, and they
are the same in every domain: between two test sets only the light changes. Training
objects are drawn anew for each domain, as they would be in the world.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import sys
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_lightning.data.backgrounds import Background
from lora_lightning.data.lighting import LIGHTINGS, Lighting
from lora_lightning.data.meshes import CLASSES, make_mesh
from lora_lightning.data.scene import Camera, Renderer
from lora_lightning.errors import ConfigError, DataError

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
    folder = _default_root(settings) if root is None else Path(root)
    if _complete(folder, settings):
        return folder
    _refuse_foreign(folder, lightings)
    renderer = Renderer(size)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        fresh = Path(scratch, "fresh")
        _write(fresh, settings, renderer, lightings, progress)
        if folder.exists():  # a folder can only be replaced when it is out of the way
            os.replace(folder, Path(scratch, "old"))
        os.replace(fresh, folder)
    return folder


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


def _default_root(settings: Mapping[str, Any]) -> Path:
    base = os.environ.get("LORA_LIGHTNING_CACHE") or Path.home() / ".cache" / "lora-lightning"
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    return Path(base, "rendered", digest[:16])


def _items(settings: Mapping[str, Any]) -> Iterator[_Item]:
    for domain, counts in settings["domains"].items():
        for split in SPLITS:
            for class_name in settings["classes"]:
                for index in range(counts.get(split, 0)):
                    yield _Item(domain, split, class_name, index)


def _complete(folder: Path, settings: Mapping[str, Any]) -> bool:
    """Say whether the folder holds exactly this set, every byte of every file as written."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        if manifest["settings"] != settings:
            return False
        paths = [item.path for item in _items(settings)]
        found = sum(1 for _ in folder.rglob("*.png"))
        return found == len(paths) and manifest["files_sha256"] == _hash_files(folder, paths)
    except (OSError, ValueError, KeyError, TypeError):
        return False  # missing or damaged


def _hash_files(folder: Path, paths: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        content = (folder / path).read_bytes()
        digest.update(f"{path} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def _refuse_foreign(folder: Path, lightings: Mapping[str, Lighting]) -> None:
    """Never replace a folder that we did not write."""
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{folder} is a file: name a folder for the rendered images")
    names = {entry.name for entry in folder.iterdir()} if folder.exists() else set()
    strange = sorted(names - set(lightings) - {"manifest.json"})
    if names and (strange or "manifest.json" not in names):
        what = f"holds {strange[0]!r}" if strange else "has no manifest.json"
        raise DataError(
            f"{folder} {what}, so it is not a rendered set and is left as it is: "
            "name an empty or a new folder, or remove it yourself"
        )


def _write(
    folder: Path,
    settings: Mapping[str, Any],
    renderer: Renderer,
    lightings: Mapping[str, Lighting],
    progress: bool,
) -> None:
    from PIL import Image

    items, pixels = list(_items(settings)), hashlib.sha256()
    for parent in {(folder / item.path).parent for item in items}:
        parent.mkdir(parents=True)
    with _progress(items, progress) as shown:
        for item in shown:
            picture = item.draw(renderer, lightings[item.domain], settings["seed"])
            pixels.update(picture.tobytes())
            # Noise does not repeat: to search for matches would cost time, and even bytes.
            Image.fromarray(picture).save(folder / item.path, compress_type=zlib.Z_HUFFMAN_ONLY)
    manifest = {
        "settings": settings,
        "versions": _versions(),
        "files": len(items),
        "pixels_sha256": pixels.hexdigest(),
        "files_sha256": _hash_files(folder, (item.path for item in items)),
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")


@contextmanager
def _progress(items: list[_Item], show: bool) -> Iterator[Iterable[_Item]]:
    if not show:
        yield items
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(file=sys.stderr), transient=True) as bar:
        yield bar.track(items, description=f"rendering {len(items)} images")


def _versions() -> dict[str, str]:
    versions = {"python": sys.version.split()[0]}
    for name in ("lora-lightning", "numpy", "panda3d", "pillow", "trimesh"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:  # a checkout that was never installed
            versions[name] = "unknown"
    return versions
