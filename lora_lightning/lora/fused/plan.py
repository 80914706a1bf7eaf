"""Execution plan of an adapted layer: its factors, the global switches and what follows from them.

Legend of shapes: N rows, I in, O out, r rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_lightning.lora.fused.recompute import Build, recipe_for
from lora_lightning.lora.fused.thin_matmul import as_rows, cut, exact


class Limits(NamedTuple):
    """Where one formula becomes cheaper than another, on one kind of device.

    Attributes:
        small: Numbers in x and y below which torch's own functions are faster than these.
        many: W + s·BA is computed, rather than y + s·h Bᵀ, where N (I + O) exceeds so many times
            I · O. One number with and without gradients, so that a model gives the same output,
            bit for bit, whether gradients are wanted or not.
        reading: A thin product of rank r takes as long as r + `reading` rows of a large one: x and
            g must be read, and kernels launched, whatever the rank.
        cheap: Multiplications of a product that takes no longer than two launches.
        compiled_many: `many` within `torch.compile`.
        compiled_whole: There the gradient of the whole weight is computed where I · O is at most so
            many times I + O: a GPU multiplies hundreds of numbers in the time that it reads one.
    """

    small: int = 400_000
    many: float = 5.0
    reading: float = 12
    cheap: float = 0
    compiled_many: int = 5
    compiled_whole: int = 40


# By kind of device, and by whether products are in half precision. On a CPU (measured, rank 4 to
# 64) `many` would be 3.5 without gradients and 7 with them. On a CUDA device (H100) launches count:
# W + s·BA and the whole weight's gradient take the fewest, and under autocast, where the frozen
# layer casts W as well, fewer than the plain formula at any size.
LIMITS = {
    ("cpu", False): Limits(),
    ("cuda", False): Limits(many=0.25, cheap=1e9, compiled_whole=160),
    ("cuda", True): Limits(0, 0.25, 320, 1e10, compiled_whole=160),
}


def limits(x: Tensor, dtype: torch.dtype | None = None) -> Limits:
    """The limits for products of x in this dtype, its own by default."""
    return LIMITS.get((x.device.type, (dtype or x.dtype).itemsize < 4)) or LIMITS["cpu", False]


@dataclass
class Switches:
    """The settings of `fused`; without a `smallest`, that of `LIMITS` counts."""

    enabled: bool = True
    recompute: bool = True
    smallest: int | None = None


switches = Switches()
_inside = [Switches()]  # the settings of each open block, the latest last


@contextmanager
def fused(
    enabled: bool = True, *, recompute: bool = True, smallest: int | None = None
) -> Iterator[None]:
    """Configure the computation of adapted layers in a ``with`` block, in all threads.

    Args:
        enabled: False: by the plain formula and autograd, which can be differentiated twice.
        recompute: False: the layer's input is kept for the backward pass, which takes memory and
            saves the time to recompute it.
        smallest: The plain formula is used where a layer's input and output have fewer numbers: it
            is faster there. By default 400,000, and 0 in half precision on a CUDA device.

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


def lowered(x: Tensor) -> torch.dtype | None:
    """The dtype of autocast; ``None`` where it is off."""
    kind = x.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def transformed() -> bool:
    """Whether `torch.func` or forward-mode derivatives are at work, which the formulas lack."""
    forward: int = torch.autograd.forward_ad._current_level
    return torch._C._functorch.maybe_current_level() is not None or forward >= 0


# What `torch.compiler.assume_constant_result` does, which would import the compiler: Dynamo calls
# the function while it traces.
transformed._dynamo_marked_constant = True  # type: ignore[attr-defined]


def is_captured(x: Tensor) -> bool:
    """Whether a CUDA graph is being captured, which would replay one seed of dropout's mask."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def adds_exactly(x: Tensor, weight: Tensor) -> bool:
    """Whether a product added to the weight by torch's own functions is rounded as the weight is.

    In this module it is also added under autocast, in float32.
    """
    return lowered(x) is None and exact(weight)


class Plan(NamedTuple):
    """How a layer computes its output for one input."""

    low: LowRank  # the factors
    whole: bool  # whether W + s·BA is computed
    # Of the products, where the tensors have others: autocast's, or that of a base in half
    # precision, whose factors are in float32
    dtype: torch.dtype | None = None
    seed: int = 0  # of dropout's mask
    build: Build | None = None  # recomputes x from what the graph keeps; ``None``: x is kept
    by_rows: bool = False  # whether it can do so for some rows
    frozen_A: bool = False  # A is frozen, so that h is kept instead of x
    # x is (B, I, …), in memory (B, …, I): the input of a pointwise convolution
    channels: bool = False

    @classmethod
    def of(
        cls, x: Tensor, weight: Tensor, low: LowRank, channels: bool
    ) -> tuple[Plan, tuple[Tensor, ...] | None]:
        """The plan for this input, and what x is recomputed from."""
        training, dtype, A = torch.is_grad_enabled(), lowered(x), low.lora_A
        if dtype is None and A.dtype != x.dtype:
            dtype = x.dtype
        (out, into), dropout = weight.shape, low.dropout
        whole = not dropout and exact(weight)
        if whole and low.start_A is None:
            whole = x.numel() * (into + out) > limits(x, dtype).many * out * into * into
        # From the global generator, so that it obeys seeds and checkpointing.
        seed = int(torch.randint(2**62, (), device="cpu")) if dropout else 0
        frozen_A = training and not A.requires_grad
        # A frozen convolution's input is kept by torch too.
        recipe = None
        if training and switches.recompute and not frozen_A and not channels:
            recipe = recipe_for(x)
        if recipe is None:
            return cls(low, whole, dtype, seed, None, False, frozen_A, channels), None
        # What is kept goes another way: in the plan it would outlive the backward pass.
        return cls(low, whole, dtype, seed, recipe.build, recipe.by_rows), recipe.kept

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
        if not self.channels:
            return F.linear(x, weight, bias)
        pointwise: Any = F.conv2d if x.dim() == 4 else F.conv3d
        out: Tensor = pointwise(x, weight.view(*weight.shape, *[1] * (x.dim() - 2)), bias)
        return out

    def unrolled(self, rows: Tensor, like: Tensor) -> Tensor:
        """The inverse of `rows`, for a tensor with the layout of `like`."""
        if not self.channels:
            return rows if like.dim() == 2 else rows.view(*like.shape[:-1], rows.shape[-1])
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

    def input_rows(self, kept: Sequence[Tensor]) -> Tensor:
        """x as rows, in the dtype of the products: as it was kept, or recomputed."""
        if self.build is None:
            return self.rows(kept[0])
        return self.rows(self.cast(self.build(kept, self.dtype)))

    def reader(self, kept: Sequence[Tensor], shape: torch.Size) -> Callable[[slice], Tensor]:
        """A function from a slice to these rows of x."""
        build, dtype = self.build, self.dtype
        parts = as_rows(kept, shape[:-1]) if build is not None and self.by_rows else None
        if build is None or parts is None:
            rows = self.input_rows(kept)
            return lambda at: cut(rows, at)
        # Recomputed piece by piece, x stays in the processor's cache.
        return lambda at: self.cast(
            build([t if shared else cut(t, at) for t, shared in parts], dtype)
        )
