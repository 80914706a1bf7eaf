"""Whole models: which adapter is in force, merging, and taking adapters off."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from lora_lightning.errors import AdapterError, AdapterNotFoundError
from lora_lightning.lora.adapted_module import release
from lora_lightning.lora.factors import Factors
from lora_lightning.lora.merging import check_unchanged, merge_layer, unmerge_layer
from lora_lightning.model import state as states
from lora_lightning.model import state_dict
from lora_lightning.model.eval_caches import forget_computed, pack_again
from lora_lightning.model.introspection import base_parameters
from lora_lightning.model.state import ModelState

_DISABLED = "disabled(model)"


def adapters(model: nn.Module) -> list[str]:
    """Names of the adapters on `model`, in the order in which they came; empty without any."""
    found = [s for _, m in states.base_modules(model) if (s := states.state_of(m)) is not None]
    return list(dict.fromkeys(name for state in found for name in state.configs))


def set_active(model: nn.Module, name: str | None) -> None:
    """Make the adapter `name` the one in force; ``None`` leaves the source model alone.

    Head, norms and statistics that an adapter owns change places with it.

    Raises:
        AdapterNotFoundError: no adapter of that name (the message lists those there are).
        AdapterError: the model is merged.
    """
    modules = states.base_modules(model)
    holders = states.roots(model, modules)
    states.check_home(modules, "set_active")
    if name is not None and all(name not in state.configs for _, state in holders):
        raise AdapterNotFoundError(f"no adapter {name!r}; there are {adapters(model)}")
    if states.merged_layers(model, modules):
        raise AdapterError("the model is merged; call unmerge(model) before switching")
    for root, state in holders:
        if name is not None and name not in state.configs:
            continue
        within = modules if root is model else states.base_modules(root)
        live = states.base_tensors(root, within)
        switch(root, state, name, live, states.adapted_layers(root, within).values())


def switch(
    root: nn.Module,
    state: ModelState,
    name: str | None,
    live: dict[str, Tensor],
    adapted: Collection[Any],
) -> None:
    """`set_active` for one injected module, without its checks.

    `live` are its `base_tensors`, `adapted` its `adapted_layers`.
    """
    before = state.active
    activate(root, state, name, live, adapted)
    if state.frozen:  # the others' factors are frozen already
        freeze(root, state, live=live, among={before, name}, adapted=adapted)


def activate(
    root: nn.Module,
    state: ModelState,
    name: str | None,
    live: dict[str, Tensor] | None = None,
    adapted: Iterable[Any] | None = None,
) -> None:
    """Let the adapter's own values act; what requires a gradient is left as it is."""
    live = states.base_tensors(root) if live is None else live
    adapted = states.adapted_layers(root).values() if adapted is None else adapted
    if name != state.active:
        if name is not None:
            _check_parked(state, name, live)
        if state.active is not None:
            _park(root, state, live)
        state.active = name
        if name is not None:
            _unpark(state, name, live)
    for layer in adapted:
        layer.put_in_force(name)
    forget_computed(state.cachers)


def _park(model: nn.Module, state: ModelState, live: dict[str, Tensor]) -> None:
    """Set the active adapter's own tensors aside and bring the source's back."""
    assert state.active is not None
    states.snapshot(model, state, live=live)
    values = {}
    for name in states.owned_names(model, state, state.active, live):
        known = state.source.get(name)
        if known is not None and not states.replaced(live[name], known):
            values[name] = live[name].data
            # A copy: what trains next in this place must not write into the source's values.
            live[name].data = states.like(known[1], live[name]).clone()
    state.parked[state.active] = values


def _check_parked(state: ModelState, name: str, live: dict[str, Tensor]) -> None:
    """Whether the adapter's own tensors still fit, before anything is moved."""
    for key, value in state.parked.get(name, {}).items():
        if key not in live or live[key].shape != value.shape:
            shape = tuple(live[key].shape) if key in live else "gone"
            raise AdapterError(
                f"adapter {name!r} holds {key} of shape {tuple(value.shape)}, and the model's is "
                f"{shape}: the layer was replaced while the adapter was inactive"
            )


def _unpark(state: ModelState, name: str, live: dict[str, Tensor]) -> None:
    """Bring the adapter's own tensors into the model (the source's must be there now)."""
    for key, value in state.parked.pop(name, {}).items():
        live[key].data = states.like(value, live[key])


def freeze(
    model: nn.Module,
    state: ModelState,
    whole: set[str] | None = None,
    live: dict[str, Tensor] | None = None,
    among: Collection[str | None] | None = None,
    adapted: Iterable[Any] | None = None,
) -> None:
    """Let exactly the active adapter's factors and extras (`whole`) require a gradient.

    `among` names the adapters whose factors may have to change; default: all that there are.
    `adapted` are the adapted layers, for a caller who has them already.
    """
    live = states.base_tensors(model) if live is None else live
    adapted = states.adapted_layers(model).values() if adapted is None else adapted
    if whole is None:
        whole = set(states.extras(model, state, state.active, live)) if state.active else set()
    own = base_parameters(model, live)
    trained = {id(own[name]) for name in whole}  # a tied parameter has several names
    for parameter in own.values():
        parameter.requires_grad_(id(parameter) in trained)
    for layer in adapted:
        for name in layer.lora if among is None else among:
            for factors in layer.factors_of(name).values():
                _set_factor_grad(factors, name == state.active)


def _set_factor_grad(factors: Factors, on: bool) -> None:
    for key, parameter in factors._parameters.items():
        if parameter is not None:
            parameter.requires_grad_(on and factors.trains(key))


@contextmanager
def source_values(
    model: nn.Module, state: ModelState, live: dict[str, Tensor] | None = None
) -> Iterator[None]:
    """The source's own tensors for the length of a ``with`` block."""
    if state.active is None:
        yield
        return
    live = states.base_tensors(model) if live is None else live
    states.snapshot(model, state, live=live)
    owned = states.owned_names(model, state, state.active, live)
    kept = {n: live[n].data for n in owned if n in state.source}
    for name in kept:
        value = states.like(state.source[name][1], live[name])
        # A forward in training mode moves statistics in place: not the kept ones.
        live[name].data = value if isinstance(live[name], nn.Parameter) else value.clone()
    try:
        yield
    finally:
        for name, value in kept.items():
            live[name].data = value


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Within the block `model` is the source model, exactly; merged models included.

    Reading and writing ``layer.weight`` here means the base's own weight. Adapters can be neither
    changed nor saved here.

    Raises:
        AdapterError: an `AdapterBank` is in force on the model.
    """
    modules = states.base_modules(model)
    holders = states.roots(model, modules)
    states.check_home(modules, "disabled(model)", within=_DISABLED)
    with unmerged(model), ExitStack() as stack:
        active = [(layer, layer.lora_active) for layer in states.adapted_layers(model).values()]
        stack.enter_context(states.lent([model, *(root for root, _ in holders)], _DISABLED))
        for root, state in holders:
            stack.callback(forget_computed, state.cachers)
            stack.enter_context(source_values(root, state))
            forget_computed(state.cachers)
        for layer, _ in active:
            layer.lora_active = None
        try:
            yield model
        finally:
            for layer, name in active:
                layer.lora_active = name


def merge(model: nn.Module) -> None:
    """Put W + s·BA of the active adapter in W's place; merging a merged model changes nothing.

    Every layer is of its own class again: forward costs what the base's costs, TorchScript
    and export see plain layers, and ``state_dict`` holds the base's keys only.

    Raises:
        AdapterNotFoundError: there is no adapter, or none is active.
    """
    modules = states.base_modules(model)
    holders = states.roots(model, modules)
    if all(state.active is None for _, state in holders):
        raise AdapterNotFoundError("no adapter is active: set_active(model, name) first")
    states.check_home(modules, "merge")
    for layer in states.adapted_layers(model, modules).values():
        merge_layer(layer)
    for _, state in holders:
        forget_computed(state.cachers)


def unmerge(model: nn.Module, discard_changes: bool = False) -> None:
    """Undo `merge`: the raw weights come back bit for bit; an unmerged model stays as it is.

    Raises:
        AdapterError: merged weights were written to since; ``discard_changes=True`` drops that.
    """
    modules = states.base_modules(model)
    holders = states.roots(model, modules)
    states.check_home(modules, "unmerge")
    merged = states.merged_layers(model, modules)
    if not discard_changes:  # all of them first: never half a model
        for layer in merged.values():
            check_unchanged(layer)
    for layer in merged.values():
        unmerge_layer(layer)
    for root, state in holders:
        forget_computed(state.cachers)
        if state.frozen:
            freeze(root, state)


@contextmanager
def unmerged(model: nn.Module) -> Iterator[None]:
    """Within the block the model is unmerged; a merged one is merged again afterwards."""
    merged = bool(states.merged_layers(model))
    if merged:
        unmerge(model)
    try:
        yield
    finally:
        if merged:
            merge(model)


def remove(model: nn.Module, name: str | None = None) -> None:
    """Take the adapter `name` off, or all of them: with the last one the model is the source.

    Raw weights, classes, head, statistics and ``requires_grad`` are what they were before
    `inject`. Removing from a model without adapters raises, as the call must be a mistake.

    Raises:
        AdapterNotFoundError: there is no adapter, or none of that name.
    """
    modules = states.base_modules(model)
    holders = states.roots(model, modules)
    states.check_home(modules, "remove")
    if name is not None and name not in adapters(model):
        raise AdapterNotFoundError(f"no adapter {name!r}; there are {adapters(model)}")
    unmerge(model)
    for root, state in holders:
        for each in [n for n in list(state.configs) if name in (None, n)]:
            _remove_one(root, state, each)


def _remove_one(root: nn.Module, state: ModelState, name: str) -> None:
    if state.active == name:
        set_active(root, None)
    modules = states.base_modules(root)
    adapted = states.adapted_layers(root, modules).values()
    for layer in adapted:
        release(layer, name)
    vacate(root, state, name, states.base_tensors(root, modules), adapted)


def vacate(
    root: nn.Module,
    state: ModelState,
    name: str,
    live: dict[str, Tensor],
    adapted: Iterable[Any],
) -> None:
    """`remove` for one injected module, without its checks, and with the factors left in place.

    For a caller who takes them off, or puts others in their place at once; arguments as in
    `switch`.
    """
    if state.active == name:
        activate(root, state, None, live, adapted)
    state.leave(name)
    if state.configs:
        return
    pack_again(state.packers)
    state_dict.unregister(root)
    states.detach(root)
    for key, parameter in base_parameters(root, live).items():
        parameter.requires_grad_(state.required_grad.get(key, parameter.requires_grad))
