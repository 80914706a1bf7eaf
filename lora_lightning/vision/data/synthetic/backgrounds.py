"""Backgrounds: seamless procedural textures on a ground and a wall."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from lora_lightning.vision.data.synthetic.solids import Floats, Rng

TILE = 64  # width and height of a pattern
KINDS = ("noise", "blobs", "foliage", "stripes", "checks", "plain", "speckles")


def pattern(kind: str, size: int, rng: Rng) -> Floats:
    """Return a tile of values from 0 to 1 that repeats without a seam."""
    x, y = np.meshgrid(np.arange(size) / size, np.arange(size) / size)
    if kind == "plain":
        return np.zeros((size, size))
    if kind == "checks":
        n = int(rng.integers(2, 5))
        return np.asarray((np.floor(x * 2 * n) + np.floor(y * 2 * n)) % 2)
    spectrum = np.fft.rfft2(rng.normal(size=(size, size)))
    field = np.fft.irfft2(spectrum / _damping(kind, size), (size, size))
    field = (field - field.mean()) / field.std()
    if kind == "stripes":  # the grain of a plank
        return np.asarray(0.5 + 0.5 * np.sin(2 * np.pi * rng.integers(3, 8) * x + 0.8 * field))
    if kind == "speckles":
        return np.asarray(field > 1.2, dtype=float)
    return np.asarray(np.clip(0.5 + field * 0.3, 0, 1))


@cache
def _damping(kind: str, size: int) -> Floats:
    """Return the divisor of each frequency of white noise."""
    slope = {"noise": 1.3, "foliage": 0.8, "blobs": 2.5, "stripes": 2.0, "speckles": 0.4}[kind]
    rows, columns = np.fft.fftfreq(size)[:, None] * size, np.fft.rfftfreq(size) * size
    return np.asarray(np.maximum(np.hypot(rows, columns), 1) ** slope)


def tile(kind: str, first: Floats, second: Floats, rng: Rng) -> Floats:
    """Return a pattern of two colours."""
    mixed = first + (second - first) * pattern(kind, TILE, rng)[..., None]
    return np.asarray(mixed, np.float32)


@dataclass(frozen=True, eq=False)
class Background:
    """Two textured planes: the ground, up to `depth` behind the object, and a wall or sky."""

    ground: Floats
    wall: Floats
    depth: float
    scale: float
    fade: float

    @classmethod
    def random(
        cls, rng: Rng, kinds: Sequence[str] = KINDS, contrast: tuple[float, float] = (0.6, 1.3)
    ) -> Background:
        """Draw a room, an open ground under a sky, or a plain backdrop.

        Its patterns are of these kinds; their second colour is brighter than the first by a
        factor in the range of `contrast`.
        """
        tiles = []
        for _ in range(2):  # of related colours: real grounds are rarely of two hues
            base = rng.uniform(0.35, 1) * (1 - rng.uniform(0, 0.5) * rng.uniform(0, 1, 3))
            other = np.clip(base * rng.uniform(*contrast) + rng.normal(0, 0.05, 3), 0.05, 1)
            tiles.append(tile(str(rng.choice(list(kinds))), base, other, rng))
        depth = float(rng.choice([rng.uniform(0.9, 3), 60, -60], p=[0.55, 0.25, 0.2]))
        return cls(tiles[0], tiles[1], depth, rng.uniform(0.15, 0.5), rng.uniform(-0.25, 0.25))

    def look(self, eye: Floats, rays: Floats) -> tuple[Floats, Floats, NDArray[np.bool_]]:
        """Return colours, places and which pixels are ground; rays are (h, w, 3)."""
        down = np.minimum(rays[..., 2], -1e-6)
        ground = (rays[..., 2] < 0) & (eye[1] - eye[2] / down * rays[..., 1] < self.depth)
        to_wall = (max(abs(self.depth), 1.2) - eye[1]) / np.maximum(rays[..., 1], 0.1)
        along = np.where(ground, -eye[2] / down, to_wall)
        place = eye + along[..., None] * rays
        u, v = (
            place[..., 0] * self.scale,
            np.where(ground, place[..., 1], place[..., 2]) * self.scale,
        )
        if abs(self.depth) > 10:  # far away: a sky keeps its pattern's size in the image
            far = ~ground
            u, v = np.where(far, rays[..., 0], u), np.where(far, rays[..., 2], v)
        row, column = (np.floor(v * TILE).astype(int) % TILE, np.floor(u * TILE).astype(int) % TILE)
        colour = np.where(ground[..., None], self.ground[row, column], self.wall[row, column])
        slope = 1 + self.fade * (rays[..., 2:] - rays[..., 2:].mean()) * 2
        return np.clip(colour * slope, 0, 1), place, ground
