"""`choose_ranks`: the rank of each layer of an adapter from target batches, before training."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from lora_lightning.errors import ConfigError, DataError
from lora_lightning.lora import rank_rules
from lora_lightning.lora.adapted_module import located, raw_tensor
from lora_lightning.lora.config import LoRAConfig
from lora_lightning.lora.factors import Factors
from lora_lightning.lora.module_tree import find
from lora_lightning.lora.rank_rules import Spectrum
from lora_lightning.model import state as states
from lora_lightning.model.calling import Forward, call
from lora_lightning.model.compression import update_report
from lora_lightning.model.data_driven.initialise import Sample, gather_inputs, shown
from lora_lightning.model.injection_report import InjectionReport
from lora_lightning.model.patterns import Target
from lora_lightning.model.probing import evaluating
from lora_lightning.model.state import ModelState
from lora_lightning.model.switching import disabled
from lora_lightning.model.view import View

ROWS = 512  # sampled from each layer's inputs


def choose_ranks(
    model: nn.Module,
    batches: Iterable[Any],
    name: str | None = None,
    *,
    forward: Forward | None = None,
    max_batches: int = 20,
    progress: bool = False,
) -> InjectionReport:
    """Give each layer its rank by the rule that is the adapter's `rank`, from the target's inputs.

    The source model sees each batch once, in eval mode, without labels; the rule and the budget
    are the configuration's (`rank`, `rank_energy`, `parameter_budget`, `max_rank`), see
    `rank_rules.choose`. Layers whose inputs cannot be seen (embeddings, transposed
    convolutions, bare parameters), and those that `rank_pattern` names, keep the rank they have;
    they count in the budget. The function stays the source's. The parameters stay the objects
    they were, with another shape.

    Args:
        model: With the adapter on, not trained yet.
        batches: Of the target, as for `start_from_data`.
        name: Of the adapter; None: the active one.
        forward: From (model, batch) to anything; runs the model once.
        max_batches: The largest number of batches to use.
        progress: Show a progress bar on the terminal.

    Returns:
        The report, with the chosen ranks.

    Raises:
        AdapterNotFoundError: there is no such adapter.
        AdapterError: the model is merged.
        ConfigError: its rank is no rule, or the budget is too small.
        DataError: there is no batch, a batch of another kind, or NaN in a layer's inputs.
    """
    root, state, name = states.holder(model, name, "to choose ranks for")
    config = state.configs[name]
    if not config.by_rule:
        raise ConfigError(f"adapter {name!r} has rank={config.rank}, which no rule is to choose")
    View(root).check_unmerged("ranks are chosen")
    View(root).check_whole("choose_ranks", "inject with data= before fully_shard")
    factors = states.named_factors(root, name)
    spectra = _spectra(root, factors, config, shown(batches, max_batches, progress), forward)
    budget = config.parameter_budget
    if budget is not None:
        budget -= sum(
            f.spec.cost(*f.matrix) * f.spec.rank for p, f in factors.items() if p not in spectra
        )
    chosen = rank_rules.choose(spectra, str(config.rank), energy=config.rank_energy, budget=budget)
    return set_ranks(root, state, name, chosen)


@torch.no_grad()
def set_ranks(
    root: nn.Module, state: ModelState, name: str, chosen: dict[str, int]
) -> InjectionReport:
    """Give factors other ranks, before training, and update the report."""
    for path, rank in chosen.items():
        module, tensor = located(root, path)
        factors: Factors = module.lora[name][tensor]
        factors.resize(rank, state.configs[name].scale(rank, factors.spec.alpha))
        factors.reset(raw_tensor(module, tensor))
    update_report(state, name, states.named_factors(root, name))
    state.unranked.discard(name)
    return state.reports[name]


def _spectra(
    root: nn.Module,
    factors: dict[str, Factors],
    config: LoRAConfig,
    batches: Iterable[Any],
    forward: Forward | None,
) -> dict[str, Spectrum]:
    fixed = _fixed(root, config, factors)
    free = {p: f for p, f in factors.items() if p not in fixed}
    with evaluating(root), disabled(root):
        found = gather_inputs(root, free, batches, forward or call, lambda f: Sample(f, ROWS))
    if not found and free:
        raise DataError(
            "no layer's inputs were seen on these batches: forward= must run the model itself"
        )
    return {
        path: rank_rules.spectrum_of(
            g.result(), (f := free[path]).spec.rank, f.spec.cost(*f.matrix)
        )
        for path, g in found.items()
    }


def _fixed(root: nn.Module, config: LoRAConfig, factors: dict[str, Factors]) -> set[str]:
    """The tensors whose rank `rank_pattern` names."""
    found = set()
    for path in factors:
        owner, _, tensor = path.rpartition(".")
        target = Target(owner, find(root, owner), tensor)
        if any(target.hit_by(p) for p in config.rank_pattern):
            found.add(path)
    return found
