"""The factors themselves: their shapes, their product, and DoRA's magnitudes."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.initialize import INITIALIZERS


@dataclass(frozen=True)
class FactorSpec:
    """What decides one pair of factors: sizes, scaling and options."""

    rank: int
    alpha: float
    scaling: float
    dropout: float = 0.0
    dora: bool = False
    freeze_a: bool = False
    init: str = "zero"
    seed: int = 0
    key: str = ""  # the tensor's full name: each tensor draws other numbers from one seed


def matrix_shape(shape: tuple[int, ...], bare: bool = False) -> tuple[int, int]:
    """The (rows, columns) in which a weight of this shape is seen: out × in·kernel.

    A bare parameter such as ``pos_embed`` (1, N, D) is seen without its leading ones.
    """
    while bare and len(shape) > 2 and shape[0] == 1:
        shape = shape[1:]
    return shape[0], math.prod(shape[1:])


class Factors(nn.Module):
    r"""The factors of one adapter on one tensor.

    .. math:: \Delta W = s\,B A, \qquad W' = W + \Delta W

    and with DoRA (arXiv:2402.09353) :math:`W' = m \odot (W + \Delta W) / \lVert W + \Delta W
    \rVert_{row}`, the norm taken as a constant in the backward pass as the paper advises.

    Shapes: ``lora_A`` (r, in·kernel), ``lora_B`` (out, r), ``magnitude`` (out,).
    """

    def __init__(self, weight: Tensor, matrix: tuple[int, int], spec: FactorSpec):
        super().__init__()
        rows, columns = matrix
        self.spec = spec
        self.matrix = matrix
        self.lora_A = nn.Parameter(_empty_like(weight, spec.rank, columns), not spec.freeze_a)
        self.lora_B = nn.Parameter(_empty_like(weight, rows, spec.rank))
        self.magnitude: nn.Parameter | None
        self.register_parameter("magnitude", None)
        if spec.dora:
            self.magnitude = nn.Parameter(self._row_norm(weight.detach()))
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Draw the starting factors again: the same seed gives the same numbers."""
        if self.lora_A.is_meta:
            return
        name_hash = zlib.crc32(self.spec.key.encode())
        generator = torch.Generator().manual_seed((self.spec.seed * 0x9E3779B1 + name_hash) % 2**63)
        INITIALIZERS[self.spec.init](self.lora_A, self.lora_B, generator)

    @torch.no_grad()
    def renorm(self, weight: Tensor) -> None:
        """Take DoRA's magnitudes from a new base weight, unless training has begun (B ≠ 0)."""
        if self.magnitude is not None and not self.lora_B.any():
            self.magnitude.copy_(self._row_norm(weight))

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        # A module injected on the meta device has no numbers until it is materialised.
        was_meta = self.lora_A.is_meta
        out = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if was_meta:
            self.reset()
        return out

    def delta(self, shape: torch.Size | tuple[int, ...]) -> Tensor:
        """ΔW = s·BA in the weight's own shape, never in autocast's lower precision."""
        product: Tensor = self._product(self.lora_A)
        return product.view(shape)

    def _product(self, lora_A: Tensor) -> Tensor:
        device = lora_A.device.type
        if device != "meta" and torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return self._product(lora_A)
        product: Tensor = self.spec.scaling * (self.lora_B @ lora_A)
        return product

    def effective(self, weight: Tensor, dropout: bool = True) -> Tensor:
        """W' from W. In training with dropout, whole columns of A are dropped for this read."""
        lora_A: Tensor = self.lora_A
        if dropout and self.training and self.spec.dropout > 0:
            keep = torch.ones_like(lora_A[:1])
            lora_A = lora_A * nn.functional.dropout(keep, self.spec.dropout)
        out: Tensor = weight + self._product(lora_A).view(weight.shape)
        if self.magnitude is None:
            return out
        scaled: Tensor = out.reshape(self.matrix) * self.row_scale(out)[:, None]
        return scaled.view(weight.shape)

    def row_scale(self, summed: Tensor) -> Tensor:
        """DoRA's factor m / ‖W + ΔW‖ for each row of `summed`, shape (out,)."""
        assert self.magnitude is not None
        ratio: Tensor = self.magnitude / self._row_norm(summed.detach())
        return ratio

    def _row_norm(self, weight: Tensor) -> Tensor:
        norm: Tensor = torch.linalg.vector_norm(weight.reshape(self.matrix), dim=1)
        return norm.clamp_min(torch.finfo(norm.dtype).tiny)

    def extra_repr(self) -> str:
        """Rank, alpha and options, for ``print(model)``."""
        s = self.spec
        flags = "".join(f", {f}" for f, on in (("dora", s.dora), ("freeze_a", s.freeze_a)) if on)
        return f"{self.matrix[0]}×{self.matrix[1]}, rank={s.rank}, scaling={s.scaling:.4g}{flags}"


def _empty_like(weight: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=weight.dtype, device=weight.device)
