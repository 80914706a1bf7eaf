"""`swapped_class`: temporary subclasses of a module's own class, with tensors that are computed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, TypeVar

from torch import nn

from lora_lightning.lora.effective_weight import WholeWeights

Made = TypeVar("Made", bound=Callable[..., Any])


def once(function: Made) -> Made:
    """`functools.cache`, typed: mypy does not take a module's class for hashable."""
    return cache(function)  # type: ignore[return-value]


def swapped_class(
    prefix: str,
    parents: tuple[type, ...],
    base: type[nn.Module],
    tensors: tuple[str, ...],
    read: Callable[[Any, str], Any],
    body: Mapping[str, Any],
) -> type[nn.Module]:
    """A temporary class for a module of class `base`."""
    properties = {tensor: _tensor_property(base, tensor, read) for tensor in tensors}
    own = {**properties, **body, "_adapted_base": base, "__module__": __name__}
    return type(f"{prefix}{base.__name__}", parents, own)


def _tensor_property(
    base: type[nn.Module], tensor: str, read: Callable[[Any, str], Any]
) -> property:
    def write(module: Any, value: Any) -> None:
        inherited = getattr(base, tensor, None)
        if isinstance(inherited, property) and inherited.fset is not None:
            if isinstance(module, WholeWeights):
                module.check_assignment(tensor, value)
            inherited.fset(module, value)  # a parametrization keeps its own originals
        else:
            module.__dict__[tensor] = value  # computed by the old weight_norm hook

    return property(lambda module: read(module, tensor), write)
