"""What an injected model remembers: its adapters, and the source's own values.

Besides factors, an adapter may own whole tensors: what `trainable` names (a head, norms) and
buffers that training moved (BatchNorm's statistics). They live in the model under the base's
names while the adapter is active; the source's values are kept here, so that `disabled`,
`set_active` and `remove` can bring the source model back exactly.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.adapter import AdaptedModule
from lora_lightning.config import LoRAConfig
from lora_lightning.errors import AdapterError, AdapterNotFoundError
from lora_lightning.factors import Factors
from lora_lightning.merging import is_merged
from lora_lightning.structure import base_parameters, live_tensors
from lora_lightning.summary import InjectionReport
from lora_lightning.targets import trainable_names
from lora_lightning.tree import join, walk

_ATTRIBUTE = "_lora_state"


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
    # Inactive adapter → name → its values of what it owns.
    parked: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    fingerprint: dict[str, str] = field(default_factory=dict)
    # Names that a source checkpoint is bringing, while it loads.
    loads_source: set[str] = field(default_factory=set)


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


def roots(model: nn.Module) -> list[tuple[nn.Module, ModelState]]:
    """Every injected module within `model`, itself included.

    Raises:
        AdapterNotFoundError: there is none.
    """
    found = [(m, s) for m in model.modules() if (s := state_of(m)) is not None]
    if not found:
        raise AdapterNotFoundError(
            f"{type(model).__name__} has no adapter: call inject(model, LoRAConfig(...)) or "
            "load_adapter(model, path) first, and pass the same model here"
        )
    return found


def adapted_layers(model: nn.Module) -> dict[str, Any]:
    """Path → module of every layer with factors (none while merged)."""
    return {n: m for n, m in walk(model) if isinstance(m, AdaptedModule)}


def merged_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Path → module of every layer that holds merged weights."""
    return {n: m for n, m in walk(model) if is_merged(m)}


def named_factors(model: nn.Module, name: str | None) -> dict[str, Factors]:
    """Full tensor path → factors of the adapter `name` (not while merged)."""
    found: dict[str, Factors] = {}
    for path, layer in adapted_layers(model).items():
        if name is not None and name in layer.lora:
            for tensor, factors in layer.lora[name].items():
                found[join(path, tensor)] = factors
    return found


def extras(model: nn.Module, state: ModelState, name: str) -> list[str]:
    """Parameters that the adapter `name` trains in full, by today's structure of the model."""
    chosen = trainable_names(model, state.configs[name].trainable, [])
    adapted = {join(row.module, row.tensor) for row in state.reports[name].rows}
    return [n for n in chosen if n not in adapted]


def all_extras(model: nn.Module, state: ModelState) -> set[str]:
    """What any adapter of the model trains in full."""
    return {e for name in state.configs for e in extras(model, state, name)}


def snapshot(
    model: nn.Module,
    state: ModelState,
    owned: set[str] | None = None,
    live: dict[str, Tensor] | None = None,
    renew: Container[str] = (),
) -> None:
    """Keep the source's values of all that an adapter may own; what is kept stays.

    For names in `renew` (a source checkpoint was loaded) live values replace the kept ones.
    `owned` is `all_extras` and `live` is `live_tensors`, for a caller who has them already.
    """
    live = live_tensors(model) if live is None else live
    owned = all_extras(model, state) if owned is None else owned
    for name, tensor in live.items():
        if name not in owned and isinstance(tensor, nn.Parameter):
            continue
        known = state.source.get(name)
        if known is None or name in renew or _replaced(tensor, known):
            state.source[name] = (tensor, tensor.detach().clone())


def owned_names(model: nn.Module, state: ModelState, name: str) -> list[str]:
    """What the active adapter owns: its extras, and buffers that moved from the source's."""
    live = live_tensors(model)
    moved = [
        n
        for n, (tensor, value) in state.source.items()
        if n in live
        and not isinstance(live[n], nn.Parameter)
        and not _replaced(live[n], (tensor, value))
        and not _same(live[n], value)
    ]
    return [*extras(model, state, name), *moved]


def park(model: nn.Module, state: ModelState) -> None:
    """Set the active adapter's own tensors aside and bring the source's back."""
    assert state.active is not None
    snapshot(model, state)
    live = live_tensors(model)
    values = {}
    for name in owned_names(model, state, state.active):
        known = state.source.get(name)
        if known is not None and not _replaced(live[name], known):
            values[name] = live[name].data
            # A copy: what trains next in this place must not write into the source's values.
            live[name].data = _like(known[1], live[name]).clone()
    state.parked[state.active] = values


def unpark(model: nn.Module, state: ModelState, name: str) -> None:
    """Bring the adapter's own tensors into the model (the source's must be there now)."""
    live = live_tensors(model)
    parked = state.parked.get(name, {})
    for key, value in parked.items():
        if key not in live or live[key].shape != value.shape:
            shape = tuple(live[key].shape) if key in live else "gone"
            raise AdapterError(
                f"adapter {name!r} holds {key} of shape {tuple(value.shape)}, and the model's is "
                f"{shape}: the layer was replaced while the adapter was inactive"
            )
    for key, value in parked.items():
        live[key].data = _like(value, live[key])
    state.parked.pop(name, None)


@contextmanager
def source_values(model: nn.Module, state: ModelState) -> Iterator[None]:
    """The source's own tensors for the length of a ``with`` block."""
    if state.active is None:
        yield
        return
    snapshot(model, state)
    live = live_tensors(model)
    kept = {n: live[n].data for n in owned_names(model, state, state.active) if n in state.source}
    for name in kept:
        value = _like(state.source[name][1], live[name])
        # A forward in training mode moves statistics in place: not the kept ones.
        live[name].data = value if isinstance(live[name], nn.Parameter) else value.clone()
    try:
        yield
    finally:
        for name, value in kept.items():
            live[name].data = value


def freeze(
    model: nn.Module,
    state: ModelState,
    whole: set[str] | None = None,
    live: dict[str, Tensor] | None = None,
) -> None:
    """Let exactly the active adapter's factors and extras (`whole`) require a gradient."""
    if whole is None:
        whole = set(extras(model, state, state.active)) if state.active else set()
    own = base_parameters(model, live)
    trained = {id(own[name]) for name in whole}  # a tied parameter has several names
    for parameter in own.values():
        parameter.requires_grad_(id(parameter) in trained)
    for layer in adapted_layers(model).values():
        for name, per_tensor in layer.lora.items():
            for factors in per_tensor.values():
                _set_factor_grad(factors, name == state.active)


def _set_factor_grad(factors: Factors, on: bool) -> None:
    for key, parameter in factors.named_parameters():
        parameter.requires_grad_(on and not (key == "lora_A" and factors.spec.freeze_a))


def _like(value: Tensor, live: Tensor) -> Tensor:
    return value.to(device=live.device, dtype=live.dtype)


def _replaced(live: Tensor, known: tuple[Tensor, Tensor]) -> bool:
    """Whether the user put another tensor in this place since its source value was kept.

    Parameters keep their identity when a model moves; buffers become new objects then.
    """
    if isinstance(live, nn.Parameter):
        return known[0] is not live
    return known[1].shape != live.shape


def _same(live: Tensor, value: Tensor) -> bool:
    return live.is_meta or value.is_meta or torch.equal(live, _like(value, live))
