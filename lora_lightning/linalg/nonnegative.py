"""Non-negative matrix factorisation: `nmf`, and `semi_nmf` for signed matrices.

Written in torch, because a layer's inputs are on its device and the result initialises factors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lora_lightning.errors import DecompositionError
from lora_lightning.linalg.decompose import checked

LOOK = 10  # iterations between two evaluations of the loss
LOSSES = ("frobenius", "kullback-leibler")


class NMF(NamedTuple):
    """X ≈ W H.

    Attributes:
        W: (N, r) ≥ 0, the weights of the parts in each row.
        H: (r, D), the parts; ≥ 0 except in `semi_nmf`.
        losses: the loss at the start and every 10 iterations.
        iterations: their number.
        converged: whether the loss stopped falling before the iterations were used up.
    """

    W: Tensor
    H: Tensor
    losses: list[float]
    iterations: int
    converged: bool


@torch.no_grad()
def nmf(
    matrix: Tensor,
    rank: int,
    *,
    loss: str = "frobenius",
    max_iterations: int = 500,
    tolerance: float = 1e-4,
    seed: int = 0,
) -> NMF:
    r"""Factors W, H ≥ 0 with X ≈ WH, by multiplicative updates, which never increase the loss.

    Frobenius, :math:`\frac12\|X - WH\|_F^2`:
    :math:`H \leftarrow H \odot W^T X / W^T W H`; Kullback–Leibler,
    :math:`\sum X \log\frac{X}{WH} - X + WH`:
    :math:`H \leftarrow H \odot W^T\!\frac{X}{WH} / W^T 1`; W likewise. Lee & Seung 2001,
    "Algorithms for non-negative matrix factorization", NeurIPS 13.

    Args:
        matrix: X (N, D), no entry below 0.
        rank: r, at most min(N, D).
        loss: ``"frobenius"`` or ``"kullback-leibler"``.
        max_iterations: The largest number.
        tolerance: It ends when ten iterations lower the loss by less than this part of the first.
        seed: Of the starting factors.

    Raises:
        DecompositionError: a negative entry (`semi_nmf` takes them), an unknown loss, or see
            `lora_lightning.linalg.decompose.checked`.
    """
    if loss not in LOSSES:
        raise DecompositionError(f"loss must be one of {', '.join(LOSSES)}; got {loss!r}")
    x = checked(matrix, rank)
    if bool((x < 0).any()):
        raise DecompositionError(
            f"{int((x < 0).sum())} entries are below 0 (the least is {float(x.min()):g}), which "
            "non-negative parts cannot add up to; use semi_nmf, whose parts are signed"
        )
    tiny = torch.finfo(x.dtype).eps
    w, h = _random_start(x, rank, seed)
    update, measure = (_frobenius_update, _frobenius) if loss == "frobenius" else (_kl_update, _kl)

    def step() -> None:
        h.mul_(update(x, w, h, tiny))
        w.mul_(update(x.T, h.T, w.T, tiny).T)

    losses, done, converged = _iterate(
        step, lambda: measure(x, w @ h, tiny), max_iterations, tolerance
    )
    return NMF(w, h, losses, done, converged)


@torch.no_grad()
def semi_nmf(
    matrix: Tensor,
    rank: int,
    *,
    max_iterations: int = 500,
    tolerance: float = 1e-4,
    seed: int = 0,
) -> NMF:
    r"""Factors W ≥ 0 and a signed H with X ≈ WH, for signed matrices.

    :math:`H = (W^T W)^{+} W^T X` and :math:`W \leftarrow W \odot
    \sqrt{\frac{(XH^T)^+ + W (HH^T)^-}{(XH^T)^- + W (HH^T)^+}}`, with :math:`M^\pm = (|M| \pm M)/2`.
    Ding, Li & Jordan 2010, "Convex and semi-nonnegative matrix factorizations", TPAMI 32(1).

    Arguments and errors are those of `nmf`.
    """
    x = checked(matrix, rank)
    tiny = torch.finfo(x.dtype).eps
    # Ding et al. start from clusters and add 0.2, so that no entry is stuck at 0.
    w = _random_start(x.abs(), rank, seed)[0]
    w = w / w.mean().clamp_min(tiny) + 0.2
    h = x.new_zeros(rank, x.shape[1])

    def step() -> None:
        h.copy_(torch.linalg.pinv(w.T @ w) @ (w.T @ x))
        xh, hh = x @ h.T, h @ h.T
        above = _positive(xh) + w @ _positive(-hh)
        below = _positive(-xh) + w @ _positive(hh)
        w.mul_(((above + tiny) / (below + tiny)).sqrt())

    step()
    losses, done, converged = _iterate(
        step, lambda: _frobenius(x, w @ h, tiny), max_iterations, tolerance
    )
    h.copy_(torch.linalg.pinv(w.T @ w) @ (w.T @ x))
    return NMF(w, h, losses, done, converged)


def _iterate(
    step: Callable[[], None], measure: Callable[[], float], limit: int, tolerance: float
) -> tuple[list[float], int, bool]:
    """Losses, iterations, and whether the loss converged."""
    losses = [measure()]
    for done in range(1, limit + 1):
        step()
        if done % LOOK == 0 or done == limit:
            losses.append(measure())
            if losses[-2] - losses[-1] < tolerance * losses[0] or losses[-1] == 0:
                return losses, done, True
    return losses, limit, False


def _random_start(x: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """Factors whose product has X's mean; drawn on the CPU, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    scale = float((x.mean() / rank).clamp_min(0).sqrt())
    w, h = (
        scale * torch.rand(*shape, generator=generator, dtype=torch.float64, device="cpu").add_(0.1)
        for shape in ((len(x), rank), (rank, x.shape[1]))
    )
    return w.to(x), h.to(x)


def _frobenius_update(x: Tensor, w: Tensor, h: Tensor, tiny: float) -> Tensor:
    return (w.T @ x) / (w.T @ w @ h).clamp_min(tiny)


def _kl_update(x: Tensor, w: Tensor, h: Tensor, tiny: float) -> Tensor:
    return (w.T @ (x / (w @ h).clamp_min(tiny))) / w.sum(dim=0).clamp_min(tiny)[:, None]


def _frobenius(x: Tensor, product: Tensor, tiny: float) -> float:
    return 0.5 * float((x - product).double().square().sum())


def _kl(x: Tensor, product: Tensor, tiny: float) -> float:
    product = product.clamp_min(tiny)
    return float((torch.xlogy(x, x / product) - x + product).double().sum())


def _positive(x: Tensor) -> Tensor:
    return x.clamp_min(0)
