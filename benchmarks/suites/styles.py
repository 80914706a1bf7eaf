"""Styles of picture: the same motifs by six designers, from npm packages.

A class is a subgroup of Unicode's emoji, as `emoji-datasource` names it; a motif is a code point.
A motif is on one side of the split, in every style: what the source model saw is never asked.
"""

from __future__ import annotations

import io
import json
import re
import zlib
from collections.abc import Iterator
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from benchmarks.suites.case import Case, Pictures
from benchmarks.suites.fetch import folder, member, npm

SIDE = 64
STYLES = {
    "openmoji": "@iconify-json/openmoji",
    "flat": "@iconify-json/fluent-emoji-flat",
    "line": "@iconify-json/fluent-emoji-high-contrast",
    "fx": "@iconify-json/fxemoji",
    "one": "@iconify-json/emojione",
    "3d": "@lobehub/fluent-emoji-3d",
}
CLASSES = (
    "animal-mammal", "transport-ground", "clothing", "sky & weather", "place-building",
    "food-fruit", "tool", "geometric", "heart", "face-concerned",
)  # fmt: skip
OTHERS = ("musical-instrument", "game", "mail", "office", "plant-flower", "award-medal", "sound")


def names() -> list[str]:
    """Every style to every other one."""
    return [f"styles/{s}-{t}" for s in STYLES for t in STYLES if s != t]


def load(name: str, seed: int) -> Case:
    """The case of this name, its motifs split by the seed."""
    source, target = name.split("/")[1].split("-")
    train, held = _split(source, seed)
    labelled, asked = _split(target, seed)
    strangers = torch.from_numpy(drawn(target)[1][drawn(target)[2] >= len(CLASSES)])
    return Case(name, f"styles-{source}-{seed}", CLASSES, train, held, asked, labelled, strangers)


def counts() -> Iterator[tuple[str, str, int]]:
    """Domain, package and number of pictures."""
    for style, package in STYLES.items():
        yield f"styles/{style}", package, int((drawn(style)[2] < len(CLASSES)).sum())


def _split(style: str, seed: int) -> tuple[Pictures, Pictures]:
    """Learnt motifs, and asked ones."""
    codes, pictures, labels = drawn(style)
    known = labels < len(CLASSES)
    asked = np.array([zlib.crc32(f"{seed} {code}".encode()) % 2 == 0 for code in codes])

    def of(rows: NDArray[np.bool_]) -> Pictures:
        return Pictures(torch.from_numpy(pictures[rows]), torch.from_numpy(labels[rows]))

    return of(known & ~asked), of(known & asked)


@cache
def drawn(style: str) -> tuple[list[str], NDArray[np.uint8], NDArray[np.int64]]:
    """Code points, pictures (N, 3, S, S) and classes (N,); `OTHERS` come after `CLASSES`."""
    path = folder() / f"styles-{style}-{SIDE}.npz"
    if not path.exists():
        wanted = {**dict(zip(CLASSES, range(99), strict=False)), **dict.fromkeys(OTHERS, 99)}
        kinds = {c: wanted[k] for c, k in subgroups().items() if k in wanted}
        found = {c: _pixels(png) for c, png in _pngs(style) if c in kinds}
        codes = sorted(found)
        np.savez_compressed(
            path, codes=codes, pictures=np.stack([found[c] for c in codes]),
            labels=np.array([kinds[c] for c in codes]),
        )  # fmt: skip
    kept = np.load(path)
    return kept["codes"].tolist(), kept["pictures"], kept["labels"]


@cache
def _datasource() -> list[dict[str, str]]:
    found: list[dict[str, str]] = json.loads(member("emoji-datasource", "emoji.json"))
    return found


@cache
def subgroups() -> dict[str, str]:
    """Code point → subgroup."""
    return {_code(e["unified"]): e["subcategory"] for e in _datasource()}


def _pngs(style: str) -> Iterator[tuple[str, bytes]]:
    """Code points, and pictures in some format that Pillow reads."""
    package = STYLES[style]
    if style == "3d":
        with npm(package) as archive:
            for entry in archive.getmembers():
                file = archive.extractfile(entry) if entry.name.endswith(".webp") else None
                if file is not None:
                    yield _code(entry.name.rpartition("/")[2].partition(".")[0]), file.read()
        return
    import resvg_py

    icons = json.loads(member(package, "icons.json"))
    kinds, named = subgroups(), _codes_of_names()
    chars = json.loads(member(package, "chars.json"))  # empty in packages that know names alone
    for code, name in chars.items() or ((named.get(_key(n), ""), n) for n in icons["icons"]):
        icon = icons["icons"].get(name)
        if icon is None or kinds.get(_code(code)) not in (*CLASSES, *OTHERS):
            continue
        w, h = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
        # Line drawings are in the colour of the text.
        body = icon["body"].replace("currentColor", "#000")
        svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {w} {h}">{body}</svg>'
        yield _code(code), bytes(resvg_py.svg_to_bytes(svg_string=svg, width=2 * SIDE))


def _codes_of_names() -> dict[str, str]:
    """Names without spaces and signs → code point, of packages that know no code points."""
    found = {}
    for package in ("@iconify-json/openmoji", "@iconify-json/fluent-emoji-flat"):
        for code, name in json.loads(member(package, "chars.json")).items():
            found.setdefault(_key(name), _code(code))
    for e in _datasource():
        for name in (e["name"] or "", *e["short_names"]):
            found.setdefault(_key(name), _code(e["unified"]))
    return found


def _pixels(png: bytes) -> NDArray[np.uint8]:
    """(3, S, S), on white."""
    picture = Image.open(io.BytesIO(png)).convert("RGBA").resize((SIDE, SIDE), Image.Resampling.BOX)
    white = Image.new("RGBA", picture.size, "white")
    return np.asarray(Image.alpha_composite(white, picture).convert("RGB")).transpose(2, 0, 1)


def _code(unified: str) -> str:
    return "-".join(part for part in unified.lower().split("-") if part != "fe0f")


def _key(name: str) -> str:
    return re.sub("[^a-z0-9]", "", name.lower())


def strangers(count: int) -> Tensor:
    """Pictures of `OTHERS`, for suites that have no pictures of no class."""
    _, pictures, labels = drawn("fx")
    return torch.from_numpy(pictures[labels >= len(CLASSES)][:count])
