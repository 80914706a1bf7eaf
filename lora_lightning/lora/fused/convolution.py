r"""Convolutions with low-rank factors, by the rules of `lora_lightning.lora.fused.linear`.

.. math:: y = (W + s\,BA) * x + b

A (r, I·k) is a convolution to r channels, B (O, r) a pointwise one. The gradients of the factors
come from the library's gradient G of the whole weight, :math:`\nabla A = s B^T G`,
:math:`\nabla B = s\,G A^T`, where the weight is small; else from thin convolutions. x is kept, as
torch keeps it for a frozen convolution.

Legend of shapes: N images (or signals), I and O channels, r rank, P positions.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_lightning.lora.fused import linear as ops
from lora_lightning.lora.fused.plan import LowRank, adds_exactly

How = tuple[tuple[int, ...], ...]  # stride, padding, dilation


def applies(x: Tensor, weight: Tensor, low: LowRank) -> bool:
    """Whether `convolution` supports this input; the plain formula always does."""
    return adds_exactly(x, weight) and not low.dropout and ops.applies(x, weight, low)


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, low: LowRank, how: How) -> Tensor:
    """x (N, I, …) → (N, O, …) without groups; only where `applies` says so."""
    if _is_matrix(x, weight, how):
        return ops.linear(x, weight.flatten(1), bias, low, channels=True)
    if not torch.is_grad_enabled():
        return _run(x, low.added_to(weight.flatten(1)).view_as(weight), bias, how)
    found: Tensor = _Convolution.apply(x, weight, bias, low.lora_A, low.lora_B, low, how)
    return found


def _is_matrix(x: Tensor, weight: Tensor, how: How) -> bool:
    """Whether it is a matrix product of contiguous rows: pointwise and channels last.

    Only where torch's own output would have that layout as well.
    """
    plain = all(k == 1 for k in (*weight.shape[2:], *how[0])) and not any(how[1])
    last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return plain and last and not x.is_contiguous()


def _run(x: Tensor, weight: Tensor, bias: Tensor | None, how: How) -> Tensor:
    functions: Any = (F.conv1d, F.conv2d, F.conv3d)
    out: Tensor = functions[weight.dim() - 3](x, weight, bias, *how)
    return out


def gradients_of(
    g: Tensor, x: Tensor, weight: Tensor, how: How, of_x: bool, of_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of x and of the weight, by torch."""
    none = [0] * (x.dim() - 2)
    wanted = [of_x, of_weight, False]
    found = torch.ops.aten.convolution_backward(g, x, weight, None, *how, False, none, 1, wanted)
    return found[0], found[1]


class _Convolution(torch.autograd.Function):
    """The gradients of the module's docstring."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        low: LowRank,
        how: How,
    ) -> Tensor:
        ctx.low, ctx.how = low, how
        ctx.save_for_backward(x, weight, A, B)
        return _run(x, low.added_to(weight.flatten(1)).view_as(weight), bias, how)

    @staticmethod
    @ops.gradients
    def backward(ctx: Any, g: Tensor) -> Any:
        low, how, needs = ctx.low, ctx.how, ctx.needs_input_grad
        x, weight, A, B = ctx.saved_tensors
        small = ops.is_small(weight, len(A))
        used = low.added_to(weight.flatten(1)).view_as(weight)
        grad_x, whole = gradients_of(g, x, used, how, needs[0], small)
        if whole is not None:
            grad_A, grad_B = B.T @ whole.flatten(1), whole.flatten(1) @ A.T
        else:
            grad_A, grad_B = thin(g, x, A.view(-1, *weight.shape[1:]), B, how)
        grad_bias = g.transpose(0, 1).flatten(1).sum(1) if needs[2] else None
        scaled = [
            grad * low.scaling if need else None
            for grad, need in ((grad_A, needs[3]), (grad_B, needs[4]))
        ]
        return grad_x, None, grad_bias, *scaled, None, None


def thin(g: Tensor, x: Tensor, kernel: Tensor, B: Tensor, how: How) -> tuple[Tensor, Tensor]:
    """The gradients of A and B without G, not scaled yet."""
    h_NRP, g_NOP = _run(x, kernel, None, how).flatten(2), g.flatten(2)
    grad_B = torch.bmm(h_NRP, g_NOP.transpose(1, 2)).sum(0).T
    back = (B.T @ g_NOP).view(g.shape[0], -1, *g.shape[2:])
    grad_A = gradients_of(back, x, kernel, how, False, True)[1]
    assert grad_A is not None
    return grad_A.flatten(1), grad_B
