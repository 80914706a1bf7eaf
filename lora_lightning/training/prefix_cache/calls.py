"""Which calls of a model come before all that is trained.

A model's forward is arbitrary code and is not cut. What can be replaced are the *calls* of its
modules: `first_calls` watches one forward, operator by operator, up to the first that touches a
trained tensor, and gives the outermost modules that had finished by then. What of their results
is used afterwards, `lora_lightning.training.prefix_cache.flow` finds out.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lora_lightning.errors import ConfigError
from lora_lightning.lora.module_tree import walk
from lora_lightning.model.view import View
from lora_lightning.training.prefix_cache.inputs import Inputs
from lora_lightning.training.prefix_cache.observers import left, observed, silenced, wrote

Around = Callable[[nn.Module, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


class Stop(BaseException):
    """The part of a forward that was wanted is done; no ``except Exception`` may catch it."""


@dataclass(eq=False)
class Leaf:
    """One value in what a call returns.

    Attributes:
        kept: Whether it is stored; else a stand-in takes its place.
        label: The bit that stands for it where its uses are followed.
        nbytes: Its size in the batch that was watched.
        sort: What it is: a floating-point tensor, another tensor, or a type.
        dim: The dimension that grows with the batch; None: there is none.
        order: Dimensions from the outermost to the innermost in memory.
    """

    kept: bool
    label: int
    nbytes: int
    sort: Any
    dim: int | None = None
    order: tuple[int, ...] = ()


@dataclass(eq=False)
class Call:
    """One call of a module, and what came back."""

    path: str
    module: nn.Module
    leaves: list[Leaf] = field(default_factory=list)
    uses: int = 0  # labels of what it was given

    @property
    def cheap(self) -> bool:
        """Without a matrix product or convolution: a norm, an activation, a pooling."""
        return all(p.ndim < 2 for p in self.module.parameters())


@dataclass(eq=False)
class Beginning:
    """What `first_calls` found: the calls, what they touched, and what ended them.

    `wrote` tells that the end is a module which left a tensor in an attribute.
    """

    calls: list[Call]
    touched: set[int]
    end: str
    wrote: bool = False


@contextmanager
def intercepted(modules: Iterable[nn.Module], around: Around) -> Iterator[None]:
    """Within the block each call of these modules' forward goes through `around`."""
    chosen = [m for m in modules if not isinstance(m, torch.jit.ScriptModule)]
    kept = [(m, m.__dict__.get("forward")) for m in chosen]
    if "torch._dynamo" in sys.modules:  # a compiled module would trace what is none of its code
        around = torch.compiler.disable(around)  # type: ignore[no-untyped-call]
    for module, _ in kept:
        module.__dict__["forward"] = _through(around, module)
    try:
        yield
    finally:
        for module, own in kept:
            if own is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = own


def _through(around: Around, module: nn.Module) -> Callable[..., Any]:
    forward = module.forward
    return lambda *args, **kwargs: around(module, forward, args, kwargs)


class InOrder:
    """Hands the calls of a prefix to `handle`, one after the other, within one forward.

    Modules that such a call runs inside itself, and calls after the last one, are left alone.

    Raises:
        ConfigError: the forward takes another path than the one that was watched.
    """

    def __init__(self, calls: list[Call], handle: Callable[..., Any]):
        self.calls, self.handle = calls, handle
        self.at, self.inside = 0, False

    def __call__(
        self,
        module: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Stands in for the module's forward."""
        if self.inside or self.at == len(self.calls):
            return forward(*args, **kwargs)
        call = self.calls[self.at]
        if call.module is not module:
            raise self.astray(f"{type(module).__name__} was called")
        self.at, self.inside = self.at + 1, True
        try:
            return self.handle(call, forward, args, kwargs)
        finally:
            self.inside = False

    def astray(self, what: str) -> ConfigError:
        """The error for a forward that goes another way."""
        return ConfigError(
            f"PrefixCache: {self.calls[self.at].path} was to be called, and {what}: the model "
            "takes another path than in its first batch (layers dropped at random, or a path that "
            "depends on the data). Switch that off, or leave PrefixCache out"
        )


class _Touch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Stops at the first operator that is given a trained tensor; notes what came before."""

    def __init__(self, trained: set[int]):
        super().__init__()  # type: ignore[no-untyped-call]
        self.trained = trained
        self.touched: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        given = storages((args, kwargs))
        if not given.isdisjoint(self.trained):
            raise Stop
        self.touched |= given
        return func(*args, **(kwargs or {}))


def first_calls(root: nn.Module, inputs: Inputs) -> Beginning:
    """The outermost calls that are over before anything trained, or someone who looks, has a say.

    A module that leaves a tensor in an attribute ends them as one with a hook does: whoever reads
    it there wants that of the batch at hand.
    """
    touch = _Touch(_trained(root))
    modules = {m: path for path, m in walk(root) if path}
    watched = {m for m in modules if observed(m)}
    done: list[Call] = []
    running = [type(root).__name__]
    writers: list[nn.Module] = []

    def around(module: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        running.append(modules[module])
        if module in watched:
            raise Stop
        before, attributes = len(done), left(module)
        out = forward(*args, **kwargs)
        if wrote(attributes, left(module)):
            writers.append(module)
            raise Stop
        done[before:] = [Call(running.pop(), module)]
        return out

    args, kwargs = inputs.call()
    try:
        with torch.no_grad(), silenced(modules), intercepted(modules, around), touch:
            root.forward(*args, **kwargs)
        running[-1] = ""
    except Stop:
        pass
    return Beginning(done, touch.touched, running[-1], bool(writers))


def _trained(root: nn.Module) -> set[int]:
    """Storages of all that is trained: adapted weights too, for their factors are."""
    tensors: list[Any] = [p for p in root.parameters() if p.requires_grad]
    for layer in View(root).adapted.values():
        for per_tensor in layer.lora.values():
            for name, factors in per_tensor.items():
                if any(p.requires_grad for p in factors.parameters()):
                    tensors += [*factors.parameters(), *factors.buffers()]
                    tensors += _raw(layer, name)
    return storages(tensors)


def _raw(layer: Any, name: str) -> list[Tensor]:
    if name in layer._parameters:
        return [layer._parameters[name]]
    parametrizations = getattr(layer, "parametrizations", {})
    return list(parametrizations[name].parameters()) if name in parametrizations else []


def storages(values: Any) -> set[int]:
    """Names of the memory behind these tensors."""
    return {storage(x) for x in tree_leaves(values) if isinstance(x, Tensor)}


def storage(tensor: Tensor) -> int:
    """A name of the memory behind a tensor, views and all."""
    return int(tensor.untyped_storage()._cdata)
