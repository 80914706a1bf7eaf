"""Kinds of layers: their weights, and how an adapter's part is computed in each.

Two paths lead to the same output. *Factorised*: ``forward`` adds s·B(Ax) to the base's own output,
by `fused.linear` where that can. *Effective weight*: the base class's own ``forward`` runs,
and what it reads as its weight is W + s·BA. A class takes the factorised path only where its
forward is known to be torch's own, so that an overridden forward (weight standardisation, "same"
padding, a functional read) is honoured by construction.

Shapes below: x_BxI (any leading dimensions, in), lora_A (r, in·kernel), lora_B (out, r).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lora_lightning.lora import parametrizations
from lora_lightning.lora.factors import Factors, matrix_shape
from lora_lightning.lora.fused import convolution
from lora_lightning.lora.fused import linear as ops
from lora_lightning.lora.fused.plan import LowRank

_CONVS: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_CONV_METHODS = ("forward", "_conv_forward")
_SINGLE: tuple[type[nn.Module], ...] = (
    nn.Linear,
    nn.modules.conv._ConvNd,  # transposed ones as well
    nn.Embedding,
    nn.EmbeddingBag,
    nn.Bilinear,
)


def tensors_of(module: nn.Module) -> tuple[str, ...]:
    """Names of the weights of an adaptable layer; empty for any other module."""
    if isinstance(module, _SINGLE):
        return ("weight",)
    if isinstance(module, nn.MultiheadAttention):
        packed = module.in_proj_weight is not None
        return (
            ("in_proj_weight",) if packed else ("q_proj_weight", "k_proj_weight", "v_proj_weight")
        )
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        return tuple(n for n in module._parameters if n.startswith("weight"))
    return ()


def refusal(module: nn.Module, tensor: str, weight: Any) -> str | None:
    """Why this tensor cannot carry an adapter, in words for the user; ``None`` where it can."""
    if has_foreign_lora(module):
        return "it has an attribute 'lora' of its own, where the factors would go"
    if isinstance(module, torch.jit.ScriptModule):
        return "it is compiled TorchScript, whose code cannot change; adapt before scripting"
    if is_lazy(weight):
        return "it is lazy and has no shape yet; run one batch through the model first"
    if not isinstance(weight, Tensor):
        return f"it holds no tensor called {tensor!r}"
    if not weight.is_floating_point():
        return f"{tensor} has dtype {weight.dtype}; factors need a floating-point weight"
    if weight.dim() < 2 or 0 in weight.shape:
        return (
            f"{tensor} has shape {tuple(weight.shape)}, which is no matrix; "
            "to train it in full, list it in `trainable`"
        )
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.max_norm is not None:
        return (
            "max_norm rewrites the weight in every forward, so that there is no fixed base to "
            "adapt; set max_norm=None after renormalising once"
        )
    return parametrizations.refusal(module, tensor)


def has_foreign_lora(module: nn.Module) -> bool:
    """Whether the module has an attribute ``lora`` that is not ours."""
    if "lora_active" in module.__dict__:
        return False
    # Not by `hasattr(module, …)`, which takes a module long to deny.
    return (
        "lora" in module._modules
        or "lora" in module._parameters
        or "lora" in module._buffers
        or "lora" in module.__dict__
        or hasattr(type(module), "lora")
    )


def largest_rank(weight: Tensor, bare: bool) -> int:
    """The full rank of the weight's matrix: a larger one would only waste parameters."""
    return min(matrix_shape(tuple(weight.shape), bare))


def base_class(module: nn.Module) -> type[nn.Module]:
    """The class that a module has, or had before an adapter was put on it."""
    cls = type(module)  # asked of the class, since a module is slow to say that it lacks something
    found: type[nn.Module] = getattr(cls, "_adapted_base", cls)
    return found


def path_of(module: nn.Module) -> str:
    """``"factorised"`` or ``"effective"``: the path that an adapter on this module takes."""
    forward = _factorised_forward(base_class(module))
    return "factorised" if forward is not None and _factorises(module, forward) else "effective"


def _factorises(module: Any, forward: Callable[[Any, Tensor], Tensor]) -> bool:
    # A weight that is no parameter is computed by a hook: only the effective path sees it.
    return "weight" in module._parameters and (forward is not _conv_forward or module.groups == 1)


def overrides(base: type[nn.Module]) -> dict[str, Any]:
    """What the adapted subclass of `base` defines besides its effective tensors."""
    if issubclass(base, nn.RNNBase):
        return {
            "_flat_weights": property(_effective_flat_weights, _keep_flat_weights),
            "_update_flat_weights": lambda self: None,
            "flatten_parameters": lambda self: None,
        }
    forward = _factorised_forward(base)
    return {} if forward is None else {"forward": _choose(base, forward)}


def _factorised_forward(base: type[nn.Module]) -> Callable[[Any, Tensor], Tensor] | None:
    forward = getattr(base, "forward", None)
    if "weight" in vars(base) or getattr(base, "parametrizations", None) is not None:
        return None  # parametrised: its weight is computed, read it as such
    if issubclass(base, nn.Linear) and forward is nn.Linear.forward:
        return _linear_forward
    if issubclass(base, nn.Embedding) and forward is nn.Embedding.forward:
        return _embedding_forward
    for conv in _CONVS:
        if issubclass(base, conv) and all(_inherits(base, conv, m) for m in _CONV_METHODS):
            return _conv_forward
    return None


def _inherits(base: type[nn.Module], torch_class: type[nn.Module], method: str) -> bool:
    return getattr(base, method) is getattr(torch_class, method)


def _choose(
    base: type[nn.Module], factorised: Callable[[Any, Tensor], Tensor]
) -> Callable[[Any, Tensor], Tensor]:
    base_forward: Any = base.forward

    def forward(self: Any, input: Tensor) -> Tensor:
        out: Tensor = (factorised if _factorises(self, factorised) else base_forward)(self, input)
        return out

    return forward


def _linear_forward(self: Any, x_BxI: Tensor) -> Tensor:
    weight, factors = self._parameters["weight"], self.factors("weight")
    low = _low_rank(factors)
    if low is not None and ops.applies(x_BxI, weight, low):
        return ops.linear(x_BxI, weight, self.bias, low)
    out_BxO: Tensor = F.linear(x_BxI, weight, self.bias)
    if factors is None:
        return out_BxO
    x_BxI = _drop(x_BxI, factors)
    low_BxO = _of_both(factors, lambda B, A: F.linear(F.linear(x_BxI, A), B))
    return _add(self, factors, out_BxO, low_BxO, (-1,))


def _conv_forward(self: Any, x_BIx: Tensor) -> Tensor:
    weight, factors = self._parameters["weight"], self.factors("weight")
    low = _low_rank(factors)
    if low is not None and convolution.applies(x_BIx, weight, low) and x_BIx.dim() == weight.dim():
        return _fused_conv(self, x_BIx, weight, low)
    out_BOx: Tensor = self._conv_forward(x_BIx, weight, self.bias)
    if factors is None:
        return out_BOx
    x_BIx = _drop(x_BIx, factors)
    ones = [1] * len(self.kernel_size)
    pointwise: Any = (F.conv1d, F.conv2d, F.conv3d)[len(ones) - 1]

    def product(lora_B: Tensor, lora_A: Tensor) -> Tensor:
        mid_BRx = self._conv_forward(x_BIx, lora_A.view(-1, *weight.shape[1:]), None)
        out: Tensor = pointwise(mid_BRx, lora_B.view(*lora_B.shape, *ones))
        return out

    low_BOx = _of_both(factors, product)
    return _add(self, factors, out_BOx, low_BOx, (-1, *ones))


def _fused_conv(self: Any, x: Tensor, weight: Tensor, low: LowRank) -> Tensor:
    """Padding that is not of zeros, or given in words, comes first."""
    padding = self.padding
    if self.padding_mode != "zeros" or isinstance(padding, str):
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        around = self._reversed_padding_repeated_twice
        x = F.pad(x, around, mode) if any(around) else x
        padding = (0,) * len(self.kernel_size)
    return convolution.convolution(x, weight, self.bias, low, (self.stride, padding, self.dilation))


def _low_rank(factors: Factors | None) -> LowRank | None:
    """What the fused functions take; ``None`` for DoRA, which is not a sum."""
    if factors is None or factors.magnitude is not None:
        return None
    dropout = factors.spec.dropout if factors.training else 0.0
    pair = factors.lora_A, factors.lora_B
    return LowRank(*pair, factors.start_A, factors.start_B, factors.spec.scaling, dropout)


def _embedding_forward(self: Any, index_Bx: Tensor) -> Tensor:
    factors: Factors | None = self.factors("weight")

    def look_up(table: Tensor) -> Tensor:
        return F.embedding(
            index_Bx, table, self.padding_idx, None, 2.0, self.scale_grad_by_freq, self.sparse
        )

    weight = self._parameters["weight"]
    out_BxO = look_up(weight)
    if factors is None:
        return out_BxO
    low_BxO = _of_both(factors, lambda B, A: look_up(B) @ A)
    if factors.magnitude is None:
        return out_BxO + factors.spec.scaling * low_BxO
    ratio = factors.row_scale(weight + factors.delta(weight.shape))
    return (out_BxO + factors.spec.scaling * low_BxO) * F.embedding(index_Bx, ratio[:, None])


def _of_both(factors: Factors, low: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """`low` of B and A, less that of their start where one is kept; the same sum at the start."""
    out = low(factors.lora_B, factors.lora_A)
    if factors.start_A is None or factors.start_B is None:
        return out
    return out - low(factors.start_B, factors.start_A)


def _drop(x: Tensor, factors: Factors) -> Tensor:
    p = factors.spec.dropout
    return F.dropout(x, p, factors.training) if p > 0 and factors.training else x


def _add(self: Any, factors: Factors, out: Tensor, low: Tensor, channel: tuple[int, ...]) -> Tensor:
    """out + s·low, or DoRA's form of it; exactly `out` while B is zero."""
    scaling = factors.spec.scaling
    if factors.magnitude is None:
        return torch.add(out, low, alpha=scaling)
    weight = self._parameters["weight"]
    ratio = factors.row_scale(weight + factors.delta(weight.shape)).view(channel)
    plain = out if self.bias is None else out - self.bias.view(channel)
    return out + (ratio - 1) * plain + scaling * ratio * low


def _effective_flat_weights(self: Any) -> list[Tensor]:
    return [_plain(getattr(self, name)) for name in self._flat_weights_names if hasattr(self, name)]


def _plain(weight: Tensor) -> Tensor:
    # The recurrent kernels take plain tensors; nobody else sees this list.
    return weight if isinstance(weight, nn.Parameter) else weight.as_subclass(Tensor)


def _keep_flat_weights(self: Any, value: list[Tensor]) -> None:
    """Torch assigns this list when weights move; ours is always computed."""
