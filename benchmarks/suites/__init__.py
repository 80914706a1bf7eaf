"""Suites of shifts between pictures, fetched or drawn into the user's cache.

    python -m benchmarks.suites  # the packages, their licences, and counts

`names()` lists the cases, `load(name, seed)` gives one, `case.under` puts it under a condition, and
`networks.source_model` trains its source model once.
"""

from __future__ import annotations

from benchmarks.suites import digits, fashion, rendered, styles
from benchmarks.suites.case import Case
from benchmarks.suites.corruptions import CORRUPTIONS

SUITES = {"styles": styles, "fashion": fashion, "digits": digits, "rendered": rendered}

# What choices are made by, and what they are judged by.
DEVELOPMENT, FINAL = 0, 100  # seeds
SOURCES = {DEVELOPMENT: ("openmoji", "flat", "fx"), FINAL: ("line", "one", "3d")}  # of styles


def names(*suites: str) -> list[str]:
    """The cases of these suites; of all, without any."""
    return [name for suite in suites or SUITES for name in SUITES[suite].names()]


def load(name: str, seed: int = 0) -> Case:
    """A case by its name."""
    found: Case = SUITES[name.partition("/")[0]].load(name, seed)
    return found


def part(seed: int, *suites: str) -> list[str]:
    """The cases of `names` that belong to `DEVELOPMENT`, or to `FINAL`; no case is in both."""
    kinds = list(CORRUPTIONS)[seed == FINAL :: 2]
    first = {"styles": SOURCES[seed], "fashion": kinds}

    def belongs(name: str) -> bool:
        suite, what = name.split("/")
        return suite not in first or what.split("-")[0] in first[suite]

    return [name for name in names(*suites) if belongs(name)]
