"""Tensors that an adapter owns besides its factors, swapped with the source's on switching.

They are the parameters that `trainable` names (a head, norms) and changed buffers (BatchNorm's
statistics). They live in the model under the base's names while the adapter is active; the source's
values are kept in the model's state, so that `disabled`, `set_active` and `remove` can bring the
source model back exactly.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from lora_lightning.errors import AdapterError
from lora_lightning.lora.sharding import assign, is_sharded
from lora_lightning.model.fingerprint import fingerprint, statistics
from lora_lightning.model.state import Kind, ModelState, kind_of, state_of
from lora_lightning.model.targets import trainable_names
from lora_lightning.model.view import Marks, View


def extras(view: View, state: ModelState, name: str) -> list[str]:
    """Parameters that the adapter `name` trains in full, by today's structure of the model."""
    if not state.configs[name].trainable:
        return []
    return _of_kind(view, state, kind_of(state.configs[name], state.reports[name]))


def all_extras(model: nn.Module | View, state: ModelState) -> set[str]:
    """Parameters that any adapter of the model trains in full."""
    view = View.of(model)
    return {e for kind in state.kinds for e in _of_kind(view, state, kind)}


def _of_kind(view: View, state: ModelState, kind: Kind) -> list[str]:
    trainable, adapted = kind
    return [n for n in chosen(view, state, trainable) if n not in adapted]


def chosen(view: View, state: ModelState, trainable: Iterable[str]) -> list[str]:
    """`trainable_names`, looked up once for each structure of the model."""
    patterns = tuple(trainable)
    if state.chosen[0] != view.structure:
        state.chosen = view.structure, {}
    if patterns not in state.chosen[1]:
        state.chosen[1][patterns] = trainable_names(view, patterns)
    return state.chosen[1][patterns]


def snapshot(view: View, state: ModelState, renew: Container[str] = ()) -> None:
    """Store the source's values of all tensors that an adapter may own, unless stored already.

    For names in `renew` (a source checkpoint was loaded) live values replace the kept ones.
    """
    whole = all_extras(view, state)
    for name, tensor in view.tensors.items():
        if name not in whole and isinstance(tensor, nn.Parameter):
            continue
        known = state.source.get(name)
        if known is None or name in renew or replaced(tensor, known):
            state.source[name] = (tensor, tensor.detach().clone())


def owned_names(view: View, state: ModelState, name: str) -> list[str]:
    """Tensors of the active adapter: its extras, and buffers that differ from the source's."""
    live = view.tensors
    moved = [
        n
        for n, (tensor, value) in state.source.items()
        if n in live
        and not isinstance(live[n], nn.Parameter)
        and not replaced(live[n], (tensor, value))
        and not _same(live[n], value)
    ]
    return [*extras(view, state, name), *moved]


def like(value: Tensor, live: Tensor) -> Tensor:
    """`value` on the device and in the precision of `live`."""
    return value.to(device=live.device, dtype=live.dtype)


def _held(live: Tensor) -> Tensor:
    """What `_hold` puts back."""
    return live.detach().clone() if is_sharded(live) else live.data


def _hold(live: Tensor, value: Tensor) -> None:
    """Let `live` be `value`, without a copy; pieces are copied, as FSDP2 knows them by memory."""
    if is_sharded(live):
        assign(live, value)
    else:
        live.data = value


def replaced(live: Tensor, known: tuple[Tensor, Tensor]) -> bool:
    """Whether the user put another tensor in this place since its source value was kept.

    Parameters keep their identity when a model moves; buffers become new objects then.
    """
    if known[1].is_meta and not live.is_meta:
        return True  # it has its values since
    if is_sharded(live) and not is_sharded(known[0]):
        return known[1].shape != live.shape  # `fully_shard` has put another object there
    if isinstance(live, nn.Parameter):
        return known[0] is not live
    return known[1].shape != live.shape


def _same(live: Tensor, value: Tensor) -> bool:
    return live.is_meta or value.is_meta or torch.equal(live, like(value, live))


def exchange(view: View, state: ModelState, name: str | None) -> None:
    """Store the active adapter's own tensors, and copy those of `name` into the model.

    Raises:
        AdapterError: they no longer fit; nothing was changed.
    """
    if name is not None:
        check_parked(view, state, name)
    if state.active is not None:
        _park(view, state, state.active)
    state.active = name
    if name is not None:  # the source's must be there now
        for key, value in state.parked.pop(name, {}).items():
            _hold(view.tensors[key], like(value, view.tensors[key]))


def check_parked(view: View, state: ModelState, name: str) -> None:
    """Raise `AdapterError` where an inactive adapter's own tensors no longer fit."""
    live = view.tensors
    for key, value in state.parked.get(name, {}).items():
        if key not in live or live[key].shape != value.shape:
            shape = tuple(live[key].shape) if key in live else "gone"
            raise AdapterError(
                f"adapter {name!r} holds {key} of shape {tuple(value.shape)}, and the model's is "
                f"{shape}: the layer was replaced while the adapter was inactive"
            )


def _park(view: View, state: ModelState, active: str) -> None:
    """Store the active adapter's own tensors and restore the source's."""
    live, values = view.tensors, {}
    snapshot(view, state)
    for name in owned_names(view, state, active):
        known = state.source.get(name)
        if known is not None and not replaced(live[name], known):
            values[name] = _held(live[name])
            # A copy: later training must not write into the source's values.
            _hold(live[name], like(known[1], live[name]).clone())
    state.parked[active] = values


@contextmanager
def source_values(view: View, state: ModelState) -> Iterator[None]:
    """Within the block the model has the source's own tensors."""
    if state.active is None:
        yield
        return
    live = view.tensors
    snapshot(view, state)
    owned = owned_names(view, state, state.active)
    kept = {n: _held(live[n]) for n in owned if n in state.source}
    try:
        for name in kept:
            value = like(state.source[name][1], live[name])
            # A forward in training mode updates statistics in place: not the stored ones.
            _hold(live[name], value if isinstance(live[name], nn.Parameter) else value.clone())
        yield
    finally:
        for name, value in kept.items():
            _hold(live[name], value)


def source_marks(view: View, extras: Iterable[str], moved: Iterable[str]) -> Marks:
    """`fingerprint` and `statistics` of the source, once for each view.

    Args:
        view: Of the base, with adapters or without.
        extras: Tensors that an adapter trains in full.
        moved: Buffers that its file holds.
    """
    key, state = (tuple(extras), tuple(moved)), state_of(view.model)
    if key not in view.marks:
        with source_values(view, state) if state else nullcontext():
            view.marks[key] = fingerprint(view, key[0]), statistics(view, key[1])
    return view.marks[key]
