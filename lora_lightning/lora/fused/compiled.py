r"""Adapted layers within `torch.compile`: the formulas of `fused.linear` in traceable operations.

.. math:: W' = \mathrm{cast}(W + s\,BA), \quad y = x W'^T + b, \quad \nabla x = g W', \quad
          \nabla A = s\,(g B)^T x, \quad \nabla B = s\,g^T (x A^T)

- Under autocast the frozen layer casts W in every step; here s·BA is added in the same kernel, so
  that the output and ∇x cost what they cost the frozen layer. W' is rounded once, as a weight that
  trains is.
- The gradients of the factors are one operator (`fused.kernels`), or the library's gradient of the
  whole weight where that is as fast.
- A compiler keeps what a product of the backward pass reads, and recomputes what only elementwise
  operations read. Behind a copy of it, which the compiler removes later, x is recomputed where the
  graph keeps what it is made of.

Legend of shapes: N rows, I in, O out, r rank.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_lightning.lora.fused.convolution import How, layer_gradients, run
from lora_lightning.lora.fused.plan import LowRank, limits, lowered, switches, transformed
from lora_lightning.lora.fused.thin_matmul import exact

Low = tuple[Tensor, Tensor, float]  # A, B, s
Found = tuple[Tensor | None, Tensor | None]  # the gradients of A and B

# Up to this rank a GPU computes W + s·BA as an elementwise function, in one kernel with the cast.
_ELEMENTWISE = 16


def applies(x: Tensor, weight: Tensor, low: LowRank) -> bool:
    """Whether this module computes the layer: within `torch.compile`, where its formulas hold."""
    # By the flag: Dynamo of torch 2.11 takes `is_exporting()` for true in any graph.
    if not torch.compiler.is_compiling() or torch.compiler._is_exporting_flag:
        return False
    if not switches.enabled or weight.requires_grad or low.start_A is not None or low.dropout:
        return False
    if x.is_nested or type(weight) not in (nn.Parameter, Tensor) or transformed():
        return False
    wanted = lowered(x)
    if wanted is not None:
        return weight.dtype == torch.float32 and x.dtype in (torch.float32, wanted)
    return x.dtype == weight.dtype and exact(weight) and not _few(x, weight)


def _few(x: Tensor, weight: Tensor) -> bool:
    """Whether W + s·BA, which nobody else needs, takes longer than the thin products."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    into, out = weight[0].numel(), len(weight)
    rows = x.numel() // weight.shape[1]
    # Not by comparing sizes, on which a compiled graph of any batch would be specialised.
    many = limits(x).compiled_many
    return statically_known_true(rows * (into + out) < many * into * out)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, low: LowRank) -> Tensor:
    """x (…, I) → (…, O) by W + s·BA and b; only where `applies` says so."""
    return _layer(x, weight, bias, low, None)


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, low: LowRank, how: How) -> Tensor:
    """x (N, I, …) → (N, O, …) without groups; only where `applies` says so."""
    return _layer(x, weight, bias, low, how)


def _layer(x: Tensor, weight: Tensor, bias: Tensor | None, low: LowRank, how: How | None) -> Tensor:
    dtype = lowered(x) or x.dtype
    bias = None if bias is None else bias.to(dtype)
    out: Tensor = _Layer.apply(
        x.to(dtype), weight, bias, low.lora_A, low.lora_B, low.scaling, how,
        switches.recompute,
    )  # fmt: skip
    return out


def effective(weight: Tensor, A: Tensor, B: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    """W + s·BA, rounded once to `dtype`; exactly W while B is zero."""
    matrix = weight.flatten(1)
    with torch.autocast(weight.device.type, enabled=False):
        if weight.device.type == "cpu" or len(A) > _ELEMENTWISE:
            out = torch.addmm(matrix, B, A, alpha=scaling)
        else:
            out = added(matrix, A, B, scaling)
        return out.to(dtype).view_as(weight)


def added(matrix: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """W + s·BA without a matrix product, which a compiler makes one kernel."""
    return torch.add(matrix, (B[:, :, None] * A).sum(1), alpha=scaling)


class _Layer(torch.autograd.Function):
    """The formulas of the module's docstring."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        scaling: float,
        how: How | None,
        recompute: bool,
    ) -> Tensor:
        used = effective(weight, A, B, scaling, x.dtype)
        ctx.how, ctx.scaling, ctx.recompute = how, scaling, recompute
        ctx.frozen_A = how is None and not ctx.needs_input_grad[3]
        # Uncast, W' is made again in the backward pass: the frozen layer keeps no copy of W either.
        ctx.keeps_used = weight.dtype != x.dtype
        kept = F.linear(x, A.to(x.dtype)) if ctx.frozen_A else x
        ctx.save_for_backward(kept, used if ctx.keeps_used else weight, A, B)
        return F.linear(x, used, bias) if how is None else run(x, used, bias, how)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, used, A, B = ctx.saved_tensors
        needs_x, _, needs_bias, needs_A, needs_B, *_ = ctx.needs_input_grad
        with torch.autocast(g.device.type, enabled=False):
            if not ctx.keeps_used:
                used = effective(used, A.clone(), B, ctx.scaling, g.dtype)
            if ctx.how is not None:
                low = A, B, ctx.scaling
                whole = partial(_projected, low=low) if _whole(A, B) else None
                grad_x, *found = layer_gradients(g, x, used, low, ctx.how, needs_x, whole)
            else:
                grad_x = g @ used if needs_x else None
                x = x.clone() if ctx.recompute else x
                found = [*_of_linear(g, x, (A, B, ctx.scaling), ctx.frozen_A, needs_A or needs_B)]
            channel = -1 if ctx.how is None else 1
            grad_bias = g.sum([d for d in range(g.dim()) if d != channel % g.dim()])
        return (
            grad_x,
            None,
            grad_bias if needs_bias else None,
            found[0] if needs_A else None,
            found[1] if needs_B else None,
            None,
            None,
            None,
        )


def _of_linear(g: Tensor, x: Tensor, low: Low, frozen_A: bool, wanted: bool) -> Found:
    """The gradients of A and B."""
    A, B, scaling = low
    if not wanted:
        return None, None
    g_NxO, x_NxI = g.reshape(-1, g.shape[-1]), x.reshape(-1, x.shape[-1])
    if frozen_A:  # x is h
        return None, (g_NxO.T @ x_NxI).to(B.dtype) * scaling
    if _whole(A, B):
        return _projected(g_NxO.T @ x_NxI, low)
    # Late: torch looks for the operator's source file among all modules, which takes 70 ms.
    from lora_lightning.lora.fused import kernels

    found: tuple[Tensor, Tensor] = kernels.thin_gradients(g_NxO, x_NxI, A, B, scaling)
    return found


def _projected(grad_W: Tensor, low: Low) -> Found:
    A, B, scaling = low
    grad_W = grad_W.to(A.dtype) * scaling
    return B.T @ grad_W, grad_W @ A.T


def _whole(A: Tensor, B: Tensor) -> bool:
    """Whether the gradient of the whole weight takes no longer than the thin products."""
    out, into = len(B), A.shape[1]
    return out * into <= limits(A).compiled_whole * (out + into)
