"""The worlds of the domains: lighting, range of views, background and occlusion.

`WORLDS` holds them by kind of shift; each kind has a world "source" and graded targets.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from lora_lightning.vision.data.synthetic.backgrounds import KINDS, Background, tile
from lora_lightning.vision.data.synthetic.lighting import LIGHTINGS, Lighting
from lora_lightning.vision.data.synthetic.meshes import make_mesh
from lora_lightning.vision.data.synthetic.scene import Bytes, Camera, Renderer
from lora_lightning.vision.data.synthetic.solids import Floats, Rng


class Picture(NamedTuple):
    """An image (size, size, 3) of an object and its viewpoint in degrees."""

    pixels: Bytes
    azimuth: float
    elevation: float


@dataclass(frozen=True)
class World:
    """The setting that images are rendered in; angles in degrees."""

    lighting: Lighting = field(default_factory=Lighting)  # the light, and the sensor
    # Range of the object's turn, counter-clockwise as seen from above; 0 shows its front, 180 its
    # rear
    azimuth: tuple[float, float] = (-35, 35)
    # Range of the viewer's height; 90 looks straight down
    elevation: tuple[float, float] = (10, 35)
    both_sides: bool = False  # change the azimuth's sign in half of the images
    backgrounds: tuple[str, ...] = KINDS  # kinds of patterns behind the object
    contrast: tuple[float, float] = (0.6, 1.3)  # range of the factor between their two colours
    fog: float = 0.0  # the object keeps exp(-fog) of its contrast, points farther away less
    cover: float = 0.0  # part of the image that is occluded
    # At azimuth 0 the front faces the viewer, so that the azimuth can be read off the image, within
    # (-180, 180]; the classes of `meshes.FRONTS` only. By default each object is first rotated at
    # random.
    facing: bool = False

    def picture(self, renderer: Renderer, class_name: str, scene: Rng, here: Rng) -> Picture:
        """Render an object of this class.

        `scene` draws what worlds share: the object, the position of the view within a range, the
        background's pattern. `here` draws what is specific to this world.
        """
        parts = make_mesh(class_name, scene, self.facing)
        camera = Camera.random(scene, self.azimuth, self.elevation)
        background = Background.random(scene, self.backgrounds, self.contrast)
        light = self.lighting.jittered(here)
        if self.both_sides and here.random() < 0.5:
            camera = replace(camera, azimuth=-camera.azimuth)
        cover = things_in_front(renderer.size, self.cover, here) if self.cover else None
        pixels = renderer.render(parts, camera, light, background, scene, self.fog, cover)
        return Picture(pixels, camera.azimuth, camera.elevation)


def things_in_front(size: int, share: float, rng: Rng) -> Floats:
    """Leaves and posts that occlude this share of an image: (size, size, 4), with opacity."""
    at = (np.arange(size, dtype=np.float32) + 0.5) / size
    x, y = np.meshgrid(at, at)
    cover = np.zeros((size, size, 4), np.float32)
    while cover[..., 3].mean() < share:
        angle, (cx, cy) = rng.uniform(0, np.pi), rng.uniform(0, 1, 2)
        along = (x - cx) * np.cos(angle) + (y - cy) * np.sin(angle)
        across = (y - cy) * np.cos(angle) - (x - cx) * np.sin(angle)
        if rng.random() < 0.3:
            inside = np.abs(across) < rng.uniform(0.015, 0.04)
        else:
            inside = np.hypot(along / rng.uniform(0.06, 0.16), across / rng.uniform(0.03, 0.09)) < 1
        first, second = rng.uniform(0.1, 0.9, (2, 3))
        pattern = tile(str(rng.choice(KINDS)), first, second, rng)
        rows, columns = np.nonzero(inside)
        cover[rows, columns, :3] = pattern[rows % len(pattern), columns % len(pattern)]
        cover[rows, columns, 3] = 1
    return cover


def _beside(low: float, high: float) -> World:
    return World(azimuth=(low, high), both_sides=True)


def _facing(
    low: float, high: float, elevation: tuple[float, float] = (10, 35), light: str = "source"
) -> World:
    return World(LIGHTINGS[light], (low, high), elevation, both_sides=True, facing=True)


_CALM, _BUSY = ("plain", "blobs", "noise"), ("checks", "speckles", "stripes", "foliage")
_TAME = (0.9, 1.1)

WORLDS: dict[str, dict[str, World]] = {
    "lighting": {name: World(light) for name, light in LIGHTINGS.items()},
    "viewpoint": {
        "source": World(),
        "side-1": _beside(45, 60),
        "side-2": _beside(65, 80),
        "side-3": _beside(85, 100),
        "rear-1": _beside(110, 130),
        "rear-2": _beside(135, 155),
        "rear-3": _beside(160, 180),
        "top-1": World(elevation=(42, 52)),
        "top-2": World(elevation=(55, 66)),
        "top-3": World(elevation=(70, 82)),
    },
    # The azimuth is the target. Each kind's range overlaps with the source's and grows from it.
    "pose": {
        "source": _facing(0, 60),
        "side-1": _facing(15, 75),
        "side-2": _facing(30, 90),
        "side-3": _facing(45, 105),
        "top-1": _facing(0, 60, (30, 50)),
        "top-2": _facing(0, 60, (40, 60)),
        "top-3": _facing(0, 60, (50, 70)),
        **{f"dim-{i}": _facing(0, 60, light=f"dim-{i}") for i in (1, 2, 3)},
    },
    "environment": {
        "source": World(backgrounds=_CALM, contrast=_TAME),
        "clutter-1": World(backgrounds=_BUSY, contrast=(0.6, 0.8)),
        "clutter-2": World(backgrounds=_BUSY, contrast=(0.3, 0.5)),
        "clutter-3": World(backgrounds=_BUSY, contrast=(0.0, 0.15)),
        "fog-1": World(backgrounds=_CALM, contrast=_TAME, fog=1.0),
        "fog-2": World(backgrounds=_CALM, contrast=_TAME, fog=1.8),
        "fog-3": World(backgrounds=_CALM, contrast=_TAME, fog=2.6),
        "covered-1": World(backgrounds=_CALM, contrast=_TAME, cover=0.15),
        "covered-2": World(backgrounds=_CALM, contrast=_TAME, cover=0.3),
        "covered-3": World(backgrounds=_CALM, contrast=_TAME, cover=0.45),
        "noise-1": World(Lighting(noise=0.02), backgrounds=_CALM, contrast=_TAME),
        "noise-2": World(Lighting(noise=0.05), backgrounds=_CALM, contrast=_TAME),
        "noise-3": World(Lighting(noise=0.1), backgrounds=_CALM, contrast=_TAME),
    },
}
