"""One batch of many adapters: what each layer reads, and modules that run in groups of items.

While it is in force, modules have the classes of `lora_lightning.bank.batch`, afterwards their
own. So nothing is injected, renamed or left behind: another batch is nothing but other tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from lora_lightning.bank.mix import Mix, Part, Room
from lora_lightning.bank.ops import CALLED
from lora_lightning.bank.probe import Places, signature
from lora_lightning.bank.tensor import BankTensor
from lora_lightning.bank.watch import Watch
from lora_lightning.errors import AdapterError
from lora_lightning.lora import parametrizations
from lora_lightning.lora.adapted_module import raw_tensor
from lora_lightning.model.calling import Call

# The class that a module has while a bank is in force: its tensors are read from the batch.
#
# It is a subclass of the module's own class in which each tensor that an adapter changes is a
# property. The forward is the base's own, which reads them.


ATTRIBUTE = "_lora_batch"  # on a module: (the batch in force, the module's path)
_CLASSES: dict[tuple[type[nn.Module], tuple[str, ...], bool], type[nn.Module]] = {}


def mixed_class(cls: type[nn.Module], tensors: tuple[str, ...], grouped: bool) -> type[nn.Module]:
    """The subclass of `cls` that reads these tensors from the batch in force; made once each."""
    if (cls, tensors, grouped) not in _CLASSES:
        # An adapted class has a forward that passes the property by: the base's own reads it.
        base: Any = getattr(cls, "_adapted_base", cls)
        body: dict[str, Any] = {tensor: _property(tensor) for tensor in tensors}
        body |= {"_adapted_base": base, "__module__": __name__}
        forward = _compilable(base) if "weight" in tensors else base.forward
        body["forward"] = _grouped(forward) if grouped else forward
        if issubclass(base, nn.RNNBase):
            body["_flat_weights"] = property(_flat_weights, lambda self, value: None)
        _CLASSES[cls, tensors, grouped] = type(f"Bank{base.__name__}", (cls,), body)
    return _CLASSES[cls, tensors, grouped]


def _property(tensor: str) -> property:
    def read(module: Any) -> Any:
        batch, path = module.__dict__[ATTRIBUTE]
        value = batch.now[path][tensor]
        if not isinstance(value, Mix):
            return value
        if torch.compiler.is_compiling():
            raise AdapterError(
                f"{value.path} is read by other code than a plain layer's forward, which a bank "
                "cannot do in a compiled model: call the model without torch.compile"
            )
        if value.n > 1 and not batch.inside and value.is_folded:
            raise AdapterError(
                f"{value.path} is used by another method than the model's forward, where a bank "
                "cannot count the items: call the model itself, or give one name for all of them"
            )
        return BankTensor.of(value)

    def write(module: Any, value: Any) -> None:
        module.__dict__[tensor] = value  # what the old weight_norm hook computes

    return property(read, write)


def _compilable(base: Any) -> Callable[..., Any]:
    """The base's forward; while it is compiled, of a plain layer, without tensors of a subclass."""
    called = CALLED.get(base.forward)
    if called is None or "weight" in vars(base):
        return base.forward  # type: ignore[no-any-return]

    def forward(self: Any, x: Tensor) -> Any:
        if not torch.compiler.is_compiling():
            return base.forward(self, x)
        batch, path = self.__dict__[ATTRIBUTE]
        own = batch.now[path]
        if not isinstance(own["weight"], Mix):
            return base.forward(self, x)
        bias = own["bias"] if "bias" in own else self._parameters["bias"]
        return called(self, x, own["weight"], bias)

    return forward


def _grouped(forward: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(forward)  # whose signature tells how a batch is passed
    def in_groups(self: Any, *args: Any, **kwargs: Any) -> Any:
        batch, path = self.__dict__[ATTRIBUTE]
        if path:
            return run(self, batch, path, args, kwargs)
        batch.announce((args, kwargs))
        batch.inside += 1
        try:
            return run(self, batch, path, args, kwargs)
        finally:
            batch.inside -= 1

    def run(self: Any, batch: Any, path: str, args: Any, kwargs: Any) -> Any:
        if batch.n == 1 or path not in batch.grouped:
            return forward(self, *args, **kwargs)
        return batch.in_groups(path, forward.__get__(self), args, kwargs)

    return in_groups


def _flat_weights(self: Any) -> list[Any]:
    return [getattr(self, name) for name in self._flat_weights_names]


@dataclass
class Batch:
    """The adapters of one batch, ready to be read; one name alone stands for any number of items.

    Attributes:
        n: number of items, or 1 where all have the same adapter.
        now: module's path → tensor's name → its `Mix`, or the source's own tensor.
        looking: whether the model runs only to be looked at.
        before: is told of each call of the model before it runs.
        announced: whether it has been told of the call that is about to run.
        inside: how many calls of the model are running.
    """

    model: nn.Module
    names: Sequence[str | None]
    adapters: Mapping[str | None, Mapping[str, Part]]
    places: Places
    room: Room
    n: int = field(init=False)
    now: dict[str, dict[str, Any]] = field(init=False)
    looking: bool = field(init=False, default=False)
    before: Callable[[Call], None] | None = field(init=False, default=None)
    announced: bool = field(init=False, default=False)
    inside: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.paths = sorted({path for parts in self.adapters.values() for path in parts})
        owners = {path.rpartition(".")[0] for path in self.paths}
        self._modules = {path: self.model.get_submodule(path) for path in owners}
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
    def in_force(self) -> Iterator[None]:
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
        """Let the items lie as it is known of calls of another kind."""
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
        """Give each module concerned its class for this batch; again after `places` has grown."""
        self._swap_back()
        self.grouped = {self.places.around[p] for p in self.paths if p in self.places.around}
        # The model itself always: it may turn out while it is called that it has to run in groups.
        for path in sorted({"", *self.now, *self.grouped}):
            module = self._modules.get(path) or self.model.get_submodule(path)
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
        """Within the block the model is the source, and `watch` is told what is used."""
        kept = self.n, self.now
        self.looking, self.n, self.now = True, 1, {
            module: {
                tensor: replace(mix, watch=watch.use) for tensor, mix in tensors.items()
            }
            for module, tensors in kept[1].items()
        }  # fmt: skip
        try:
            yield
        finally:
            self.looking, (self.n, self.now) = False, kept

    def in_groups(
        self, path: str, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run a module once for every adapter of the batch, each time with that one's items."""
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
        return [(name, torch.tensor(items)) for name, items in own.items()]

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


@contextmanager
def _explained(module: str, name: str | None) -> Iterator[None]:
    """Within the block an error of torch's says that it is about some of the batch's items."""
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
