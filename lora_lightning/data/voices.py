"""The speakers of the spoken data: those that a source model hears, and those that it never does.

Source speakers have the accents of English and of some other languages. Target speakers read
English with the letters and sounds of languages that no source speaker has. No timbre (eSpeak's
variant) is on both sides either.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lora_lightning.config import unknown_key
from lora_lightning.data.espeak import Voice
from lora_lightning.errors import ConfigError

_ENGLISH = (
    "en", "en-us", "en-us-nyc", "en-gb-scotland", "en-gb-x-rp", "en-gb-x-gbclan",
    "en-gb-x-gbcwmd", "en-029",
)  # fmt: skip
_FOREIGN = ("de", "fr-be", "es", "sk", "nb", "et", "lv", "lt", "ca", "sl", "sq", "af")
_TIMBRES = (
    "m1", "f1", "m2", "f2", "m3", "f3", "m4", "f4", "m5", "f5", "m6", "m7", "m8", "", "Alex",
    "Andy", "Annie", "david", "ed", "edward", "gustave", "ian", "john", "linda", "max", "mike2",
    "paul", "quincy", "rob", "steph", "travis", "victor", "zac", "adam", "belinda", "benjamin",
    "caleb", "shelby", "Gene", "Jacky", "Lee",
)  # fmt: skip

TARGETS = {
    "portuguese": Voice("pt", "antonio"),
    "danish": Voice("da", "Mr serious"),
    "dutch": Voice("nl", "grandma"),
    "italian": Voice("it", "aunty"),
    "hungarian": Voice("hu", "robosoft8"),
    "polish": Voice("pl", "norbert"),
    "czech": Voice("cs", "whisperf"),
    "finnish": Voice("fi", "klatt2"),
    "romanian": Voice("ro", "pablo"),
    "swedish": Voice("sv", "announcer"),
}


def source_voices(count: int) -> dict[str, Voice]:
    """The first `count` source speakers, by name; two of seven have a foreign accent.

    Raises:
        ConfigError: more than there are, or none.
    """
    if not 1 <= count <= 200:
        raise ConfigError(f"there are 1 to 200 source voices, got {count}")
    return {f"source-{index:03d}": _source_voice(index) for index in range(count)}


def _source_voice(index: int) -> Voice:
    # 41 timbres, 8 and 12 accents: no two of the voices have both in common.
    foreign = index % 7 in (3, 6)
    accents = _FOREIGN if foreign else _ENGLISH
    rng = np.random.default_rng(index)
    return Voice(
        language=accents[(index // 7 * 2 + (index % 7 == 6) if foreign else index) % len(accents)],
        variant=_TIMBRES[index % len(_TIMBRES)],
        pitch=int(rng.integers(25, 75)),
        pitch_range=int(rng.integers(30, 70)),
        rate=int(rng.integers(140, 200)),
    )


def target_voices(names: Sequence[str] | None = None) -> dict[str, Voice]:
    """Target speakers by name, all where none are named.

    Raises:
        ConfigError: there is no such speaker; names the nearest.
    """
    for name in names or ():
        if name not in TARGETS:
            raise ConfigError(unknown_key(name, TARGETS).replace("key", "target voice"))
    return {name: TARGETS[name] for name in names} if names else dict(TARGETS)
