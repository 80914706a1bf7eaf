"""Execution plan of an adapted layer: its factors, the global switches and what follows from them.

Legend of shapes: N rows, I in, O out, r rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_lightning.lora.fused.recompute import Recipe, recipe_for
from lora_lightning.lora.fused.thin_matmul import cut, exact

# W + s·BA rather than y + s·h Bᵀ where N (I + O) exceeds so many times I · O. On a CPU the two cost
# the same at 3.5 without gradients and at 7 with them; one number for both, so that a model gives
# the same output, bit for bit, whether gradients are wanted or not.
_MANY = 5.0
# Below so many numbers in x and y the interpreter's overhead dominates, and torch's own functions
# are faster.
_SMALL = 400_000


@dataclass
class Switches:
    """The state that `fused` sets.

    Attributes:
        enabled: Use the fused functions, not the plain formula.
        recompute: Recompute a layer's input where possible, instead of keeping it.
        smallest: Numbers in a layer's input and output below which the plain formula is used.
    """

    enabled: bool = True
    recompute: bool = True
    smallest: int = _SMALL


switches = Switches()
_inside = [Switches()]  # the settings of each open block, the latest last


@contextmanager
def fused(
    enabled: bool = True, *, recompute: bool = True, smallest: int = _SMALL
) -> Iterator[None]:
    """Configure the computation of adapted layers in a ``with`` block, in all threads.

    Args:
        enabled: False: by the plain formula and autograd, which can be differentiated twice.
        recompute: False: the layer's input is kept for the backward pass, which takes memory and
            saves the time to recompute it.
        smallest: The plain formula is used where a layer's input and output have fewer numbers: it
            is faster there.

    Under activation checkpointing the backward pass runs the layers again, so it must be in the
    block as well.
    """
    own = Switches(enabled, recompute, smallest)
    _inside.append(own)
    vars(switches).update(vars(own))
    try:
        yield
    finally:
        # Another thread's block may have been entered since: the latest open one counts.
        _inside[:] = [block for block in _inside if block is not own]
        vars(switches).update(vars(_inside[-1]))


class LowRank(NamedTuple):
    """s·(BA − B₀A₀) of one layer: B (O, r), A (r, I); B₀A₀ only where a start is kept.

    `dropout` is the probability for the input of A, 0 in eval mode.
    """

    lora_A: Tensor
    lora_B: Tensor
    start_A: Tensor | None
    start_B: Tensor | None
    scaling: float
    dropout: float = 0.0

    def added_to(self, weight_OxI: Tensor) -> Tensor:
        """W + s·BA, exactly W at the start."""
        if self.start_A is None or self.start_B is None:
            return torch.addmm(weight_OxI, self.lora_B, self.lora_A, alpha=self.scaling)
        product = self.lora_B @ self.lora_A
        product -= self.start_B @ self.start_A
        return torch.add(weight_OxI, product, alpha=self.scaling)


def lowered(x: Tensor) -> torch.dtype | None:
    """The dtype of autocast; ``None`` where it is off."""
    kind = x.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def is_captured(x: Tensor) -> bool:
    """Whether a CUDA graph is being captured, which would replay one seed of dropout's mask."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def adds_exactly(x: Tensor, weight: Tensor) -> bool:
    """Whether a product can be added to the weight without loss of precision."""
    return lowered(x) is None and exact(weight)


class Plan(NamedTuple):
    """How a layer computes its output for one input.

    Attributes:
        low: The factors.
        whole: Whether W + s·BA is computed.
        dtype: Of the products, where the tensors have others: autocast's, or that of a base in half
            precision, whose factors are in float32.
        seed: Of dropout's mask.
        recipe: How to recompute x, where it is not kept.
        frozen_A: A is frozen, so that h is kept instead of x.
        channels: x is (B, I, …), in memory (B, …, I): the input of a pointwise convolution.
    """

    low: LowRank
    whole: bool
    dtype: torch.dtype | None = None
    seed: int = 0
    recipe: Recipe | None = None
    frozen_A: bool = False
    channels: bool = False

    @classmethod
    def of(cls, x: Tensor, weight: Tensor, low: LowRank, channels: bool) -> Plan:
        """The plan for this input."""
        training, dtype = torch.is_grad_enabled(), lowered(x)
        if dtype is None and low.lora_A.dtype != x.dtype:
            dtype = x.dtype
        ratio = x.numel() / weight.shape[1] * sum(weight.shape) / weight.numel()
        many = ratio > _MANY or low.start_A is not None
        whole = many and adds_exactly(x, weight) and not low.dropout
        # From the global generator, so that it obeys seeds and checkpointing.
        seed = int(torch.randint(2**62, ())) if low.dropout else 0
        frozen_A = training and not low.lora_A.requires_grad
        # A frozen convolution's input is kept by torch too.
        may_recompute = training and not frozen_A and not channels and switches.recompute
        recipe = recipe_for(x) if may_recompute else None
        return cls(low, whole, dtype, seed, recipe, frozen_A, channels)

    def cast(self, tensor: Tensor) -> Tensor:
        """The tensor in the dtype of the products."""
        return tensor if self.dtype is None else tensor.to(self.dtype)

    def rows(self, x: Tensor) -> Tensor:
        """(N, ·) of a tensor with the layout of x."""
        if self.channels:
            x = x.permute(0, *range(2, x.dim()), 1)
        return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])

    def base(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The output with this weight (O, I)."""
        bias = None if bias is None else self.cast(bias)
        if not self.channels:
            return F.linear(x, weight, bias)
        pointwise: Any = F.conv2d if x.dim() == 4 else F.conv3d
        out: Tensor = pointwise(x, weight.view(*weight.shape, *[1] * (x.dim() - 2)), bias)
        return out

    def unrolled(self, rows: Tensor, like: Tensor) -> Tensor:
        """The inverse of `rows`, for a tensor with the layout of `like`."""
        if not self.channels:
            return rows.view(*like.shape[:-1], rows.shape[-1])
        return rows.view(len(like), *like.shape[2:], rows.shape[-1]).movedim(-1, 1)

    def dropped(self, x: Tensor) -> Tensor:
        """The input of A: x after dropout."""
        return x * self.mask(x, x.shape) if self.low.dropout else x

    def mask(self, like: Tensor, shape: torch.Size) -> Tensor:
        """Dropout's mask for x of this shape, as rows; deterministic for a plan."""
        generator = torch.Generator(like.device).manual_seed(self.seed)
        keep = 1 - self.low.dropout
        width = shape[1 if self.channels else -1]
        drawn = like.new_empty(shape.numel() // max(width, 1), width)
        return drawn.bernoulli_(keep, generator=generator).div_(keep)

    def keep(self, ctx: Any, x: Tensor, *others: Tensor | None) -> None:
        """Save `others`, x or what it is recomputed from, and this plan."""
        made_of = (x,) if self.recipe is None else self.recipe.kept
        ctx.save_for_backward(*others, *(made_of if ctx.needs_input_grad[3] else ()))
        # In the plan they would outlive the backward pass, which frees what was saved.
        ctx.plan = self._replace(recipe=self.recipe and replace(self.recipe, kept=()))

    def reader(self, kept: Sequence[Tensor], shape: torch.Size) -> Callable[[slice], Tensor]:
        """A function from a slice to these rows of x, from what `keep` saved."""
        recipe = self.recipe
        parts = as_rows(kept, shape[:-1]) if recipe is not None and recipe.by_rows else None
        if recipe is None or parts is None:
            rows = self.rows(kept[0] if recipe is None else recipe.build(kept))
            return lambda at: self.cast(cut(rows, at))
        # Recomputed piece by piece, x stays in the processor's cache.
        return lambda at: self.cast(
            recipe.build([t if shared else cut(t, at) for t, shared in parts])
        )


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
