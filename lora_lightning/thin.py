"""Products with a side of rank r, on as many threads as torch may use.

A CPU's BLAS gives a product whose result has r rows to one thread. Here the rows are divided. The
long dimension is the last one, (r, N), ten times as fast there as the other way round.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lora_lightning.plan import exact

# Numbers of x and g that one thread works on at a time in the backward pass, and the fewest rows
# that keep matrix products efficient.
_PIECE, _FEWEST = 2**19, 256


def _threads(rows: Tensor) -> int:
    """Between which this module divides the work itself; 0: not at all.

    On other devices that is the library's affair; and sums in half precision, which would be
    rounded once for each part, are left whole.
    """
    return torch.get_num_threads() if rows.device.type == "cpu" and exact(rows) else 0


def pieces(rows: Tensor, width: int) -> list[slice]:
    """Even slices of rows that a processor's cache holds with those of x: g is read once."""
    count, workers = len(rows), _threads(rows)
    if not workers:
        return [slice(0, count)]
    number = round(count * (rows.shape[1] + width) / (_PIECE * workers))
    number = max(min(number, count // (_FEWEST * workers)), 1)
    step = max(math.ceil(count / number / workers), 1) * workers
    return [slice(i, i + step) for i in range(0, count, step)]


def _split(rows: Tensor) -> Tensor:
    """(N, ·) → (parts, N / parts, ·), for as many threads as divide N.

    BLAS gives a product whose result has r rows to one thread: in parts it takes two thirds of the
    time on two.
    """
    parts = math.gcd(len(rows), _threads(rows)) if len(rows) and _threads(rows) else 1
    return rows.view(parts, len(rows) // parts, rows.shape[1])


def across(factor_RxI: Tensor, rows_NxI: Tensor) -> Tensor:
    """The factor times rowsᵀ, (r, N)."""
    parts = _split(rows_NxI)
    if len(parts) < 2:
        return factor_RxI @ rows_NxI.T
    thin = torch.bmm(factor_RxI.expand(len(parts), *factor_RxI.shape), parts.transpose(1, 2))
    return thin.transpose(0, 1).flatten(1)


def add_along(total_RxO: Tensor, thin_RxN: Tensor, rows_NxO: Tensor) -> None:
    """Add the sum over rows."""
    parts = _split(rows_NxO)
    if len(parts) < 2:
        total_RxO.addmm_(thin_RxN, rows_NxO)
    else:
        thin = thin_RxN.view(len(thin_RxN), len(parts), -1).transpose(0, 1)
        total_RxO += torch.bmm(thin, parts).sum(0)
