"""Our renderings: light, viewpoint and environment."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

from benchmarks.do_no_harm import Data
from benchmarks.suites.case import Case, Pictures
from benchmarks.suites.styles import strangers
from lora_lightning.vision.data.synthetic.worlds import WORLDS

KINDS = ("lighting", "viewpoint", "environment")
SEVERITIES = ("1", "3")
LEARN, ADAPT, TEST = 40, 20, 10  # pictures of a class


def names() -> list[str]:
    """The mildest and the most severe of each kind of shift."""
    return [f"rendered/{k}:{w}" for k in KINDS for w in WORLDS[k] if w.endswith(SEVERITIES)]


def load(name: str, seed: int) -> Case:
    """The case of this name; the seed draws objects and scenes."""
    kind, world = name.split("/")[1].split(":")
    data = _data(kind, seed)
    crop = data.domains.size
    margin = (data.side - crop) // 2

    def of(found: tuple[Pictures, ...] | object) -> Pictures:
        pictures, labels = found  # type: ignore[misc]
        return Pictures(pictures[:, :, margin : margin + crop, margin : margin + crop], labels)

    return Case(
        name, f"rendered-{'environment' if kind == 'environment' else 'plain'}-{seed}",
        tuple(data.domains.classes), of(data.get("source", "train")),
        of(data.target("source")), of(data.target(world)), of(data.get(world, "test")),
        strangers(60),
    )  # fmt: skip


def counts() -> Iterator[tuple[str, str, int]]:
    """Domain, where it comes from, and number of pictures."""
    for kind in KINDS:
        worlds = 1 + len([w for w in WORLDS[kind] if w.endswith(SEVERITIES)])
        yield f"rendered/{kind}", "drawn here", 10 * (worlds * (ADAPT + TEST) + LEARN)


@lru_cache(2)
def _data(kind: str, seed: int) -> Data:
    worlds = [w for w in WORLDS[kind] if w.endswith(SEVERITIES)]
    return Data(seed, None, kind, worlds, learn=LEARN, adapt=ADAPT, test=TEST)
