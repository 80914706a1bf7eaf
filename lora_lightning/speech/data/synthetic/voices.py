"""The speakers of the spoken data: source speakers to train on, target speakers to adapt to.

Source speakers have English accents. Target speakers read English by the pronunciation rules of
another language, a stronger accent than people have. No timbre (eSpeak's variant) is used by
both.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lora_lightning.errors import ConfigError
from lora_lightning.registry import unknown
from lora_lightning.speech.data.synthetic.espeak import Voice

_ENGLISH = (
    "en", "en-us", "en-us-nyc", "en-gb-scotland", "en-gb-x-rp", "en-gb-x-gbclan",
    "en-gb-x-gbcwmd", "en-029",
)  # fmt: skip
_TIMBRES = (
    "m1", "f1", "m2", "f2", "m3", "f3", "m4", "f4", "m5", "f5", "m6", "m7", "m8", "", "Alex",
    "Andy", "Annie", "david", "ed", "edward", "gustave", "ian", "john", "linda", "max", "mike2",
    "paul", "quincy", "rob", "steph", "travis", "victor", "zac", "adam", "belinda", "benjamin",
    "caleb", "shelby", "Gene", "Jacky", "Lee",
)  # fmt: skip

# 8 accents and 41 timbres have no common divisor: no two voices share both.
MOST_SOURCES = len(_ENGLISH) * len(_TIMBRES)

TARGETS = {
    "portuguese": Voice("pt", "antonio"),
    "danish": Voice("da", "Mr serious"),
    "german": Voice("de", "kaukovalta"),
    "dutch": Voice("nl", "grandma"),
    "italian": Voice("it", "aunty"),
    "hungarian": Voice("hu", "robosoft8"),
    "polish": Voice("pl", "norbert"),
    "czech": Voice("cs", "whisperf"),
}


def source_voices(count: int) -> dict[str, Voice]:
    """The first `count` source speakers, by name.

    Raises:
        ConfigError: more than there are, or none.
    """
    if not 1 <= count <= MOST_SOURCES:
        raise ConfigError(f"there are 1 to {MOST_SOURCES} source voices, got {count}")
    return {f"source-{index:03d}": _source_voice(index) for index in range(count)}


def _source_voice(index: int) -> Voice:
    rng = np.random.default_rng(index)
    return Voice(
        language=_ENGLISH[index % len(_ENGLISH)],
        variant=_TIMBRES[index % len(_TIMBRES)],
        pitch=int(rng.integers(20, 80)),
        pitch_range=int(rng.integers(20, 80)),
        rate=int(rng.integers(120, 180)),
    )


def target_voices(names: Sequence[str] | None = None) -> dict[str, Voice]:
    """Target speakers by name; all by default.

    Raises:
        ConfigError: there is no such speaker; names the nearest.
    """
    for name in names or ():
        if name not in TARGETS:
            raise ConfigError(unknown("key", name, TARGETS).replace("key", "target voice"))
    return {name: TARGETS[name] for name in names} if names else dict(TARGETS)
