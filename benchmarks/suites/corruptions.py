"""Corruptions of pictures at three severities, after Hendrycks & Dietterich 2019, arXiv:1903.12261.

Pictures x (N, S, S) of floats from 0 to 1, a strength and a generator become such pictures.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

Grey = NDArray[np.float64]


def _fog(x: Grey, part: float, rng: Any) -> Grey:
    cloud = ndimage.gaussian_filter(rng.random(x.shape), (0, 5, 5))
    low, high = (f(cloud, axis=(1, 2), keepdims=True) for f in (np.min, np.max))
    return (1 - part) * x + part * (cloud - low) / (high - low)


def _pixelate(x: Grey, part: float, rng: Any) -> Grey:
    small = ndimage.zoom(x, (1, part, part), order=1)
    return ndimage.zoom(small, (1, *(x.shape[1] / small.shape[1],) * 2), order=0)


def _jpeg(x: Grey, quality: float, rng: Any) -> Grey:
    found = []
    for picture in (x * 255).astype(np.uint8):
        file = io.BytesIO()
        Image.fromarray(picture).save(file, "jpeg", quality=int(quality))
        found.append(np.asarray(Image.open(file)) / 255)
    return np.stack(found)


def _affine(x: Grey, matrix: list[list[float]]) -> Grey:
    """Rows and columns (r, c) are taken from `matrix` · (r, c), about the centre."""
    whole, centre = np.eye(3), np.array([0, *((x.shape[1] - 1) / 2,) * 2])
    whole[1:, 1:] = matrix
    return ndimage.affine_transform(x, whole, centre - whole @ centre, order=1)


def _covered(x: Grey, side: float, rng: Any) -> Grey:
    found = x.copy()
    for picture, (r, c) in zip(found, rng.integers(0, x.shape[1] - side, (len(x), 2)), strict=True):
        picture[r : r + int(side), c : c + int(side)] = 0.5
    return found


def _edges(x: Grey, part: float, rng: Any) -> Grey:
    drawing = ndimage.gaussian_gradient_magnitude(x, 0.7, axes=(1, 2))
    return (1 - part) * x + part * drawing / drawing.max()


def _impulse(x: Grey, part: float, rng: Any) -> Grey:
    return np.where(rng.random(x.shape) < part, rng.random(x.shape) < 0.5, x)


def _mixed(x: Grey, part: float, other: Any) -> Grey:
    return (1 - part) * x + part * other


Strengths = tuple[float, float, float]
CORRUPTIONS: dict[str, tuple[Strengths, Callable[[Grey, float, Any], Grey]]] = {
    "gaussian": ((0.15, 0.25, 0.4), lambda x, s, rng: x + rng.normal(0, s, x.shape)),
    "shot": ((20, 8, 3), lambda x, s, rng: rng.poisson(x * s) / s),
    "impulse": ((0.08, 0.16, 0.3), _impulse),
    "defocus": ((1.0, 1.6, 2.4), lambda x, s, rng: ndimage.gaussian_filter(x, (0, s, s))),
    "motion": ((5, 8, 12), lambda x, s, rng: ndimage.uniform_filter1d(x, int(s), axis=2)),
    "brightness": ((0.3, 0.45, 0.6), lambda x, s, rng: x + s),
    "contrast": ((0.4, 0.25, 0.15), lambda x, s, rng: 0.5 + (x - 0.5) * s),
    "dark": ((0.4, 0.25, 0.15), lambda x, s, rng: x * s),
    "negative": ((0.35, 0.65, 1.0), lambda x, s, rng: _mixed(x, s, 1 - x)),
    "fog": ((0.4, 0.6, 0.75), _fog),
    "pixelate": ((0.5, 0.36, 0.25), _pixelate),
    "jpeg": ((20, 8, 3), _jpeg),
    "rotated": (
        (0.26, 0.52, 0.79),
        lambda x, s, rng: _affine(x, [[np.cos(s), np.sin(s)], [-np.sin(s), np.cos(s)]]),
    ),
    "sheared": ((0.2, 0.4, 0.6), lambda x, s, rng: _affine(x, [[1, 0], [s, 1]])),
    "smaller": ((0.8, 0.65, 0.5), lambda x, s, rng: _affine(x, [[1 / s, 0], [0, 1 / s]])),
    "covered": ((9, 13, 17), _covered),
    "edges": ((0.4, 0.7, 1.0), _edges),
    "texture": (
        (0.25, 0.4, 0.6),
        lambda x, s, rng: _mixed(x, s, np.indices(x.shape[1:]).sum(axis=0) // 2 % 2),
    ),
}
SEVERITIES = (1, 2, 3)


def corrupted(pictures: NDArray[np.uint8], name: str, severity: int, seed: int) -> Any:
    """Pictures (N, S, S) as bytes, corrupted."""
    rng = np.random.default_rng([seed, severity, *name.encode()])
    strengths, corrupt = CORRUPTIONS[name]
    found = corrupt(pictures / 255.0, strengths[severity - 1], rng)
    return (found.clip(0, 1) * 255).round().astype(np.uint8)
