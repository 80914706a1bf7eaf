"""`Batch`: the tensors that layers read for a mixed batch; modules that run in groups.

While it is on the model, modules have the classes of `lora_lightning.bank.classes`, afterwards
their own. So nothing is injected, renamed or left behind: another batch is only other tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from lora_lightning.bank.classes import ATTRIBUTE, mixed_class
from lora_lightning.bank.mix import Mix, Part, Room
from lora_lightning.bank.probe import Places, signature
from lora_lightning.bank.watch import Watch
from lora_lightning.errors import AdapterError
from lora_lightning.lora import parametrizations
from lora_lightning.lora.adapted_module import raw_tensor
from lora_lightning.lora.merging import is_merged
from lora_lightning.lora.module_tree import find
from lora_lightning.model import state as states
from lora_lightning.model.calling import Call
from lora_lightning.model.view import View


@dataclass
class Batch:
    """The adapters of one batch, ready to be read; one name stands for any number of items."""

    model: nn.Module
    names: Sequence[str | None]
    adapters: Mapping[str | None, Mapping[str, Part]]
    places: Places
    room: Room
    n: int = field(init=False)  # number of items, or 1 where all have the same adapter
    # module's path → tensor's name → its `Mix`, or the source's own tensor
    now: dict[str, dict[str, Any]] = field(init=False)
    probing: bool = field(init=False, default=False)  # whether the model runs only to be probed
    # called before each call of the model
    before: Callable[[Call], None] | None = field(init=False, default=None)
    # whether it has been called for the next call of the model
    announced: bool = field(init=False, default=False)
    inside: int = field(init=False, default=0)  # how many calls of the model are running

    def __post_init__(self) -> None:
        self.paths = sorted({path for parts in self.adapters.values() for path in parts})
        owners = {path.rpartition(".")[0] for path in self.paths}
        self._modules = {path: find(self.model, path) for path in owners}
        self._raw = {path: self._source(path) for path in self.paths}
        self.grouped: set[str] = set()  # paths of the modules that run in groups
        self._classes: list[tuple[nn.Module, type[nn.Module]]] = []
        self.n = len(self.names) if len(set(self.names)) > 1 else 1
        self.now = self._read(self.names[: self.n])

    def _read(self, names: Sequence[str | None]) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {}
        for path in self.paths:
            module, _, tensor = path.rpartition(".")
            parts, raw = [self.adapters[name].get(path) for name in names], self._raw[path]
            layouts = self.places.layouts.setdefault(path, {})
            alone = all(part is None for part in parts)
            value = raw if alone else Mix.of(path, raw, parts, layouts, self.room)
            found.setdefault(module, {})[tensor] = value
        return found

    def _source(self, path: str) -> Any:
        owner, _, tensor = path.rpartition(".")
        module = self._modules[owner]
        if tensor in module._buffers:
            return module._buffers[tensor]
        parametrizations.recompute(module, tensor)
        return raw_tensor(module, tensor)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within the block the model's layers read this batch's tensors."""
        try:
            self.swap()
            yield
        finally:
            self._swap_back()

    def announce(self, call: Call) -> None:
        """Called by the model's forward: ``model.forward(x)`` has run no hook before."""
        if self.before is not None and not self.announced:
            self.before(call)
        self.announced = False

    def arrange(self, places: Places) -> None:
        """Use the layouts that are known for calls of another kind."""
        if places is self.places:
            return
        self.places = places
        for module, tensors in self.now.items():
            for tensor, mix in tensors.items():
                if isinstance(mix, Mix):
                    path = f"{module}.{tensor}" if module else tensor
                    mix.layouts = places.layouts.setdefault(path, {})
        self.swap()

    def swap(self) -> None:
        """Swap the classes of the modules concerned; called again after `places` has grown."""
        self._swap_back()
        self.grouped = {self.places.around[p] for p in self.paths if p in self.places.around}
        # The model itself always: it may be found during a call that it has to run in groups.
        for path in sorted({"", *self.now, *self.grouped}):
            module = self._modules.get(path) or find(self.model, path)
            self._classes.append((module, type(module)))
            module.__dict__[ATTRIBUTE] = (self, path)
            tensors = tuple(sorted(self.now.get(path, ())))
            grouped = not path or path in self.grouped
            module.__class__ = mixed_class(type(module), tensors, grouped)

    def _swap_back(self) -> None:
        while self._classes:
            module, cls = self._classes.pop()
            module.__class__ = cls
            del module.__dict__[ATTRIBUTE]

    @contextmanager
    def watched(self, watch: Watch) -> Iterator[None]:
        """Within the block the model is the source, and `watch` records the uses of tensors."""
        kept = self.n, self.now
        self.probing, self.n, self.now = True, 1, {
            module: {
                tensor: replace(mix, watch=watch.use) for tensor, mix in tensors.items()
            }
            for module, tensors in kept[1].items()
        }  # fmt: skip
        try:
            yield
        finally:
            self.probing, (self.n, self.now) = False, kept

    def in_groups(
        self, path: str, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run a module once for every adapter of the batch, on that adapter's items."""
        leaves, spec = tree_flatten((args, kwargs))
        crossing = self.places.crossings[path].get(signature(leaves))
        if crossing is None or not all(
            layout is None or layout.fits(leaf, self.n)
            for leaf, layout in zip(leaves, crossing.inputs, strict=True)
        ):
            raise AdapterError(
                f"{path or type(self.model).__name__} runs once for every adapter of the batch, "
                "and is called with other inputs than the bank has seen. Call bank.probe(batch) "
                "with a batch of this kind"
            )
        n, outputs = self.n, []
        for name, chosen in self._groups():
            own = [
                leaf if layout is None else layout.select(leaf, chosen.to(leaf.device), n)
                for leaf, layout in zip(leaves, crossing.inputs, strict=True)
            ]
            own_args, own_kwargs = tree_unflatten(own, spec)
            with self._alone(name), _explained(path or type(self.model).__name__, name):
                outputs.append((chosen, forward(*own_args, **own_kwargs)))
        return self._gathered(outputs, crossing.outputs)

    def _groups(self) -> list[tuple[str | None, Tensor]]:
        own: dict[str | None, list[int]] = {}
        for i, name in enumerate(self.names):
            own.setdefault(name, []).append(i)
        return [(name, torch.tensor(items, device="cpu")) for name, items in own.items()]

    @contextmanager
    def _alone(self, name: str | None) -> Iterator[None]:
        kept = self.n, self.now
        self.n, self.now = 1, self._read([name])
        try:
            yield
        finally:
            self.n, self.now = kept

    def _gathered(self, outputs: list[tuple[Tensor, Any]], layouts: Sequence[Any]) -> Any:
        flat = [(chosen, *tree_flatten(output)) for chosen, output in outputs]
        whole = []
        for i, layout in enumerate(layouts):
            parts = [(chosen, leaves[i]) for chosen, leaves, _ in flat]
            whole.append(layout.gather(parts, self.n) if layout else parts[0][1])
        return tree_unflatten(whole, flat[0][2])


def check_free(model: nn.Module) -> bool:
    """Raise where a bank cannot serve the model; returns whether it has an active adapter."""
    active = False
    for path, module in View(model).modules:
        where = path or type(model).__name__
        if module.training:
            raise AdapterError(f"{where} is in training mode, a bank is for eval: model.eval()")
        if ATTRIBUTE in module.__dict__:
            raise AdapterError("the model is in a bank's `with` block already: leave that first")
        if is_merged(module):
            raise AdapterError(f"{where} is merged: unmerge(model) before using a bank")
        state = states.state_of(module)
        active |= state is not None and state.active is not None
    return active


@contextmanager
def _explained(module: str, name: str | None) -> Iterator[None]:
    """Re-raise errors of torch with the module and the adapter whose items were run alone."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, IndexError) as error:
        raise AdapterError(
            f"{module} runs once for every adapter of the batch, and fails with the items of "
            f"{name or 'the source model'} alone ({error}). Does it need the longest item of the "
            "batch? Run one adapter at a time (bank[name])"
        ) from error
