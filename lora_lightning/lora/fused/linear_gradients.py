"""Gradients of x, A and B of an adapted linear layer, for `lora_lightning.lora.fused.linear`.

Legend of shapes: N rows, I in, O out, r rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lora_lightning.lora.fused.factor_products import (
    effective_weight,
    factor_gradients,
    gradient_B,
    matmul,
    narrow,
    of_whole,
    whole_is_cheap,
)
from lora_lightning.lora.fused.thin_matmul import across, along, cut

Found = tuple[Tensor | None, Tensor | None, Tensor | None]


def at_once(
    ctx: Any, g_NxO: Tensor, weight: Tensor, h_RxN: Tensor | None, kept: Sequence[Tensor]
) -> Found:
    """The gradients of x (as rows), A and B in the fewest steps."""
    plan, (needs_x, _, _, needs_A, needs_B, *_) = ctx.plan, ctx.needs_input_grad
    low = plan.low
    grad_x: Tensor | None = None
    grad_A: Tensor | None = None
    grad_B: Tensor | None = None
    back_RxN: Tensor | None = None
    if plan.whole and needs_x:
        used = effective_weight(weight, low) if plan.dtype is None else weight
        grad_x = matmul(g_NxO, used, ctx.dtype)
    elif not plan.whole:
        back_RxN = across(narrow(low.lora_B, low.scaling, g_NxO.dtype).t(), g_NxO)
        if needs_x:
            grad_x = torch.mm(g_NxO, weight).addmm_(back_RxN.t(), plan.cast(low.lora_A))
    if needs_A:
        x_NxI = plan.input_rows(kept)
        grad_A, grad_B = factor_gradients(g_NxO, x_NxI, low, needs_B, back_RxN, h_RxN)
    elif needs_B and h_RxN is not None:
        grad_B = gradient_B(g_NxO, h_RxN, low.lora_B.dtype, low.scaling)
    return grad_x, grad_A, grad_B


def in_pieces(
    ctx: Any,
    g_NxO: Tensor,
    parts: list[slice],
    weight: Tensor,
    h_RxN: Tensor | None,
    kept: Sequence[Tensor],
) -> Found:
    """The same by pieces that fit into a processor's cache, or with dropout."""
    plan, (needs_x, _, _, needs_A, needs_B, *_) = ctx.plan, ctx.needs_input_grad
    low, A, B = plan.low, plan.low.lora_A, plan.low.lora_B
    low_A, back_RxO = plan.cast(A), (plan.cast(B) * low.scaling).T
    used = effective_weight(weight, low) if plan.whole and needs_x else weight
    grad_A: Tensor | None = None
    grad_Bt: Tensor | None = None
    grad_x = g_NxO.new_empty(len(g_NxO), A.shape[1]) if needs_x else None
    read = plan.reader(kept, ctx.shape) if needs_A else None
    mask = plan.mask(g_NxO, ctx.shape) if low.dropout else None
    small = plan.whole and needs_A and whole_is_cheap(g_NxO, g_NxO.shape[0], B.shape[0], *A.shape)
    grad_W = torch.zeros_like(weight) if small else None
    for at in parts:
        g_i = cut(g_NxO, at)
        if read is not None:
            x_i = read(at) if mask is None else read(at) * cut(mask, at)
        if grad_x is not None:
            grad_x_i = torch.mm(g_i, used, out=cut(grad_x, at))
        if grad_W is not None:
            grad_W.addmm_(g_i.T, x_i)
            continue
        back_i = across(back_RxO, g_i)
        if needs_A:
            grad_A = along(back_i, x_i, grad_A)
        if needs_B:
            h_i = across(low_A, x_i) if h_RxN is None else h_RxN[:, at]
            grad_Bt = along(h_i, g_i, grad_Bt)
        if grad_x is not None and mask is not None:
            grad_x_i.addcmul_(back_i.T @ low_A, cut(mask, at))
        elif grad_x is not None and not plan.whole:
            grad_x_i.addmm_(back_i.T, low_A)
    if grad_W is not None:
        return (grad_x, *of_whole(grad_W, low, needs_B))
    return (
        grad_x,
        None if grad_A is None else grad_A.to(A.dtype),
        None if grad_Bt is None else grad_Bt.T.to(B.dtype) * low.scaling,
    )
