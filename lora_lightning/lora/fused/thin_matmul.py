"""Products with a side of rank r, on as many threads as torch may use.

A CPU's BLAS computes a product whose result has r rows on one thread. Here the rows are divided.
The long dimension is the last one, (r, N), which is ten times as fast as the other way round.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# Numbers of x and g that one thread works on at a time in the backward pass, and the fewest rows
# that keep matrix products efficient.
_PIECE, _FEWEST = 2**19, 256
# Multiplications below which dividing a thin product takes longer than it saves.
_WORTH = 2**20
ALL = slice(None)  # the rows of a single piece


def exact(weight: Tensor) -> bool:
    """Whether a small product survives in a sum with the weight."""
    return weight.dtype in (torch.float32, torch.float64)


def _threads(rows: Tensor) -> int:
    """The number of threads that this module divides the work between; 0: not at all.

    Other devices do that themselves, and sums in half precision, which would be rounded once for
    each part, are not divided.
    """
    return torch.get_num_threads() if rows.device.type == "cpu" and exact(rows) else 0


def pieces(rows: Tensor, width: int) -> list[slice]:
    """Even slices of rows that fit into a processor's cache with those of x, to read g once."""
    count, workers = len(rows), _threads(rows)
    if not workers:
        return [ALL]
    number = round(count * (rows.shape[1] + width) / (_PIECE * workers))
    number = min(number, count // (_FEWEST * workers))
    if number < 2:
        return [ALL]
    step = math.ceil(count / number / workers) * workers
    return [slice(i, i + step) for i in range(0, count, step)]


def cut(rows: Tensor, at: slice) -> Tensor:
    """These rows; without a view, which takes time, where it is all of them."""
    return rows if at is ALL else rows[at]


def _parts(rows: Tensor, rank: int) -> int:
    """The number of parts that the rows of a thin product are divided into.

    In parts the product takes two thirds of the time on two threads.
    """
    workers = _threads(rows)
    if workers < 2 or rows.numel() * rank < _WORTH:
        return 1
    return math.gcd(len(rows), workers)


def across(factor_RxI: Tensor, rows_NxI: Tensor) -> Tensor:
    """The factor times rowsᵀ, (r, N)."""
    if rows_NxI.device.type != "cpu":  # (N, r) in memory, as odd N would misalign the other
        return (rows_NxI @ factor_RxI.T).T
    parts = _parts(rows_NxI, len(factor_RxI))
    if parts < 2:
        return factor_RxI @ rows_NxI.T
    divided = rows_NxI.view(parts, -1, rows_NxI.shape[1])
    thin = torch.bmm(factor_RxI.expand(parts, *factor_RxI.shape), divided.transpose(1, 2))
    return thin.transpose(0, 1).flatten(1)


def along(thin_RxN: Tensor, rows_NxO: Tensor, total_RxO: Tensor | None = None) -> Tensor:
    """The sum over rows, (r, O), added in place to `total` where it is given."""
    parts = _parts(rows_NxO, len(thin_RxN))
    if parts < 2:
        return thin_RxN @ rows_NxO if total_RxO is None else total_RxO.addmm_(thin_RxN, rows_NxO)
    thin = thin_RxN.view(len(thin_RxN), parts, -1).transpose(0, 1)
    found = torch.bmm(thin, rows_NxO.view(parts, -1, rows_NxO.shape[1])).sum(0)
    return found if total_RxO is None else total_RxO.add_(found)


def as_rows(kept: Sequence[Tensor], lead: torch.Size) -> list[tuple[Tensor, bool]] | None:
    """The inputs of an elementwise function with output (*lead, ·), each as rows, and whether it is
    a single row, shared by all; ``None`` where one is neither (a gate (B, 1, I))."""
    parts = []
    for t in kept:
        if t.dim() and t.shape[:-1] == lead:
            parts.append((t.reshape(-1, t.shape[-1]), False))
        elif all(size == 1 for size in t.shape[:-1]):
            parts.append((t.reshape(t.shape[-1:]), True))
        else:
            return None
    return parts
