"""Loading state dicts into an injected model, strictly, whatever part of it they hold.

A state dict may hold all of the model; or no factors (a *source checkpoint*, written before
injection); or factors and no base weights (an *adapter checkpoint*, as `LoRACallback` writes).
The hook below completes the latter two with the model's own values, so that ``strict=True``
keeps its meaning. Anything in between is an error that names the keys.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from typing import Any

from torch import Tensor, nn

from lora_lightning.errors import AdapterError, AdapterFileError
from lora_lightning.lora import parametrizations
from lora_lightning.lora.adapted_module import located, raw_tensor
from lora_lightning.lora.config import LoRAConfig
from lora_lightning.lora.factors import TENSORS, Factors
from lora_lightning.lora.initialisation import METHODS
from lora_lightning.lora.merging import raw_parameters
from lora_lightning.lora.module_tree import every_name, join
from lora_lightning.model import state as states
from lora_lightning.model.absent_base import AbsentBase
from lora_lightning.model.compression import update_report
from lora_lightning.model.fingerprint import fingerprint
from lora_lightning.model.injection_report import InjectionReport
from lora_lightning.model.owned_tensors import all_extras, snapshot
from lora_lightning.model.view import View
from lora_lightning.model.wrapped_keys import to_own, to_plain

_FACTOR_KEY = re.compile(rf"(?:^|\.)lora\.([^.]+)\.[^.]+\.(?:{'|'.join(TENSORS)})$")


def register(model: nn.Module) -> None:
    """Install the hooks on the injected module."""
    model.register_load_state_dict_pre_hook(_before)  # type: ignore[no-untyped-call]
    model.register_load_state_dict_post_hook(_renew)  # type: ignore[no-untyped-call]
    model.register_state_dict_pre_hook(_check_ties)  # type: ignore[no-untyped-call]


def unregister(model: nn.Module) -> None:
    """Remove the hooks."""
    own = (_before, _renew, _check_ties)
    before, after = model._load_state_dict_pre_hooks, model._load_state_dict_post_hooks
    tables: Any = (before, after, model._state_dict_pre_hooks)
    for table in tables:
        for key in [k for k, h in table.items() if getattr(h, "hook", h) in own]:
            del table[key]


def _check_ties(module: nn.Module, prefix: str, keep_vars: bool) -> None:
    """Refuse a merged model's state dict where a model that ties weights again would take one.

    Merging changes one place of a tied weight; loading fills both with whatever comes last.

    Raises:
        AdapterError: a merged weight was tied to another place.
    """
    view = View(module)
    raws = raw_parameters(view.merged)
    if not raws:
        return
    places = Counter(id(p) for p in [*raws.values(), *view.parameters.values()])
    tied = [name for name, raw in raws.items() if places[id(raw)] > 1]
    if tied:
        others = [n for n, p in view.parameters.items() if p is raws[tied[0]]]
        raise AdapterError(
            f"{tied[0]} was tied to {(others or tied[1:])[0]} and merging changed one of them "
            "alone, so that a model which ties them again would load other weights than these: "
            "unmerge(model) and keep the adapter in a file (save_adapter), or untie the weights "
            "before inject"
        )


def all_factors(model: nn.Module) -> list[tuple[str, Factors]]:
    """(full tensor path, factors) of every adapter."""
    state = states.state_of(model)
    names = list(state.configs) if state else []
    view = View(model)
    return [pair for n in names for pair in states.named_factors(view, n).items()]


def factor_keys(model: nn.Module) -> dict[str, Tensor]:
    """State-dict key → tensor of every factor in the model, under each name of its module."""
    found: dict[str, Tensor] = {}
    for path, _, module in every_name(model):
        if isinstance(module, Factors):
            found |= {f"{path}.{n}": t for n, t in module.tensors().items()}
    return found


def _before(
    module: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: Any,
    strict: bool,
    *_: Any,
) -> None:
    own = to_plain(module, state_dict, prefix)
    _complete(module, state_dict, prefix, strict)
    to_own(state_dict, prefix, own)


def _complete(module: nn.Module, state_dict: dict[str, Any], prefix: str, strict: bool) -> None:
    view, own = View(module), factor_keys(module)
    found = {k: v for k, v in state_dict.items() if k.startswith(prefix)}
    bases = [state_dict.pop(k) for k, v in found.items() if isinstance(v, AbsentBase)]
    given = {k[len(prefix) :] for k, v in found.items() if isinstance(v, Tensor)}
    factors = given & own.keys()
    state = states.state_of(module)
    assert state is not None
    base = view.tensors
    any_factor = any(_FACTOR_KEY.search(k) for k in given)
    if any_factor and view.merged:
        raise AdapterError(
            "the model is merged and has no factors to load the checkpoint's adapters into: call "
            "unmerge(model) first"
        )
    for absent in bases:
        absent.check(view)
    state.loads_source = set() if any_factor else given & base.keys()
    _take_ranks(view, state, {k: state_dict[prefix + k] for k in factors})
    whole = all_extras(view, state)
    trained = {id(base[n]) for n in whole}  # a tied parameter has several names
    frozen = {n for n, p in view.parameters.items() if id(p) not in trained}
    state.loads_base = bool(given & frozen)
    if strict or (any_factor and not factors):
        _check(module, state_dict, prefix, given, own)
    state.settle({m[1] for k in factors if (m := _FACTOR_KEY.search(k))})
    if not factors:
        state_dict.update({f"{prefix}{k}": p.detach() for k, p in own.items()})
        return
    if whole and len(state.configs) > 1:
        warnings.warn(
            "a state dict holds the head and statistics of the active adapter only; with several "
            "adapters, keep each in a file of its own (save_adapter)",
            stacklevel=2,
        )
    if not state.loads_base:  # buffers may have moved: they are in every checkpoint
        fill = frozen - given - whole
        state_dict.update({f"{prefix}{n}": base[n].detach() for n in fill})


def _take_ranks(view: View, state: states.ModelState, given: dict[str, Tensor]) -> None:
    """Take ranks from the state dict that were chosen from data, pruned or compressed."""
    for name, config in state.configs.items():
        free = config.by_rule or config.prune_to is not None
        if not free and not _lowered(config, state.reports[name]):
            continue
        factors = states.named_factors(view, name)
        moves = METHODS[config.init].moves
        if any(f.spec.offset != moves or f.spec.xs != config.xs for f in factors.values()):
            continue  # `compress` has changed their kind
        for path, rank in _ranks_in(view.model, name, factors, given).items():
            if rank != factors[path].spec.rank:
                factors[path].resize(rank, config.scale(rank, factors[path].spec.alpha))
        update_report(state, name, factors)


def _lowered(config: LoRAConfig, report: InjectionReport) -> bool:
    """Whether there are ranks that the configuration does not give, as after `compress`."""
    given = {config.rank, *config.rank_pattern.values()}
    return any(row.rank not in given and row.rank < min(row.shape) for row in report.rows)


def _ranks_in(
    module: nn.Module, name: str, factors: dict[str, Factors], given: dict[str, Tensor]
) -> dict[str, int]:
    """Path → rank in the state dict, where only ranks differ: a refused one changes nothing."""
    ranks = {}
    for path, f in factors.items():
        key = join(path.rpartition(".")[0], f"lora.{name}.{located(module, path)[1]}.")
        lora_A, lora_B = given.get(key + "lora_A"), given.get(key + "lora_B")
        if lora_A is None or lora_B is None or lora_A.ndim != 2:
            return {}
        ranks[path] = rank = len(lora_A)
        if lora_A.shape[1] != f.matrix[1] or lora_B.shape != (f.matrix[0], rank):
            return {}
    return ranks


def _check(
    module: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    given: set[str],
    own: dict[str, Tensor],
) -> None:
    """Refuse a checkpoint whose adapters are not the model's, before anything is copied."""
    foreign = sorted(k for k in given if _FACTOR_KEY.search(k) and k not in own)
    if foreign:
        names = sorted({m[1] for k in foreign if (m := _FACTOR_KEY.search(k))})
        raise AdapterFileError(
            f"the checkpoint holds factors that this model has no place for (adapters {names}; "
            f"first: {foreign[0]}). Inject with the configuration that it was saved with"
        )
    present = given & own.keys()
    absent = sorted(own.keys() - given)
    if present and absent:
        raise AdapterFileError(
            f"the checkpoint holds {len(present)} of {len(own)} factors; missing: "
            f"{', '.join(absent[:5])}{' …' if len(absent) > 5 else ''}"
        )
    for key in sorted(present):
        shape, expected = tuple(state_dict[prefix + key].shape), tuple(own[key].shape)
        if shape != expected:
            raise AdapterFileError(
                f"{key} has shape {shape} in the checkpoint and {expected} in the model: it was "
                "saved with another rank or another base"
            )


def _renew(module: nn.Module, incompatible: Any) -> None:
    state = states.state_of(module)
    if state is None:
        return
    view = View(module)
    # By another name: not the weight that frozen factors were computed from.
    trained = {id(view.tensors[n]) for n in all_extras(view, state)}
    for path, factors in all_factors(module):
        if factors.matrices()[0].is_meta:
            _materialise(path, factors, view)
        if state.loads_base and id(_weight(module, path)) not in trained:
            factors.follow(_weight(module, path))
        if state.loads_source:
            factors.rebase(_weight(module, path))
    snapshot(view, state, renew=state.loads_source)
    state.loads_source, state.loads_base = set(), False
    state.fingerprint = fingerprint(view, all_extras(view, state))


def _weight(module: nn.Module, path: str) -> Any:
    owner, tensor = located(module, path)
    parametrizations.recompute(owner, tensor)
    return raw_tensor(owner, tensor)


def _materialise(path: str, factors: Factors, view: View) -> None:
    """Give factors on the meta device values, after base weights were assigned to the model."""
    device = next((p.device for p in view.parameters.values() if not p.is_meta), None)
    if device is not None:
        factors.to_empty(device=device)
        factors.reset(raw_tensor(*located(view.model, path)))
