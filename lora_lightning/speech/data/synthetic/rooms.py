"""Impulse responses of rooms, by image sources (Allen and Berkley, 1979; pyroomacoustics)."""

from __future__ import annotations

import functools
import zlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lora_lightning.errors import ConfigError, MissingDependencyError

Size = tuple[float, ...]


@functools.lru_cache(maxsize=256)
def impulse_response(
    size: Size, rt60: float, distance: float, sample_rate: int, seed: int, place: int
) -> tuple[Tensor, int]:
    """The impulse response (samples,) of one placement, and the sample of its direct path.

    Args:
        size: Length, width and height in metres.
        rt60: Seconds in which sound decays by 60 dB.
        distance: From the source to the microphone, in metres.
        sample_rate: In hertz.
        seed: Determines the two positions, together with `place`.
        place: Index of the placement.

    Raises:
        ConfigError: the room cannot decay that fast, or the distance does not fit into it.
        MissingDependencyError: pyroomacoustics is not installed.
    """
    source, microphone = _placement(size, distance, seed, place)
    target = _sabine_target(size, rt60, sample_rate)
    samples = _simulate(size, target, sample_rate, source, microphone)
    pra = _pyroomacoustics()
    delay = np.linalg.norm(source - microphone) / pra.constants.get("c") * sample_rate
    # pyroomacoustics centres each fractional delay in a filter of this length.
    direct = round(float(delay)) + pra.constants.get("frac_delay_length") // 2
    return torch.from_numpy(samples.astype(np.float32)), direct


@functools.lru_cache(maxsize=64)
def _sabine_target(size: Size, rt60: float, sample_rate: int) -> float:
    """The reverberation time to pass to Sabine's formula, so that the room decays in `rt60`.

    The formula assumes a diffuse field. A flat room decays more slowly, so it is measured.
    """
    pra, target = _pyroomacoustics(), rt60
    source, microphone = np.array(size) * (0.3, 0.35, 0.45), np.array(size) * (0.6, 0.7, 0.55)
    for _ in range(3):
        samples = _simulate(size, target, sample_rate, source, microphone)
        target *= rt60 / float(pra.experimental.measure_rt60(samples, sample_rate, decay_db=30))
    return target


def _simulate(size: Size, target: float, sample_rate: int, source: Any, microphone: Any) -> Any:
    pra = _pyroomacoustics()
    try:
        absorption, order = pra.inverse_sabine(target, size)
    except ValueError as error:
        raise ConfigError(
            f"Room: a room of {size} m cannot decay that fast, even with walls that absorb all; "
            "give a longer rt60 or a smaller room"
        ) from error
    room = pra.ShoeBox(size, fs=sample_rate, materials=pra.Material(absorption), max_order=order)
    room.add_source(source)
    room.add_microphone(microphone)
    room.compute_rir()
    return room.rir[0][0]


def _placement(size: Size, distance: float, seed: int, place: int) -> tuple[Any, Any]:
    """Source and microphone, both at least a tenth of the room from its walls."""
    rng = np.random.default_rng(zlib.crc32(f"{size}/{distance}/{seed}/{place}".encode()))
    low, high = 0.1 * np.array(size), 0.9 * np.array(size)
    for _ in range(1000):
        microphone, way = rng.uniform(low, high), rng.normal(size=3) * (1, 1, 0.2)
        source = microphone + distance * way / np.linalg.norm(way)
        if (source > low).all() and (source < high).all():
            return source, microphone
    raise ConfigError(
        f"Room: distance_m={distance} does not fit into a room of {size} m; bring the microphone "
        "nearer"
    )


def _pyroomacoustics() -> Any:
    try:
        import pyroomacoustics
    except ImportError as error:
        raise MissingDependencyError(
            "rooms are simulated by pyroomacoustics, which is not installed: "
            'pip install "lora-lightning[demo]"'
        ) from error
    return pyroomacoustics
