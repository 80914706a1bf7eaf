"""Recurrent layers: torch hands their kernels a list of all weights, ours the effective ones."""

from __future__ import annotations

import threading
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.backends.cudnn import rnn


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


def _in_one_piece(self: Any, weights: list[Tensor]) -> list[Tensor]:
    """The weights as cuDNN wants them; it would pack them itself at each call, with a warning."""
    first, cudnn = weights[0], cast("Any", torch.backends.cudnn)
    if not first.is_cuda or torch.is_autocast_enabled("cuda"):  # which packs what it casts
        return weights
    if not cudnn.is_acceptable(first) or any(w.dtype != first.dtype for w in weights):
        return weights
    return list(_Packed.apply(self, *weights))


class _Packed(torch.autograd.Function):
    """Copies of a layer's weights in one piece of memory, in cuDNN's order."""

    @staticmethod
    def forward(ctx: Any, layer: Any, *weights: Tensor) -> tuple[Tensor, ...]:
        alias: Any = Tensor.set_
        copies = [alias(w.new_empty(0), w.detach().contiguous()) for w in weights]
        mode: Any = rnn.get_cudnn_mode(layer.mode)  # type: ignore[no-untyped-call]
        with torch.cuda.device(weights[0].device):
            # Lets each of these tensors point to its place in new memory.
            torch._cudnn_rnn_flatten_weight(
                copies, 2 * (1 + layer.bias) + (layer.proj_size > 0), layer.input_size, mode,
                layer.hidden_size, layer.proj_size, layer.num_layers, layer.batch_first,
                bool(layer.bidirectional),
            )  # fmt: skip
        return tuple(copies)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return None, *gradients


def _forward_once(self: Any, *args: Any, **options: Any) -> Any:
    """The base's own forward, which reads the list several times."""
    base = getattr(self, "_adapted_base", type(self))  # a kept method outlives merging
    if torch.compiler.is_compiling():
        return base.forward(self, *args, **options)
    before = _forward.layer, _forward.weights
    _forward.layer, _forward.weights = self, _in_one_piece(self, _flat_weights(self))
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
