"""Primitive solids: stacks of rings that grow into triangle meshes.

Lengths are arbitrary, z points up, the ground is z = 0 and the viewer stands at -y.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    import trimesh

Floats = NDArray[np.floating[Any]]
Rng = np.random.Generator
Solid = tuple[Floats, int]  # a (k, n, 3) stack of rings, and the slot of its material


def dense(points: ArrayLike, step: float) -> Floats:
    """Subdivide a polyline: light is computed at vertices, so there must be enough."""
    path = np.asarray(points, float)
    counts = np.maximum(1, np.ceil(np.linalg.norm(np.diff(path, axis=0), axis=1) / step))
    at = np.concatenate([i + np.arange(n) / n for i, n in enumerate(counts)] + [[len(counts)]])
    return np.stack([np.interp(at, np.arange(len(path)), column) for column in path.T], 1)


def ring(centre: ArrayLike, rx: float, ry: float, n: int = 28, power: float = 2.0) -> Floats:
    """Return a horizontal ring; a higher `power` turns the ellipse into a rounded box."""
    angle = 2 * np.pi * np.arange(n) / n
    unit = np.stack([np.cos(angle), np.sin(angle), 0 * angle], 1)
    unit *= ((np.abs(unit) ** power).sum(1, keepdims=True)) ** (-1 / power)
    return np.asarray(unit * (rx, ry, 0) + np.asarray(centre))


def lathe(profile: ArrayLike, n: int = 28, power: float = 2.0) -> Floats:
    """Turn a profile of (radius, height) around the z axis."""
    return np.stack([ring((0, 0, z), r, r, n, power) for r, z in dense(profile, 0.15)])


def ball(centre: ArrayLike, radii: ArrayLike) -> Floats:
    """Return an ellipsoid."""
    angle = np.linspace(-np.pi / 2, np.pi / 2, 9)
    unit = np.stack([ring((0, 0, np.sin(a)), np.cos(a), np.cos(a), 16) for a in angle])
    return np.asarray(unit * np.asarray(radii) + np.asarray(centre))


def tube(path: ArrayLike, radii: float | Sequence[float], n: int = 10) -> Floats:
    """Sweep a circle along a path; `radii` are spread evenly over its points."""
    points = dense(path, 0.2)
    tangent = np.gradient(points, axis=0)
    side = np.cross(tangent, np.eye(3)[np.ptp(points, axis=0).argmin()])
    side /= np.linalg.norm(side, axis=1, keepdims=True)
    up = np.cross(side, tangent) / np.linalg.norm(tangent, axis=1, keepdims=True)
    given = np.atleast_1d(np.asarray(radii, float))
    radius = np.interp(np.linspace(0, 1, len(points)), np.linspace(0, 1, len(given)), given)
    circle = ring((0, 0, 0), 1, 1, n)[None, :, :, None]
    offset = circle[:, :, 0] * side[:, None] + circle[:, :, 1] * up[:, None]
    return np.asarray(points[:, None] + radius[:, None, None] * offset)


def block(low: ArrayLike, high: ArrayLike, taper: tuple[float, float] = (1, 1)) -> Floats:
    """Return a box between two corners, its top shrunk by `taper` in x and y."""
    a, b = np.asarray(low, float), np.asarray(high, float)
    square = dense([(-0.5, -0.5), (0.5, -0.5), (0.5, 0.5), (-0.5, 0.5), (-0.5, -0.5)], 0.26)[:-1]
    levels = np.linspace(0, 1, max(2, int((b[2] - a[2]) / 0.2)))
    rings = np.zeros((len(levels), len(square), 3))
    shrink = 1 + (np.asarray(taper) - 1) * levels[:, None, None]
    rings[..., :2] = square * (b - a)[:2] * shrink + (a + b)[:2] / 2
    rings[..., 2] = (a[2] + (b - a)[2] * levels)[:, None]
    return rings


def turned(solids: Iterable[Solid], degrees: float) -> list[Solid]:
    """Turn solids about the z axis."""
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return [(rings @ np.array([[c, s, 0], [-s, c, 0], [0, 0, 1]]), slot) for rings, slot in solids]


def legs(rng: Rng, w: float, d: float, top: float, thick: float) -> list[Solid]:
    """Return four legs, straight or splayed, with or without stretchers."""
    splay, taper = rng.choice([1, rng.uniform(1, 1.25)]), thick * rng.uniform(0.5, 1)
    feet = [(-w, -d), (w, -d), (w, d), (-w, d)]
    solids: list[Solid] = [
        (tube([(x * splay, y * splay, 0), (x, y, top)], [taper, thick]), 1) for x, y in feet
    ]
    if rng.random() < 0.35:
        z = top * rng.uniform(0.2, 0.5)
        for (x, y), (x2, y2) in zip(feet, feet[1:] + feet[:1], strict=True):
            solids.append((tube([(x, y, z), (x2, y2, z)], thick * 0.7), 1))
    return solids


def skin(rings: Floats) -> trimesh.Trimesh:
    """Skin a stack of rings, close its ends with shrinking copies, and face outwards."""
    import trimesh

    ends, shrink = rings[[0, -1]], np.array([0, 0.35, 0.7])[:, None, None, None]
    middle = ends.mean(1, keepdims=True)
    caps = middle + (ends - middle) * shrink
    stack = np.concatenate([caps[:, 0], rings, caps[::-1, 1]])
    index = np.arange(stack.shape[0] * stack.shape[1]).reshape(stack.shape[:2])
    a, b = index[:-1], index[1:]
    quads = np.stack([a, np.roll(a, -1, 1), np.roll(b, -1, 1), b], -1).reshape(-1, 4)
    faces = np.concatenate([quads[:, [0, 1, 2]], quads[:, [0, 2, 3]]])
    points = stack.reshape(-1, 3)
    volume = np.linalg.det(points[faces]).sum()
    return trimesh.Trimesh(points, faces if volume > 0 else faces[:, ::-1], process=False)


def dot(a: Floats, b: Floats) -> Floats:
    """Return dot products along the last axis, several times as fast as a sum."""
    return np.asarray(np.einsum("...i,...i->...", a, b))
