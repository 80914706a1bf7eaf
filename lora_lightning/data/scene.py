"""Objects under a light: panda3d's software renderer, and the lights that make the domains.

Light is computed here, at the vertices, in linear units; panda3d only rasterises. The
picture is kept at full exposure until the sensor step, so that a dim scene loses its
detail to noise, as in a camera, and not to eight-bit arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_lightning.data.meshes import Floats, Material, Part, Rng
from lora_lightning.errors import ConfigError, MissingDependencyError

GAMMA = 2.2
CREASE = 0.8  # cosine of the angle between faces above which a surface looks smooth
SCENES = ("room", "room", "outdoors", "backdrop")
_CORNER = [("vertex", "<f4", 3), ("colour", "u1", 4), ("uv", "<f4", 2)]
_QUIET = "notify-level error\naudio-library-name null\nthreading-model\ntextures-power-2 none"


@dataclass(frozen=True)
class Lighting:
    """A light and the sensor that sees by it; angles in degrees, as the viewer sees them.

    Azimuth 0 shines from the viewer, -90 from the left; elevation 90 from above.
    `ambient` is the share of the light that comes from everywhere. `noise` is the
    sensor's standard deviation against a fully lit white; `exposure` multiplies what
    the sensor caught, noise included.
    """

    azimuth: float = 0.0
    elevation: float = 40.0
    intensity: float = 1.0
    ambient: float = 0.45
    colour: tuple[float, float, float] = (1.0, 1.0, 1.0)
    exposure: float = 1.0
    noise: float = 0.003
    vignette: float = 0.1

    def jittered(self, rng: Rng) -> Lighting:
        """Return a light near this one: no two pictures of a domain are lit alike."""
        tint = np.array(self.colour) * np.exp(rng.normal(0, 0.04, 3))
        return replace(
            self,
            azimuth=self.azimuth + rng.uniform(-14, 14),
            elevation=self.elevation + rng.uniform(-6, 6),
            intensity=self.intensity * float(np.exp(rng.normal(0, 0.12))),
            colour=tuple((tint / tint.max()).tolist()),
        )

    @property
    def direction(self) -> Floats:
        """The unit vector towards the light."""
        a, e = np.radians([self.azimuth, self.elevation])
        return np.array([np.sin(a) * np.cos(e), -np.cos(a) * np.cos(e), np.sin(e)])


LIGHTINGS: dict[str, Lighting] = {
    "source": Lighting(),
    "dim-1": Lighting(intensity=0.12, noise=0.006),
    "dim-2": Lighting(intensity=0.05, noise=0.008, exposure=1.2),
    "dim-3": Lighting(intensity=0.02, noise=0.009, exposure=1.6),
    "low-1": Lighting(elevation=8, ambient=0.22),
    "low-2": Lighting(elevation=-12, ambient=0.1),
    "low-3": Lighting(elevation=-32, ambient=0.04, intensity=0.8),
    "side-1": Lighting(azimuth=-65, elevation=25, ambient=0.2),
    "side-2": Lighting(azimuth=-90, elevation=18, ambient=0.08),
    "side-3": Lighting(azimuth=-115, elevation=12, ambient=0.03),
    "coloured-1": Lighting(colour=(1.0, 0.5, 0.25)),
    "coloured-2": Lighting(colour=(1.0, 0.15, 0.35)),
    "coloured-3": Lighting(colour=(0.35, 0.02, 1.0)),
}


@dataclass(frozen=True)
class Camera:
    """Where the viewer stands; the object spans `fill` of the picture."""

    azimuth: float = 20.0
    elevation: float = 20.0
    fov: float = 35.0
    fill: float = 0.7
    shift: tuple[float, float] = (0.0, 0.0)

    @classmethod
    def random(cls, rng: Rng) -> Camera:
        """Draw a modest change of view."""
        u = rng.uniform
        shift = (u(-0.08, 0.08), u(-0.08, 0.08))
        return cls(u(-35, 35), u(10, 35), u(25, 45), u(0.6, 0.82), shift)

    def place(self, points: Floats) -> tuple[Floats, Floats]:
        """Return where the viewer stands and looks, so that the points fill the picture."""
        e, half = np.radians(self.elevation), np.tan(np.radians(self.fov / 2))
        axes = np.array([[1, 0, 0], [0, np.cos(e), -np.sin(e)], [0, np.sin(e), np.cos(e)]])
        target, distance = points.mean(0), 5.0
        for _ in range(4):
            seen = (points - target) @ axes.T
            flat = seen[:, [0, 2]] / (distance + seen[:, [1]]) / half  # -1 to 1 in the picture
            low, high = flat.min(0), flat.max(0)
            middle = (low + high) / 2 - self.shift
            target = target + (middle * distance * half) @ axes[[0, 2]]
            distance *= float((high - low).max()) / (2 * self.fill)
        return target - distance * axes[1], target


@dataclass(frozen=True)
class Background:
    """What is behind the object: its colours, and which pixels are ground."""

    albedo: Floats
    ground: NDArray[np.bool_]


def pattern(kind: str, size: int, rng: Rng) -> Floats:
    """Return a tile of values from 0 to 1 that repeats without a seam."""
    x, y = np.meshgrid(np.arange(size) / size, np.arange(size) / size)
    if kind == "plain":
        return np.zeros((size, size))
    if kind == "checks":
        n = int(rng.integers(2, 5))
        return np.asarray((np.floor(x * 2 * n) + np.floor(y * 2 * n)) % 2)
    slope = {"noise": 1.3, "foliage": 0.7, "blobs": 2.5, "stripes": 2.0, "speckles": 0.4}[kind]
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(size) * size, np.fft.rfftfreq(size) * size))
    spectrum = np.fft.rfft2(rng.normal(size=(size, size)))
    spectrum /= np.maximum(frequency.T if frequency.shape[0] != size else frequency, 1) ** slope
    field = np.fft.irfft2(spectrum, (size, size))
    field = (field - field.mean()) / field.std()
    if kind == "stripes":  # the rings of a plank of wood
        return np.asarray(0.5 + 0.5 * np.sin(2 * np.pi * rng.integers(3, 8) * x + 0.8 * field))
    if kind == "speckles":
        return np.asarray(field > 1.2, dtype=float)
    return np.clip(0.5 + field * (0.28 if kind == "noise" else 0.5), 0, 1)


def _mix(tile: Floats, first: Floats, second: Floats) -> Floats:
    return np.asarray(first + (second - first) * tile[..., None])


def _colours(rng: Rng) -> Floats:
    """Draw two related colours: natural grounds and walls are rarely of two hues."""
    colour = rng.uniform(0.25, 0.9) * (1 - rng.uniform(0, 0.5) * rng.uniform(0, 1, 3))
    other = np.clip(colour * rng.uniform(0.55, 1.3) + rng.normal(0, 0.05, 3), 0.05, 1)
    return np.stack([colour, other])
