"""Compiled and captured: graphs are made once, and say what the eager model says."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters

from lora_lightning import AdapterBank, fused, inject, save_adapter, set_active, verify
from lora_lightning.model.probing import difference
from tests.helpers.bank_cases import images, write
from tests.helpers.cuda import apart, fit, gradients, stir
from tests.helpers.training import Losses, bright, lora, tiny_vit

# Torch's own remarks while it compiles.
pytestmark = [pytest.mark.cuda, pytest.mark.filterwarnings("ignore")]

compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("gcc", "cc", "clang"))), reason="inductor needs a C compiler"
)


@pytest.fixture(autouse=True)
def _fresh():
    """No test finds the graphs of another."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def stack(**options) -> nn.Module:
    """Two linear layers and a convolution, adapted."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 4, 4), nn.Flatten(2), nn.LayerNorm(64), nn.Linear(64, 32), nn.GELU(),
        nn.Linear(32, 8), nn.Flatten(), nn.Linear(64, 4),
    )  # fmt: skip
    options = {"rank": 2, "target_modules": "all", "trainable": [], **options}
    inject(model, **options)
    return stir(model)


def pictures(items: int, device: torch.device) -> torch.Tensor:
    return images(32, items).to(device)


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


@compiler
def test_the_default_mode_trains_as_eager_does(device):
    model = stack().to(device)
    x = pictures(4, device)
    expected = model(x)
    slopes = gradients(model, [expected])
    compiled = torch.compile(model, fullgraph=True)
    out = compiled(x)
    assert apart([out], [expected]) < 1e-4
    assert apart(gradients(model, [out]), slopes) < 1e-3


def test_a_changing_batch_is_one_graph(device):
    model, counter = stack().to(device), CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    with fused(smallest=5000):  # between the sizes of these batches
        for items in (4, 7, 12):  # from 16 on torch's own convolution on a CPU takes another way
            x = pictures(items, device)
            assert difference([compiled(x)], [model(x)]) < 1e-4
    assert counter.frame_count == 1


@pytest.mark.parametrize("verified", [True, False])
def test_verification_adds_no_graph_to_a_fit(tmp_path, verified, device):
    module, counter = Losses(tiny_vit()), CompileCounter()
    module.model.compile(backend=counter)
    counts = []

    def count(*_):
        counts.append(counter.frame_count)

    module.on_train_batch_end = count
    fit(tmp_path, device, module, lora(verify=verified), data=bright(batch=4), max_epochs=3)
    assert counts[-1] == counts[1], "compiled again after the second batch"
    # The first batch is recorded by a hook, and the compiler sees the model with it, and without.
    assert counts[-1] <= 2


def test_verify_leaves_graphs_valid(device):
    model, counter = stack().to(device), CompileCounter()
    compiled = torch.compile(model, backend=counter)
    x = pictures(4, device)
    before = compiled(x)
    verify(model, x)
    assert torch.equal(compiled(x), before)
    assert counter.frame_count == 1


def two_adapters(device: torch.device) -> nn.Module:
    model = stack(name="one")
    inject(model, rank=2, target_modules="all", trainable=[], name="two", seed=1)
    return stir(model, seed=1).to(device)


@compiler
def test_reduce_overhead_trains_and_switches_without_compiling_again(device):
    model = two_adapters(device)
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    x = pictures(4, device)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1e-3)
    names = ["one", "two", "one", "two", "one", "two", "one"]
    seen = []
    for name in names:
        set_active(model, name)
        expected = model(x).detach().clone()
        torch.compiler.cudagraph_mark_step_begin()
        out = compiled(x)
        assert apart([out], [expected]) < 1e-4
        out.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        seen.append(graphs())
    assert seen[-1] == seen[1], "compiled again for an adapter that was compiled for"


def test_a_bank_swaps_adapters_without_compiling_again(tmp_path, device):
    base = nn.Sequential(nn.Conv2d(3, 6, 3, 2), nn.ReLU(), nn.Flatten(2), nn.Linear(49, 5)).eval()
    x, paths = pictures(4, device)[..., :16, :16], write(base, tmp_path)
    base.to(device)
    bank, counter = AdapterBank(base, paths, example=x), CompileCounter()
    compiled = torch.compile(base, backend=counter, fullgraph=True)
    for names in (["a", "b", "c", "a"], ["c", None, "a", "b"], ["b", "c", "c", "a"]):
        with torch.no_grad(), bank[names]:
            assert difference([compiled(x)], [base(x)]) <= 1e-5
    assert counter.frame_count == 1


def test_export_takes_a_model_of_the_device(device):
    model = stack().to(device).eval()
    batch = torch.export.Dim("batch", min=2, max=15)
    program = torch.export.export(model, (pictures(4, device),), dynamic_shapes=({0: batch},))
    x = pictures(9, device)
    assert difference([program.module()(x)], [model(x)]) < 1e-4


# ---- CUDA graphs ---------------------------------------------------------------------------------


def captured(run, device: torch.device) -> torch.cuda.CUDAGraph:
    """A graph of what `run` does, after the usual warm-up on another stream."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


@pytest.mark.parametrize("make", [stack, tiny_vit], ids=["stack", "vit"])
def test_a_forward_pass_is_captured(make, cuda):
    model = make()
    if make is tiny_vit:
        inject(model, rank=2, trainable=[])
        stir(model)
    model.to(cuda).eval()
    x, out = pictures(4, cuda), None

    @torch.no_grad()
    def run():
        nonlocal out
        out = model(x)

    graph = captured(run, cuda)
    x.copy_(images(32, 8)[4:])
    graph.replay()
    with torch.no_grad():
        assert difference([out], [model(x)]) < 1e-5


@pytest.mark.parametrize("size", [0, 2**60], ids=["fused", "plain"])
def test_a_training_step_is_captured(size, cuda):
    model, twin = stack().to(cuda), stack().to(cuda)
    x = pictures(4, cuda)
    pairs = [
        (m, torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=1e-3))
        for m in (model, twin)
    ]

    def step(which: int):
        m, optimizer = pairs[which]
        optimizer.zero_grad(set_to_none=True)
        m(x).square().sum().backward()
        optimizer.step()

    with fused(smallest=size):
        graph = captured(lambda: step(0), cuda)
        for _ in range(3):
            graph.replay()
        for _ in range(6):  # three to warm up; what is captured is not run
            step(1)
    assert apart(list(model.parameters()), list(twin.parameters())) < 1e-4


@pytest.mark.parametrize("size", [0, 2**60], ids=["fused", "plain"])
def test_a_captured_step_draws_another_mask_each_time(size, cuda):
    """And the gradient is that of the mask: ⟨∇A, A⟩ is the projected effect."""
    layer = nn.Linear(16, 16, bias=False)
    nn.init.zeros_(layer.weight)
    model = nn.Sequential(layer)
    inject(model, rank=2, target_modules="all", trainable=[], dropout=0.5)
    stir(model, 1.0).to(cuda).train()
    x = torch.randn(200, 16, device=cuda)
    A = model[0].lora["default"]["weight"].lora_A
    total = gradient = None

    def run():
        nonlocal total, gradient
        total = model(x).square().sum()
        (gradient,) = torch.autograd.grad(total, A)

    with fused(smallest=size):
        graph = captured(run, cuda)
        found = []
        for _ in range(3):
            graph.replay()
            # The square of what is linear in A: its gradient along A is twice itself.
            torch.testing.assert_close((gradient * A).sum(), 2 * total, rtol=1e-3, atol=1e-3)
            found.append(float(total))
    assert len(set(found)) == 3


def test_an_adapter_file_is_written_from_compiled_models(tmp_path, device):
    model = stack().to(device)
    model.compile(backend="eager")
    model(pictures(2, device))
    assert save_adapter(model, tmp_path / "a.safetensors").exists()
