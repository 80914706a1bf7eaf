"""Factorised forwards of adapted layers: s·B(Ax) is added to Wx.

Each replaces the forward of torch's layer of that name, whose own output it adds to; by
`lora_lightning.lora.fused` where that supports the input.

Shapes below: x_BxI (any leading dimensions, in), lora_A (r, in·kernel), lora_B (out, r).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_lightning.lora.factors import Factors
from lora_lightning.lora.fused import compiled, convolution
from lora_lightning.lora.fused import linear as ops
from lora_lightning.lora.fused.plan import LowRank
from lora_lightning.lora.precision import floating


def linear_forward(self: Any, x_BxI: Tensor) -> Tensor:
    """Forward of `nn.Linear`."""
    weight, factors = self._parameters["weight"], self.factors("weight")
    low = _low_rank(factors)
    if low is not None and compiled.applies(x_BxI, weight, low):
        return compiled.linear(x_BxI, weight, self.bias, low)
    if low is not None and ops.applies(x_BxI, weight, low):
        return ops.linear(x_BxI, weight, _bias(self), low)
    out_BxO: Tensor = F.linear(x_BxI, weight, self.bias)
    if factors is None:
        return out_BxO
    x_BxI = _drop(x_BxI, factors)
    low_BxO = _of_both(factors, weight, lambda B, A: F.linear(F.linear(x_BxI, A), B))
    return _add(self, factors, out_BxO, low_BxO, (-1,))


def conv_forward(self: Any, x_BIx: Tensor) -> Tensor:
    """Forward of `nn.Conv1d`, `nn.Conv2d` and `nn.Conv3d`."""
    weight, factors = self._parameters["weight"], self.factors("weight")
    low = _low_rank(factors)
    if low is not None and x_BIx.dim() == weight.dim():
        for module in (compiled, convolution):
            if module.applies(x_BIx, weight, low):
                return _fused_conv(module, self, x_BIx, weight, low)
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

    low_BOx = _of_both(factors, weight, product)
    return _add(self, factors, out_BOx, low_BOx, (-1, *ones))


def _fused_conv(module: Any, self: Any, x: Tensor, weight: Tensor, low: LowRank) -> Tensor:
    """The fused convolution, after padding in another mode than zeros or "same"."""
    padding = self.padding
    if self.padding_mode != "zeros" or isinstance(padding, str):
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        around = self._reversed_padding_repeated_twice
        x = F.pad(x, around, mode) if any(around) else x
        padding = (0,) * len(self.kernel_size)
    how = self.stride, padding, self.dilation
    out: Tensor = module.convolution(x, weight, _bias(self), low, how)
    return out


def _low_rank(factors: Factors | None) -> LowRank | None:
    """The factors for the fused functions; ``None`` for DoRA, which is not a sum."""
    if factors is None or factors._parameters["magnitude"] is not None:
        return None
    spec, starts = factors.spec, factors._buffers
    dropout = spec.dropout if factors.training else 0.0
    return LowRank(*factors.pair(), starts["start_A"], starts["start_B"], spec.scaling, dropout)


def _bias(layer: Any) -> Tensor | None:
    """The layer's bias, by the table unless it is computed: an attribute takes longer."""
    bias: Tensor | None
    try:
        bias = layer._parameters["bias"]
    except KeyError:
        bias = layer.bias
    return bias


def embedding_forward(self: Any, index_Bx: Tensor) -> Tensor:
    """Forward of `nn.Embedding`."""
    factors: Factors | None = self.factors("weight")
    if factors is None:
        return nn.Embedding.forward(self, index_Bx)
    weight = self._parameters["weight"]
    # Gradients of factors are dense also where the table's are sparse: A's could be nothing else.
    sparse = self.sparse and weight.requires_grad
    out_BxO = F.embedding(index_Bx, weight, sparse=sparse)
    low_BxO = _of_both(factors, weight, lambda B, A: F.embedding(index_Bx, B) @ A)
    out_BxO = out_BxO + factors.spec.scaling * low_BxO
    if factors.magnitude is not None:
        ratio = factors.row_scale(weight + factors.delta(weight.shape))
        out_BxO = (out_BxO * F.embedding(index_Bx, ratio[:, None])).to(weight.dtype)
    if self.padding_idx is None and not self.scale_grad_by_freq:
        return out_BxO
    share_Bx1 = _gradient_shares(self, index_Bx).to(weight.dtype)
    return out_BxO.detach() + share_Bx1 * (out_BxO - out_BxO.detach())


def _gradient_shares(self: Any, index_Bx: Tensor) -> Tensor:
    """By how much each item's gradient counts: not at all where it is padding; by frequency.

    torch does so on the way to the table, whose gradient is not that of A.
    """
    share_Bx = torch.ones(index_Bx.shape, device=index_Bx.device)
    if self.scale_grad_by_freq:
        counts = share_Bx.new_zeros(self.num_embeddings)
        counts.index_add_(0, index_Bx.reshape(-1), share_Bx.reshape(-1))
        share_Bx = 1 / counts[index_Bx]
    if self.padding_idx is not None:
        share_Bx = share_Bx * (index_Bx != self.padding_idx)
    return share_Bx[..., None]


def _of_both(factors: Factors, weight: Tensor, low: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """`low` of B and A in the weight's dtype, less that of the initial factors, where kept."""
    out = low(factors.lora_B.to(weight.dtype), factors.lora_A.to(weight.dtype))
    if factors.start_A is None or factors.start_B is None:
        return out
    return out - low(factors.start_B.to(weight.dtype), factors.start_A.to(weight.dtype))


def _drop(x: Tensor, factors: Factors) -> Tensor:
    p = factors.spec.dropout
    return F.dropout(x, p, factors.training) if p > 0 and factors.training else x


def _add(self: Any, factors: Factors, out: Tensor, low: Tensor, channel: tuple[int, ...]) -> Tensor:
    """out + s·low, or DoRA's form of it, in the dtype of out; exactly `out` while B is zero."""
    scaling = factors.spec.scaling
    if factors.magnitude is None:
        if torch.compiler.is_compiling():  # inductor forgets alpha: pytorch/pytorch#167313
            return out + scaling * low
        return torch.add(out, low, alpha=scaling)
    weight = floating(self._parameters["weight"])
    ratio = factors.row_scale(weight + factors.delta(weight.shape)).view(channel)
    plain = out if self.bias is None else out - self.bias.view(channel).to(out.dtype)
    # Rounded after the difference, of which little would be left in half precision.
    return out + (ratio - 1).to(out.dtype) * plain + (scaling * ratio).to(out.dtype) * low
