"""The row "lora" at other ranks than the recipe's: methods ``lora@8``, ``lora@effective-rank``.

``lora-lightning sweep NAME`` compares them. The scaling is s = c/√r, with c that of
the recipe's own rank, so that the first steps are of one size at every rank (Kalajdzievski 2023,
arXiv:2312.03732): with another s a larger rank would act as a larger learning rate.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any

from lora_lightning.lora.config import NOMINAL_RANK, LoRAConfig
from lora_lightning.registry import Registry

_AT = re.compile(r"lora@(\d+|[a-z][a-z-]*)")
Rank = int | str


def rank_of(method: str) -> Rank | None:
    """8 of "lora@8", the rule of "lora@effective-rank", nothing of another method."""
    found = _AT.fullmatch(method)
    if found is None:
        return None
    return int(found[1]) if found[1].isdigit() else found[1]


def method_of(name: str, methods: Registry[Callable[..., Any]]) -> Callable[..., Any]:
    """The method of this name; ``lora@8`` is ``lora`` at rank 8."""
    rank = rank_of(name)
    return methods.get(name) if rank is None else partial(methods.get("lora"), rank=rank)


def at_rank(lora: LoRAConfig, rank: Rank | None) -> LoRAConfig:
    """The same adapter at this rank, where layers allow it, with first steps of the same size."""
    if rank is None:
        return lora
    now = NOMINAL_RANK if lora.by_rule else int(lora.rank)
    c = lora.scale(now, lora.alpha) * math.sqrt(now)
    return LoRAConfig.make(lora, rank=rank, alpha=c, scaling="alpha/sqrt(r)", clamp_rank=True)
