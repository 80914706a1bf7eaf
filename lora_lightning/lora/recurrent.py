"""Recurrent layers: torch hands their kernels a list of all weights, ours the effective ones."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor, nn


class _Forward(threading.local):
    """The layer whose forward runs in this thread, and its effective weights."""

    layer: Any = None
    weights: list[Tensor] | None = None


_forward = _Forward()


def _flat_weights(self: Any) -> list[Tensor]:
    if _forward.layer is self and _forward.weights is not None:
        return _forward.weights
    found = (getattr(self, name, None) for name in self._flat_weights_names)
    return [_plain(weight) for weight in found if weight is not None]


def _plain(weight: Tensor) -> Tensor:
    # The recurrent kernels take plain tensors; nothing else reads this list.
    return weight if isinstance(weight, nn.Parameter) else weight.as_subclass(Tensor)


def _forward_once(self: Any, *args: Any, **options: Any) -> Any:
    """The base's own forward, which reads the list several times."""
    base = getattr(self, "_adapted_base", type(self))  # a kept method outlives merging
    if torch.compiler.is_compiling():
        return base.forward(self, *args, **options)
    before = _forward.layer, _forward.weights
    _forward.layer, _forward.weights = self, _flat_weights(self)
    try:
        return base.forward(self, *args, **options)
    finally:
        _forward.layer, _forward.weights = before


def forget_flat_weights(module: Any) -> None:
    """Let a layer that is adapted no more hold its raw weights again."""
    module.__dict__.pop("_flat_weights", None)
    if not hasattr(type(module), "_adapted_tensors"):
        module._init_flat_weights()


BODY = {
    # Torch assigns this list when weights move; ours is always computed.
    "_flat_weights": property(_flat_weights, lambda self, value: None),
    "_update_flat_weights": lambda self: None,
    "flatten_parameters": lambda self: None,
    "forward": _forward_once,
}
