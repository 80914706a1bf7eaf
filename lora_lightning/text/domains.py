"""The domains of a translation run: the user's own pairs, or generated ones."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lora_lightning.errors import ConfigError, DataError
from lora_lightning.registry import unknown
from lora_lightning.text.parallel import Pair, held_out, read_pairs
from lora_lightning.text.settings import Config, PairSettings
from lora_lightning.text.synthetic.register_words import SOURCE
from lora_lightning.text.synthetic.registers import DOMAINS, registers


@dataclass(frozen=True)
class Domain:
    """A domain of text."""

    name: str
    train: list[Pair]
    test: list[Pair]

    def drawn(self, count: int, seed: int) -> list[Pair]:
        """Pairs drawn for this seed; fewer draws are a part of more."""
        order = np.random.default_rng(seed).permutation(len(self.train))
        return [self.train[i] for i in order[:count]]


def read_domains(config: Config) -> list[Domain]:
    """The source domain, and the targets.

    Raises:
        ConfigError: the grammar has no such source.
        DataError: the pairs cannot be used.
    """
    pairs = _pairs(config.data)
    names, source = list(dict.fromkeys(p.domain for p in pairs)), config.data.source
    others = [n for n in names if n != source]
    wanted = others if config.data.target is None else list(config.data.target)
    for key, name, known in (("source", source, names), *(("target", w, others) for w in wanted)):
        if name not in known:
            raise DataError(f"data.{key}: {unknown('domain', name, known)}")
    if not wanted:
        raise DataError(f"there is no target domain beside {source!r}")
    found = []
    for name in (source, *wanted):
        own = [p for p in pairs if p.domain == name]
        sides = ([p for p in own if p.split == split] for split in ("train", "test"))
        found.append(Domain(name, *sides))
    for domain in found[1:]:
        if len(domain.train) < config.labelled:
            raise DataError(
                f"{domain.name} has {len(domain.train)} training pairs, but labelled="
                f"{config.labelled}"
            )
    return found


def _pairs(data: PairSettings) -> list[Pair]:
    if data.pairs is not None:
        return held_out(read_pairs(data.pairs), data.test, data.seed)
    if data.source != SOURCE:
        raise ConfigError(f"data.source must be {SOURCE} without data.pairs, got {data.source!r}")
    number = data.registers
    wanted = DOMAINS if data.target is None else tuple(data.target)
    return registers(number.source_train, number.target_train, data.test, data.seed, wanted)
