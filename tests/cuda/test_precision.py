"""Numbers of every precision: TF32, mixed, half; verification and training in each."""

from __future__ import annotations

import pytest
import timm
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import nn

from lora_lightning import (
    compress,
    disabled,
    inject,
    load_adapter,
    merge,
    save_adapter,
    unmerge,
    verify,
)
from lora_lightning.model.data_driven.prune import Pruner
from lora_lightning.model.probing import difference, run
from lora_lightning.model.state import named_factors
from tests.helpers.cuda import (
    SETTINGS,
    Recurrent,
    apart,
    finite,
    fit,
    needs_half_recurrence,
    set_precision,
    stir,
)
from tests.helpers.training import Losses, bright, lora, randomise, tiny_vit
from tests.model.test_every_timm import wake

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.filterwarnings("ignore:RNN module weights are not part of single contiguous"),
]
# Wide enough for tensor cores.
NETWORKS = {
    "resnet18": (32, {}),
    "mobilenetv3_small_050": (64, {}),
    "convnext_atto": (64, {"depths": (1, 1, 2, 1)}),
    "vit_tiny_patch16_224": (64, {"img_size": 64, "depth": 3}),
}
PRECISIONS = ["32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true"]
# A base that Lightning converts to float16 is not recognised as its own in float32: documented.
float16 = pytest.mark.filterwarnings("ignore:the base's weights changed .* rounded to float16")
HALVES = {"bf16-true": torch.bfloat16, "16-true": torch.float16}


def network(name: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    size, options = NETWORKS[name]
    model = timm.create_model(name, num_classes=10, **options).eval()
    wake(model)
    return model, torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def flags() -> tuple[bool, str]:
    return torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", NETWORKS)
def test_verify_under_every_setting_of_tf32(name, setting, device):
    model, x = network(name)
    inject(model, rank=4, target_modules="all", trainable=[])
    model.to(device)
    set_precision(setting)
    found = verify(model, x)[0]
    assert found.effect > 1e-3
    assert found.merge_error < 1e-4, "judged without TF32"
    assert flags() == SETTINGS[setting]


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("dtype", HALVES.values(), ids=str)
def test_verify_in_half_precision(name, dtype, device):
    model, x = network(name)
    inject(model, rank=4, target_modules="all", trainable=[])
    model.to(device, dtype)
    verify(model, x.to(dtype))
    verify(model, x.to(dtype), forward=lambda m, batch: m(batch.to(device)).float())


def test_verify_does_not_read_torchs_former_switches(device):
    """They raise as soon as convolutions and recurrent layers are set apart."""
    model = Recurrent()
    inject(model, rank=2, target_modules="all", trainable=[])
    x = torch.randn(4, 5, 6)
    backends = torch.backends.cudnn.conv, torch.backends.cudnn.rnn
    before = [b.fp32_precision for b in backends]
    try:
        backends[0].fp32_precision, backends[1].fp32_precision = "ieee", "tf32"
        verify(model.to(device), x)
        inject(
            model, rank="explained-variance", name="a", target_modules="all", trainable=[], data=[x]
        )
        inject(model, rank=2, name="b", target_modules="all", trainable=[], init="eva", data=[x])
        assert [b.fp32_precision for b in backends] == ["ieee", "tf32"]
    finally:
        for backend, value in zip(backends, before, strict=True):
            backend.fp32_precision = value


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_recurrent_layers_through_the_callback(tmp_path, kind, precision, device):
    if precision != "32-true":
        needs_half_recurrence(device)
    torch.manual_seed(0)
    module = Losses(Recurrent(kind))
    adapter = lora(target_modules="all", trainable=[])
    fit(
        tmp_path,
        device,
        module,
        adapter,
        data=bright(shape=(5, 6)),
        max_epochs=6,
        precision=precision,
    )
    assert module.losses[-1] < module.losses[0]
    assert finite(module)


@float16
@pytest.mark.parametrize("setting", ["default", "high"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_the_callback_in_every_precision(tmp_path, name, precision, setting, device):
    """As Lightning's users have it: verified at the first batch, finite, and learning."""
    torch.manual_seed(0)
    model = tiny_vit() if name == "test_vit" else timm.create_model(name, num_classes=4)
    wake(model)
    module = Losses(model, lr=3e-3)
    set_precision(setting)
    # Adam's ε is 0 in float16, and so is many a gradient: a head of its own would be NaN, adapted
    # or not. Factors are float32.
    heads = {"trainable": []} if precision == "16-true" else {}
    adapter = lora(target_modules="all", batch_norm="adapt", **heads)
    fit(tmp_path, device, module, adapter, max_epochs=8, precision=precision)
    assert finite(module)
    assert torch.tensor(module.losses).isfinite().all()
    assert sum(module.losses[-2:]) < sum(module.losses[:2])
    assert all(f.lora_B.any() for f in named_factors(module.model, "default").values())


@float16
@pytest.mark.parametrize("precision", HALVES)
def test_small_updates_are_not_lost_in_half_precision(tmp_path, precision, device):
    """Two hundred steps of 1e-5 move A, though each is below half an ulp of its values."""
    torch.manual_seed(0)
    module = Losses(tiny_vit(), lr=1e-5)
    before = tiny_vit()
    inject(before, rank=2, seed=0)
    start = {p: f.lora_A.detach().float() for p, f in named_factors(before, "default").items()}
    data = bright(items=8, batch=4)
    adapter = lora(trainable=[])
    fit(tmp_path, device, module, adapter, data=data, max_epochs=40, precision=precision)
    moved = [
        float((f.lora_A.detach().float() - start[p]).abs().mean())
        for p, f in named_factors(module.model, "default").items()
    ]
    # Adam's steps are of the size of the learning rate: at least a tenth of all of them add up.
    assert min(moved) > 0.1 * 80 * 1e-5


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("dtype", HALVES.values(), ids=str)
def test_small_adapters_act_in_half_precision(dtype, dora, device):
    """BA far below an ulp of W still moves the output, as it does in float32."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64))
    inject(model, rank=2, target_modules="all", trainable=[], dora=dora)
    randomise(model, 2e-4)
    x = torch.randn(256, 64)
    with torch.no_grad():
        f = named_factors(model, "default")["0.weight"]
        wanted = x @ f.delta(model[0]._parameters["weight"].shape).T
        model.to(device, dtype)
        x = x.to(device, dtype)
        found = model(x)
        with disabled(model):
            found = (found.float() - model(x).float()).cpu()
    if not dora:  # whose ratio of norms has an effect of its own
        assert float((found * wanted).sum() / wanted.square().sum()) == pytest.approx(1, abs=0.5)
    assert found.any()


# ---- gradients that are skipped, or scaled -------------------------------------------------------


def scaler(device: torch.device, scale: float) -> MixedPrecision:
    """Lightning's, whose first steps overflow where the scale is too large."""
    own = torch.amp.GradScaler(device.type, init_scale=scale)
    return MixedPrecision("16-mixed", device.type, scaler=own)


@pytest.mark.parametrize("options", [{}, {"rank": 4, "prune_to": 2}, {"dora": True}], ids=str)
def test_skipped_steps(tmp_path, options, device):
    torch.manual_seed(0)
    module, plugin = Losses(tiny_vit(), lr=3e-3), scaler(device, 2.0**30)
    fit(tmp_path, device, module, lora(**options), max_epochs=24, plugins=[plugin])
    assert plugin.scaler.get_scale() < 2.0**30, "no step was skipped"
    assert finite(module)
    assert sum(module.losses[-2:]) < sum(module.losses[:2])
    if "prune_to" in options:
        ranks = [f.spec.rank for f in named_factors(module.model, "default").values()]
        assert sum(ranks) == 2 * len(ranks)


def test_the_pruner_ignores_gradients_that_are_not_finite(device):
    """Its choice is that of a run without the step that was skipped."""

    def kept(worst: float | None) -> dict[str, list[bool]]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        inject(model, rank=4, target_modules="all", trainable=[])
        randomise(model)
        factors = named_factors(model.to(device), "default")
        pruner = Pruner(factors, 2, 0, 8)
        x = torch.randn(32, 8, generator=torch.Generator().manual_seed(1)).to(device)
        for step in range(8):
            model.zero_grad()
            model(x).square().sum().backward()
            if step == 3 and worst is not None:
                for f in factors.values():
                    f.lora_B.grad.fill_(worst)
            elif step == 3:
                continue
            pruner.observe(step)
        assert all(bool(s.isfinite().all()) for s in pruner.importance.values())
        pruner.act(8, [])
        return {p: f.lora_B.ne(0).any(0).tolist() for p, f in factors.items()}

    expected = kept(None)
    assert kept(float("inf")) == expected
    assert kept(float("nan")) == expected


# ---- decompositions and files --------------------------------------------------------------------


def test_compression_is_exact_whatever_tf32_is(device):
    model, x = network("vit_tiny_patch16_224")
    inject(model, rank=4, trainable=[])
    stir(model).to(device)
    x = x.to(device)
    with torch.no_grad():
        expected = run(model, x)
        set_precision("high")
        compress(model, energy=1.0)
        set_precision("ieee")
        assert difference(run(model, x), expected) < 1e-5


@pytest.mark.parametrize("setting", SETTINGS)
def test_merging_is_undone_exactly_whatever_tf32_is(setting, device):
    model, _ = network("convnext_atto")
    inject(model, rank=4, target_modules="all", trainable=[])
    stir(model).to(device)
    set_precision(setting)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    merge(model)
    unmerge(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES.values()], ids=str)
def test_a_file_of_the_device_is_read_on_the_cpu(tmp_path, dtype, device):
    torch.manual_seed(0)
    base = tiny_vit().to(dtype)
    fresh = tiny_vit().to(dtype)
    fresh.load_state_dict(base.state_dict())
    model = base.to(device)
    inject(model, rank=2, trainable=["head"])
    path = save_adapter(stir(model), tmp_path / "a.safetensors")
    load_adapter(fresh, path)
    x = torch.randn(2, 3, 32, 32).to(dtype)
    with torch.no_grad():
        limit = 1e-4 if dtype == torch.float32 else 6e-2
        assert apart([model(x.to(device))], [fresh(x)]) < limit
    loaded = named_factors(fresh, "default")
    for key, f in named_factors(model, "default").items():
        assert torch.equal(f.lora_A.cpu(), loaded[key].lora_A)
        assert torch.equal(f.lora_B.cpu(), loaded[key].lora_B)
