"""`combine`: weighted sums of adapters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lora_lightning.errors import AdapterError, AdapterNotFoundError, ConfigError
from lora_lightning.lora.adapted_module import adapt, raw_tensor
from lora_lightning.lora.config import LoRAConfig
from lora_lightning.lora.factors import Factors
from lora_lightning.lora.module_tree import find
from lora_lightning.lora.spec import FactorSpec
from lora_lightning.model import lending
from lora_lightning.model import state as states
from lora_lightning.model.injection import check_free, register
from lora_lightning.model.injection_report import InjectionReport, Row
from lora_lightning.model.owned_tensors import check_parked, extras, owned_names, snapshot
from lora_lightning.model.state import ModelState
from lora_lightning.model.switching import switch
from lora_lightning.model.undo import all_or_nothing
from lora_lightning.model.view import View


@lending.one_at_a_time
def combine(model: nn.Module, weights: Mapping[str, float], name: str) -> InjectionReport:
    r"""A new adapter with :math:`\Delta W = \sum_i w_i\,s_i\,B_i A_i`, exactly, for any scaling.

    The factors are stacked, so ranks add up; what adapters train in full is combined likewise,
    source + Σ w_i (own − source). The new adapter becomes the active one.

    Raises:
        AdapterNotFoundError, AdapterExistsError, ConfigError: a name is unknown or taken.
        AdapterError: an adapter is not linear in its factors (DoRA) or changed buffers, so that
            a weighted sum has no meaning.
    """
    weights, view = dict(weights), View(model)
    state = _check(view, weights, name)
    stacks = _stacks(view, weights)
    values = _extras(view, state, weights)
    first = next(iter(weights))
    config = LoRAConfig.make(state.configs[first], xs=False)  # a stack is a plain product
    config.trainable = sorted({p for n in weights for p in state.configs[n].trainable})
    total, whole = state.reports[first].total_parameters, {n: v.numel() for n, v in values.items()}
    with all_or_nothing(view, name):
        rows = []
        for path, parts in stacks.items():
            owner, _, tensor = path.rpartition(".")
            rows.append(_place(find(model, owner), name, tensor, parts, owner))
        report = InjectionReport(name, tuple(rows), whole, total)
        register(view, state, config, report, state.frozen)
        state.parked[name] = values
        switch(view, state, name)
    return report


def _check(view: View, weights: dict[str, float], name: str) -> ModelState:
    state = states.state_of(view.model)
    unknown = sorted(set(weights) - set(state.configs if state else ()))
    if state is None or unknown or not weights:
        have = list(state.configs) if state else []
        raise AdapterNotFoundError(f"cannot combine {unknown or 'nothing'}; there are {have}")
    check_free(view, name)
    if name in state.configs:
        raise ConfigError(f"adapter {name!r} exists; remove it or choose another name")
    dora = sorted(n for n in weights if state.configs[n].dora)
    if dora:
        raise AdapterError(
            f"{dora} use DoRA, whose weights are not linear in the factors: a weighted sum has no "
            "meaning. Merge one of them and train on, or combine adapters without DoRA"
        )
    buffers = sorted(n for n in weights if _moved_buffers(view, state, n))
    if buffers:
        raise AdapterError(
            f"{buffers} moved buffers (BatchNorm statistics), of which a weighted sum has no "
            "meaning; train them with batch_norm='frozen' to combine them"
        )
    return state


def _moved_buffers(view: View, state: ModelState, name: str) -> list[str]:
    whole = set(extras(view, state, name))
    if state.active == name:
        return [n for n in owned_names(view, state, name) if n not in whole]
    return [n for n in state.parked.get(name, {}) if n not in whole]


def _stacks(view: View, weights: dict[str, float]) -> dict[str, list[tuple[float, Factors]]]:
    stacks: dict[str, list[tuple[float, Factors]]] = {}
    for name, weight in weights.items():
        for path, factors in states.named_factors(view, name).items():
            stacks.setdefault(path, []).append((weight, factors))
    return stacks


@torch.no_grad()
def _place(
    module: nn.Module, name: str, tensor: str, parts: list[tuple[float, Factors]], owner: str
) -> Row:
    """Stack A row by row and w·s·B column by column: B A is then the weighted sum itself."""
    pairs = [(w * f.spec.scaling, *f.low_rank()) for w, f in parts]
    lora_A = torch.cat([A for _, _, A in pairs])
    lora_B = torch.cat([scale * B for scale, B, _ in pairs], dim=1)
    rank = lora_A.shape[0]
    first = parts[0][1]
    bare = first.matrix[0] != len(raw_tensor(module, tensor))
    adapt(module, name, {tensor: FactorSpec(rank, float(rank), 1.0, key=f"{owner}.{tensor}")}, bare)
    live: Any = module
    placed: Factors = live.lora[name][tensor]
    placed.lora_A.copy_(lora_A)
    placed.lora_B.copy_(lora_B)
    size = placed.lora_A.numel() + placed.lora_B.numel()
    kind = live._adapted_base.__name__
    return Row(owner, tensor, kind, "effective", rank, float(rank), size, first.matrix)


@torch.no_grad()
def _extras(view: View, state: ModelState, weights: dict[str, float]) -> dict[str, torch.Tensor]:
    """Source + Σ w (own − source) of each tensor that an adapter trains in full."""
    live = view.tensors
    snapshot(view, state)  # of a layer that was replaced, what is there now
    sums: dict[str, torch.Tensor] = {}
    for name, weight in weights.items():
        check_parked(view, state, name)
        for key in extras(view, state, name):
            source = state.source[key][1].to(live[key].device)
            own = live[key].data if state.active == name else state.parked[name].get(key, source)
            sums[key] = sums.get(key, source.clone()) + weight * (own - source)
    return sums
