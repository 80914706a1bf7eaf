"""What decides one pair of factors, and the matrix in which a weight is seen."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass

import torch


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
    offset: bool = False  # the start's product is kept aside and subtracted
    xs: bool = False  # a core between frozen factors, see `lora_lightning.lora.xs`

    def generator(self) -> torch.Generator:
        """What the start is drawn with: one seed gives each tensor the same numbers everywhere."""
        name_hash = zlib.crc32(self.key.encode())
        return torch.Generator().manual_seed((self.seed * 0x9E3779B1 + name_hash) % 2**63)

    def trained(self, rows: int, columns: int) -> int:
        """How many numbers train on a matrix of this size."""
        plain = self.rank * (rows if self.freeze_a else rows + columns)
        return (self.rank**2 if self.xs else plain) + (rows if self.dora else 0)


def matrix_shape(shape: tuple[int, ...], bare: bool = False) -> tuple[int, int]:
    """The (rows, columns) in which a weight of this shape is seen: out × in·kernel.

    A bare parameter such as ``pos_embed`` (1, N, D) is seen without its leading ones.
    """
    while bare and len(shape) > 2 and shape[0] == 1:
        shape = shape[1:]
    return shape[0], math.prod(shape[1:])
