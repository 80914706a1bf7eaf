"""`StreamingSVD`: the leading right singular vectors of rows that come in batches."""

from __future__ import annotations

import torch
from torch import Tensor

from lora_lightning.errors import DecompositionError
from lora_lightning.linalg.decompose import SVD, checked, explained_variance, truncated_svd

EXACT_UP_TO = 256  # smaller side of the rows from which their SVD is randomised


class StreamingSVD:
    r"""SVD of all rows seen so far, in O(r · D) memory.

        svd = StreamingSVD(8)
        for rows in batches:           # (N, D)
            svd.update(rows)
            if svd.converged(0.99):
                break
        svd.components                 # (8, D)

    Each update decomposes the kept :math:`diag(S)\,V^T` with the new rows below it and keeps the
    r + `spare` largest. That is exact while no more directions are seen than are kept. Levy &
    Lindenbaum 2000, "Sequential Karhunen–Loeve basis extraction"; Ross et al. 2008, "Incremental
    learning for robust visual tracking". Rows are not centred: a linear layer does not centre
    them either.

    Args:
        rank: r, the directions that are asked for.
        spare: Further directions to keep, so that one that grows later is not lost.

    Raises:
        DecompositionError: a value is below its least.
    """

    def __init__(self, rank: int, spare: int = 8):
        if rank < 1 or spare < 0:
            raise DecompositionError(f"rank must be at least 1 and spare 0; got {rank}, {spare}")
        self.rank, self.spare = rank, spare
        self.rows, self.energy = 0, 0.0
        self._s: Tensor | None = None
        self._vh: Tensor | None = None
        self._moved = 0.0  # overlap of the leading subspace with that of the previous update

    @torch.no_grad()
    def update(self, rows: Tensor) -> None:
        """Add rows (N, D).

        Raises:
            DecompositionError: NaN or infinity, no rows, or another D than before.
        """
        rows = checked(rows, what="a batch of rows")
        before, stacked = self._vh, rows
        if before is not None and self._s is not None:
            if before.shape[1] != rows.shape[1]:
                raise DecompositionError(
                    f"rows of {rows.shape[1]} numbers after rows of {before.shape[1]}"
                )
            stacked = torch.cat([self._s[:, None] * before, rows])
        self.rows, self.energy = self.rows + len(rows), self.energy + float((rows**2).sum())
        keep = min(self.rank + self.spare, *stacked.shape)
        _, self._s, self._vh = _leading(stacked, keep)
        self._moved = 0.0 if before is None else _overlap(before, self._vh, self.rank)

    def converged(self, overlap: float) -> bool:
        r"""Whether the last update rotated the leading subspace by less than this.

        The overlap of two subspaces is :math:`\|V_{old} V_{new}^T\|_F^2 / r`, 1 where they are the
        same. False before the second update.
        """
        return self._moved >= overlap

    @property
    def components(self) -> Tensor:
        """(r, D), orthonormal rows, the largest singular value first; fewer if D or N is."""
        return self._known()[1][: self.rank]

    @property
    def singular_values(self) -> Tensor:
        """(r,), largest first."""
        return self._known()[0][: self.rank]

    @property
    def explained_variance(self) -> Tensor:
        """Part of all rows' energy along each component, (r,) in float64."""
        return explained_variance(self.singular_values, self.energy)

    def _known(self) -> tuple[Tensor, Tensor]:
        if self._s is None or self._vh is None:
            raise DecompositionError("no rows were seen yet: call update(rows) first")
        return self._s, self._vh


def _leading(rows: Tensor, keep: int) -> SVD:
    """SVD by the smaller side: of many short rows through their QR; of long ones at random."""
    if len(rows) > 2 * rows.shape[1]:
        rows = torch.linalg.qr(rows, mode="r").R
    return truncated_svd(rows, keep, randomised=min(rows.shape) > EXACT_UP_TO)


def _overlap(before: Tensor, now: Tensor, rank: int) -> float:
    before, now = before[:rank], now[:rank]
    if len(before) < len(now):
        return 0.0
    return float((before @ now.T).square().sum() / len(now))
