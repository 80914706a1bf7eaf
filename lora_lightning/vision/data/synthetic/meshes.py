"""Procedural everyday objects: meshes with materials, and the face corners to render.

Shape alone determines the class: colours and patterns come from one palette for all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lora_lightning.errors import ConfigError, MissingDependencyError
from lora_lightning.vision.data.synthetic.shapes import MAKERS
from lora_lightning.vision.data.synthetic.solids import Floats, Rng, dot, skin, turned

if TYPE_CHECKING:
    import trimesh

CLASSES: tuple[str, ...] = tuple(sorted(MAKERS))
PATTERNS = ("plain", "plain", "stripes", "checks", "noise", "speckles")
CREASE = 0.8  # cosine of the angle between faces above which a surface looks smooth


@dataclass(frozen=True, eq=False)
class Material:
    """A pattern that mixes two RGB colours and repeats `scale` times over an object."""

    pattern: str
    colour: Floats
    accent: Floats
    scale: float
    smooth: bool


@dataclass(frozen=True, eq=False)
class Part:
    """One closed piece of an object and what it is made of."""

    mesh: trimesh.Trimesh
    material: Material


@dataclass(frozen=True)
class Front:
    """Orientation of an object with a front; degrees, counter-clockwise as seen from above."""

    turn: float  # rotation of the maker's output that makes its front face the viewer
    low: float  # least random rotation of a new instance
    high: float  # greatest
    either: bool = False  # draw the sign of the rotation as well

    def random(self, rng: Rng) -> float:
        """Draw the rotation of a new instance."""
        sign = rng.choice([-1, 1]) if self.either else 1
        return float(sign * rng.uniform(self.low, self.high))


# The classes whose front is recognisable from any side: the nose, the door, the seat. Each is as
# likely as its mirror image, so that a mirrored image shows the negated azimuth. The others have
# none: round ones look the same from all sides, a table from two, and some mugs have no handle.
FRONTS: dict[str, Front] = {
    "airplane": Front(90, 25, 70),
    "car": Front(90, -30, 30),
    "chair": Front(0, 0, 40, either=True),
    "house": Front(0, 10, 45, either=True),
}


def make_mesh(class_name: str, rng: Rng, facing: bool = False) -> list[Part]:
    """Return a new instance of a class: standing at the origin, fitted into a unit ball.

    Args:
        class_name: One of `CLASSES`.
        rng: Draws the instance.
        facing: Its front faces the viewer, for a class of `FRONTS`; by default it is rotated at
            random.

    Raises:
        ConfigError: there is no such class, or it has no front.
        MissingDependencyError: the extra `demo` is not installed.
    """
    if class_name not in MAKERS:
        raise ConfigError(f"unknown class {class_name!r}; the classes are {', '.join(CLASSES)}")
    if facing and class_name not in FRONTS:
        raise ConfigError(f"{class_name!r} has no front; those with one are {', '.join(FRONTS)}")
    try:
        import trimesh  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            'rendered objects need trimesh: pip install "lora-lightning[demo]"'
        ) from error
    solids = MAKERS[class_name](rng)
    if front := FRONTS.get(class_name):
        drawn = front.random(rng)  # in any case, so that later draws stay the same
        solids = turned(solids, front.turn if facing else drawn)
    palette = [_material(rng) for _ in range(3)]
    points = np.concatenate([rings.reshape(-1, 3) for rings, _ in solids])
    low, high = points.min(0), points.max(0)
    origin = ((low + high) / 2 * (1, 1, 0)) + (0, 0, low[2])
    size = np.linalg.norm(high - low) / 2
    return [Part(skin((rings - origin) / size), palette[slot]) for rings, slot in solids]


def _material(rng: Rng) -> Material:
    """Draw a material of any hue, independent of the class."""
    grey, bright = rng.dirichlet((1, 1, 1), 2), rng.uniform(0.35, 0.95, (2, 1))
    mixed = grey / grey.max(1, keepdims=True)
    colours = bright * (mixed + (1 - mixed) * rng.uniform(0, 1, (2, 1)))
    pattern, smooth = str(rng.choice(PATTERNS)), bool(rng.random() < 0.85)
    return Material(pattern, colours[0], colours[1], rng.uniform(0.5, 2), smooth)


def face_corners(parts: Sequence[Part]) -> tuple[Floats, Floats, Floats]:
    """Return the corners of all faces (n, 3, 3), their normals, and the faces' own normals.

    A corner has the mean normal of the faces that meet there, except at an edge.
    """
    counts = [0, *np.cumsum([len(part.mesh.vertices) for part in parts])]
    vertices = np.concatenate([np.asarray(part.mesh.vertices, np.float32) for part in parts])
    pairs = list(zip(parts, counts[:-1], strict=True))
    faces = np.concatenate([np.asarray(part.mesh.faces) + start for part, start in pairs])
    smooth = np.repeat([p.material.smooth for p in parts], [len(p.mesh.faces) for p in parts])
    corners = vertices[faces]
    flat = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    spread, index = np.repeat(flat, 3, 0), faces.ravel()
    total: Floats = np.stack([np.bincount(index, axis, len(vertices)) for axis in spread.T], 1)
    flat, mean = _unit(flat), _unit(total.astype(np.float32))[faces]
    curved = (dot(mean, flat[:, None]) > CREASE) & smooth[:, None]
    return corners, np.where(curved[..., None], mean, flat[:, None]), flat


def _unit(vectors: Floats) -> Floats:
    length = np.sqrt(dot(vectors, vectors))
    return np.asarray(vectors / np.maximum(length, 1e-12)[:, None])


def flat_texture(corners: Floats, flat: Floats) -> Floats:
    """Project textures from the front, the side or the top, whichever a face points to most."""
    planes = np.array([(1, 2), (0, 2), (0, 1)])[np.abs(flat).argmax(1)]
    return np.take_along_axis(corners, planes[:, None], 2).reshape(-1, 2)
