"""Recomputation of a layer's input in the backward pass, or saving where it would differ."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lora_lightning import fused
from lora_lightning.lora.fused.recompute import recipe_for
from lora_lightning.model.probing import difference
from tests.helpers.ops_cases import adapted, agree

pytestmark = pytest.mark.usefixtures("as_if_inputs_were_large")

PRODUCERS = {
    "layer norm": lambda: nn.LayerNorm(8),
    "plain layer norm": lambda: nn.LayerNorm(8, elementwise_affine=False),
    "RMS norm": lambda: nn.RMSNorm(8),
    "GELU": nn.GELU,
    "GELU by tanh": lambda: nn.GELU("tanh"),
    "SiLU": nn.SiLU,
    "ReLU": nn.ReLU,
    "ReLU in place": lambda: nn.ReLU(inplace=True),
    "ReLU6": nn.ReLU6,
    "Hardswish": nn.Hardswish,
    "sigmoid": nn.Sigmoid,
    "GLU": lambda: nn.Sequential(nn.Linear(8, 16).double().requires_grad_(False), nn.GLU()),
    "dropout": lambda: nn.Sequential(nn.SiLU(), nn.Dropout(0.3)),
    "reshaped": lambda: nn.Sequential(nn.GELU(), nn.Unflatten(-1, (2, 4)), nn.Flatten(-2)),
}


class Before(nn.Module):
    """A producer between frozen layers, and the tensors that the graph keeps of it."""

    def __init__(self, kind: str):
        super().__init__()
        self.first, self.producer = nn.Linear(8, 8), PRODUCERS[kind]()
        self.last = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        self.made = self.producer(self.first(x))
        return self.last(self.made)


@pytest.mark.parametrize("kind", PRODUCERS)
def test_inputs_are_made_again(kind):
    """Bit for bit or to rounding; the layer itself keeps neither x nor a copy of it."""
    model = adapted(Before(kind), target_modules=["*last"])
    agree(model, torch.randn(7, 5, 8, dtype=torch.float64))
    x = torch.randn(7, 5, 8, dtype=torch.float64, requires_grad=True)
    out = model(x)
    made = model[0].made
    if kind == "ReLU in place":  # of a view: its node tells nothing, and keeps x itself
        assert recipe_for(made) is None
        return
    recipe = recipe_for(made)
    assert recipe is not None
    with torch.no_grad():
        assert difference([recipe.build(recipe.kept)], [made]) < 1e-14
    if kind not in ("ReLU", "sigmoid"):  # whose own backward keeps the output itself
        kept = {t.data_ptr() for t in out.grad_fn.saved_tensors if t is not None}
        assert made.data_ptr() not in kept
        with fused(recompute=False, smallest=0):
            out = model(x)  # which holds them
            kept = {t.data_ptr() for t in out.grad_fn.saved_tensors if t is not None}
        assert model[0].made.data_ptr() in kept


def test_attention_output_is_made_again():
    q = torch.randn(2, 3, 9, 4, dtype=torch.float64, requires_grad=True) * 1
    x = F.scaled_dot_product_attention(q, q, q).transpose(1, 2).reshape(2, 9, 12)
    recipe = recipe_for(x)
    assert recipe is not None
    assert torch.equal(recipe.build(recipe.kept), x)


def test_no_recipe_for_what_the_graph_does_not_keep():
    leaf = torch.randn(3, 8, requires_grad=True)
    assert recipe_for(leaf) is None
    assert recipe_for(leaf + 1) is None
    assert recipe_for(F.layer_norm(torch.randn(3, 8), (8,))) is None
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        assert recipe_for(F.gelu(leaf)) is None


GATES = [(4, 1, 8), (5, 8), (1, 5, 8), (5, 1), (1, 1, 8), (1, 1, 1), (4, 5, 1), (4, 1, 1), ()]
OF_MANY = {
    **{f"gate {size}": lambda x, size=size: F.gelu(x) * drawn(size).to(x) for size in GATES},
    "norm over two dimensions": lambda x: F.layer_norm(x, (5, 8)),
    "with weights": lambda x: F.layer_norm(x, (5, 8), drawn((5, 8)).to(x), drawn((5, 8)).to(x)),
    "broadcast": lambda x: F.gelu(x[:, :1]) * drawn((4, 5, 8)).to(x),
    "GLU of the last dimension, counted from the front": lambda x: F.glu(x.repeat(1, 1, 2), 2),
    "GLU of another": lambda x: F.glu(x.repeat(1, 2, 1), 1),
    "hardtanh without an end": lambda x: F.hardtanh(x, 0.0, float("inf")),
    "hardtanh of large ends": lambda x: F.hardtanh(x, -1e20, 1e20),
}  # fmt: skip


def drawn(size: tuple[int, ...]) -> Tensor:
    return torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(4))


class After(nn.Module):
    """A layer after a function."""

    def __init__(self, function: Callable[[Tensor], Tensor]):
        super().__init__()
        self.function, self.last = function, nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(x * 1))


@pytest.mark.parametrize("kind", OF_MANY)
@pytest.mark.parametrize("options", [{}, {"dropout": 0.2}])
def test_functions_of_several_tensors(kind, options):
    """Gates and norms of every shape that broadcasts: by rows where that is right."""
    x = torch.randn(4, 5, 8, dtype=torch.float64)
    model = adapted(After(OF_MANY[kind]), target_modules=["*last"], **options).eval()
    agree(model, x)
    with torch.autocast("cpu", torch.bfloat16):
        model = adapted(After(OF_MANY[kind]), target_modules=["*last"], dtype=torch.float32)
        agree(model, x.float(), 0.02)


@pytest.mark.parametrize(
    "function", [lambda x: F.gelu(x) * torch.tensor(0.3), lambda x: F.layer_norm(x, (8,))]
)
def test_of_a_single_row(function):
    agree(adapted(After(function), target_modules=["*last"]), torch.randn(8, dtype=torch.float64))


def masked(x: Tensor) -> Tensor:
    x = F.gelu(x)
    with torch.no_grad():
        x[:, 3:] = 0
    return x


class Clone(torch.autograd.Function):
    """A custom function whose node is called like torch's own, but for a zero."""

    @staticmethod
    def forward(ctx, x):
        return x * 3

    @staticmethod
    def backward(ctx, g):
        return g * 3


@pytest.mark.parametrize("function", [masked, lambda x: Clone.apply(F.gelu(x))])
def test_what_the_graph_does_not_tell_is_kept(function):
    x = torch.randn(4, 5, 8, dtype=torch.float64)
    assert recipe_for(function(x.clone().requires_grad_() * 1)) is None
    agree(adapted(After(function), target_modules=["*last"]), x)


def test_half_precision_without_autocast():
    """A norm's statistics may be wider than its output."""
    x = torch.randn(40, 8).bfloat16().requires_grad_()
    y = F.layer_norm(x, (8,), torch.randn(8), torch.randn(8))
    recipe = recipe_for(y)
    assert recipe is not None
    with torch.no_grad():
        assert recipe.build(recipe.kept).dtype == y.dtype == torch.bfloat16
    model = adapted(nn.Linear(8, 6), dtype=torch.bfloat16)
    model(y).sum().backward()
    assert model[0].lora["default"]["weight"].lora_A.grad.isfinite().all()


def test_a_graph_that_was_freed_or_overwritten():
    """Otherwise nothing changes: x is kept."""
    z = torch.randn(200, 8, dtype=torch.float64, requires_grad=True)
    model = adapted(nn.Linear(8, 6))
    x = F.gelu(z * 1)
    x.sum().backward()
    assert model(x).shape == (200, 6)
    h = z * 1
    x = F.layer_norm(h, (8,))
    h += 1
    factors = model[0].lora["default"]["weight"]
    grads = torch.autograd.grad(model(x).sum(), [factors.lora_A, factors.lora_B])
    with fused(False):
        plain = torch.autograd.grad(model(x).sum(), [factors.lora_A, factors.lora_B])
    assert difference(grads, plain) < 1e-12


@pytest.mark.parametrize("ends", [nn.GELU(), nn.LayerNorm(8), nn.ReLU()])
def test_a_checkpointed_block_is_not_run_again_in_the_forward_pass(ends):
    runs = []

    class Block(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            runs.append(1)
            return ends(x * 2)

    model, block = adapted(nn.Linear(8, 6), dtype=torch.float32), Block()
    out = model(checkpoint(block, torch.randn(300, 8, requires_grad=True), use_reentrant=False))
    assert len(runs) == 1
    out.sum().backward()
    assert len(runs) == 2


@pytest.mark.parametrize("function", [
    lambda x: F.layer_norm(x, (8,)),
    lambda x: F.gelu(x) * torch.rand_like(x),
    lambda x: F.gelu(x).reshape(-1, 2, 8).flatten(0, 1),
])  # fmt: skip
def test_backward_frees_what_was_kept(function):
    """The loss, which lives until the next step's, holds none of it."""
    model = adapted(nn.Linear(8, 6))
    z = torch.randn(700, 8, dtype=torch.float64, requires_grad=True)
    h = z * 1
    kept = h.untyped_storage()._weak_ref()
    loss = model(function(h)).sum()
    del h
    loss.backward()
    gc.collect()
    assert torch.UntypedStorage._expired(kept)
    assert loss.isfinite()
    torch.UntypedStorage._free_weak_ref(kept)
