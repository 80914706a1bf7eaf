"""`drawn`: the images of a rendered set, drawn by several processes, in the order of the items.

A process of its own imports this module, which needs no torch, and writes what it has drawn to its
standard output. (Python's own pools import the caller's script again, which may have no guard.)
"""

from __future__ import annotations

import io
import os
import pickle
import subprocess
import sys
import zlib
from collections.abc import Generator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from lora_lightning.vision.data.synthetic.scene import Renderer
from lora_lightning.vision.data.synthetic.worlds import Picture, World

SHARE = 150  # images for which a further process, which takes a second to start, is worth it


class Drawn(NamedTuple):
    """An image, and the bytes of its PNG file."""

    picture: Picture
    png: bytes


@dataclass(frozen=True)
class Item:
    """One image of the set."""

    domain: str
    split: str
    class_name: str
    index: int

    @property
    def path(self) -> str:
        """Relative to the root of the set."""
        return f"{self.domain}/{self.split}/{self.class_name}/{self.index:04d}.png"

    def draw(self, renderer: Renderer, world: World, seed: int) -> Picture:
        """Render the image; a test object's light alone depends on the domain's name."""
        words = [self.split, self.class_name, self.domain if self.split == "train" else ""]
        scene = [seed, self.index, *(zlib.crc32(word.encode()) for word in words)]
        here = np.random.default_rng([*scene, zlib.crc32(self.domain.encode())])
        return world.picture(renderer, self.class_name, np.random.default_rng(scene), here)


def _drawn(item: Item, renderer: Renderer, worlds: Mapping[str, World], seed: int) -> Drawn:
    from PIL import Image

    picture, file = item.draw(renderer, worlds[item.domain], seed), io.BytesIO()
    # Noise does not repeat: searching for matches would cost time, and even bytes.
    Image.fromarray(picture.pixels).save(file, "png", compress_type=zlib.Z_HUFFMAN_ONLY)
    return Drawn(picture, file.getvalue())


class _Helper:
    """Another process that draws these items."""

    def __init__(self, items: Sequence[Item], size: int, worlds: Mapping[str, World], seed: int):
        paths = os.pathsep.join(filter(None, sys.path))
        self._process = subprocess.Popen(
            [sys.executable, "-c", f"import {__name__} as it; it.help_out()"],
            env={**os.environ, "PYTHONPATH": paths},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert self._process.stdin is not None
        with suppress(BrokenPipeError), self._process.stdin as pipe:
            pickle.dump((list(items), size, dict(worlds), seed), pipe)

    def next(self) -> Drawn | None:
        """Its next image; None where the process has ended."""
        assert self._process.stdout is not None
        try:
            return pickle.load(self._process.stdout)  # type: ignore[no-any-return]
        except Exception:  # it has ended, or a library of it printed into the stream
            self._process.kill()
            return None

    def stop(self) -> None:
        """End the process."""
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._process.kill()
        self._process.wait()


def drawn(
    items: Sequence[Item],
    renderer: Renderer,
    worlds: Mapping[str, World],
    seed: int,
    processes: int | None = None,
) -> Generator[Drawn, None, None]:
    """The images in order; close it, to end the other processes.

    Args:
        items: To draw.
        renderer: Of this process.
        worlds: Domain → its world.
        seed: Of the set.
        processes: This one included; None: one for each core, where there are enough images.
    """
    n = processes or max(1, min(_cores(), len(items) // SHARE))
    helpers = [_Helper(items[k::n], renderer.size, worlds, seed) for k in range(1, n)]
    try:
        for number, item in enumerate(items):
            done = helpers[number % n - 1].next() if number % n else None
            yield done or _drawn(item, renderer, worlds, seed)
    finally:
        for helper in helpers:
            helper.stop()


def _cores() -> int:
    allowed = getattr(os, "sched_getaffinity", None)
    return len(allowed(0)) if allowed else os.cpu_count() or 1


def help_out() -> None:
    """Draw what standard input tells, for a `_Helper`."""
    items, size, worlds, seed = pickle.load(sys.stdin.buffer)
    renderer = Renderer(size)
    for item in items:
        sys.stdout.buffer.write(pickle.dumps(_drawn(item, renderer, worlds, seed)))
        sys.stdout.buffer.flush()
