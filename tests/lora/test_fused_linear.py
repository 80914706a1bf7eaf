"""The fused path equals the plain formula, keeps less, and falls back where needed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from lora_lightning import fused, inject
from lora_lightning.errors import AdapterError
from lora_lightning.lora import factorised
from lora_lightning.lora.fused import linear as ops
from lora_lightning.lora.fused import thin_matmul
from lora_lightning.lora.fused.plan import LIMITS, LowRank, switches
from lora_lightning.model.probing import difference
from tests.helpers.ops_cases import adapted, agree, results

pytestmark = pytest.mark.usefixtures("as_if_inputs_were_large")

LARGE = st.integers(1, 40)


@settings(deadline=None, max_examples=40)
@given(LARGE, LARGE, LARGE, st.integers(1, 6), st.sampled_from([{}, {"freeze_a": True},
       {"init": "pissa"}, {"xs": True}]), st.booleans())  # fmt: skip
def test_linear_of_any_shape(rows, inputs, outputs, rank, options, bias):
    """From a single row, where factors are applied one by one, to many, where BA joins W."""
    layer = nn.Linear(inputs, outputs, bias)
    model = adapted(layer, rank=rank, clamp_rank=True, **options)
    agree(model, torch.randn(rows, inputs, dtype=torch.float64))
    agree(model, torch.randn(2, rows, inputs, dtype=torch.float64).transpose(0, 1))


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 3),
    st.integers(1, 9),
    st.integers(1, 40),
    st.integers(1, 3),
    st.integers(1, 2),
    st.sampled_from([0, 1, "same", "valid", "reflect"]),
    st.sampled_from([{}, {"freeze_a": True}, {"init": "pissa"}]),
    st.booleans(),
)
def test_convolution_of_any_shape(dims, inputs, outputs, kernel, step, padding, options, last):
    """Whole gradients of small kernels, thin ones of large, matrix products of pointwise ones."""
    stride, mode = step, "zeros"
    if padding == "same":
        stride, kernel = 1, 2 * (kernel // 2) + 1
    if padding == "reflect":
        padding, mode = 1, "reflect"
    make = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    layer = make(inputs, outputs, kernel, stride, padding, padding_mode=mode)
    x = torch.randn(2, inputs, *[5] * dims, dtype=torch.float64)
    if last:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    agree(adapted(layer, clamp_rank=True, **options), x)


@pytest.mark.parametrize("rows", [1, 300])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradcheck(rows, dropout):
    """Against finite differences; dropout's mask in backward is that of forward."""
    model = adapted(nn.Linear(5, 4), dropout=dropout)
    model.train()
    factors = model[0].lora["default"]["weight"]

    def run(x: Tensor, A: Tensor, B: Tensor, bias: Tensor) -> Tensor:
        torch.manual_seed(7)
        low = LowRank(A, B, None, None, 0.5, dropout)
        weight = model[0]._parameters["weight"]
        assert ops.applies(x, weight, low)
        return ops.linear(x, weight, bias, low)

    x = torch.randn(rows, 5, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(run, (x, factors.lora_A, factors.lora_B, bias), fast_mode=True)


def test_dropout_is_dropout():
    """In training some of the inputs are dropped, and the others scaled; in eval none."""
    model = adapted(nn.Linear(1, 1, bias=False), rank=1, alpha=1, dropout=0.25)
    nn.init.ones_(model[0].lora["default"]["weight"].lora_A)
    nn.init.ones_(model[0].lora["default"]["weight"].lora_B)
    x = torch.ones(20_000, 1, dtype=torch.float64)
    low = model.train()(x) - model[0]._parameters["weight"]
    assert sorted({round(v, 9) for v in low.flatten().tolist()}) == [0.0, round(4 / 3, 9)]
    assert abs(low.mean() - 1) < 0.02
    assert torch.allclose(model.eval()(x) - model[0]._parameters["weight"], torch.ones(()).double())


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_in_a_captured_graph_dropout_draws_from_torchs_own_generator(monkeypatch, dropout):
    """A generator made there is not registered with the graph, which would repeat one mask."""
    model = adapted(nn.Linear(5, 4), dropout=dropout).train()
    x, layer = torch.randn(30, 5, dtype=torch.float64), model[0]
    low = factorised._low_rank(layer.lora["default"]["weight"])
    assert ops.applies(x, layer._parameters["weight"], low)
    monkeypatch.setattr(ops, "is_captured", lambda x: True)
    assert ops.applies(x, layer._parameters["weight"], low) is not bool(dropout)


def test_a_frozen_A_needs_no_input():
    """Only h = A xᵀ is kept: (r, N) numbers, whatever the input's width."""
    model = adapted(nn.Linear(50, 40), freeze_a=True)
    for rows in (2, 500):
        x = torch.randn(rows, 50, dtype=torch.float64, requires_grad=True)
        out = model(x)  # which holds them
        kept = [t for t in out.grad_fn.saved_tensors if t is not None]
        assert x.data_ptr() not in {t.data_ptr() for t in kept}
        assert (2, rows) in {tuple(t.shape) for t in kept}


@pytest.mark.parametrize("reentrant", [True, False])
def test_under_activation_checkpointing(reentrant):
    model = adapted(nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8), dropout=0.2)
    x = torch.randn(30, 8, dtype=torch.float64)

    def gradients(run: Any) -> list[Tensor]:
        torch.manual_seed(3)
        model.zero_grad()
        run(x.clone().requires_grad_()).square().sum().backward()
        return [p.grad for p in model.parameters() if p.requires_grad]

    expected = [g.clone() for g in gradients(model)]
    found = gradients(lambda x: checkpoint(model, x, use_reentrant=reentrant))
    assert difference(found, expected) < 1e-12


def test_under_saved_tensor_hooks():
    """Everything a backward pass needs goes through the hooks, as with torch's own functions."""
    model = adapted(nn.LayerNorm(8), nn.Linear(8, 8))
    x = torch.randn(300, 8, dtype=torch.float64)
    expected = results(model, x)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        assert difference(results(model, x), expected) == 0


@pytest.mark.parametrize("layers", [(nn.Linear(8, 6),), (nn.Conv2d(8, 6, 1), nn.Conv2d(6, 5, 3))])
@pytest.mark.parametrize("options", [{}, {"dropout": 0.2}, {"init": "pissa"}])
def test_autocast(layers, options):
    """In bfloat16, to its rounding; the gradients of factors are of the factors' own dtype."""
    model = adapted(*layers, dtype=torch.float32, **options)
    shape = (300, 8) if len(layers) == 1 else (4, 8, 5, 5)
    x = torch.randn(shape)
    exact = results(model, x)
    with torch.autocast("cpu", torch.bfloat16):
        plain, found = results(model, x, enabled=False), results(model, x)
    assert [t.dtype for t in found] == [t.dtype for t in plain]
    if "dropout" not in options:  # the two draw other masks
        assert difference(found, exact) < 0.03
        assert difference(found, plain) < 0.03


@pytest.mark.parametrize("layer", [nn.Linear(8, 6), nn.Conv2d(8, 6, 1), nn.Conv2d(8, 6, 3)])
@pytest.mark.parametrize("options", [{}, {"freeze_a": True}, {"init": "pissa"}])
def test_under_autocast_the_weight_is_rounded_once(layer, options):
    """The product is that of W + sBA, cast; the gradients are those of float64, to rounding."""
    model = adapted(layer, dtype=torch.float32, **options)
    x = torch.randn((900, 8) if isinstance(layer, nn.Linear) else (4, 8, 30, 30))
    used = model[0].lora["default"]["weight"].effective(model[0]._parameters["weight"])
    product = F.linear if isinstance(layer, nn.Linear) else F.conv2d
    low = [t.detach().bfloat16() for t in (x, used, model[0].bias)]
    with torch.autocast("cpu", torch.bfloat16):
        without, found, *gradients = results(model, x)
    assert torch.equal(without, found)
    assert torch.equal(found, product(*low))
    exact = results(copy.deepcopy(model).double(), x.double())[2:]
    assert difference([g.double() for g in gradients], exact) < 2 * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("layer", [nn.Linear(8, 6), nn.Conv1d(8, 6, 2)])
def test_autocast_around_the_backward_pass_alone(layer):
    model = adapted(layer, dtype=torch.float32)
    x = torch.randn(30, 8, 4 if isinstance(layer, nn.Conv1d) else 8)
    expected = results(model, x)[2:]
    leaves = [x.requires_grad_(), *(p for p in model.parameters() if p.requires_grad)]
    out = model(x)
    torch.manual_seed(2)
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(out, leaves, torch.randn(out.shape))
    assert difference(found, expected) < 1e-6


def test_grad_scaler():
    """Scaled gradients come out scaled, and the step is that of the plain formula."""
    steps = []
    start = adapted(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 3), dtype=torch.float32)
    for enabled in (True, False):
        model = copy.deepcopy(start)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        with fused(enabled, smallest=0):
            torch.manual_seed(5)
            scaler.scale(model(torch.randn(200, 8)).square().mean()).backward()
            scaler.step(optimizer)
            scaler.update()
        steps.append([p.detach() for p in model.parameters()])
    assert difference(*steps) < 1e-5


@pytest.mark.parametrize("layer", [nn.Linear(4, 3), nn.Conv1d(4, 3, 2)])
def test_a_second_derivative_is_refused_and_has_a_way(layer):
    model = adapted(layer)
    x = torch.randn(5, 4, 6 if isinstance(layer, nn.Conv1d) else 4, dtype=torch.float64)
    x.requires_grad_()
    with pytest.raises(AdapterError, match=r"lora_lightning.fused\(False\)"):
        torch.autograd.grad(model(x).pow(3).sum(), x, create_graph=True)
    with fused(False):
        (first,) = torch.autograd.grad(model(x).pow(3).sum(), x, create_graph=True)
        assert torch.autograd.grad(first.sum(), x)[0].any()


def test_many_gradients_at_once_are_refused_and_have_a_way():
    model = adapted(nn.Linear(4, 3))
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    with pytest.raises(AdapterError, match="is_grads_batched"):
        torch.autograd.grad(model(x), x, torch.ones(2, 5, 3).double(), is_grads_batched=True)
    with fused(False):
        out = model(x)
    torch.autograd.grad(out, x, torch.ones(2, 5, 3).double(), is_grads_batched=True)


@pytest.mark.filterwarnings("ignore::FutureWarning:torch.*")  # torch's own, on first use
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*")
def test_torch_func_takes_the_plain_formula():
    model = adapted(nn.Linear(4, 3))
    x = torch.randn(6, 4, dtype=torch.float64)
    jacobian = torch.func.jacrev(model)(x[0])
    assert difference([jacobian], [torch.func.jacfwd(model)(x[0])]) < 1e-12
    assert difference([torch.func.vmap(model)(x)], [model(x)]) < 1e-12
    _, moved = torch.func.jvp(model, (x,), (torch.ones_like(x),))
    assert difference([moved[0]], [jacobian.sum(1)]) < 1e-12


def test_an_activation_may_work_in_place():
    model = adapted(nn.Conv2d(4, 6, 1), nn.ReLU(inplace=True), nn.Conv2d(6, 5, 1))
    x = torch.randn(3, 4, 9, 9, dtype=torch.float64)
    agree(model, x)
    agree(model, x.to(memory_format=torch.channels_last))
    last = model(x.to(memory_format=torch.channels_last))
    assert last.is_contiguous(memory_format=torch.channels_last)


def test_a_weight_changed_before_backward_is_noticed():
    model = adapted(nn.Linear(4, 3))
    out = model(torch.randn(200, 4, dtype=torch.float64)).sum()
    with torch.no_grad():
        model[0].lora["default"]["weight"].lora_B.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


def test_trained_weights_and_unbatched_inputs():
    """A base weight that trains gets its gradient too; (C, H, W) pictures pass."""
    model = adapted(nn.Conv2d(4, 3, 3))
    x = torch.randn(4, 6, 6, dtype=torch.float64)
    assert difference([model(x)], [model(x[None])[0]]) < 1e-14
    weight = model[0]._parameters["weight"].requires_grad_()
    model(x[None]).sum().backward()
    assert weight.grad.any()


@pytest.mark.parametrize("rows", [(0,), (3, 0)])
def test_empty_batches(rows):
    model = adapted(nn.Linear(4, 3))
    x = torch.zeros(*rows, 4, dtype=torch.float64, requires_grad=True)
    out = model(x)
    assert out.shape == (*rows, 3)
    out.sum().backward()
    assert x.grad.shape == x.shape
    assert not model[0].lora["default"]["weight"].lora_B.grad.any()


@pytest.mark.parametrize("dims", [2, 3])
def test_pointwise_convolution_with_the_channels_last(dims):
    """Few positions, where the factors are applied one by one, in place."""
    layer = (nn.Conv2d, nn.Conv3d)[dims - 2](64, 48, 1)
    x = torch.randn(2, 64, *[3] * dims, dtype=torch.float64)
    last = torch.channels_last if dims == 2 else torch.channels_last_3d
    x, model = x.to(memory_format=last), adapted(layer)
    agree(model, x)
    assert model(x).stride() == layer.double()(x).stride()


@pytest.mark.parametrize("options", [{}, {"init": "pissa"}])
def test_a_weight_with_the_channels_last_is_not_copied(options):
    """W' has its memory format, which the convolution would ask for."""
    model = adapted(nn.Conv2d(6, 5, 3), **options).to(memory_format=torch.channels_last)
    x = torch.randn(2, 6, 9, 9, dtype=torch.float64).to(memory_format=torch.channels_last)
    agree(model, x)
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "conv2d", lambda x, weight, *rest: seen.append(weight) or x)
        model(x)
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    assert not seen[0].is_contiguous()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_nested_tensors_take_the_plain_formula():
    model = adapted(nn.Linear(8, 6))
    parts = [torch.randn(n, 8, dtype=torch.float64) for n in (3, 5)]
    out = model(torch.nested.nested_tensor(parts, layout=torch.strided))
    assert difference(list(out.unbind()), [model(part) for part in parts]) < 1e-12


def test_small_inputs_take_torchs_own_functions():
    """Where the interpreter's overhead would exceed the gain."""
    model = adapted(nn.Linear(64, 8))
    for rows, wanted in ((4, False), (8000, True)):
        with fused():
            out = model(torch.randn(rows, 64, dtype=torch.float64))
        assert (type(out.grad_fn).__name__ == "_LinearBackward") == wanted


def test_the_switch_is_put_back():
    before = vars(switches).copy()
    with pytest.raises(KeyError), fused(False, recompute=False):
        raise KeyError
    assert vars(switches) == before


def test_blocks_that_overlap_in_two_threads():
    """Each restores its own settings; in between the latest open one applies."""
    before = vars(switches).copy()
    first, second = fused(False), fused(smallest=7)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert (switches.enabled, switches.smallest) == (True, 7)
    second.__exit__(None, None, None)
    assert vars(switches) == before


@pytest.mark.parametrize("rows", [3, 20, 60, 500])
@pytest.mark.parametrize("options", [{}, {"freeze_a": True}, {"init": "pissa"}])
def test_the_same_output_with_and_without_gradients(rows, options):
    """Bit for bit; and the base's own at the start."""
    x = torch.randn(rows, 30)
    base = nn.Linear(30, 20)
    expected = base(x)
    inject(base, rank=2, target_modules="all", trainable=[], **options)
    assert torch.equal(base(x), expected)
    nn.init.normal_(base.lora["default"]["weight"].lora_B)
    with torch.no_grad():
        without = base(x)
    assert torch.equal(base(x), without)


# ---- as on a CUDA device, where launches count ---------------------------------------------------


@pytest.fixture
def as_on_a_cuda_device(as_if_inputs_were_large, monkeypatch):
    """Its formulas, and backward passes in one piece."""
    for half in (False, True):
        monkeypatch.setitem(LIMITS, ("cpu", half), LIMITS["cuda", half])
    monkeypatch.setattr(thin_matmul, "_PIECE", 2**19)
    monkeypatch.setattr(thin_matmul, "_WORTH", 2**20)


@pytest.mark.usefixtures("as_on_a_cuda_device")
@pytest.mark.parametrize("cheap", [0, 1e9])
@pytest.mark.parametrize("options", [{}, {"freeze_a": True}, {"init": "pissa"}, {"xs": True}])
def test_the_formulas_of_a_cuda_device(cheap, options, monkeypatch):
    """The whole weight's gradient, and thin ones, in one piece; few rows, and many."""
    own = LIMITS["cpu", False]._replace(cheap=cheap, reading=-10.0)
    monkeypatch.setitem(LIMITS, ("cpu", False), own)
    layers = nn.LayerNorm(24), nn.Linear(24, 30), nn.GELU(), nn.Linear(30, 20)
    model = adapted(*layers, **options)
    for rows in (1, 4, 60):
        agree(model, torch.randn(3, rows, 24, dtype=torch.float64))
    model = adapted(nn.Conv2d(24, 30, 1), nn.Conv2d(30, 20, 3), **options)
    agree(model, torch.randn(2, 24, 9, 9, dtype=torch.float64))
    agree(model, torch.randn(2, 9, 9, 24, dtype=torch.float64).permute(0, 3, 1, 2))


class Calls(TorchDispatchMode):
    """Records operators that compute, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view and "empty" not in func.__name__:
            self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


AGAIN = {"layer norm": ["sub", "mul_", "addcmul"], "GELU": ["gelu"], "nothing": []}


@pytest.mark.usefixtures("as_on_a_cuda_device")
@pytest.mark.parametrize("producer", AGAIN)
@pytest.mark.parametrize("low", [False, True], ids=["float32", "autocast"])
def test_the_number_of_operators(producer, low):
    """One more than the frozen layer's in the forward pass, W + sBA; four in the backward pass."""
    before = {"layer norm": nn.LayerNorm(32), "GELU": nn.GELU(), "nothing": nn.Identity()}
    before = nn.Sequential(nn.Linear(32, 32), before[producer]).requires_grad_(False)
    model = adapted(nn.Linear(32, 48), dtype=torch.float32)
    x = torch.randn(128, 32, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        x = before(x)
        with Calls() as forward:
            out = model(x)
    trained = [p for p in model.parameters() if p.requires_grad and p.dim() == 2]
    ones = torch.ones_like(out)
    with Calls() as backward:
        torch.autograd.grad(out, [x, *trained], ones)
    casts = ["_to_copy"] * low
    assert forward.names == ["addmm", *casts, *casts, "addmm"]
    # In float32 W + sBA is computed again; the cast one is kept, as torch keeps the cast W. The
    # cast of the gradient is a CPU's alone.
    again = [] if low else ["addmm"]
    assert backward.names == [*again, "mm", *AGAIN[producer], "mm", *casts, "addmm", "addmm"]
