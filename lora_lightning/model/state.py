"""What an injected model remembers: its adapters, and the source's own values.

Besides factors, an adapter may own whole tensors: what `trainable` names (a head, norms) and
buffers that training moved (BatchNorm's statistics). They live in the model under the base's
names while the adapter is active; the source's values are kept here, so that `disabled`,
`set_active` and `remove` can bring the source model back exactly.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lora_lightning.errors import AdapterError, AdapterNotFoundError
from lora_lightning.lora.adapted_module import AdaptedModule
from lora_lightning.lora.config import LoRAConfig
from lora_lightning.lora.factors import Factors
from lora_lightning.lora.merging import is_merged
from lora_lightning.lora.module_tree import Children, Modules, join, walk
from lora_lightning.model.injection_report import InjectionReport
from lora_lightning.model.introspection import live_tensors
from lora_lightning.model.targets import trainable_names

_ATTRIBUTE = "_lora_state"
Kind = tuple[tuple[str, ...], frozenset[str]]
# Module → the block that it stands for another model in; not on the module, which may be copied.
_lent: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


@dataclass
class ModelState:
    """Kept on the module that was given to `inject`, outside its state dict."""

    configs: dict[str, LoRAConfig] = field(default_factory=dict)
    reports: dict[str, InjectionReport] = field(default_factory=dict)
    active: str | None = None
    frozen: bool = True
    # Name → whether it required a gradient before the first injection.
    required_grad: dict[str, bool] = field(default_factory=dict)
    # Name → (the live tensor object, the source's values): another object means that the user
    # replaced it, a classifier reset for instance, and then the old values are void.
    source: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    # Modules whose shortcuts would miss the adapters: see `lora_lightning.model.eval_caches`.
    cachers: list[nn.Module] = field(default_factory=list)
    packers: list[nn.TransformerEncoder] = field(default_factory=list)
    # Adapters whose ranks, or factors, are still to be taken from data that `inject` had not.
    unranked: set[str] = field(default_factory=set)
    unstarted: set[str] = field(default_factory=set)
    # Inactive adapter → name → its values of what it owns.
    parked: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    fingerprint: dict[str, str] = field(default_factory=dict)
    # Names that a source checkpoint is bringing, while it loads.
    loads_source: set[str] = field(default_factory=set)
    # Whether a state dict is bringing weights of the frozen base, while it loads.
    loads_base: bool = False
    # (`trainable`, adapted tensors) → the adapters of that kind; those that train no more than
    # factors are left out, so that a thousand alike cost what one costs.
    kinds: dict[Kind, set[str]] = field(default_factory=dict)
    # What each `trainable` chooses, while the base has the parameters of this hash.
    chosen: tuple[int, dict[tuple[str, ...], list[str]]] = field(default_factory=lambda: (0, {}))

    def enter(self, name: str, config: LoRAConfig, report: InjectionReport) -> None:
        """Take note of a new adapter."""
        self.configs[name], self.reports[name] = config, report
        if config.trainable:
            self.kinds.setdefault(_kind(config, report), set()).add(name)

    def leave(self, name: str) -> None:
        """Forget an adapter."""
        self.parked.pop(name, None)
        self.settle({name})
        for names in self.kinds.values():
            names.discard(name)
        self.kinds = {kind: names for kind, names in self.kinds.items() if names}
        del self.configs[name], self.reports[name]

    def settle(self, names: set[str]) -> None:
        """Their factors hold values that no look at data may replace."""
        self.unranked -= names
        self.unstarted -= names


def _kind(config: LoRAConfig, report: InjectionReport) -> Kind:
    return tuple(config.trainable), frozenset(join(r.module, r.tensor) for r in report.rows)


def state_of(model: nn.Module) -> ModelState | None:
    """The state kept on this very module, or ``None``."""
    state: ModelState | None = model.__dict__.get(_ATTRIBUTE)
    return state


def attach(model: nn.Module, state: ModelState) -> None:
    """Keep `state` on `model`."""
    model.__dict__[_ATTRIBUTE] = state


def detach(model: nn.Module) -> None:
    """Forget the state of `model`."""
    model.__dict__.pop(_ATTRIBUTE, None)


def roots(model: nn.Module, modules: Modules | None = None) -> list[tuple[nn.Module, ModelState]]:
    """Every injected module within `model`, itself included.

    `modules` is `base_modules`, here and below, for a caller who has them already.

    Raises:
        AdapterNotFoundError: there is none.
    """
    modules = base_modules(model) if modules is None else modules
    found = [(m, s) for _, m in modules if (s := state_of(m)) is not None]
    if not found:
        raise AdapterNotFoundError(
            f"{type(model).__name__} has no adapter: call inject(model, LoRAConfig(...)) or "
            "load_adapter(model, path) first, and pass the same model here"
        )
    return found


@contextmanager
def lent(modules: Iterable[nn.Module], block: str) -> Iterator[None]:
    """Within this block the modules hold values that are put back at its end: see `check_home`."""
    before = {m: _lent.get(m) for m in modules}
    _lent.update(dict.fromkeys(before, block))
    try:
        yield
    finally:
        for module, outer in before.items():
            if outer is None:
                _lent.pop(module, None)
            else:
                _lent[module] = outer


def check_home(modules: Modules, what: str, within: str = "") -> None:
    """Refuse what changes or reads adapters while a block has put other values in their place.

    Raises:
        AdapterError: one of the modules is lent to another block than `within`.
    """
    for _, module in modules if _lent else ():
        block = _lent.get(module, within)
        if block != within:
            raise AdapterError(
                f"{what} inside `with {block}:` would be undone by the end of the block, or "
                "outlive it: leave the block first"
            )


def holder(model: nn.Module, name: str | None, purpose: str) -> tuple[nn.Module, ModelState, str]:
    """The injected module within `model` that holds this adapter (default: the active one).

    `purpose` is for the message: "to save".

    Raises:
        AdapterNotFoundError: there is none, or none of that name.
    """
    holders = roots(model)
    for root, state in holders:
        wanted = name or state.active
        if wanted is not None and wanted in state.configs:
            return root, state, wanted
    have = [n for _, s in holders for n in s.configs]
    raise AdapterNotFoundError(f"no adapter {name or '(active)'!r} {purpose}; there are {have}")


def base_modules(model: nn.Module) -> Modules:
    """`walk`, but not down into factors: its cost does not grow with the number of adapters."""
    return walk(model, _base_children)


def _base_children(module: nn.Module) -> Children:
    if isinstance(module, AdaptedModule):
        return {name: child for name, child in module._modules.items() if name != "lora"}
    return module._modules


def base_tensors(model: nn.Module, modules: Modules | None = None) -> dict[str, Tensor]:
    """`live_tensors` of a model with any number of adapters, at the price of the base's alone."""
    return live_tensors(model, base_modules(model) if modules is None else modules)


def adapted_layers(model: nn.Module, modules: Modules | None = None) -> dict[str, Any]:
    """Path → module of every layer with factors (none while merged)."""
    modules = base_modules(model) if modules is None else modules
    return {n: m for n, m in modules if isinstance(m, AdaptedModule)}


def merged_layers(model: nn.Module, modules: Modules | None = None) -> dict[str, nn.Module]:
    """Path → module of every layer that holds merged weights."""
    modules = base_modules(model) if modules is None else modules
    return {n: m for n, m in modules if is_merged(m)}


def named_factors(model: nn.Module, name: str | None) -> dict[str, Factors]:
    """Full tensor path → factors of the adapter `name` (not while merged)."""
    found: dict[str, Factors] = {}
    for path, layer in adapted_layers(model).items():
        for tensor, factors in layer.factors_of(name).items():
            found[join(path, tensor)] = factors
    return found


def extras(
    model: nn.Module, state: ModelState, name: str, live: dict[str, Tensor] | None = None
) -> list[str]:
    """Parameters that the adapter `name` trains in full, by today's structure of the model."""
    if not state.configs[name].trainable:
        return []
    return _extras(model, state, _kind(state.configs[name], state.reports[name]), live)


def all_extras(
    model: nn.Module, state: ModelState, live: dict[str, Tensor] | None = None
) -> set[str]:
    """What any adapter of the model trains in full."""
    return {e for kind in state.kinds for e in _extras(model, state, kind, live)}


def _extras(
    model: nn.Module, state: ModelState, kind: Kind, live: dict[str, Tensor] | None
) -> list[str]:
    trainable, adapted = kind
    live = base_tensors(model) if live is None else live
    structure = hash(tuple((n, id(p)) for n, p in live.items() if isinstance(p, nn.Parameter)))
    if state.chosen[0] != structure:
        state.chosen = structure, {}
    if trainable not in state.chosen[1]:
        state.chosen[1][trainable] = trainable_names(model, trainable, [], live)
    return [n for n in state.chosen[1][trainable] if n not in adapted]


def snapshot(
    model: nn.Module,
    state: ModelState,
    owned: set[str] | None = None,
    live: dict[str, Tensor] | None = None,
    renew: Container[str] = (),
) -> None:
    """Keep the source's values of all that an adapter may own; what is kept stays.

    For names in `renew` (a source checkpoint was loaded) live values replace the kept ones.
    `owned` is `all_extras` and `live` is `base_tensors`, for a caller who has them already.
    """
    live = base_tensors(model) if live is None else live
    owned = all_extras(model, state, live) if owned is None else owned
    for name, tensor in live.items():
        if name not in owned and isinstance(tensor, nn.Parameter):
            continue
        known = state.source.get(name)
        if known is None or name in renew or replaced(tensor, known):
            state.source[name] = (tensor, tensor.detach().clone())


def owned_names(
    model: nn.Module, state: ModelState, name: str, live: dict[str, Tensor] | None = None
) -> list[str]:
    """What the active adapter owns: its extras, and buffers that moved from the source's."""
    live = base_tensors(model) if live is None else live
    moved = [
        n
        for n, (tensor, value) in state.source.items()
        if n in live
        and not isinstance(live[n], nn.Parameter)
        and not replaced(live[n], (tensor, value))
        and not _same(live[n], value)
    ]
    return [*extras(model, state, name, live), *moved]


def like(value: Tensor, live: Tensor) -> Tensor:
    """`value` on the device and in the precision of `live`."""
    return value.to(device=live.device, dtype=live.dtype)


def replaced(live: Tensor, known: tuple[Tensor, Tensor]) -> bool:
    """Whether the user put another tensor in this place since its source value was kept.

    Parameters keep their identity when a model moves; buffers become new objects then.
    """
    if isinstance(live, nn.Parameter):
        return known[0] is not live
    return known[1].shape != live.shape


def _same(live: Tensor, value: Tensor) -> bool:
    return live.is_meta or value.is_meta or torch.equal(live, like(value, live))
