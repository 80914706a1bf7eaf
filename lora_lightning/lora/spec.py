"""`FactorSpec`: sizes and options of one pair of factors; matrix shapes of weights."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class FactorSpec:
    """Sizes, scaling and options of one pair of factors."""

    rank: int
    alpha: float
    scaling: float
    dropout: float = 0.0
    dora: bool = False
    freeze_a: bool = False
    init: str = "zero"
    seed: int = 0
    key: str = ""  # the tensor's full name: each tensor draws its own numbers from one seed
    offset: bool = False  # the initial product is kept and subtracted
    xs: bool = False  # a core between frozen factors, see `lora_lightning.lora.xs`

    def generator(self) -> torch.Generator:
        """The generator of the initial factors: one seed gives the same numbers on all machines."""
        name_hash = zlib.crc32(self.key.encode())
        return torch.Generator().manual_seed((self.seed * 0x9E3779B1 + name_hash) % 2**63)

    def trains(self, key: str) -> bool:
        """Whether the factor of this name is trained while the adapter is active."""
        return not (self.freeze_a and key == "lora_A")

    def cost(self, rows: int, columns: int) -> int:
        """Trained parameters for each rank: out + in·kernel, or out where A is frozen."""
        return replace(self, rank=1, dora=False).trained(rows, columns)

    def trained(self, rows: int, columns: int) -> int:
        """Number of trained parameters on a matrix of this size."""
        plain = self.rank * (rows if self.freeze_a else rows + columns)
        return (self.rank**2 if self.xs else plain) + (rows if self.dora else 0)


def matrix_shape(shape: tuple[int, ...], bare: bool = False) -> tuple[int, int]:
    """The (rows, columns) of a weight of this shape as a matrix: out × in·kernel.

    A bare parameter such as ``pos_embed`` (1, N, D) is taken without its leading ones.
    """
    while bare and len(shape) > 2 and shape[0] == 1:
        shape = shape[1:]
    return shape[0], math.prod(shape[1:])
