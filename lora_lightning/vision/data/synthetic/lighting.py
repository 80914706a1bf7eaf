"""Lighting of the domains: lamp, ambient light, shadows, and the sensor.

Light is computed at vertices and pixels, in linear units. The image is kept at full
exposure until the sensor step, so that a dim scene loses its detail to noise, as in a
camera, and not to eight-bit arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from lora_lightning.vision.data.synthetic.solids import Floats, Rng, dot

GAMMA = 2.2
REACH = 1.3  # half the width of the shadow map; objects lie within a unit ball


@dataclass(frozen=True)
class Lighting:
    """A light and a sensor; angles in degrees, as the viewer sees them.

    Azimuth 0 shines from the viewer, -90 from the left; elevation 90 from above.
    The lamp stands `distance` away (an object's half diagonal is 1), never below the
    ground; nearer points are brighter. `ambient` is the share of the light that
    comes from everywhere, in its own colour. `noise` is the sensor's standard deviation
    against a fully lit white; `exposure` multiplies its signal, noise included.
    """

    azimuth: float = 0.0
    elevation: float = 40.0
    intensity: float = 1.25
    ambient: float = 0.45
    colour: tuple[float, float, float] = (1.0, 1.0, 1.0)
    ambient_colour: tuple[float, float, float] = (1.0, 1.0, 1.0)
    distance: float = 8.0
    exposure: float = 1.0
    noise: float = 0.001
    vignette: float = 0.1

    def jittered(self, rng: Rng) -> Lighting:
        """Return a light near this one: no two images of a domain are lit alike."""
        tint = np.array(self.colour) * np.exp(rng.normal(0, 0.04, 3))
        return replace(
            self,
            azimuth=self.azimuth + rng.uniform(-14, 14),
            elevation=self.elevation + rng.uniform(-6, 6),
            intensity=self.intensity * float(np.exp(rng.normal(0, 0.12))),
            colour=tuple(tint.tolist()),
        )

    def lamp(self, centre: Floats) -> Floats:
        """Return where the lamp stands, for an object around `centre`."""
        place = centre + self.distance * self.direction
        place[2] = max(place[2], 0.05)
        return np.asarray(place, np.float32)

    @property
    def direction(self) -> Floats:
        """The unit vector towards the light."""
        a, e = np.radians([self.azimuth, self.elevation])
        toward = [np.sin(a) * np.cos(e), -np.cos(a) * np.cos(e), np.sin(e)]
        return np.array(toward, np.float32)


LIGHTINGS: dict[str, Lighting] = {
    "source": Lighting(),
    "dim-1": Lighting(intensity=0.18, noise=0.003),
    "dim-2": Lighting(intensity=0.1, noise=0.004),
    "dim-3": Lighting(intensity=0.06, noise=0.0045),
    "low-1": Lighting(25, 5, ambient=0.15, distance=2.5, intensity=1, noise=0.002),
    "low-2": Lighting(35, -8, ambient=0.05, distance=1.6, intensity=0.6, noise=0.004),
    "low-3": Lighting(45, -15, ambient=0.015, distance=1.15, intensity=0.4, noise=0.006),
    "side-1": Lighting(-70, 25, ambient=0.15, distance=4, intensity=1, noise=0.002),
    "side-2": Lighting(-100, 18, ambient=0.04, distance=2.5, intensity=0.6, noise=0.003),
    "side-3": Lighting(-125, 12, ambient=0.015, distance=2, intensity=0.6, noise=0.005),
    "coloured-1": Lighting(colour=(1, 0.45, 0.2), ambient_colour=(0.8, 0.4, 0.4), noise=0.002),
    "coloured-2": Lighting(
        40, intensity=0.5, colour=(1, 0.12, 0.2), ambient_colour=(0.1, 0.15, 1), noise=0.0035
    ),
    "coloured-3": Lighting(
        60, intensity=0.42, colour=(1, 0, 0.08), ambient_colour=(0, 0.05, 1), noise=0.004
    ),
}


class ShadowMap:
    """Depth map of the object, seen from the light."""

    def __init__(self, lighting: Lighting, centre: Floats):
        light = lighting.lamp(centre) - centre
        light /= np.linalg.norm(light)
        right = np.cross((0, 0, 1), light) if light[:2].any() else np.eye(3)[0]
        right /= np.linalg.norm(right)
        axes = np.stack([right, light, np.cross(light, right)])
        self.axes, self.centre = axes.astype(np.float32), centre.astype(np.float32)
        self.lamp = lighting.lamp(self.centre)
        self.depth: Floats = np.zeros((1, 1))

    def project(self, points: Floats) -> Floats:
        """Return right, depth and up coordinates as seen from the light, -1 to 1 in the map."""
        return np.asarray((points - self.centre) @ self.axes.T / REACH)

    def lit(self, points: Floats) -> Floats:
        """Return the share of the light that reaches the points, softened at the edges."""
        seen, n = self.project(points), self.depth.shape[0]
        inside = np.maximum(np.abs(seen[..., 0]), np.abs(seen[..., 2])) < 0.95
        column, row = ((seen[..., i].clip(-0.95, 0.95) + 1) * n / 2 for i in (0, 2))
        depth, bar = self.depth.ravel(), seen[..., 1] + 0.04
        lit = np.zeros(seen.shape[:-1], np.uint8)
        for dx, dy in ((0, 0), (-1.2, 0), (1.2, 0), (0, -1.2), (0, 1.2)):
            at = (row + dy).astype(np.int32) * n + (column + dx).astype(np.int32)
            lit += depth.take(at) < bar
        return np.where(inside, lit / 5.0, 1.0)


def illuminate(points: Floats, normals: Floats, shadow: ShadowMap, lighting: Lighting) -> Floats:
    """Return the light at each point: ambient, more of it from above, and the lamp's."""
    way = shadow.lamp - points
    far = np.sqrt(dot(way, way)) + 0.1  # a lamp is no point: nothing is infinitely bright
    middle = np.linalg.norm(shadow.lamp - shadow.centre) + 0.1
    facing = (dot(normals, way) / far).clip(0) * (middle / far) ** 2
    facing *= shadow.lit(points + 0.03 * normals) * (1 - lighting.ambient)
    around = lighting.ambient * (0.7 + 0.3 * normals[..., 2])
    key, fill = (np.array(c, np.float32) for c in (lighting.colour, lighting.ambient_colour))
    return np.asarray(facing[..., None] * key + around[..., None] * fill)


def sense(picture: Floats, lighting: Lighting, rng: Rng) -> NDArray[np.uint8]:
    """Return the sensor's 8-bit image of a fully exposed scene under the given light."""
    at = np.linspace(-1, 1, len(picture))
    corner = 1 - lighting.vignette * (at[:, None] ** 2 + at**2)
    light = (corner[..., None] * lighting.intensity).astype(np.float32)
    linear = picture.astype(np.float32) ** GAMMA * light
    grain = lighting.noise * np.sqrt(1 + 10 * linear)  # of the electronics and of the light
    noise = rng.standard_normal(picture.shape, np.float32)
    caught = lighting.exposure * (linear + grain * noise)
    return np.asarray(np.round(255 * np.clip(caught, 0, 1) ** (1 / GAMMA)), dtype=np.uint8)
