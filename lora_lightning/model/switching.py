"""Whole models: switching, disabling, merging and removing adapters."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

from torch import nn

from lora_lightning.errors import AdapterError, AdapterNotFoundError
from lora_lightning.lora.adapted_module import release
from lora_lightning.lora.merging import check_unchanged, merge_layer, overflowing, unmerge_layer
from lora_lightning.lora.sharding import reshard
from lora_lightning.model import lending, state_dict
from lora_lightning.model import state as states
from lora_lightning.model.eval_caches import settle
from lora_lightning.model.owned_tensors import exchange, extras, source_values
from lora_lightning.model.state import ModelState
from lora_lightning.model.undo import all_or_nothing
from lora_lightning.model.view import View

_DISABLED = "disabled(model)"


def adapters(model: nn.Module) -> list[str]:
    """Names of the adapters on `model`, in the order in which they were added."""
    found = states.states_in(View(model))
    return list(dict.fromkeys(name for _, state in found for name in state.configs))


@lending.one_at_a_time
def set_active(model: nn.Module, name: str | None) -> None:
    """Make the adapter `name` the active one; ``None``: the source model.

    Head, norms and statistics that an adapter owns are switched with it.

    Raises:
        AdapterNotFoundError: no adapter of that name (the message lists those there are).
        AdapterError: the model is merged.
    """
    view = View(model)
    holders = states.roots(view)
    lending.check_home(view, "set_active")
    if name is not None and all(name not in state.configs for _, state in holders):
        raise AdapterNotFoundError(f"no adapter {name!r}; there are {adapters(model)}")
    view.check_unmerged("switching")
    reshard(view.modules)
    for root, state in holders:
        if name is None or name in state.configs:
            switch(view if root is model else View(root), state, name)


def switch(view: View, state: ModelState, name: str | None) -> None:
    """`set_active` for one injected module, without its checks."""
    before = state.active
    activate(view, state, name)
    if state.frozen:  # the others' factors are frozen already
        freeze(view, state, among={before, name})


def activate(view: View, state: ModelState, name: str | None) -> None:
    """Activate the adapter's own values; ``requires_grad`` is left as it is."""
    if name != state.active:
        exchange(view, state, name)
    for layer in view.adapted.values():
        layer.set_lora_active(name)
    settle(state.cachers, state.packers)


def freeze(view: View, state: ModelState, among: Collection[str | None] | None = None) -> None:
    """Let exactly the active adapter's factors and its tensors trained in full require a gradient.

    `among` names the adapters whose factors may have to change; default: all.
    """
    own = view.parameters
    whole = extras(view, state, state.active) if state.active else []
    trained = {id(own[name]) for name in whole}  # a tied parameter has several names
    for parameter in own.values():
        parameter.requires_grad_(id(parameter) in trained)
    for layer in view.adapted.values():
        for name in layer.lora if among is None else among:
            for factors in layer.factors_of(name).values():
                factors.require_grad(name == state.active)


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Within the block `model` is the source model, exactly; merged models included.

    Reading and writing ``layer.weight`` here means the base's own weight. Adapters can be neither
    changed nor saved here.

    Raises:
        AdapterError: an `AdapterBank` is active on the model, or another thread is within.
    """
    with lending.applied(partial(_disable, model)):
        yield model


def _disable(model: nn.Module, stack: ExitStack) -> None:
    """`disabled` until `stack` closes."""
    view = View(model)
    holders = states.roots(view)
    lending.check_home(view, "disabled(model)", within=_DISABLED)
    stack.enter_context(unmerged(model))
    reshard(view.modules)
    stack.callback(reshard, view.modules)
    active = [(layer, layer.lora_active) for layer in view.adapted.values()]
    stack.enter_context(lending.lent([model, *(root for root, _ in holders)], _DISABLED))
    for root, state in holders:
        stack.callback(settle, state.cachers, state.packers)
        stack.enter_context(source_values(View(root), state))
    for layer, name in active:
        stack.callback(setattr, layer, "lora_active", name)
        layer.lora_active = None
    for _, state in holders:
        settle(state.cachers, state.packers)


@lending.one_at_a_time
def merge(model: nn.Module) -> None:
    """Replace W by W + s·BA of the active adapter; merging a merged model changes nothing.

    Every layer is of its own class again: forward costs what the base's costs, TorchScript
    and export see plain layers, and ``state_dict`` holds the base's keys only.

    Raises:
        AdapterNotFoundError: there is no adapter, or none is active.
        AdapterError: a merged weight would hold NaN or infinity, which the base's own does not.

    Whatever is raised, the model is as it was.
    """
    view = View(model)
    holders = states.roots(view)
    if all(state.active is None for _, state in holders):
        raise AdapterNotFoundError("no adapter is active: set_active(model, name) first")
    lending.check_home(view, "merge")
    view.check_whole("merge")
    view.check_floating()
    with all_or_nothing(view):
        adapted = view.adapted
        for layer in adapted.values():
            merge_layer(layer)
        if bad := overflowing(adapted):
            raise AdapterError(
                f"the merged weights of {len(bad)} layers ({bad[0]} …) would hold NaN or infinity: "
                "the adapter's factors do, as after a training that diverged, or W + s·BA is "
                "larger than the base's precision can hold (float16: 65,504). Train again, or "
                "merge in float32 or bfloat16"
            )
    for _, state in holders:
        settle(state.cachers, state.packers)


@lending.one_at_a_time
def unmerge(model: nn.Module, discard_changes: bool = False) -> None:
    """Undo `merge`: the raw weights are restored bit for bit; an unmerged model stays as it is.

    Raises:
        AdapterError: merged weights were changed since; ``discard_changes=True`` drops the change.
    """
    view = View(model)
    holders = states.roots(view)
    lending.check_home(view, "unmerge")
    if merged := view.merged:
        view.check_whole("unmerge")
    if not discard_changes:  # all of them first: never half a model
        for layer in merged.values():
            check_unchanged(layer)
    for layer in merged.values():
        unmerge_layer(layer)
    for root, state in holders:
        settle(state.cachers, state.packers)
        if state.frozen:
            freeze(View(root), state)  # the raw parameters are back


@contextmanager
def unmerged(model: nn.Module) -> Iterator[None]:
    """Within the block the model is unmerged; a merged one is merged again afterwards."""
    merged = bool(View(model).merged)
    if merged:
        unmerge(model)
    try:
        yield
    finally:
        if merged:
            merge(model)


@lending.one_at_a_time
def remove(model: nn.Module, name: str | None = None) -> None:
    """Remove the adapter `name`, or all of them: without any the model is the source.

    Raw weights, classes, head, statistics and ``requires_grad`` are what they were before
    `inject`. Removing from a model without adapters raises, as the call must be a mistake.

    Raises:
        AdapterNotFoundError: there is no adapter, or none of that name.
    """
    view = View(model)
    holders = states.roots(view)
    lending.check_home(view, "remove")
    view.check_whole("remove")
    if name is not None and name not in adapters(model):
        raise AdapterNotFoundError(f"no adapter {name!r}; there are {adapters(model)}")
    unmerge(model)
    for root, state in holders:
        for each in [n for n in list(state.configs) if name in (None, n)]:
            _remove_one(root, state, each)


def _remove_one(root: nn.Module, state: ModelState, name: str) -> None:
    if state.active == name:
        set_active(root, None)
    view = View(root)
    for layer in view.adapted.values():
        release(layer, name)
    vacate(view, state, name)


def vacate(view: View, state: ModelState, name: str) -> None:
    """`remove` for one injected module, without its checks, and with the factors left in place.

    For a caller who removes or replaces them at once.
    """
    if state.active == name:
        activate(view, state, None)
    state.leave(name)
    if state.configs:
        return
    state_dict.unregister(view.model)
    states.detach(view.model)
    for key, parameter in view.parameters.items():
        parameter.requires_grad_(state.required_grad.get(key, parameter.requires_grad))
