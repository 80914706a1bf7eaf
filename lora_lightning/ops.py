r"""Low-rank products at the cost of the frozen layer and little more.

.. math:: y = x (W + s\,BA)^T + b, \qquad
          \nabla A = s\,(g B)^T x, \quad \nabla B = s\,g^T (x A^T), \quad \nabla x = g (W + s\,BA)

with g the gradient of y. The plain formula, left to autograd, makes several tensors of the size of
x and y and keeps x. Here

- nothing of that size is made: the product of the factors is added to W where there are many rows
  (an O × I matrix is small beside N × O), or to y in place where there are few;
- x is not kept where the graph keeps what made it (`lora_lightning.producers`), nor where A is
  frozen;
- the thin products are written so that the long dimension is the last one, (r, N): ten times as
  fast on a CPU as the other way round.

Autocast, dropout (its mask is drawn again from its seed), and starts kept aside are covered.
`fused` switches it off. Legend of shapes: N rows, I in, O out, r rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_lightning.errors import AdapterError
from lora_lightning.producers import Recipe, recipe_for

# W + s·BA rather than y + s·h Bᵀ where N (I + O) exceeds so many times I · O. On a CPU the two cost
# the same at 3.5 without gradients and at 7 with them; one number for both, so that a model gives
# the same output, bit for bit, whether gradients are wanted or not.
_MANY = 5.0
# Below so many numbers in x the interpreter's time is what counts: torch's own functions, which
# keep what they like, are faster then.
_SMALL = 2**15
# Thin products take so many times as long as their multiplications should (measured on a CPU).
_THIN = 3.0
# Numbers of x and g that one thread works on at a time in the backward pass, and the fewest rows
# that keep matrix products efficient.
_PIECE, _FEWEST = 2**19, 256


@dataclass
class Switches:
    """What `fused` sets.

    Attributes:
        enabled: Use the functions of this module, not the plain formula.
        recompute: Make a layer's input again where that is possible, instead of keeping it.
        smallest: Numbers in x below which the plain formula is used.
    """

    enabled: bool = True
    recompute: bool = True
    smallest: int = _SMALL


switches = Switches()


@contextmanager
def fused(
    enabled: bool = True, *, recompute: bool = True, smallest: int = _SMALL
) -> Iterator[None]:
    """Choose for a ``with`` block, in all threads, how adapted layers compute.

    Args:
        enabled: False: by the plain formula and autograd, which can be differentiated twice.
        recompute: False: the layer's input is kept for the backward pass, which takes memory and
            saves the time of making it again.
        smallest: The plain formula is used for inputs of fewer numbers, where it is faster.
    """
    before = dict(vars(switches))
    vars(switches).update(enabled=enabled, recompute=recompute, smallest=smallest)
    try:
        yield
    finally:
        vars(switches).update(before)


class LowRank(NamedTuple):
    """s·(BA − B₀A₀) of one layer: B (O, r), A (r, I); the start B₀A₀ only where one is kept.

    `dropout` is the part of x's numbers that are zero on their way to A, now.
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


def applies(x: Tensor, weight: Tensor, low: LowRank) -> bool:
    """Whether this module can compute the layer; the plain formula can always."""
    if not switches.enabled or x.numel() < switches.smallest or weight.requires_grad:
        return False
    if torch.compiler.is_compiling() or torch._C._is_tracing():
        return False
    if torch._C._functorch.maybe_current_level() is not None or torch.overrides.has_torch_function(
        (x, weight)
    ):
        return False
    if torch.autograd.forward_ad._current_level >= 0:
        return False
    wanted = lowered(x)
    if low.start_A is not None and (low.dropout or not adds_exactly(x, weight)):
        return False  # the two products must cancel at the start: see `LowRank.added_to`
    if wanted is not None:
        return weight.dtype == torch.float32 and x.dtype in (torch.float32, wanted)
    return x.dtype == weight.dtype == low.lora_A.dtype


def lowered(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast wants here; ``None`` where it is off."""
    kind = x.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def adds_exactly(x: Tensor, weight: Tensor) -> bool:
    """Whether a product can be added to the weight with which x is computed, nothing lost."""
    return lowered(x) is None and _exact(weight)


def _exact(weight: Tensor) -> bool:
    """Whether a small product survives in a sum with the weight."""
    return weight.dtype in (torch.float32, torch.float64)


@dataclass(frozen=True)
class Plan:
    """How a layer computes this time.

    Attributes:
        low: The factors.
        whole: Whether W + s·BA is made.
        dtype: What autocast wants, if it is on.
        seed: Of dropout's mask.
        recipe: How to make x again, where it is not kept.
        frozen_A: A does not train, and x is not needed: h is kept instead.
        channels: x is (B, I, …), in memory (B, …, I): pictures for a pointwise convolution.
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
        """For this input."""
        training, dtype = torch.is_grad_enabled(), lowered(x)
        ratio = x.numel() / weight.shape[1] * sum(weight.shape) / weight.numel()
        many = ratio > _MANY or low.start_A is not None
        whole = many and adds_exactly(x, weight) and not low.dropout
        # From the global generator, so that seeds and checkpointing govern it.
        seed = int(torch.randint(2**62, ())) if low.dropout else 0
        frozen_A = training and not low.lora_A.requires_grad
        # A frozen convolution's input is kept by torch too.
        again = training and not frozen_A and not channels and switches.recompute
        recipe = recipe_for(x) if again else None
        return cls(low, whole, dtype, seed, recipe, frozen_A, channels)

    def cast(self, tensor: Tensor) -> Tensor:
        """To autocast's dtype."""
        return tensor if self.dtype is None else tensor.to(self.dtype)

    def rows(self, x: Tensor) -> Tensor:
        """(N, ·) of what has the layout of x."""
        if self.channels:
            x = x.permute(0, *range(2, x.dim()), 1)
        return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])

    def base(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer with this weight (O, I)."""
        bias = None if bias is None else self.cast(bias)
        if not self.channels:
            return F.linear(x, weight, bias)
        pointwise: Any = F.conv2d if x.dim() == 4 else F.conv3d
        out: Tensor = pointwise(x, weight.view(*weight.shape, *[1] * (x.dim() - 2)), bias)
        return out

    def unrolled(self, rows: Tensor, like: Tensor) -> Tensor:
        """The inverse of `rows`, for a tensor with the layout of `like`."""
        if not self.channels:
            return rows.view(*like.shape[:-1], -1)
        return rows.view(len(like), *like.shape[2:], -1).movedim(-1, 1)

    def dropped(self, x: Tensor) -> Tensor:
        """What of x goes to A."""
        return x * self.mask(x, x.shape) if self.low.dropout else x

    def mask(self, like: Tensor, shape: torch.Size) -> Tensor:
        """Dropout's for x of this shape, as rows; the same whenever it is asked for."""
        generator = torch.Generator(like.device).manual_seed(self.seed)
        keep = 1 - self.low.dropout
        width = shape[1 if self.channels else -1]
        drawn = like.new_empty(shape.numel() // max(width, 1), width)
        return drawn.bernoulli_(keep, generator=generator).div_(keep)

    def keep(self, ctx: Any, x: Tensor, *others: Tensor | None) -> None:
        """Save `others`, and x or what it can be made of."""
        made_of = (x,) if self.recipe is None else self.recipe.kept
        ctx.save_for_backward(*others, *(made_of if ctx.needs_input_grad[3] else ()))

    def reader(self, kept: Sequence[Tensor], shape: torch.Size) -> Callable[[slice], Tensor]:
        """From a slice to these rows of x, of what `keep` saved."""
        recipe = self.recipe
        if recipe is None or not recipe.by_rows:
            rows = self.rows(kept[0] if recipe is None else recipe.build(kept))
            return lambda at: self.cast(rows[at])
        # Piece by piece what is made again stays in the processor's cache.
        lead = shape[:-1]
        folded = [t.reshape(-1, t.shape[-1]) if t.shape[:-1] == lead else t for t in kept]

        def read(at: slice) -> Tensor:
            pieces = zip(folded, kept, strict=True)
            own = [f[at] if t.shape[:-1] == lead else t for f, t in pieces]
            return self.cast(recipe.build(own))

        return read


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, low: LowRank, channels: bool = False
) -> Tensor:
    """x (…, I) → (…, O) by W + s·BA and b; only where `applies` says so.

    Args:
        x: The input.
        weight: W, (O, I).
        bias: b, (O,).
        low: The factors.
        channels: x is (B, I, …) and the output (B, O, …), with the channels last in memory.
    """
    plan = Plan.of(x, weight, low, channels)
    if not torch.is_grad_enabled():
        return _linear(x, plan.cast(weight), bias, plan)[0]
    out: Tensor = _Linear.apply(x, weight, bias, low.lora_A, low.lora_B, plan)
    return out


def _linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, plan: Plan
) -> tuple[Tensor, Tensor | None]:
    """The output, and h = A xᵀ (r, N) where it was made."""
    low, x = plan.low, plan.cast(x)
    # The base's own function: while B is zero the output is the base's, bit for bit.
    out = plan.base(x, low.added_to(weight) if plan.whole else weight, bias)
    h_RxN = None
    if plan.frozen_A or not plan.whole:
        h_RxN = _across(plan.cast(low.lora_A), plan.dropped(plan.rows(x)))
    if h_RxN is not None and not plan.whole:
        plan.rows(out).addmm_(h_RxN.T, plan.cast(low.lora_B).T, alpha=low.scaling)
    return out, h_RxN


class _Linear(torch.autograd.Function):
    """The gradients of the module's docstring."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, plan: Plan
    ) -> Tensor:
        ctx.plan, ctx.shape, ctx.dtype = plan, x.shape, x.dtype
        weight = plan.cast(weight)
        out, h_RxN = _linear(x, weight, bias, plan)
        plan.keep(ctx, x, weight, A, B, h_RxN)
        # For some shapes torch's own output is a view, in which no activation could work in place.
        return torch.ops.aten._unsafe_view(out, out.shape) if out._is_view() else out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        refuse_second()
        plan, (needs_x, _, needs_bias, needs_A, needs_B, _) = ctx.plan, ctx.needs_input_grad
        weight, A, B, h_RxN, *kept = ctx.saved_tensors
        low_A, g_NxO = plan.cast(A), plan.rows(g)
        back_RxO = (plan.cast(B) * plan.low.scaling).T
        used = plan.low.added_to(weight) if plan.whole and needs_x else weight
        grad_A, grad_Bt = torch.zeros_like(low_A), g.new_zeros(len(A), len(B))
        grad_x = g.new_empty(len(g_NxO), A.shape[1]) if needs_x else None
        read = plan.reader(kept, ctx.shape) if needs_A else None
        mask = plan.mask(g, ctx.shape) if plan.low.dropout else None
        small = plan.whole and needs_A and is_small(weight, len(A))
        grad_W = torch.zeros_like(weight) if small else None
        for at in _pieces(g_NxO, A.shape[1]):
            g_i = g_NxO[at]
            if read is not None:
                x_i = read(at) if mask is None else read(at) * mask[at]
            if grad_x is not None:
                torch.mm(g_i, used, out=grad_x[at])
            if grad_W is not None:
                grad_W.addmm_(g_i.T, x_i)
                continue
            back_i = _across(back_RxO, g_i)
            if needs_A:
                _add_along(grad_A, back_i, x_i)
            if needs_B:
                h_i = _across(low_A, x_i) if h_RxN is None else h_RxN[:, at]
                _add_along(grad_Bt, h_i, g_i)
            if grad_x is not None and mask is not None:
                grad_x[at].addcmul_(back_i.T @ low_A, mask[at])
            elif grad_x is not None and not plan.whole:
                grad_x[at].addmm_(back_i.T, low_A)
        if grad_W is not None:
            grad_A, grad_Bt = back_RxO @ grad_W, low_A @ grad_W.T
        return (
            None if grad_x is None else plan.unrolled(grad_x, g).to(ctx.dtype),
            None,
            g_NxO.sum(0) if needs_bias else None,
            grad_A.to(A.dtype) if needs_A else None,
            grad_Bt.T.to(B.dtype) * plan.low.scaling if needs_B else None,
            None,
        )


def is_small(weight: Tensor, rank: int) -> bool:
    """Whether the gradient of the whole weight takes less time than the thin products do."""
    thin = 2 * rank * (len(weight) + weight[0].numel())
    return weight.numel() < _THIN * thin


def _threads(rows: Tensor) -> int:
    """Between which this module divides the work itself; 0: not at all.

    On other devices that is the library's affair; and sums in half precision, which would be
    rounded once for each part, are left whole.
    """
    return torch.get_num_threads() if rows.device.type == "cpu" and _exact(rows) else 0


def _pieces(rows: Tensor, width: int) -> list[slice]:
    """Even slices of rows that a processor's cache holds with those of x: g is read once."""
    count, threads = len(rows), _threads(rows)
    if not threads:
        return [slice(0, count)]
    pieces = round(count * (rows.shape[1] + width) / (_PIECE * threads))
    pieces = max(min(pieces, count // (_FEWEST * threads)), 1)
    step = max(math.ceil(count / pieces / threads), 1) * threads
    return [slice(i, i + step) for i in range(0, count, step)]


def _split(rows: Tensor) -> Tensor:
    """(N, ·) → (parts, N / parts, ·), for as many threads as divide N.

    BLAS gives a product whose result has r rows to one thread: in parts it takes two thirds of the
    time on two.
    """
    parts = math.gcd(len(rows), _threads(rows)) if len(rows) and _threads(rows) else 1
    return rows.view(parts, len(rows) // parts, rows.shape[1])


def _across(factor_RxI: Tensor, rows_NxI: Tensor) -> Tensor:
    """The factor times rowsᵀ, (r, N)."""
    parts = _split(rows_NxI)
    if len(parts) < 2:
        return factor_RxI @ rows_NxI.T
    thin = torch.bmm(factor_RxI.expand(len(parts), *factor_RxI.shape), parts.transpose(1, 2))
    return thin.transpose(0, 1).flatten(1)


def _add_along(total_RxO: Tensor, thin_RxN: Tensor, rows_NxO: Tensor) -> None:
    """Add the sum over rows."""
    parts = _split(rows_NxO)
    if len(parts) < 2:
        total_RxO.addmm_(thin_RxN, rows_NxO)
    else:
        thin = thin_RxN.view(len(thin_RxN), len(parts), -1).transpose(0, 1)
        total_RxO += torch.bmm(thin, parts).sum(0)


def refuse_second() -> None:
    """Called by a backward pass, which cannot be differentiated itself.

    Raises:
        AdapterError: it is to be (``create_graph=True``).
    """
    if torch.is_grad_enabled():
        raise AdapterError(
            "create_graph=True asks for gradients of gradients, which the fused path of adapted "
            "layers does not have: run the forward pass inside `with lora_lightning.fused(False):`"
        )
