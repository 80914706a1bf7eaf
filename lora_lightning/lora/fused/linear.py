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
from lora_lightning.lora.fused.factor_products import effective_weight
from lora_lightning.lora.fused.linear_gradients import at_once, in_pieces
from lora_lightning.lora.fused.plan import (
    LowRank,
    Plan,
    is_captured,
    limits,
    lowered,
    switches,
    transformed,
)
from lora_lightning.lora.fused.thin_matmul import ALL, across, exact, pieces
from lora_lightning.lora.precision import factor_dtype
from lora_lightning.lora.sharding import is_sharded


def applies(x: Tensor, weight: Tensor, low: LowRank) -> bool:
    """Whether this module supports this input; the plain formula always does."""
    if not switches.enabled or weight.requires_grad or x.is_nested or x.is_meta:
        return False
    # Before the size is asked for, on which a compiled graph of any batch would be specialised.
    if torch.compiler.is_compiling() or torch._C._is_tracing():
        return False
    wanted, smallest = lowered(x), switches.smallest
    if smallest is None:
        smallest = limits(x, wanted).small
    if smallest:
        out, into = weight.shape[:2]
        if x.numel() * (into + out) < smallest * into:
            return False
    if transformed() or torch.overrides.has_torch_function((x, weight)) or is_sharded(weight):
        return False
    if low.dropout and is_captured(x):
        return False  # a graph would replay one seed
    if low.start_A is not None and (low.dropout or not exact(weight)):
        return False  # the two products must cancel at the start: see `effective_weight`
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
    plan, kept = Plan.of(x, weight, low, channels)
    with_casts = plan.dtype is not None and autocast_off(x)
    try:
        if torch.is_grad_enabled():
            return _Linear.apply(x, weight, bias, low.lora_A, low.lora_B, plan, kept)  # type: ignore[no-any-return]
        return _linear(*_prepared(x, weight, bias, plan), plan)[0]
    finally:
        if with_casts:
            torch.set_autocast_enabled(x.device.type, True)


def autocast_off(x: Tensor) -> bool:
    """Switch autocast off, whose casts are made here; whether it was on."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind):
        return False
    torch.set_autocast_enabled(kind, False)  # the context manager takes much longer
    return True


def _prepared(
    x: Tensor, weight: Tensor, bias: Tensor | None, plan: Plan
) -> tuple[Tensor, Tensor, Tensor | None]:
    """x, the weight that it is multiplied by, and b, in the dtype of the product."""
    dtype = plan.dtype
    used = effective_weight(weight, plan.low, dtype) if plan.whole else plan.cast(weight)
    if dtype is None:
        return x, used, bias
    return x.to(dtype), used, None if bias is None else bias.to(dtype)


def _linear(
    x: Tensor, used: Tensor, bias: Tensor | None, plan: Plan
) -> tuple[Tensor, Tensor | None]:
    """The output, and h = A xᵀ (r, N) where it was computed."""
    # The base's own function: while B is zero the output is the base's, bit for bit.
    out = plan.base(x, used, bias)
    if plan.whole and not plan.frozen_A:
        return out, None
    h_RxN = across(plan.cast(plan.low.lora_A), plan.dropped(plan.rows(x)))
    if not plan.whole:
        rows_NxO = plan.rows(out)
        rows_NxO.addmm_(h_RxN.T, plan.cast(plan.low.lora_B).T, alpha=plan.low.scaling)
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
        if torch.is_grad_enabled():
            raise _refusal("create_graph=True asks for gradients of gradients")
        if torch._C._functorch.is_legacy_batchedtensor(g):
            raise _refusal("is_grads_batched=True asks for many gradients at once")
        if not autocast_off(g):
            return backward(ctx, g)
        try:
            return backward(ctx, g)
        finally:
            torch.set_autocast_enabled(g.device.type, True)

    return checked


def _refusal(asked: str) -> AdapterError:
    return AdapterError(
        f"{asked}, which the fused path of adapted layers does not have: run the forward pass "
        "inside `with lora_lightning.fused(False):` (under activation checkpointing the backward "
        "pass too)"
    )


class _Linear(torch.autograd.Function):
    """The gradients of the module's docstring."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        plan: Plan,
        kept: tuple[Tensor, ...] | None,
    ) -> Tensor:
        ctx.plan, ctx.shape, ctx.dtype = plan, x.shape, x.dtype
        x, used, bias = _prepared(x, weight, bias, plan)
        out, h_RxN = _linear(x, used, bias, plan)
        if not ctx.needs_input_grad[3]:
            kept = ()
        elif kept is None:
            kept = (x,)
        # W' is computed again where it is not the cast weight, which torch keeps as well.
        ctx.save_for_backward(weight if plan.dtype is None else used, A, B, h_RxN, *kept)
        # For some shapes torch's output is a view, on which no activation could work in place.
        return torch.ops.aten._unsafe_view.default(out, out.shape) if out._is_view() else out

    @staticmethod
    @gradients
    def backward(ctx: Any, g: Tensor) -> Any:
        plan, needs = ctx.plan, ctx.needs_input_grad
        weight, A, _, h_RxN, *kept = ctx.saved_tensors
        g_NxO = plan.rows(g)
        parts = pieces(g_NxO, A.shape[1])
        if parts[0] is ALL and not plan.low.dropout:
            grad_x, grad_A, grad_B = at_once(ctx, g_NxO, weight, h_RxN, kept)
        else:
            grad_x, grad_A, grad_B = in_pieces(ctx, g_NxO, parts, weight, h_RxN, kept)
        if grad_x is not None:
            grad_x = plan.unrolled(grad_x, g).to(ctx.dtype)
        return grad_x, None, g_NxO.sum(0) if needs[2] else None, grad_A, grad_B, None, None
