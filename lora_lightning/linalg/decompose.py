"""SVD and QR of matrices, and estimates of their rank.

Matrices are (rows, columns). Whatever the input's precision, sums are taken in float32 or better.
`linalg.streaming_svd` has the SVD of a stream of batches, `linalg.nonnegative` the NMF. The
spectrum of a low-rank product is computed from its factors, never from BA.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lora_lightning.errors import DecompositionError
from lora_lightning.linalg.torch_settings import forked_rng

OVERSAMPLING = 10  # directions beyond those asked for, Halko et al. 2011, section 1.3


class SVD(NamedTuple):
    """M ≈ U diag(S) Vh: U (rows, r), S (r,) largest first, Vh (r, columns)."""

    U: Tensor
    S: Tensor
    Vh: Tensor

    def product(self) -> Tensor:
        """U diag(S) Vh, (rows, columns)."""
        return (self.U * self.S) @ self.Vh

    def halves(self, scaling: float = 1.0) -> tuple[Tensor, Tensor]:
        """(B, A) that share the singular values evenly, so that s·BA is the product."""
        root = (self.S / scaling).sqrt()
        return self.U * root, root[:, None] * self.Vh


def checked(matrix: Tensor, rank: int | None = None, what: str = "the matrix") -> Tensor:
    """The matrix in float32, or float64 if it is, checked for decompositions.

    Raises:
        DecompositionError: it is empty, not a matrix, or holds NaN or infinity; `rank` is below 1
            or above its smaller side.
    """
    if matrix.ndim != 2 or 0 in matrix.shape:
        raise DecompositionError(
            f"{what} has shape {tuple(matrix.shape)}; expected (rows, columns), none of them 0"
        )
    if not matrix.is_floating_point():
        raise DecompositionError(
            f"{what} has dtype {matrix.dtype}; expected floating-point numbers"
        )
    if rank is not None and not 1 <= rank <= min(matrix.shape):
        raise DecompositionError(
            f"{what} of shape {tuple(matrix.shape)} has ranks 1 to {min(matrix.shape)}, got {rank}"
        )
    if not bool(matrix.isfinite().all()):
        raise DecompositionError(
            f"{what} holds {int((~matrix.isfinite()).sum())} values that are NaN or infinite; look "
            "at the weights or the inputs that it was made of"
        )
    return matrix if matrix.dtype == torch.float64 else matrix.float()


@torch.no_grad()
def truncated_svd(
    matrix: Tensor,
    rank: int | None = None,
    *,
    randomised: bool = False,
    power_iterations: int = 4,
    seed: int = 0,
) -> SVD:
    r"""The `rank` largest singular values of a matrix and their vectors.

    .. math:: M \approx U\,diag(S)\,V^T, \qquad U^T U = V^T V = I .

    Of all matrices of this rank the product is nearest to M (Eckart & Young 1936). Signs are such
    that the largest entry of each column of U is positive, so that they do not depend on the
    machine. A constant or singular matrix is no special case: singular values are then 0.

    Args:
        matrix: (rows, columns).
        rank: r; None: all min(rows, columns).
        randomised: Look for them in the image of r + 10 random vectors (Halko, Martinsson & Tropp
            2011, arXiv:0909.4061): O(rows · columns · r) in place of O(rows · columns ·
            min(rows, columns)), and exact to rounding only where the spectrum falls off.
        power_iterations: Of the randomised one; more of them are more exact.
        seed: Of its random vectors.

    Raises:
        DecompositionError: see `checked`.
    """
    matrix = checked(matrix, rank)
    rank = min(matrix.shape) if rank is None else rank
    if randomised and rank + OVERSAMPLING < min(matrix.shape):
        with forked_rng(seed):
            u, s, v = torch.svd_lowrank(matrix, rank + OVERSAMPLING, power_iterations)
        vh = v.mH
    else:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    u, s, vh = u[:, :rank], s[:rank], vh[:rank]
    sign = signs(u)
    return SVD(u * sign, s, vh * sign[:, None])


def signs(u: Tensor) -> Tensor:
    """1 or -1 for each column: the sign of its largest entry."""
    largest = u.gather(0, u.abs().argmax(dim=0, keepdim=True))[0]
    return torch.where(largest < 0, -1.0, 1.0).to(u.dtype)


@torch.no_grad()
def pivoted_qr(matrix: Tensor, rank: int | None = None) -> tuple[Tensor, Tensor]:
    r"""Q (rows, r) with orthonormal columns and R (r, columns), so that M ≈ QR.

    Columns are taken largest first (Businger & Golub 1965; LAPACK's ``geqp3``, by SciPy), which
    without the truncation gives M exactly, and with it keeps what the largest columns span. R is
    in M's own order of columns, so it is not triangular.

    Raises:
        DecompositionError: see `checked`.
    """
    from scipy.linalg import qr

    matrix = checked(matrix, rank)
    q, r, order = qr(matrix.cpu().double().numpy(), mode="economic", pivoting=True)
    unordered = torch.from_numpy(r)[:, torch.from_numpy(order).argsort()]
    return torch.from_numpy(q)[:, :rank].to(matrix), unordered[:rank].to(matrix)


@torch.no_grad()
def spectrum(lora_B: Tensor, lora_A: Tensor, scaling: float = 1.0) -> Tensor:
    r"""Singular values of :math:`s\,BA`, largest first, shape (r,).

    With :math:`B = Q_B R_B` and :math:`A^T = Q_A R_A` they are those of the r × r matrix
    :math:`R_B R_A^T`: cost O((in + out) r²). Shapes: lora_B (out, r), lora_A (r, in).
    """
    r_B = torch.linalg.qr(lora_B.float(), mode="r").R
    r_A = torch.linalg.qr(lora_A.float().T, mode="r").R
    values: Tensor = torch.linalg.svdvals(r_B.double() @ r_A.T.double())
    return abs(scaling) * values.float()


@torch.no_grad()
def product_svd(lora_B: Tensor, lora_A: Tensor) -> SVD:
    """`truncated_svd` of BA from its factors, at O((in + out) r²); of rank r.

    Raises:
        DecompositionError: see `checked`.
    """
    q_B, r_B = torch.linalg.qr(checked(lora_B, what="lora_B"))
    q_A, r_A = torch.linalg.qr(checked(lora_A, what="lora_A").T)
    # In float64, since TF32 would leave three digits of a product that stands for BA.
    core = truncated_svd(r_B.double() @ r_A.T.double())
    found = q_B.double() @ core.U, core.S, core.Vh @ q_A.T.double()
    return SVD(*(part.to(q_B.dtype) for part in found))


# ---- estimates of the rank ------------------------------------------------------------------


def effective_rank(singular_values: Tensor) -> float:
    r"""Exponential of the entropy of the normalised spectrum (Roy & Vetterli 2007).

    Between 1 and r for a non-zero spectrum; 0 where all values are zero.
    """
    total = singular_values.sum()
    if total <= 0:
        return 0.0
    p = singular_values / total
    return float(torch.exp(-(p * torch.log(p.clamp_min(1e-30))).sum()))


def explained_variance(singular_values: Tensor, total: float | Tensor | None = None) -> Tensor:
    """Part of the energy (the sum of squares) that each direction holds; 0 where there is none.

    Args:
        singular_values: (r,).
        total: The whole energy, where these are not all values; None: they are.
    """
    squares = singular_values.double() ** 2
    whole = squares.sum() if total is None else torch.as_tensor(total).to(squares)
    return squares / whole if whole > 0 else torch.zeros_like(squares)


def energy_rank(singular_values: Tensor, energy: float, total: float | Tensor | None = None) -> int:
    """The smallest number of directions with this part of the energy; 0 where there is none.

    Raises:
        DecompositionError: `energy` is not in (0, 1].
    """
    if not 0 < energy <= 1:
        raise DecompositionError(f"energy is a part of the whole, in (0, 1]; got {energy}")
    held = explained_variance(singular_values, total).cumsum(0)
    if held[-1] == 0:
        return 0
    # Against rounding of the sum: all of the energy is reached with the last direction.
    return min(int((held < energy * (1 - 1e-12)).sum()) + 1, len(held))


def optimal_hard_threshold(singular_values: Tensor, shape: tuple[int, int]) -> float:
    r"""Singular values up to this are noise, if entries carry independent noise of one variance.

    .. math:: \tau = \omega(\beta)\, median(\sigma), \qquad \omega(\beta) \approx
        0.56\beta^3 - 0.95\beta^2 + 1.82\beta + 1.43

    with β = rows / columns ≤ 1. Gavish & Donoho 2014, "The optimal hard threshold for singular
    values is 4/√3", arXiv:1305.5870 (eq. 5, unknown noise).

    Args:
        singular_values: All min(rows, columns) of them.
        shape: (rows, columns).

    Raises:
        DecompositionError: these are not all of them; the median would be another.
    """
    if len(singular_values) != min(shape):
        raise DecompositionError(
            f"the threshold needs all {min(shape)} singular values, got {len(singular_values)}"
        )
    beta = min(shape) / max(shape)
    omega = 0.56 * beta**3 - 0.95 * beta**2 + 1.82 * beta + 1.43
    # The mean of the two middle ones; torch's median takes the lower.
    ordered = singular_values.double().sort().values
    middle = (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
    return omega * float(middle)
