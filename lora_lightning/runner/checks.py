"""Checks of a run's settings beyond types, before anything is read or trained."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from operator import attrgetter
from typing import Any

from lora_lightning.errors import ConfigError
from lora_lightning.lora.values import SEEDS, check_count, check_number
from lora_lightning.registry import unknown
from lora_lightning.runner.sweep import rank_of


def check_plan(methods: Sequence[str], seeds: Sequence[int], known: Collection[str]) -> None:
    """Raise ConfigError for an unknown method, or invalid seeds."""
    for name in methods:
        if name not in known and (rank_of(name) is None or "lora" not in known):
            raise ConfigError(f"methods: {unknown('method', name, known)}")
    if not seeds or not methods:
        raise ConfigError("seeds and methods must not be empty")
    if min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise ConfigError(f"seeds must be different and 0 or more, got {list(seeds)}")
    check_number("seeds", max(seeds), SEEDS)


def at_least(config: Any, least: int, keys: Iterable[str]) -> None:
    """Raise ConfigError for the first of these dotted keys whose number is smaller."""
    for key in keys:
        check_count(key, attrgetter(key)(config), least)


def step_a_round(steps: int, keep: Sequence[float]) -> None:
    """Raise ConfigError where a training without labels has more rounds than steps."""
    if steps < len(keep):
        raise ConfigError(
            f"train.label_free.steps must be a step for each of the {len(keep)} rounds of keep, "
            f"at least; got {steps}"
        )
