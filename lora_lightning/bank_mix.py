"""`Mix`: the values of one tensor of the model that differ between the items of a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_lightning.bank_layout import WHOLE, Layout
from lora_lightning.errors import AdapterError


@dataclass(frozen=True)
class Part:
    r"""What one adapter does to one tensor W: replace it, or

    .. math:: W' = c \odot (W + B A)

    with the scaling folded into B, and with c (out,) where the adapter has DoRA's magnitudes.
    """

    lora_A: Tensor | None = None
    lora_B: Tensor | None = None
    scale: Tensor | None = None
    full: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Memory that it takes."""
        tensors = (self.lora_A, self.lora_B, self.scale, self.full)
        return sum(t.nbytes for t in tensors if t is not None)

    def value(self, raw: Tensor) -> Tensor:
        """W' in full."""
        if self.full is not None:
            return self.full
        assert self.lora_A is not None and self.lora_B is not None
        summed = raw.reshape(len(self.lora_B), -1) + self.lora_B @ self.lora_A
        return (summed if self.scale is None else self.scale[:, None] * summed).view(raw.shape)


@dataclass
class Mix:
    """One tensor for n items, each with its own adapter; n = 1: all items have the same.

    Shapes: ``raw`` the tensor's own; ``lora_A`` (n, r, in·kernel), ``lora_B`` (n, out, r),
    ``scale`` (n, out), ``full`` (n, …). Ranks below r are filled up with zeros.
    """

    path: str
    raw: Tensor
    n: int
    layouts: Mapping[int, Layout] = field(default_factory=dict)
    lora_A: Tensor | None = None
    lora_B: Tensor | None = None
    scale: Tensor | None = None
    full: Tensor | None = None
    # In a probe: is told of every use, and then the raw tensor is used.
    watch: Callable[[Mix, Any, Tensor | None], None] | None = None

    @classmethod
    def of(
        cls,
        path: str,
        raw: Tensor,
        parts: Sequence[Part | None],
        layouts: Mapping[int, Layout],
    ) -> Mix:
        """Stack the parts of the items; ``None``: the source's own tensor."""
        mix = cls(path, raw, len(parts), layouts)
        given = [p for p in parts if p is not None]
        if any(p.full is not None for p in given):
            mix.full = torch.stack([raw.detach() if p is None else p.value(raw) for p in parts])
            return mix
        mix.lora_A = _stack([p and p.lora_A for p in parts], raw)
        mix.lora_B = _stack([p and p.lora_B for p in parts], raw)
        if any(p.scale is not None for p in given):
            assert mix.lora_B is not None
            ones = mix.lora_B.new_ones(mix.lora_B.shape[1])
            mix.scale = torch.stack([ones if p is None or p.scale is None else p.scale for p in parts])
        return mix

    @property
    def is_bare(self) -> bool:
        """Whether the factors see the tensor as another matrix than a layer's weight is."""
        return self.lora_B is not None and self.lora_B.shape[1] != len(self.raw)

    def where(self, x: Tensor) -> Layout:
        """The layout of this input of the layer.

        Raises:
            AdapterError: no such input was seen in the probe, or it cannot be n items.
        """
        if self.n == 1:
            return WHOLE
        layout = self.layouts.get(x.dim())
        if layout is None or not layout.fits(x, self.n):
            raise AdapterError(
                f"{self.path}: where the {self.n} items lie in an input of shape {tuple(x.shape)} "
                f"is not known ({layout or 'none of that many dimensions was seen'}). Call "
                "bank.probe(batch) with a batch of this kind, its items larger or more than one"
            )
        return layout

    def value(self) -> Tensor:
        """The adapted tensor of every item, (n, …)."""
        if self.full is not None:
            return self.full
        assert self.lora_A is not None and self.lora_B is not None
        summed = self.raw.reshape(1, self.lora_B.shape[1], -1) + self.lora_B @ self.lora_A
        if self.scale is not None:
            summed = summed * self.scale[..., None]
        return summed.view(self.n, *self.raw.shape)

    def rows(self, rows: slice) -> Mix:
        """The mix of these rows of the tensor alone."""
        cut = {
            key: None if (value := getattr(self, key)) is None else value[:, rows]
            for key in ("lora_B", "scale", "full")
        }
        return replace(self, raw=self.raw[rows], **cut)

    def map(self, change: Callable[[Tensor], Tensor]) -> Mix:
        """The mix of another representation: device, precision."""
        keys = ("raw", "lora_A", "lora_B", "scale", "full")
        values = {key: getattr(self, key) for key in keys}
        return replace(self, **{k: None if v is None else change(v) for k, v in values.items()})


def _stack(tensors: Sequence[Tensor | None], raw: Tensor) -> Tensor:
    """Matrices (r, in) or (out, r) of any rank as one (n, …), filled up with zeros."""
    given = [t for t in tensors if t is not None]
    rows, columns = (max(t.shape[d] for t in given) for d in (0, 1))
    zeros = given[0].new_zeros(rows, columns)
    if len(given) < len(tensors):
        tensors = [zeros if t is None else t for t in tensors]
    same = all(t.shape == zeros.shape for t in given)
    full = tensors if same else [
        t if t.shape == zeros.shape else F.pad(t, (0, columns - t.shape[1], 0, rows - t.shape[0]))
        for t in tensors if t is not None
    ]  # fmt: skip
    return torch.stack([t for t in full if t is not None]).to(raw)
