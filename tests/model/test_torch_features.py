"""torch's features on adapted models: compile, export, checkpoint, cast, script."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

from lora_lightning import disabled, inject, load_adapter, merge, remove, save_adapter
from lora_lightning.lora.factors import Factors
from lora_lightning.model.probing import difference
from lora_lightning.model.state import named_factors
from tests.helpers.training import randomise, tiny_vit
from tests.helpers.zoo import ZOO, targets

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(5))
# Torch's own remarks while compiling on a machine without CUDA.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*CUDA.*"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning:torch.*"),
]


def adapted(model: nn.Module | None = None, **options) -> nn.Module:
    """This model, or a small ViT, with an adapter that acts: on all of its layers, or auto's."""
    options = ({"target_modules": "all"} if model else {}) | options
    model = model or tiny_vit()
    inject(model, rank=2, trainable=[], **options)
    randomise(model)
    return model


@pytest.mark.parametrize(
    "kind",
    ["Linear", "Linear subclass", "Conv2d grouped", "StdConv2d", "MultiheadAttention",
     "pos_embed", "weight norm", "ConvTranspose2d"],
)  # fmt: skip
def test_compile_fullgraph(kind):
    """Traced without a break, forward and backward; one backend is as good as another."""
    make, x = ZOO[kind]
    model = adapted(make(), target_modules=targets(kind))
    expected = model(x)
    expected.square().sum().backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    before = [id(p) for p in model.parameters()]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    out = compiled(x)
    assert difference([out], [expected]) < 1e-6
    out.square().sum().backward()
    found = [p.grad for p in model.parameters() if p.grad is not None]
    assert difference(found, gradients) < 1e-5
    assert [id(p) for p in model.parameters()] == before


@pytest.mark.slow
def test_compile_fullgraph_with_inductor():
    model = adapted(target_modules=["auto", "pos_embed"])
    assert difference([torch.compile(model, fullgraph=True)(X)], [model(X)]) < 1e-4


def test_one_graph_for_batches_of_any_size():
    """The fused path asks for the size of its input, which would be a guard of the graph."""
    model, counter = adapted(nn.Sequential(nn.Linear(8, 8))), CompileCounter()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    few, many = torch.randn(3, 8), torch.randn(30_000, 8)
    for x in (few, many):
        assert difference([compiled(x)], [model(x)]) < 1e-5
    assert counter.frame_count == 1
    shapes = ({0: torch.export.Dim("batch", min=2, max=100_000)},)
    program = torch.export.export(model, (few,), dynamic_shapes=shapes).module()
    assert difference([program(many)], [model(many)]) < 1e-5


def test_compile_vit_and_switch_off():
    torch._dynamo.reset()
    model = adapted(target_modules=["auto", "pos_embed"])
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    # A compiler is given the plain formula, which rounds otherwise than the fused one.
    assert difference([compiled(X)], [model(X)]) < 1e-5
    with disabled(model):
        assert difference([compiled(X)], [model(X)]) < 1e-6
    torch._dynamo.reset()


def test_export():
    model = adapted(target_modules=["auto", "pos_embed"]).eval()
    program = torch.export.export(model, (X,))
    assert difference([program.module()(X)], [model(X)]) < 1e-5


def test_torchscript_after_merging():
    # timm's fused attention is scriptable only with its exportable layers.
    layers = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3600, 4)
    model = adapted(nn.Sequential(*layers))
    expected = model(X)
    merge(model)
    for scripted in (torch.jit.script(model), torch.jit.trace(model, X)):
        assert difference([scripted(X)], [expected]) < 1e-5


def test_torchscript_of_a_merged_vit():
    model = adapted().eval()
    expected = model(X)
    merge(model)
    assert difference([torch.jit.script(model)(X)], [expected]) < 1e-5


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    model = adapted(dropout=0.0).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    model(X).square().sum().backward()
    expected = [p.grad.clone() for p in trained]
    model.zero_grad()

    def blocks(x):
        return checkpoint(model.blocks, x, use_reentrant=reentrant)

    x = model._pos_embed(model.patch_embed(X)).requires_grad_()
    model.forward_head(model.norm(blocks(x))).square().sum().backward()
    assert difference([p.grad for p in trained], expected) < 1e-5


def test_timm_gradient_checkpointing():
    model = adapted().train()
    model.set_grad_checkpointing(True)
    model(X).square().sum().backward()
    assert all(f.lora_A.grad.any() for f in named_factors(model, "default").values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    model = adapted(target_modules=["auto", "patch_embed.proj", "pos_embed"])
    exact = model(X)
    with torch.autocast("cpu", dtype=dtype):
        out = model(X)
        merge(model)
        merged = model(X)
    out.float().square().sum()
    assert difference([out.float()], [exact]) < 0.05
    assert difference([merged.float()], [out.float()]) < 0.05


def test_autocast_backward():
    model = adapted(target_modules="all")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(X).float().square().sum()
    loss.backward()
    assert all(
        f.lora_B.grad.dtype == torch.float32 for f in named_factors(model, "default").values()
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_conversion_after_injection(dtype):
    model = adapted().to(dtype)
    assert model(X.to(dtype)).dtype == dtype
    with disabled(model):
        assert model(X.to(dtype)).dtype == dtype


def test_channels_last():
    make, x = ZOO["Conv2d"]
    model = adapted(make())
    expected = model(x)
    model.to(memory_format=torch.channels_last)
    x = x.contiguous(memory_format=torch.channels_last)
    out = model(x)
    assert difference([out], [expected]) < 1e-5
    assert out.is_contiguous(memory_format=torch.channels_last)
    merge(model)
    assert difference([model(x)], [expected]) < 1e-5


def test_meta_device_then_source_weights():
    """Injected without memory; numbers come with the checkpoint, factors draw theirs."""
    base = tiny_vit()
    with torch.device("meta"):
        model = tiny_vit()
    inject(model, rank=2, seed=0)
    assert all(p.is_meta for p in model.parameters())
    model.load_state_dict(base.state_dict(), strict=True, assign=True)
    model.eval()
    assert torch.equal(model(X), base(X))
    twin = copy.deepcopy(base)
    inject(twin, rank=2, seed=0)
    mine, theirs = named_factors(model, "default"), named_factors(twin, "default")
    assert all(torch.equal(f.lora_A, theirs[p].lora_A) for p, f in mine.items())


def test_meta_device_then_to_empty():
    with torch.device("meta"):
        model = nn.Linear(4, 3)
    inject(model, rank=2, target_modules="all", trainable=[], seed=0)
    model.to_empty(device="cpu")
    twin = nn.Linear(4, 3)
    inject(twin, rank=2, target_modules="all", trainable=[], seed=0)
    factors = next(m for m in model.modules() if isinstance(m, Factors))
    assert torch.equal(factors.lora_A, named_factors(twin, "default")["weight"].lora_A)
    assert not factors.lora_B.any()


def test_adapter_file_onto_a_model_from_the_meta_device(tmp_path):
    base = tiny_vit()
    model = adapted(copy.deepcopy(base))
    path = save_adapter(model, tmp_path / "a.safetensors")
    with torch.device("meta"):
        fresh = tiny_vit()
    fresh.load_state_dict(base.state_dict(), assign=True)
    load_adapter(fresh.eval(), path)
    assert torch.equal(fresh(X), model(X))


def test_torch_func():
    """Per-sample gradients of the factors, through the factorised and the effective path."""
    model = nn.Sequential(nn.Linear(4, 4), ZOO["Linear subclass"][0]())
    model[1] = type(model[1])(4, 3)
    adapted(model)
    values = {n: p.detach() for n, p in model.named_parameters()}
    x = torch.randn(5, 4)

    def loss(parameters, sample):
        return torch.func.functional_call(model, parameters, (sample,)).square().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(values, x)
    model(x).square().sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert torch.allclose(per_sample[name].sum(0), parameter.grad, atol=1e-4)


def test_state_dict_of_a_merged_model_is_a_plain_checkpoint():
    model = adapted(target_modules=["auto", "pos_embed"])
    expected = model(X)
    merge(model)
    plain = tiny_vit()
    plain.load_state_dict(model.state_dict(), strict=True)
    assert difference([plain(X)], [expected]) < 1e-5
    remove(model)


def test_hooks_survive():
    model = tiny_vit()
    seen = []
    model.blocks[0].attn.qkv.register_forward_hook(lambda *_: seen.append(1))
    inject(model, rank=1)
    model(X)
    remove(model)
    model(X)
    assert len(seen) == 2


@pytest.mark.parametrize("kind", ["Linear", "Conv2d", "Conv2d 1x1"])
def test_a_compiler_is_given_no_alpha(kind):
    """Inductor forgets it where it joins a sum with a product of matrices."""
    make, x = ZOO[kind]
    seen = []

    def backend(graph, inputs):
        seen.extend(graph.graph.nodes)
        return graph

    model = adapted(nn.Sequential(make()))
    assert difference([torch.compile(model, backend=backend)(x)], [model(x)]) < 1e-6
    assert seen
    assert not any("alpha" in node.kwargs for node in seen)
