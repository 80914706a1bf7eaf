r"""The two products of an adapted layer with its factors: W', and the gradients of A and B.

.. math:: W' = W + s\,BA, \qquad \nabla A = s\,B^T g^T x, \quad \nabla B = s\,g^T x A^T

Legend of shapes: N rows, I in, O out, r rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora_lightning.lora.fused.plan import LowRank, limits
from lora_lightning.lora.fused.thin_matmul import across, along


def effective_weight(weight_OxI: Tensor, low: LowRank, dtype: torch.dtype | None = None) -> Tensor:
    """W' = W + s·BA, rounded once where its dtype is narrower; exactly W at the start."""
    A, B, start_A, start_B, s, _ = low
    if start_A is None or start_B is None:
        summed = torch.addmm(weight_OxI, B, A, alpha=s)
    else:
        product = B @ A
        product -= start_B @ start_A
        summed = torch.add(weight_OxI, product, alpha=s)
    return summed if dtype is None else summed.to(dtype)


def factor_gradients(
    g_NxO: Tensor,
    x_NxI: Tensor,
    low: LowRank,
    needs_B: bool,
    back_RxN: Tensor | None = None,
    h_RxN: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The gradients of A and B, in their own dtype, from that of the output.

    (s·gB)ᵀ and A xᵀ may be given where they are known; then the products stay thin.
    """
    A, B = low.lora_A, low.lora_B
    if back_RxN is None and whole_is_cheap(g_NxO, g_NxO.shape[0], B.shape[0], *A.shape):
        return of_whole(matmul(g_NxO.t(), x_NxI, A.dtype), low, needs_B)
    if back_RxN is None:
        back_RxN = across(narrow(B, low.scaling, g_NxO.dtype).t(), g_NxO)
    on_cpu = g_NxO.device.type == "cpu"
    grad_A = along(back_RxN, x_NxI).to(A.dtype) if on_cpu else matmul(back_RxN, x_NxI, A.dtype)
    if not needs_B:
        return grad_A, None
    if h_RxN is not None:
        return grad_A, gradient_B(g_NxO, h_RxN, B.dtype, low.scaling)
    h_RxN = across(narrow(A, low.scaling, x_NxI.dtype), x_NxI)
    return grad_A, gradient_B(g_NxO, h_RxN, B.dtype)


def gradient_B(g_NxO: Tensor, h_RxN: Tensor, dtype: torch.dtype, scaling: float = 1.0) -> Tensor:
    """The gradient of B from h = A xᵀ."""
    if g_NxO.device.type == "cpu":
        grad_B = along(h_RxN, g_NxO).t().to(dtype)
    else:
        grad_B = matmul(g_NxO.t(), h_RxN.t(), dtype)
    return grad_B if scaling == 1 else grad_B * scaling


def whole_is_cheap(g: Tensor, rows: int, out: int, rank: int, into: int) -> bool:
    """Whether the gradient of the whole weight takes less time than the thin products do."""
    limit = limits(g)
    less = out * into < 2 * (rank + limit.reading) * (out + into)
    return less or rows * out * into < limit.cheap


def of_whole(grad_OxI: Tensor, low: LowRank, needs_B: bool = True) -> tuple[Tensor, Tensor | None]:
    """The gradients of A and B from that of the whole weight."""
    A, B, s = low.lora_A, low.lora_B, low.scaling
    # With β = 0 the first argument gives the shape alone.
    grad_A = torch.addmm(A, B.t(), grad_OxI, beta=0, alpha=s)
    return grad_A, torch.addmm(B, grad_OxI, A.t(), beta=0, alpha=s) if needs_B else None


def matmul(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """The product in a dtype that may be wider than that of the two."""
    if a.dtype == dtype:
        return torch.mm(a, b)
    if a.is_cuda and dtype == torch.float32 and torch.version.hip is None:
        return torch.mm(a, b, out_dtype=dtype)  # what the device has summed, not rounded
    return torch.mm(a, b).to(dtype)


def narrow(factor: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    """s times the factor, rounded once to this dtype."""
    if scaling == 1:
        return factor.to(dtype)
    return torch.mul(factor, scaling, out=torch.empty_like(factor, dtype=dtype))
