r"""Convolutions with low-rank factors, by the rules of `lora_lightning.lora.fused.linear`.

.. math:: y = (W + s\,BA) * x + b

A (r, I·k) is a convolution to r channels, B (O, r) a pointwise one. The gradients of the factors
come from the library's gradient G of the whole weight, :math:`\nabla A = s B^T G`,
:math:`\nabla B = s\,G A^T`, where the weight is small; else from thin convolutions. x is kept, as
torch keeps it for a frozen convolution.

Legend of shapes: N images (or signals), I and O channels, r rank, P positions.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_lightning.lora.fused import linear as ops
from lora_lightning.lora.fused.factor_products import effective_weight, of_whole, whole_is_cheap
from lora_lightning.lora.fused.plan import LowRank, lowered
from lora_lightning.lora.fused.thin_matmul import exact

How = tuple[tuple[int, ...], ...]  # stride, padding, dilation


def applies(x: Tensor, weight: Tensor, low: LowRank) -> bool:
    """Whether `convolution` supports this input; the plain formula always does."""
    return exact(weight) and not low.dropout and ops.applies(x, weight, low)


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, low: LowRank, how: How) -> Tensor:
    """x (N, I, …) → (N, O, …) without groups; only where `applies` says so."""
    if _is_matrix(x, weight, how):
        return ops.linear(x, weight.flatten(1), bias, low, channels=True)
    dtype = lowered(x)
    with_casts = dtype is not None and ops.autocast_off(x)
    try:
        if torch.is_grad_enabled():
            return _Convolution.apply(x, weight, bias, low.lora_A, low.lora_B, low, how, dtype)  # type: ignore[no-any-return]
        return _forward(x, weight, bias, low, how, dtype)[0]
    finally:
        if with_casts:
            torch.set_autocast_enabled(x.device.type, True)


def _is_matrix(x: Tensor, weight: Tensor, how: How) -> bool:
    """Whether it is a matrix product of contiguous rows: pointwise and channels last.

    Only where torch's own output would have that layout as well.
    """
    plain = all(k == 1 for k in (*weight.shape[2:], *how[0])) and not any(how[1])
    last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return plain and last and not x.is_contiguous()


def run(x: Tensor, weight: Tensor, bias: Tensor | None, how: How) -> Tensor:
    """Torch's own convolution with this weight."""
    functions: Any = (F.conv1d, F.conv2d, F.conv3d)
    out: Tensor = functions[weight.dim() - 3](x, weight, bias, *how)
    return out


def layer_gradients(
    g: Tensor,
    x: Tensor,
    weight: Tensor,
    low: tuple[Tensor, Tensor, float],
    how: How,
    of_x: bool,
    projected: Callable[[Tensor], tuple[Tensor | None, Tensor | None]] | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of x, A and B; `projected` gives the last two from that of the whole weight.

    Without it they are computed by thin convolutions.
    """
    A, B, scaling = low
    grad_x, grad_W = _gradients_of(g, x, weight, how, of_x, projected is not None)
    if projected is not None and grad_W is not None:
        return grad_x, *projected(grad_W.flatten(1).to(A.dtype))
    low_A = A.to(x.dtype).view(-1, *weight.shape[1:])
    grad_A, grad_B = _thin(g, x, low_A, B.to(x.dtype), how)
    return grad_x, grad_A.to(A.dtype) * scaling, grad_B.to(B.dtype) * scaling


def _gradients_of(
    g: Tensor, x: Tensor, weight: Tensor, how: How, of_x: bool, of_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of x and of the weight, by torch."""
    none = [0] * (x.dim() - 2)
    wanted = [of_x, of_weight, False]
    found = torch.ops.aten.convolution_backward(g, x, weight, None, *how, False, none, 1, wanted)
    return found[0], found[1]


def _effective(weight: Tensor, low: LowRank, dtype: torch.dtype | None = None) -> Tensor:
    """W' in the weight's own memory format, without a copy of it."""
    if weight.is_contiguous() or not weight.movedim(1, -1).is_contiguous():
        return effective_weight(weight.flatten(1), low, dtype).view_as(weight)
    start_A = low.start_A
    moved = low._replace(
        lora_A=_moved(low.lora_A, weight),
        start_A=None if start_A is None else _moved(start_A, weight),
    )
    rows = effective_weight(weight.movedim(1, -1).flatten(1), moved, dtype)
    return rows.view(weight.movedim(1, -1).shape).movedim(-1, 1)


def _moved(A: Tensor, weight: Tensor) -> Tensor:
    """A with its columns in the order of such a weight's memory."""
    return A.view(-1, *weight.shape[1:]).movedim(1, -1).flatten(1)


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    low: LowRank,
    how: How,
    dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The output, and x and W' in the dtype of the product."""
    used = _effective(weight, low, dtype)
    if dtype is not None:
        x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
    return run(x, used, bias, how), x, used


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
        dtype: torch.dtype | None,
    ) -> Tensor:
        ctx.low, ctx.how, ctx.dtypes = low, how, (x.dtype, dtype)
        out, x, used = _forward(x, weight, bias, low, how, dtype)
        # W' is computed again where it is not the cast weight, which torch keeps as well.
        ctx.save_for_backward(x, weight if dtype is None else used, A, B)
        return out

    @staticmethod
    @ops.gradients
    def backward(ctx: Any, g: Tensor) -> Any:
        low, how, needs, (of_x, dtype) = ctx.low, ctx.how, ctx.needs_input_grad, ctx.dtypes
        x, used, A, B = ctx.saved_tensors
        positions = g.numel() // max(B.shape[0], 1)
        whole = whole_is_cheap(g, positions, B.shape[0], *A.shape)
        if dtype is None and needs[0]:
            used = _effective(used, low)
        found = layer_gradients(
            g, x, used, (A, B, low.scaling), how, needs[0],
            partial(of_whole, low=low) if whole else None,
        )  # fmt: skip
        grad_x, grad_A, grad_B = found
        return (
            None if grad_x is None else grad_x.to(of_x),
            None,
            g.transpose(0, 1).flatten(1).sum(1) if needs[2] else None,
            grad_A if needs[3] else None,
            grad_B if needs[4] else None,
            None,
            None,
            None,
        )


def _thin(g: Tensor, x: Tensor, kernel: Tensor, B: Tensor, how: How) -> tuple[Tensor, Tensor]:
    """The gradients of A and B without that of the whole weight, not scaled yet."""
    h_NRP, g_NOP = run(x, kernel, None, how).flatten(2), g.flatten(2)
    grad_B = torch.bmm(h_NRP, g_NOP.transpose(1, 2)).sum(0).T
    back = (B.T @ g_NOP).view(g.shape[0], -1, *g.shape[2:])
    grad_A = _gradients_of(back, x, kernel, how, False, True)[1]
    assert grad_A is not None
    return grad_A.flatten(1), grad_B
