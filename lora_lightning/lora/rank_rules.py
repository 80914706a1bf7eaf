"""Rules that choose each layer's rank from the spectrum of its inputs on the target.

`choose` applies them: a rule proposes a rank for each layer from its inputs' spectrum, and a
parameter budget, where there is one, is allocated among all layers. They are applied to an adapter
in `lora_lightning.model.data_driven.rank_choice`.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_lightning.errors import ConfigError
from lora_lightning.linalg.decompose import (
    effective_rank,
    energy_rank,
    explained_variance,
    optimal_hard_threshold,
)
from lora_lightning.registry import Registry


@dataclass(frozen=True)
class Spectrum:
    """The spectrum of one layer's inputs.

    Attributes:
        values: (min(N, in),), the singular values of its centred inputs (N, in), largest first.
        shape: (N, in) of the inputs.
        limit: The largest rank it may get.
        cost: Parameters that one more rank adds.
    """

    values: Tensor
    shape: tuple[int, int]
    limit: int
    cost: int

    def parts(self) -> list[float]:
        """Part of the variance along each direction, at most `limit` of them."""
        found: list[float] = explained_variance(self.values)[: self.limit].tolist()
        return found


# From a `Spectrum` and a part of the variance to a number of directions.
RULES: Registry[Callable[[Spectrum, float], int]] = Registry("rank rule")


@RULES.register("explained-variance")
def by_explained_variance(s: Spectrum, energy: float) -> int:
    """The fewest directions that hold this part of the inputs' variance."""
    return energy_rank(s.values, energy)


@RULES.register("hard-threshold")
def by_hard_threshold(s: Spectrum, energy: float) -> int:
    """The directions above the noise level, see `lora_lightning.linalg.decompose`."""
    return int((s.values > optimal_hard_threshold(s.values, s.shape)).sum())


@RULES.register("effective-rank")
def by_effective_rank(s: Spectrum, energy: float) -> int:
    """The exponential of the spectrum's entropy, rounded."""
    return round(effective_rank(s.values))


def choose(
    spectra: Mapping[str, Spectrum],
    rule: str = "explained-variance",
    *,
    energy: float = 0.5,
    budget: int | None = None,
) -> dict[str, int]:
    r"""A rank for each layer, at least 1 and at most its `Spectrum.limit`.

    Without a budget it is the one that the rule proposes. With one, directions are allocated over
    all layers together, in the order of the part of their layer's variance that they explain,

    .. math:: \xi_{l,i} = \sigma_{l,i}^2 / \sum_j \sigma_{l,j}^2

    (Paischer et al. 2024, "EVA", arXiv:2410.07170, section 3), until no more of what the rule
    proposes fits. Their total cost never exceeds the budget.

    Args:
        spectra: Layer → its spectrum.
        rule: A key of `RULES`.
        energy: The part that "explained-variance" asks for, in (0, 1].
        budget: Parameters of all factors together. None: no limit.

    Raises:
        ConfigError: the budget is too small for one direction in each layer.
    """
    wanted = {p: min(max(RULES[rule](s, energy), 1), s.limit) for p, s in spectra.items()}
    return wanted if budget is None else _dealt(spectra, wanted, budget)


def _dealt(spectra: Mapping[str, Spectrum], wanted: dict[str, int], budget: int) -> dict[str, int]:
    left = budget - sum(s.cost for s in spectra.values())
    if left < 0:
        raise ConfigError(
            f"parameter_budget={budget:,} is too small: one direction in each of these "
            f"{len(spectra)} layers takes {budget - left:,}; raise it, or adapt fewer layers"
        )
    ranks = dict.fromkeys(spectra, 1)
    parts = {p: s.parts() for p, s in spectra.items()}
    # A layer's next direction never explains more than its last one: one entry a layer is enough.
    queue = [(-x[1], p) for p, x in parts.items() if wanted[p] > 1 and len(x) > 1]
    heapq.heapify(queue)
    while queue:
        _, path = heapq.heappop(queue)
        if spectra[path].cost > left:
            continue  # nor will any later one of this layer fit
        ranks[path] += 1
        left -= spectra[path].cost
        if ranks[path] < min(wanted[path], len(parts[path])):
            heapq.heappush(queue, (-parts[path][ranks[path]], path))
    return ranks


def spectrum_of(rows: Tensor, limit: int, cost: int) -> Spectrum:
    """The spectrum of a sample of a layer's inputs (N, in).

    Centred: after a ReLU the mean alone may hold most of the energy, but no variance.
    """
    centred = rows.double() - rows.double().mean(dim=0)
    values = torch.linalg.svdvals(centred)
    return Spectrum(values, (rows.shape[0], rows.shape[1]), limit, cost)
