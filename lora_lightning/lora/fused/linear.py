r"""Linear layers with low-rank factors, at little more than the cost of the frozen layer.

.. math:: y = x (W + s\,BA)^T + b, \qquad
          \nabla A = s\,(g B)^T x, \quad \nabla B = s\,g^T (x A^T), \quad \nabla x = g (W + s\,BA)

with g the gradient of y. The plain formula under autograd allocates several tensors of the size of
x and y and keeps x. Here

- nothing of that size is allocated: the product of the factors is added to W with many rows (an
  O × I matrix is small beside N × O), or to y in place with few;
- x is not kept where it can be recomputed from what the graph keeps (`fused.recompute`), nor where
  A is frozen;
- the thin products are arranged so that the long dimension is the last one, (r, N): ten times as
  fast on a CPU as the other way round.

Autocast, dropout (its mask is redrawn from its seed), and subtracted initial factors are supported.
`fused` switches this module off. Legend of shapes: N rows, I in, O out, r rank.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lora_lightning.errors import AdapterError
from lora_lightning.lora.fused.plan import (
    LowRank,
    Plan,
    adds_exactly,
    is_captured,
    lowered,
    switches,
)
from lora_lightning.lora.fused.thin_matmul import across, along, cut, pieces
from lora_lightning.lora.precision import factor_dtype

# A thin product of rank r takes as long as r + 12 rows of a large one (measured on a CPU, rank 4 to
# 64, linear layers and convolutions: x and g must be read whatever the rank).
_READING = 12


def applies(x: Tensor, weight: Tensor, low: LowRank) -> bool:
    """Whether this module supports this input; the plain formula always does."""
    if not switches.enabled or weight.requires_grad or x.is_nested or x.is_meta:
        return False
    # Before the size is asked for, on which a compiled graph of any batch would be specialised.
    if torch.compiler.is_compiling() or torch._C._is_tracing():
        return False
    if low.dropout and is_captured(x):
        return False
    out, into = weight.shape[:2]
    if x.numel() * (into + out) < switches.smallest * into:
        return False
    if torch._C._functorch.maybe_current_level() is not None or torch.overrides.has_torch_function(
        (x, weight)
    ):
        return False
    if torch.autograd.forward_ad._current_level >= 0:
        return False
    wanted = lowered(x)
    if low.start_A is not None and (low.dropout or not adds_exactly(x, weight)):
        return False  # the two products must cancel at the start: see `LowRank.added_to`
    if wanted is not None:
        return weight.dtype == torch.float32 and x.dtype in (torch.float32, wanted)
    return x.dtype == weight.dtype and low.lora_A.dtype == factor_dtype(weight)


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, low: LowRank, channels: bool = False
) -> Tensor:
    """x (…, I) → (…, O) by W + s·BA and b; only where `applies` says so.

    Args:
        x: The input.
        weight: W, (O, I).
        bias: b, (O,).
        low: The factors.
        channels: x is (B, I, …) and the output (B, O, …), with the channels last in memory.
    """
    plan = Plan.of(x, weight, low, channels)
    if not torch.is_grad_enabled():
        return _linear(x, plan.cast(weight), bias, plan)[0]
    out: Tensor = _Linear.apply(x, weight, bias, low.lora_A, low.lora_B, plan)
    return out


def _linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, plan: Plan
) -> tuple[Tensor, Tensor | None]:
    """The output, and h = A xᵀ (r, N) where it was computed."""
    low, x = plan.low, plan.cast(x)
    # The base's own function: while B is zero the output is the base's, bit for bit.
    out = plan.base(x, low.added_to(weight) if plan.whole else weight, bias)
    h_RxN = None
    if plan.frozen_A or not plan.whole:
        h_RxN = across(plan.cast(low.lora_A), plan.dropped(plan.rows(x)))
    if h_RxN is not None and not plan.whole:
        rows_NxO = plan.rows(out)
        rows_NxO.addmm_(h_RxN.T, plan.cast(low.lora_B).T, alpha=low.scaling)
        layout = torch.channels_last if plan.channels else torch.contiguous_format
        if not out.is_contiguous(memory_format=layout):  # another layout: rows are copies
            out.copy_(plan.unrolled(rows_NxO, out))
    return out, h_RxN


def gradients(backward: Callable[[Any, Tensor], Any]) -> Callable[[Any, Tensor], Any]:
    """Decorator of a backward pass that cannot be differentiated or batched; it runs in the
    dtypes of its forward pass.

    Raises:
        AdapterError: with ``create_graph=True`` or ``is_grads_batched=True``.
    """

    @functools.wraps(backward)
    def checked(ctx: Any, g: Tensor) -> Any:
        batched = torch._C._functorch.is_legacy_batchedtensor(g)
        if batched or torch.is_grad_enabled():
            asked = (
                "is_grads_batched=True asks for many gradients at once"
                if batched
                else "create_graph=True asks for gradients of gradients"
            )
            raise AdapterError(
                f"{asked}, which the fused path of adapted layers does not have: run the forward "
                "pass inside `with lora_lightning.fused(False):` (under activation checkpointing "
                "the backward pass too)"
            )
        if not torch.is_autocast_enabled(g.device.type):
            return backward(ctx, g)
        with torch.autocast(g.device.type, enabled=False):
            return backward(ctx, g)

    return checked


class _Linear(torch.autograd.Function):
    """The gradients of the module's docstring."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, plan: Plan
    ) -> Tensor:
        ctx.shape, ctx.dtype = x.shape, x.dtype
        weight = plan.cast(weight)
        out, h_RxN = _linear(x, weight, bias, plan)
        plan.keep(ctx, x, weight, A, B, h_RxN)
        # For some shapes torch's output is a view, on which no activation could work in place.
        return torch.ops.aten._unsafe_view.default(out, out.shape) if out._is_view() else out

    @staticmethod
    @gradients
    def backward(ctx: Any, g: Tensor) -> Any:
        plan, (needs_x, _, needs_bias, needs_A, needs_B, _) = ctx.plan, ctx.needs_input_grad
        weight, A, B, h_RxN, *kept = ctx.saved_tensors
        low_A, g_NxO = plan.cast(A), plan.rows(g)
        back_RxO = (plan.cast(B) * plan.low.scaling).T
        used = plan.low.added_to(weight) if plan.whole and needs_x else weight
        grad_A: Tensor | None = None
        grad_Bt: Tensor | None = None
        grad_x = g.new_empty(len(g_NxO), A.shape[1]) if needs_x else None
        read = plan.reader(kept, ctx.shape) if needs_A else None
        mask = plan.mask(g, ctx.shape) if plan.low.dropout else None
        small = plan.whole and needs_A and is_small(weight, len(A))
        grad_W = torch.zeros_like(weight) if small else None
        for at in pieces(g_NxO, A.shape[1]):
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
            grad_A = back_RxO @ grad_W
            grad_Bt = low_A @ grad_W.T if needs_B else None
        return (
            None if grad_x is None else plan.unrolled(grad_x, g).to(ctx.dtype),
            None,
            g_NxO.sum(0) if needs_bias else None,
            None if grad_A is None else grad_A.to(A.dtype),
            None if grad_Bt is None else grad_Bt.T.to(B.dtype) * plan.low.scaling,
            None,
        )


def is_small(weight: Tensor, rank: int) -> bool:
    """Whether the gradient of the whole weight takes less time than the thin products do."""
    return weight.numel() < 2 * (rank + _READING) * (len(weight) + weight[0].numel())
