"""The classes that modules have while a bank's batch is on the model.

Each is a subclass of the module's own in which every tensor that an adapter changes is a property,
read from the batch; its forward is the base's own, which reads them. A module that cannot do that
per item has a forward that runs once for every adapter of the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.bank.mix import Mix
from lora_lightning.bank.tensor import CALLED, BankTensor
from lora_lightning.errors import AdapterError
from lora_lightning.lora.swapped_class import once, swapped_class

ATTRIBUTE = "_lora_batch"  # on a module: (the bank's batch, the module's path)


@once
def mixed_class(cls: type[nn.Module], tensors: tuple[str, ...], grouped: bool) -> type[nn.Module]:
    """The subclass of `cls` that reads these tensors from the bank's batch; made once each."""
    # An adapted class has a forward that bypasses the property: the base's own reads it.
    base: Any = getattr(cls, "_adapted_base", cls)
    forward = _compilable(base) if "weight" in tensors else base.forward
    body: dict[str, Any] = {"forward": _grouped(forward) if grouped else forward}
    if issubclass(base, nn.RNNBase):
        body["_flat_weights"] = property(_flat_weights, lambda self, value: None)
    return swapped_class("Bank", (cls,), base, tensors, _of_batch, body)


def _of_batch(module: Any, tensor: str) -> Any:
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
    @wraps(forward)  # whose signature shows how a batch is passed
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
