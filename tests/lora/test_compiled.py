"""Layers within compiled graphs say what the plain formula says, and save no more than the base."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
import textwrap

import pytest
import torch
from functorch.compile import min_cut_rematerialization_partition
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch._inductor.decomposition import select_decomp_table

from lora_lightning import fused, inject, set_active
from lora_lightning.lora.fused import compiled, kernels
from lora_lightning.lora.fused.plan import LIMITS
from tests.helpers.cuda import apart, stir

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's own remarks while it compiles
X = torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def stack(short: bool = False, **options) -> nn.Module:
    """A convolution that is small, one that is not, a pointwise one and two linear layers; or the
    first alone and a linear layer."""
    torch.manual_seed(0)
    more = nn.Conv2d(8, 96, 3, padding=1), nn.Conv2d(96, 8, 1)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 4, 4), nn.GELU(), *(() if short else more), nn.Flatten(2),
        nn.LayerNorm(16), nn.Linear(16, 24), *(() if short else (nn.GELU(), nn.Linear(24, 16))),
    )  # fmt: skip
    inject(model, **{"rank": 2, "target_modules": "all", "trainable": [], **options})
    return stir(model)


def outcome(model: nn.Module, run, low: bool = False) -> list[torch.Tensor]:
    """The output and the gradients of all that trains."""
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        out = run(X).float()
    trained = [p for p in model.parameters() if p.requires_grad]
    return [out, *torch.autograd.grad(out.square().sum(), trained)]


@pytest.fixture(autouse=True)
def _fresh():
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("way", "frozen", "low", "short"),
    [
        ("thin", False, False, False),
        ("whole", True, False, True),
        ("thin", True, True, True),
        *(
            pytest.param(way, frozen, low, False, marks=pytest.mark.slow)
            for way, frozen, low in itertools.product(("thin", "whole"), (0, 1), (0, 1))
        ),
    ],
)
def test_gradients_are_those_of_the_plain_formula(monkeypatch, way, frozen, low, short):
    """By each way to the gradients, of both factors and of B alone, under autocast too."""
    own = LIMITS["cpu", False]._replace(compiled_whole={"thin": 0, "whole": 10**9}[way])
    monkeypatch.setitem(LIMITS, ("cpu", False), own)
    model = stack(short, freeze_a=bool(frozen))
    with fused(False):
        expected = outcome(model, model)
    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert apart(outcome(model, run, bool(low)), expected) < (0.1 if low else 1e-5)


@pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a C++ compiler")
def test_inductor_keeps_the_scaling_of_the_plain_formula():
    """Of ``torch.add(linear, low, alpha=s)`` it dropped s."""
    layer = nn.Sequential(nn.Linear(64, 512))
    inject(layer, rank=2, alpha=16, target_modules="all", trainable=[])
    x = torch.randn(16, 64)
    with fused(False), torch.no_grad():
        assert apart([torch.compile(stir(layer))(x)], [layer(x)]) < 1e-5


@pytest.mark.parametrize("low", [False, True], ids=["float32", "autocast"])
def test_the_base_output_bit_for_bit_while_B_is_zero(low):
    model = stack(short=low).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            nn.init.zeros_(parameter)
    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=low), torch.no_grad():
        out = run(X)
        set_active(model, None)
        assert torch.equal(out, model(X))


def test_effective_weights_are_the_same_with_and_without_a_product():
    W, A, B = (torch.randn(s, dtype=torch.float64) for s in ((5, 7), (3, 7), (5, 3)))
    expected = compiled.effective(W, A, B, 0.5, torch.float64)
    torch.testing.assert_close(compiled.added(W, A, B, 0.5), expected)


@pytest.mark.parametrize(
    ("backend", "short"),
    [("eager", True), pytest.param("aot_eager", False, marks=pytest.mark.slow)],
)
def test_one_graph_for_any_batch_and_two_for_two_adapters(backend, short):
    model = stack(short, name="one")
    inject(model, rank=2, target_modules="all", trainable=[], name="two", seed=1)
    run = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
    counters.clear()
    for name, items in (("one", 64), ("two", 40), ("one", 17)):
        set_active(model, name)
        # Of views the compiler compares the bases too; below 16 torch convolves otherwise.
        x = X[:items].clone()
        assert apart([run(x)], [model(x)]) < 1e-5
    assert counters["stats"]["unique_graphs"] == 2


def saved(model: nn.Module) -> int:
    """Bytes of activations that a compiled graph keeps for its backward pass."""
    found = 0

    def partition(joint, *args, **kwargs):
        nonlocal found
        graphs = min_cut_rematerialization_partition(joint, *args, **kwargs)
        (out,) = graphs[0].graph.find_nodes(op="output")
        kept = [n for n in out.args[0][kwargs["num_fwd_outputs"] :] if n.op != "placeholder"]
        found = sum(n.meta["val"].nbytes for n in kept)
        return graphs

    options = {"decompositions": select_decomp_table(), "partition_fn": partition}
    backend = aot_autograd(fw_compiler=lambda g, _: g, bw_compiler=lambda g, _: g, **options)
    x = torch.randn(400, 32, requires_grad=True)
    torch.compile(model, backend=backend, fullgraph=True)(x).sum().backward()
    return found


def test_inputs_are_recomputed_where_the_graph_keeps_what_they_are_made_of():
    base = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 32))
    floor = saved(base.requires_grad_(False))
    inject(base, rank=2, target_modules="all", trainable=[])
    assert saved(base) <= floor
    with fused(recompute=False):
        torch.compiler.reset()
        assert saved(base) >= floor + 4 * 400 * (32 + 128)


def test_the_operator_is_registered_as_torch_wants_it():
    for dtype in (torch.float32, torch.bfloat16):
        args = [torch.randn(s) for s in ((9, 5), (9, 7), (3, 7), (5, 3))]
        args = [args[0].to(dtype), args[1].to(dtype), *args[2:]]
        torch.library.opcheck(kernels.thin_gradients, (*args, 0.5))


KERNEL = """
    import torch
    from lora_lightning.lora.fused import kernels, triton_kernels

    torch.manual_seed(0)
    for rows, into, out, rank in ((70, 24, 40, 3), (1, 7, 5, 17)):
        for dtype, close in ((torch.float32, 1e-6), (torch.float16, 2e-3)):
            g, x = torch.randn(out, rows).to(dtype).T, torch.randn(rows, into).to(dtype)
            A, B = torch.randn(rank, into), torch.randn(out, rank)
            found = triton_kernels.thin_gradients(g, x, A, B, 0.5, tiles=(32, 32, 4, 3))
            rounded = [t.to(dtype).double() for t in (g, x, A, B)]
            for a, b in zip(found, kernels.products(*rounded, 0.5)):
                assert a.dtype == torch.float32
                assert (a - b).norm() <= close * b.norm(), (rows, into, out, rank, dtype)
"""


def test_the_kernel_in_tritons_interpreter():
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(KERNEL)]
    subprocess.run(command, check=True, env=environment)
