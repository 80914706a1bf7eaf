"""`Mix`: the values of one tensor of the model that differ between the items of a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_lightning.bank.layout import WHOLE, Layout
from lora_lightning.errors import AdapterError


@dataclass(frozen=True)
class Part:
    r"""The effect of one adapter on one tensor W: replace it, or

    .. math:: W' = c \odot (W + B A)

    with the scaling folded into B, and with c (out,) where the adapter has DoRA's magnitudes.
    """

    lora_A: Tensor | None = None
    lora_B: Tensor | None = None
    scale: Tensor | None = None
    full: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Its memory in bytes."""
        tensors = (self.lora_A, self.lora_B, self.scale, self.full)
        return sum(t.nbytes for t in tensors if t is not None)

    def value(self, raw: Tensor) -> Tensor:
        """W' in full."""
        if self.full is not None:
            return self.full
        assert self.lora_A is not None
        assert self.lora_B is not None
        summed = raw.reshape(len(self.lora_B), -1) + self.lora_B @ self.lora_A
        return (summed if self.scale is None else self.scale[:, None] * summed).view(raw.shape)


class Room:
    """Reused memory in which the factors of a batch are stacked.

    Allocation costs more than copying. Each stream of a GPU has its own: another's kernels may
    still read what was stacked there before.
    """

    def __init__(self) -> None:
        self._tensors: dict[tuple[str, str, int], Tensor] = {}

    def stack(self, key: tuple[str, str], tensors: list[Tensor]) -> Tensor:
        """The stacked tensors, in the memory of those stacked under this key before."""
        if len(tensors) == 1:
            return tensors[0][None]
        if torch.is_grad_enabled():  # the previous batch's graph may still need its tensors
            return torch.stack(tensors)
        first, place = tensors[0], (*key, stream_of(tensors[0]))
        known = self._tensors.get(place)
        shape = (len(tensors), *first.shape)
        same = known is not None and known.shape == shape and known.dtype == first.dtype
        if known is None or not same or known.device != first.device:
            known = self._tensors[place] = first.new_empty(shape)
        with torch.no_grad():
            return torch.stack(tensors, out=known)


def stream_of(tensor: Tensor) -> int:
    """Which queue of its device runs what comes next; 0 on a CPU, which has one."""
    return torch.cuda.current_stream(tensor.device).cuda_stream if tensor.is_cuda else 0


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
    # In a probe: called for every use; the raw tensor is then used.
    watch: Callable[[Mix, Any, Tensor | None], None] | None = None

    @classmethod
    def of(
        cls,
        path: str,
        raw: Tensor,
        parts: Sequence[Part | None],
        layouts: Mapping[int, Layout],
        room: Room,
    ) -> Mix:
        """Stack the parts of the items; ``None``: the source's own tensor."""
        mix = cls(path, raw, len(parts), layouts)
        given = [part for part in parts if part is not None]
        if any(part.full is not None for part in given):
            whole = [raw.detach() if part is None else part.value(raw) for part in parts]
            mix.full = room.stack((path, "full"), whole)
            return mix
        mix.lora_A = room.stack((path, "lora_A"), _of_one_rank(parts, given, "lora_A"))
        mix.lora_B = room.stack((path, "lora_B"), _of_one_rank(parts, given, "lora_B"))
        if any(part.scale is not None for part in given):
            ones = raw.new_ones(mix.lora_B.shape[1])
            scales = [part.scale if part is not None else None for part in parts]
            mix.scale = torch.stack([ones if scale is None else scale for scale in scales])
        return mix

    @property
    def is_bare(self) -> bool:
        """Whether the factors' matrix is shaped otherwise than a layer's weight."""
        return self.lora_B is not None and self.lora_B.shape[1] != len(self.raw)

    @property
    def is_folded(self) -> bool:
        """Whether the layer's input may have several entries for each item."""
        return any(layout.minor is not None for layout in self.layouts.values())

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

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (n, r, in·kernel) and B (n, out, r) of a mix that has them."""
        assert self.lora_A is not None
        assert self.lora_B is not None
        return self.lora_A, self.lora_B

    def value(self) -> Tensor:
        """The adapted tensor of every item, (n, …)."""
        if self.full is not None:
            return self.full
        lora_A, lora_B = self.factors()
        summed = self.raw.reshape(1, lora_B.shape[1], -1) + lora_B @ lora_A
        if self.scale is not None:
            summed = summed * self.scale[..., None]
        return summed.view(self.n, *self.raw.shape)

    def map(self, change: Callable[[Tensor], Tensor]) -> Mix:
        """The mix of another representation: device, precision."""
        keys = ("raw", "lora_A", "lora_B", "scale", "full")
        given = {key: value for key in keys if (value := getattr(self, key)) is not None}
        changed: dict[str, Any] = {key: change(value) for key, value in given.items()}
        return replace(self, **changed)


def _of_one_rank(parts: Sequence[Part | None], given: Sequence[Part], key: str) -> list[Tensor]:
    """Each item's factor, padded with zeros to the largest shape."""
    shapes = {getattr(part, key).shape for part in given}
    shape = [max(sizes) for sizes in zip(*shapes, strict=True)]
    zeros = getattr(given[0], key).new_zeros(shape)
    found = [zeros if part is None else getattr(part, key) for part in parts]
    if len(shapes) == 1:
        return found
    return [F.pad(t, (0, shape[1] - t.shape[1], 0, shape[0] - t.shape[0])) for t in found]


@contextmanager
def lasting(model: nn.Module) -> Iterator[None]:
    """Within the block new tensors can be kept: no autocast, no inference mode."""
    first, grad = next(model.parameters(), None), torch.is_grad_enabled()
    device = "cpu" if first is None else first.device.type
    exact = torch.autocast(device, enabled=False)
    with torch.inference_mode(False), torch.set_grad_enabled(grad), exact:
        yield
