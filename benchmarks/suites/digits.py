"""Digits in Debian's fonts: to handwritten ones (scikit-learn's), and to fonts of handwriting."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from benchmarks.suites.case import Case, Pictures
from benchmarks.suites.fashion import coloured, read
from benchmarks.suites.fetch import UPRIGHT, WRITTEN, debian

SIDE = 28
CLASSES = tuple("0123456789")
TARGETS = ("handwritten", "script", "worn")
TRAIN, HELD, TARGET, LABELLED = 2000, 300, 300, 1000


def names() -> list[str]:
    """From printed digits to each target."""
    return [f"digits/{target}" for target in TARGETS]


def load(name: str, seed: int) -> Case:
    """The case of this name; the seed draws the target, one source for all."""
    to = name.split("/")[1]
    pictures, labels = printed(0, TRAIN + HELD)
    if to == "handwritten":
        asked, answers = handwritten(seed)
    else:
        asked, answers = printed(seed + 500, TARGET + LABELLED, WRITTEN, worn=to == "worn")
    return Case(
        name, "digits", CLASSES, _of(pictures[:TRAIN], labels[:TRAIN]),
        _of(pictures[TRAIN:], labels[TRAIN:]), _of(asked[:TARGET], answers[:TARGET]),
        _of(asked[TARGET:][:LABELLED], answers[TARGET:][:LABELLED]),
        coloured(read("t10k")[0][:200]), flip=False,
    )  # fmt: skip


def counts() -> Iterator[tuple[str, str, int]]:
    """Domain, package and number of pictures."""
    for package in (*UPRIGHT, *WRITTEN):
        yield f"digits/{package.removeprefix('fonts-')}, fonts", package, len(_fonts((package,)))
    yield "digits/handwritten", "scikit-learn", len(handwritten(0)[1])


def handwritten(seed: int) -> tuple[Any, Any]:
    """scikit-learn's digits, (N, 28, 28) and (N,)."""
    from sklearn.datasets import load_digits

    found: Any = load_digits()
    small = [Image.fromarray((x / 16 * 255).astype(np.uint8)) for x in found.images]
    inner, margin = 22, 3
    found_at = [np.asarray(x.resize((inner, inner), Image.Resampling.BILINEAR)) for x in small]
    big = np.pad(np.stack(found_at), ((0, 0), (margin, margin), (margin, margin)))
    order = np.random.default_rng(seed).permutation(len(big))
    return big[order], found.target[order].astype(np.int64)


def printed(
    seed: int, count: int, packages: tuple[str, ...] = UPRIGHT, worn: bool = False
) -> tuple[Any, Any]:
    """White digits on black in the fonts of some packages; `worn`: grey, small and with noise."""
    rng, fonts, found = np.random.default_rng(seed), _fonts(packages), []
    labels = rng.integers(0, 10, count)
    for label in labels:
        size = int(rng.integers(15, 21) if worn else rng.integers(20, 29))
        font = ImageFont.truetype(fonts[int(rng.integers(len(fonts)))], size)
        picture = Image.new("L", (SIDE, SIDE))
        place = tuple(SIDE / 2 + rng.uniform(-2, 2, 2))
        ImageDraw.Draw(picture).text(place, str(label), fill=255, font=font, anchor="mm")
        turned = picture.rotate(float(rng.uniform(-12, 12)), Image.Resampling.BILINEAR)
        found.append(np.asarray(turned))
    drawn = np.stack(found)
    if worn:
        drawn = (60 + drawn * 0.4 + rng.normal(0, 25, drawn.shape)).clip(0, 255).astype(np.uint8)
    return drawn, labels


@cache
def _fonts(packages: tuple[str, ...]) -> list[str]:
    roots = [debian(p) / "usr/share/fonts" for p in packages]
    found = sorted(str(f) for r in roots for f in r.rglob("*.[to]tf"))
    return [f for f in found if _has_digits(f)]


def _has_digits(path: str) -> bool:
    """Symbol fonts draw one box for every digit."""
    drawn = {bytes(ImageFont.truetype(path, 20).getmask(c)) for c in CLASSES}
    return len(drawn) == len(CLASSES)


def _of(grey: Any, labels: Any) -> Pictures:
    return Pictures(coloured(grey), torch.from_numpy(labels))
