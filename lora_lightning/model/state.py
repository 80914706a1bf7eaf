"""`ModelState` of an injected model: its adapters, and the source's own values."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule

from lora_lightning.errors import AdapterError, AdapterNotFoundError
from lora_lightning.lora.config import LoRAConfig
from lora_lightning.lora.factors import Factors
from lora_lightning.lora.module_tree import join, unwrapped
from lora_lightning.model.injection_report import InjectionReport
from lora_lightning.model.view import View

_ATTRIBUTE = "_lora_state"
_HOOKS = "_state_dict_pre_hooks"
_PRESERVED = "_user_preserved_attributes"  # of `torch.fx`
Kind = tuple[tuple[str, ...], frozenset[str]]


@dataclass
class ModelState:
    """Stored on the module that was given to `inject`, outside its state dict."""

    configs: dict[str, LoRAConfig] = field(default_factory=dict)
    reports: dict[str, InjectionReport] = field(default_factory=dict)
    active: str | None = None
    frozen: bool = True
    # Name → whether it required a gradient before the first injection.
    required_grad: dict[str, bool] = field(default_factory=dict)
    # Name → (the live tensor object, the source's values): another object means that the user
    # replaced it, a classifier reset for instance, and then the old values no longer hold.
    source: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    # Modules whose caches would miss the adapters: see `lora_lightning.model.eval_caches`.
    cachers: list[nn.Module] = field(default_factory=list)
    packers: list[nn.TransformerEncoder] = field(default_factory=list)
    # Adapters whose ranks, or factors, are still to be initialised from data.
    unranked: set[str] = field(default_factory=set)
    unstarted: set[str] = field(default_factory=set)
    # Inactive adapter → name → its values of what it owns.
    parked: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    fingerprint: dict[str, str] = field(default_factory=dict)
    # Names in a source checkpoint, while it loads.
    loads_source: set[str] = field(default_factory=set)
    # Whether a state dict holds weights of the frozen base, while it loads.
    loads_base: bool = False
    # (`trainable`, adapted tensors) → the adapters of that kind; those that train no more than
    # factors are left out, so that a thousand alike cost what one costs.
    kinds: dict[Kind, set[str]] = field(default_factory=dict)
    # Parameters that each `trainable` selects, while the base has the parameters of this hash.
    chosen: tuple[int, dict[tuple[str, ...], list[str]]] = field(default_factory=lambda: (0, {}))

    def enter(self, name: str, config: LoRAConfig, report: InjectionReport) -> None:
        """Register a new adapter."""
        self.configs[name], self.reports[name] = config, report
        if config.trainable:
            self.kinds.setdefault(kind_of(config, report), set()).add(name)

    def leave(self, name: str) -> None:
        """Forget an adapter."""
        self.parked.pop(name, None)
        self.settle({name})
        left = {kind: names - {name} for kind, names in self.kinds.items()}
        self.kinds = {kind: names for kind, names in left.items() if names}
        del self.configs[name], self.reports[name]

    def settle(self, names: set[str]) -> None:
        """Mark these adapters' factors as initialised."""
        self.unranked -= names
        self.unstarted -= names


def kind_of(config: LoRAConfig, report: InjectionReport) -> Kind:
    """The key of the tensors that the adapter trains in full, see `ModelState.kinds`."""
    return tuple(config.trainable), frozenset(join(r.module, r.tensor) for r in report.rows)


def state_of(model: nn.Module) -> ModelState | None:
    """The state kept on this very module, or ``None``."""
    own = unwrapped(model).__dict__
    state: ModelState | None = own.get(_ATTRIBUTE)
    if state is None and isinstance(meta := own.get("meta"), dict):
        state = meta.get(_PRESERVED, {}).get(_ATTRIBUTE)
    return state


def attach(model: nn.Module, state: ModelState) -> None:
    """Keep `state` on `model`."""
    model.__dict__[_ATTRIBUTE] = state
    if isinstance(model, GraphModule):
        _preserve(model, {_ATTRIBUTE: state, _HOOKS: model.__dict__[_HOOKS]})


def detach(model: nn.Module) -> None:
    """Forget the state of `model`."""
    model.__dict__.pop(_ATTRIBUTE, None)
    if isinstance(model, GraphModule):
        _preserve(model, {})


def _preserve(model: GraphModule, own: dict[str, Any]) -> None:
    """List attributes that copies keep: a copy is made of what its graph refers to, and of these.

    In new dicts, as copies share them.
    """
    meta = model.__dict__.get("meta", {})
    others = {k: v for k, v in meta.get(_PRESERVED, {}).items() if k not in (_ATTRIBUTE, _HOOKS)}
    model.__dict__["meta"] = {**meta, _PRESERVED: {**others, **own}}


def check_whole(view: View) -> None:
    """Refuse layers whose adapters are registered elsewhere, or nowhere.

    Raises:
        AdapterError: a layer has adapters, and no module of the view has their state.
    """
    loose = next(iter({**view.adapted, **view.merged}), None)
    if loose is not None and not states_in(view):
        raise AdapterError(
            f"{loose or 'this module'} has adapters that were put on a larger model, or on the one "
            "from which this was made: pass that model, or remove(model) before taking layers of it"
        )


def states_in(view: View) -> list[tuple[nn.Module, ModelState]]:
    """Every injected module of the view, the model itself included, with its state."""
    return [(m, s) for _, m in view.modules if (s := state_of(m)) is not None]


def roots(model: nn.Module | View) -> list[tuple[nn.Module, ModelState]]:
    """`states_in`, of which there must be one.

    Raises:
        AdapterNotFoundError: there is none.
    """
    view = View.of(model)
    found = states_in(view)
    if not found:
        check_whole(view)
        raise AdapterNotFoundError(
            f"{type(view.model).__name__} has no adapter: call inject(model, LoRAConfig(...)) or "
            "load_adapter(model, path) first, and pass the same model here"
        )
    return found


def holder(
    model: nn.Module | View, name: str | None, purpose: str
) -> tuple[nn.Module, ModelState, str]:
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


def named_factors(model: nn.Module | View, name: str | None) -> dict[str, Factors]:
    """Full tensor path → factors of the adapter `name` (not while merged)."""
    layers = View.of(model).adapted.items()
    return {join(p, t): f for p, layer in layers for t, f in layer.factors_of(name).items()}
