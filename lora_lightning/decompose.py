"""Decompositions of low-rank products. Spectra are taken from the factors, never from BA."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def spectrum(lora_B: Tensor, lora_A: Tensor, scaling: float = 1.0) -> Tensor:
    r"""Singular values of :math:`s\,BA`, largest first, shape (r,).

    With :math:`B = Q_B R_B` and :math:`A^T = Q_A R_A` they are those of the r × r matrix
    :math:`R_B R_A^T`: cost O((in + out) r²). Shapes: lora_B (out, r), lora_A (r, in).
    """
    r_B = torch.linalg.qr(lora_B.float(), mode="r").R
    r_A = torch.linalg.qr(lora_A.float().T, mode="r").R
    values: Tensor = torch.linalg.svdvals(r_B @ r_A.T)
    return abs(scaling) * values


def effective_rank(singular_values: Tensor) -> float:
    r"""Exponential of the entropy of the normalised spectrum (Roy & Vetterli 2007).

    Between 1 and r for a non-zero spectrum; 0 where all values are zero.
    """
    total = singular_values.sum()
    if total <= 0:
        return 0.0
    p = singular_values / total
    return float(torch.exp(-(p * torch.log(p.clamp_min(1e-30))).sum()))
