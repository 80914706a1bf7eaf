"""Every kind of layer on the device against the CPU, in float32 without TF32."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lora_lightning import fused, inject, merge, remove, unmerge, verify
from lora_lightning.model.probing import difference, run
from lora_lightning.model.state import named_factors
from tests.helpers import audio_zoo, ops_cases
from tests.helpers.cuda import apart, gradients, on_cpu, stir
from tests.helpers.training import tiny_vit
from tests.helpers.zoo import WAYS, ZOO, targets
from tests.lora.test_layers import adapted, equal, outputs

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported"),
]
# One test asks for no such warning; the others ask for right numbers.
chunks = pytest.mark.filterwarnings("ignore:RNN module weights are not part of single contiguous")
KINDS = sorted(ZOO)
FORMS = {
    "plain": {},
    "dora": {"dora": True},
    "A frozen": {"freeze_a": True},
    "start kept": {"init": "pissa"},
    "core alone": {"xs": True},
}
CASES = [(k, f) for f in FORMS for k in (KINDS if f in ("plain", "dora") else WAYS)]
RECURRENT = {"LSTM": nn.LSTM, "GRU": nn.GRU, "RNN": nn.RNN}
TOLERANCE = 1e-4


def pair(kind: str, device: torch.device, **options):
    """The same adapted layer on the CPU and on the device, and its input."""
    found = []
    for _ in range(2):  # torch cannot copy what the old weight norm keeps
        torch.manual_seed(0)
        _, model, x = adapted(kind, **options)
        found.append(stir(model))
    return found[0], found[1].to(device), x


@chunks
@pytest.mark.parametrize(("kind", "form"), CASES)
def test_output_and_gradients_are_those_of_the_cpu(kind, form, device):
    here, there, x = pair(kind, device, **FORMS[form])
    assert apart(outputs(there, x), outputs(here, x)) < TOLERANCE
    # cuDNN differentiates recurrent layers in training mode alone.
    ours, theirs = run(here.train(), x), run(there.train(), x)
    assert apart(theirs, ours) < TOLERANCE
    expected, found = gradients(here, ours), gradients(there, theirs)
    assert any(bool(g.any()) for g in expected)
    # What cancels but for rounding, as a magnitude's before the weight is standardised, is judged
    # by the size of the others.
    most = max(float(g.abs().max()) for g in expected)
    small = [float(g.abs().max()) < 1e-3 * most for g in expected]
    for g, e, cancels in zip(on_cpu(found), expected, small, strict=True):
        size = most if cancels else float(e.abs().max())
        assert float((g - e).abs().max()) < TOLERANCE * size


@chunks
@pytest.mark.parametrize("form", ["plain", "dora"])
@pytest.mark.parametrize("kind", KINDS)
def test_merge_unmerge_and_remove_exactly_across_moves(kind, form, device):
    here, there, x = pair(kind, device, **FORMS[form])
    before = outputs(there, x)
    merge(there)
    assert apart(outputs(there, x), before) < TOLERANCE
    assert apart(outputs(there, x), outputs(here, x)) < TOLERANCE
    unmerge(there)
    assert equal(outputs(there, x), before)
    merge(there)
    there.cpu()
    unmerge(there)
    assert equal(outputs(there, x), outputs(here, x))
    merge(there)
    there.to(device)
    unmerge(there)
    assert equal(outputs(there, x), before)
    remove(there)
    remove(here)
    base = here.state_dict()
    assert all(torch.equal(v.cpu(), base[k]) for k, v in there.state_dict().items())


@chunks
@pytest.mark.parametrize("form", ["plain", "dora"])
@pytest.mark.parametrize("kind", KINDS)
def test_verify_finds_no_fault_and_leaves_no_trace(kind, form, device):
    _, model, x = pair(kind, device, **FORMS[form])
    before = outputs(model, x)
    assert verify(model, x)[0].effect > 1e-4
    assert equal(outputs(model, x), before)


@chunks
@pytest.mark.parametrize(("kind", "form"), CASES)
def test_injected_on_the_device_it_starts_as_the_base(kind, form, device):
    torch.manual_seed(0)
    make, x = ZOO[kind]
    base = make().eval().requires_grad_(False)
    model = make().eval().requires_grad_(False)
    model.load_state_dict(base.state_dict())
    base, model = base.to(device), model.to(device)
    inject(model, rank=2, target_modules=targets(kind), trainable=[], seed=0, **FORMS[form])
    assert all(p.device.type == device.type for p in model.parameters())
    expected = outputs(base, x)
    if form == "start kept":
        assert difference(outputs(model, x), expected) < 1e-5
    else:
        assert equal(outputs(model, x), expected)


def test_a_seed_draws_the_same_factors_on_every_device(device):
    here, there = tiny_vit(), tiny_vit().to(device)
    for model in (here, there):
        inject(model, rank=2, seed=3)
    theirs = named_factors(there, "default")
    for path, f in named_factors(here, "default").items():
        assert torch.equal(theirs[path].lora_A.cpu(), f.lora_A)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["Linear", "Conv1d", "Conv2d", "Conv2d 1x1", "Conv2d grouped",
                                  "Embedding", "MultiheadAttention", "StdConv2d"])  # fmt: skip
def test_without_an_effect_it_is_the_base_bit_for_bit(kind, dtype, device):
    """B = 0, with gradients and without, by both paths."""
    torch.manual_seed(0)
    base, model, x = adapted(kind)
    base, model = base.to(device, dtype), model.to(device, dtype)
    x = x.to(device, dtype if x.is_floating_point() else None)
    for enabled in (True, False):
        with fused(enabled, smallest=0):
            assert equal(outputs(model.eval(), x), outputs(base.eval(), x))
            # torch picks the kernels of attention by mode, and by whether anything is trained.
            found, expected = (run(m.train(), x) for m in (model, base.requires_grad_()))
            assert equal([t.detach() for t in found], [t.detach() for t in expected])
            base.requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16],
                         ids=str)  # fmt: skip
@pytest.mark.parametrize("rank", [1, 2, 8])
@pytest.mark.parametrize("rows", [33, 64, 513])
def test_the_fused_path_is_the_plain_formula(dtype, rank, rows, device):
    model = ops_cases.adapted(nn.LayerNorm(24), nn.Linear(24, 20), nn.GELU(), nn.Linear(20, 12),
                              dtype=torch.float32, rank=rank)  # fmt: skip
    model = stir_down(model).to(device, dtype)
    x = torch.randn(rows, 24, device=device, dtype=dtype)
    agree(model, x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("kernel", [1, 3, 7])
@pytest.mark.parametrize("size", [7, 16])
def test_the_fused_convolution_is_the_plain_formula(dtype, last, kernel, size, device):
    layers = nn.Conv2d(6, 8, kernel, padding=kernel // 2), nn.ReLU(), nn.Conv2d(8, 5, kernel)
    model = stir_down(ops_cases.adapted(*layers, dtype=torch.float32)).to(device, dtype)
    x = torch.randn(3, 6, size, size, device=device, dtype=dtype)
    if last:
        x, model = (t.to(memory_format=torch.channels_last) for t in (x, model))
    agree(model, x)


@torch.no_grad()
def stir_down(model: nn.Module) -> nn.Module:
    """Outputs stay near 1, so that halves are judged by their rounding."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.mul_(0.3)
    return model


def agree(model: nn.Module, x: torch.Tensor) -> None:
    limit = {torch.float64: 1e-10, torch.float32: TOLERANCE, torch.float16: 1e-2}.get(x.dtype, 6e-2)
    plain = ops_cases.results(model, x, enabled=False)
    for recompute in (True, False):
        found = ops_cases.results(model, x, recompute=recompute)
        assert [t.dtype for t in found] == [t.dtype for t in plain]
        assert torch.equal(found[0], found[1]), "another output without gradients"
        assert apart(found, plain) < limit


@pytest.mark.parametrize("options", [{}, {"dropout": 0.2}, {"init": "pissa"}], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(options, dtype, device):
    """Dtypes are those of the plain formula, and numbers to the rounding of autocast's."""
    model = ops_cases.adapted(nn.LayerNorm(24), nn.Linear(24, 20), dtype=torch.float32, **options)
    model = stir_down(model).to(device)
    x = torch.randn(65, 24, device=device)
    exact = ops_cases.results(model, x)
    with torch.autocast(device.type, dtype):
        plain = ops_cases.results(model, x, enabled=False)
        found = ops_cases.results(model, x)
    assert [t.dtype for t in found] == [t.dtype for t in plain]
    if "dropout" not in options:
        assert apart([t.float() for t in found], [t.float() for t in exact]) < 0.06
    assert all(bool(t.isfinite().all()) for t in found)


@pytest.mark.parametrize("dora", [False, True])
def test_autocast_gives_its_own_dtype(dora, device):
    model = tiny_vit().to(device)
    inject(model, rank=2, dora=dora, target_modules="all")
    with torch.autocast(device.type, torch.bfloat16):
        assert model(torch.randn(2, 3, 32, 32, device=device)).dtype == torch.bfloat16


# ---- dropout -------------------------------------------------------------------------------------


def dropping(device, dtype=torch.float64) -> nn.Module:
    layers = nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)
    return ops_cases.adapted(*layers, dtype=dtype, dropout=0.4).to(device).train()


def test_dropout_is_drawn_from_the_seed(device):
    model, x = dropping(device), torch.randn(64, 8, dtype=torch.float64).to(device)
    found = []
    with fused(smallest=0):
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            found.append(model(x).detach())
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_dropouts_mask_is_the_same_in_forward_and_backward(device):
    """The output is linear in A, so that ⟨∇A, A⟩ is the output's own projection."""
    layer = nn.Linear(16, 16, bias=False)
    nn.init.zeros_(layer.weight)
    model = ops_cases.adapted(layer, dropout=0.5).to(device).train()
    x = torch.randn(500, 16, dtype=torch.float64).to(device)
    with fused(smallest=0):
        out = model(x)
        weights = torch.randn(out.shape, dtype=torch.float64).to(device)
        total = (out * weights).sum()
        A = model[0].lora["default"]["weight"].lora_A
        (gradient,) = torch.autograd.grad(total, A)
    torch.testing.assert_close((gradient * A).sum(), total, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("reentrant", [True, False])
def test_dropout_under_activation_checkpointing(reentrant, device):
    model, x = dropping(device), torch.randn(64, 8, dtype=torch.float64).to(device)

    def step(run) -> list[torch.Tensor]:
        torch.manual_seed(3)
        return gradients(model, [run(x.clone().requires_grad_())])

    with fused(smallest=0):
        expected = step(model)
        if not reentrant:
            found = step(lambda x: checkpoint(model, x, use_reentrant=False))
        else:  # which torch.autograd.grad does not support
            torch.manual_seed(3)
            out = checkpoint(model, x.clone().requires_grad_(), use_reentrant=True)
            generator = torch.Generator().manual_seed(0)
            weights = torch.randn(out.shape, generator=generator).to(device)
            (out.float() * weights).sum().backward()
            found = [p.grad for p in model.parameters() if p.requires_grad]
    assert apart(found, expected) < 1e-6


@pytest.mark.parametrize("reentrant", [True, False])
def test_timms_gradient_checkpointing(reentrant, device):
    model = tiny_vit()
    inject(model, rank=2, trainable=[], dropout=0.1)
    stir(model).to(device).train()
    x = torch.randn(4, 3, 32, 32, device=device)

    def step() -> list[torch.Tensor]:
        torch.manual_seed(3)
        model.zero_grad()
        model(x.clone().requires_grad_()).square().sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.requires_grad]

    with fused(smallest=0):
        expected = step()
        timm.layers.set_reentrant_ckpt(reentrant)
        try:
            model.set_grad_checkpointing(True)
            assert apart(step(), expected) < TOLERANCE
        finally:
            timm.layers.set_reentrant_ckpt(False)


# ---- recurrent layers ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", RECURRENT)
def test_cudnn_gets_flat_weights_without_a_warning(kind, device):
    """Warnings are errors: cuDNN must find the effective weights in one piece of memory."""
    _, model, x = pair(kind, device)
    x = x.to(device)
    for _ in range(2):
        gradients(model, run(model.train(), x))
    with torch.no_grad():
        model.eval()(x)
        merge(model)
        model(x)
        unmerge(model)
        model(x)


@chunks
@pytest.mark.parametrize("kind", RECURRENT)
def test_cudnn_and_torchs_own_kernels_agree(kind, device):
    _, model, x = pair(kind, device)
    x, model = x.to(device), model.train()
    found = run(model, x)
    slopes = gradients(model, found)
    with torch.backends.cudnn.flags(enabled=False):
        plain = run(model, x)
        assert apart(found, plain) < TOLERANCE
        assert apart(slopes, gradients(model, plain)) < TOLERANCE


# ---- whole networks ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_convnext"])
def test_channels_last(name, device):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=4).eval()
    inject(model, rank=2, target_modules="all", trainable=[])
    stir(model).to(device)
    x = torch.randn(3, 3, 64, 64, device=device)
    expected = run(model, x)
    slopes = gradients(model, expected)
    twin = copy.deepcopy(model).to(memory_format=torch.channels_last)
    with fused(smallest=0):
        found = run(twin, x.contiguous(memory_format=torch.channels_last))
        assert apart(found, expected) < TOLERANCE
        assert apart(gradients(twin, found), slopes) < 1e-3
        merge(twin)
        assert apart(run(twin, x), expected) < TOLERANCE
    seen = []
    first = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    first.register_forward_hook(lambda *given: seen.append(given[2]))
    model.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last))
    assert seen[0].is_contiguous(memory_format=torch.channels_last)


@chunks
@pytest.mark.parametrize(
    "name", ["Wav2Vec2", "WavLM", "Conformer", "Emformer", "RNN-T", "DeepSpeech", "Tacotron2"]
)
def test_models_of_speech(name, device, monkeypatch):
    model, inputs = audio_zoo.build(name)
    if name == "Tacotron2":  # which drops out in eval mode too, by the device's own generator
        monkeypatch.setattr(nn.functional, "dropout", lambda x, *_, **__: x)
    model.requires_grad_(False)
    inject(model, rank=2, target_modules="all", trainable=[], clamp_rank=True)
    stir(model, 0.05)
    with torch.no_grad():
        expected = audio_zoo.run(model, inputs)
        model.to(device)
        found = audio_zoo.run(model, tuple(t.to(device) for t in inputs))
    assert apart(found, expected) < 1e-3
    verify(model, tuple(t.to(device) for t in inputs), forward=audio_zoo.positional)
