"""Fits on the device: guards, caches, starts from data, resumes, errors, synchronisations."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn

from lora_lightning import FitGuard, PrefixCache, disabled, inject, load_adapter, verify
from lora_lightning.errors import ConfigError
from lora_lightning.model.probing import difference, run
from lora_lightning.model.state import named_factors
from tests.helpers.cuda import Recurrent, apart, finite, fit, set_precision, stir
from tests.helpers.training import Losses, alike, bright, lora, tiny_vit, trainer
from tests.helpers.zoo import ZOO
from tests.training import test_prefix_cache as prefix

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.filterwarnings("ignore:RNN module weights are not part of single contiguous"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype"),
]
X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def states(device: torch.device) -> list[torch.Tensor]:
    """Of every generator that there is."""
    own = torch.cuda.get_rng_state_all() if device.type == "cuda" else []
    return [torch.get_rng_state(), *own]


# ---- starts from data ----------------------------------------------------------------------------

START = {
    "eva": {"init": "eva"},
    "lora-ga": {"init": "lora-ga"},
    "activation-nmf": {"init": "activation-nmf"},
    "auto": {"rank": "explained-variance", "max_rank": 6},
    "auto and eva": {"rank": "explained-variance", "max_rank": 6, "init": "eva"},
}


@pytest.mark.parametrize("setting", ["ieee", "high"])
@pytest.mark.parametrize("start", START)
def test_starts_from_data_through_the_callback(tmp_path, start, setting, device):
    """The same ranks as on the CPU, and a fit that learns."""
    here, there = alike(2)
    fit(tmp_path, torch.device("cpu"), here, lora(**START[start]), max_epochs=0, max_steps=0)
    set_precision(setting)
    module = Losses(there.model)
    fit(tmp_path, device, module, lora(**START[start]), max_epochs=3, precision="bf16-mixed")
    assert module.losses[-1] < module.losses[0]
    expected = {p: f.spec.rank for p, f in named_factors(here.model, "default").items()}
    found = {p: f.spec.rank for p, f in named_factors(module.model, "default").items()}
    assert found.keys() == expected.keys()
    assert sum(abs(found[p] - r) for p, r in expected.items()) <= 0.1 * sum(expected.values())


@pytest.mark.parametrize("init", ["eva", "corda"])
@pytest.mark.parametrize("kind", ["Linear", "Conv2d", "MultiheadAttention", "LSTM"])
def test_what_data_say_is_what_they_say_on_the_cpu(kind, init, device):
    """The same space, whatever the signs of its vectors."""
    make, x = ZOO[kind]
    found = []
    for where in (torch.device("cpu"), device):
        torch.manual_seed(0)
        model = make().eval().requires_grad_(False).to(where)
        inject(model, rank=2, target_modules="all", trainable=[], init=init, data=[x], forward=run)
        factors = named_factors(model, "default")
        found.append([(f.lora_A.mT @ f.lora_A).detach() for f in factors.values()])
    assert apart(found[1], found[0]) < 1e-3


def test_attention_is_seen_under_the_callers_own_autocast(device):
    make, x = ZOO["MultiheadAttention"]
    model = make().eval().to(device)
    with torch.autocast(device.type, torch.bfloat16):
        inject(model, rank=2, target_modules="all", trainable=[], init="eva", data=[x], forward=run)
    for path, f in named_factors(model, "default").items():
        unit = torch.ones(2, device=device)
        torch.testing.assert_close(f.lora_A.norm(dim=1), unit, rtol=1e-2, atol=1e-2, msg=path)


def test_generators_are_as_they_were(device):
    model = tiny_vit().to(device)
    data = [torch.randn(4, 3, 32, 32)]
    cached = frozen()
    before = states(device)
    inject(model, rank=2, init="eva", data=data, seed=0)
    inject(model, rank="explained-variance", max_rank=4, data=data, name="auto", seed=0)
    verify(model, X)
    with PrefixCache(10).attach(cached), torch.no_grad():
        cached(X)
    assert all(map(torch.equal, states(device), before))


def frozen() -> nn.Module:
    model = prefix.small_vit()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("head"))
    return model


def test_verification_leaves_the_fit_as_it_was(tmp_path, device):
    """With dropout, whose masks come from the device's generator."""
    found = []
    for verified in (True, False):
        torch.manual_seed(0)
        module = Losses(tiny_vit())
        fit(tmp_path, device, module, lora(verify=verified, dropout=0.2), max_epochs=3)
        found.append(module)
    assert found[0].losses == pytest.approx(found[1].losses, rel=1e-5)
    assert apart(*(list(m.model.parameters()) for m in found)) < 1e-4


# ---- prefix cache and guard ----------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_three_epochs_with_a_prefix_cache(tmp_path, precision, device):
    options = {"accelerator": device.type, "devices": 1, "precision": precision}
    plain = prefix.fit(tmp_path, **options)
    cache = PrefixCache(10)
    cached = prefix.fit(tmp_path, cache, **options)
    assert (cache.items_, cache.hit_rate_) == (prefix.ITEMS, 1)
    limit = 1e-4 if precision == "32-true" else 3e-2
    assert cached.losses == pytest.approx(plain.losses, rel=limit)


def test_a_prefix_cache_under_tf32(tmp_path, device):
    set_precision("high")
    options = {"accelerator": device.type, "devices": 1, "model": prefix.resnet()}
    cache = PrefixCache(10)
    cached = prefix.fit(tmp_path, cache, lora={"target_modules": "all"}, **options)
    assert (cache.items_, cache.hit_rate_) == (prefix.ITEMS, 1)
    assert torch.tensor(cached.losses).isfinite().all()


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_a_guarded_fit(tmp_path, precision, device):
    torch.manual_seed(0)
    module, guard = Losses(tiny_vit()), FitGuard()
    data, held_out = bright(32, 1), bright(12, 2)
    options = {"data": data, "held_out": held_out, "max_epochs": 4, "precision": precision}
    fit(tmp_path, device, module, lora(rank=4), guard, **options)
    assert guard.shrinkage_ > 0
    assert min(look.held_out for look in guard.history_) < guard.history_[0].held_out
    assert finite(module)


class Fused(Losses):
    fused = True

    def configure_optimizers(self):
        trained = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.AdamW(trained, lr=self.lr, weight_decay=0.0, fused=self.fused)


def test_the_pull_is_as_strong_under_a_fused_optimizer(tmp_path, device):
    """Which unscales gradients itself, after the hook that adds the pull."""

    def factors(use_fused: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        module = Fused(tiny_vit(), lr=3e-3)
        module.fused = use_fused
        guard = FitGuard(l2_sp=30.0, shares=[1], lower_rank=False, patience=9)
        options = {"held_out": bright(12, 2), "max_epochs": 4, "precision": "16-mixed"}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*source model is kept")
            fit(tmp_path, device, module, lora(trainable=[]), guard, **options)
        return [v for k, v in sorted(guard._best.items()) if k.endswith("lora_B")]

    try:
        found = factors(True)
    except ConfigError as error:
        assert "fused" in str(error)  # noqa: PT017 - to refuse is right as well
        return
    assert apart(found, factors(False)) < 0.1


# ---- checkpoints ---------------------------------------------------------------------------------


def test_a_fit_goes_on_on_another_device_and_back(tmp_path, device):
    here = torch.device("cpu")
    straight, *parts = alike(4)
    fit(tmp_path, device, straight, lora(), max_epochs=6)
    ckpt = None
    for i, (module, where) in enumerate(zip(parts, (device, here, device), strict=True)):
        adapter = lora(output_dir=tmp_path)
        one = fit(tmp_path, where, module, adapter, max_epochs=2 * (i + 1), ckpt=ckpt)
        assert module.trainer.global_step == 4 * (i + 1)
        one.save_checkpoint(ckpt := tmp_path / f"{i}.ckpt")
    with torch.no_grad():
        assert apart([parts[-1].model.eval()(X)], [straight.model.eval()(X)]) < 5e-2
        fresh = copy.deepcopy(parts[-1].model)
        expected = fresh(X)
        load_adapter(fresh, adapter.adapter_path_, "again")
        assert difference([fresh(X)], [expected]) < 1e-5


# ---- errors --------------------------------------------------------------------------------------


def exhaust(device: torch.device) -> None:
    """Runs out of memory, as the device does."""
    if device.type == "cuda":
        torch.empty(2**44, dtype=torch.uint8, device=device)
    raise torch.OutOfMemoryError("as on a device")


class Runs(Losses):
    """Out of memory in the second step, or at a forward pass of the network."""

    def __init__(self, model: nn.Module, at: str, calls: int = 0):
        super().__init__(model)
        self.at, self.left = at, calls
        if at == "forward":
            model.blocks[1].register_forward_hook(self.count)

    def count(self, *_):
        self.left -= 1
        if self.left == 0:
            exhaust(self.device)

    def training_step(self, batch, batch_idx):
        if self.at == "step" and batch_idx == 1:
            exhaust(self.device)
        return super().training_step(batch, batch_idx)

    def on_before_optimizer_step(self, optimizer):
        if self.at == "optimizer" and self.trainer.global_step == 1:
            exhaust(self.device)


@pytest.mark.parametrize(
    ("at", "calls"),
    [("step", 0), ("optimizer", 0), ("forward", 1), ("forward", 2), ("forward", 4), ("forward", 6)],
)
def test_out_of_memory_leaves_the_model_usable(tmp_path, at, calls, device):
    torch.manual_seed(0)
    base = tiny_vit()
    module = Runs(copy.deepcopy(base), at, calls)
    with pytest.raises(torch.OutOfMemoryError):
        fit(tmp_path, device, module, lora(batch_norm="adapt", trainable=[]), max_epochs=3)
    model = module.model.cpu().eval()
    model.zero_grad()
    assert not model._forward_pre_hooks
    model.blocks[1]._forward_hooks.clear()
    with torch.no_grad(), disabled(model):
        assert torch.equal(model(X), base.eval()(X))
    factors = named_factors(model, "default").values()
    assert all(bool(f.lora_A.isfinite().all()) for f in factors)
    if at == "forward":  # before any step, so that the adapter is as it was injected
        assert not any(f.lora_B.any() for f in factors)
        with torch.no_grad():
            assert torch.equal(model(X), base(X))
    again = Losses(model)
    fit(tmp_path, device, again, lora(trainable=[]), max_epochs=3)
    assert again.losses[-1] < again.losses[0]


# ---- synchronisations ----------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"dropout": 0.1}, {"dora": True}, {"xs": True}], ids=str)
@pytest.mark.parametrize("name", ["vit", "lstm"])
def test_a_training_step_does_not_wait_for_the_device(name, options, cuda):
    torch.manual_seed(0)
    model, shape = (tiny_vit(), (8, 3, 32, 32)) if name == "vit" else (Recurrent(), (8, 5, 6))
    inject(model, rank=2, **({"target_modules": "all"} | options))
    stir(model).to(cuda).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    x, y = torch.randn(shape, device=cuda), torch.arange(8, device=cuda) % 4

    def step():
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()

    step()
    try:
        torch.cuda.set_sync_debug_mode("error")
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Watch(Callback):
    """Counts the synchronisations of each training step after the first."""

    def __init__(self):
        self.found: list[int] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.caught = warnings.catch_warnings(record=True)
        self.seen = self.caught.__enter__()
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        torch.cuda.set_sync_debug_mode("default")
        self.caught.__exit__(None, None, None)
        self.found.append(sum("synchronizing CUDA" in str(w.message) for w in self.seen))


class Quiet(Losses):
    """Logs nothing and asks for no number."""

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])


@pytest.mark.parametrize("options", [{}, {"rank": 4, "prune_to": 2}], ids=["plain", "pruned"])
def test_a_step_of_the_trainer_waits_no_more_than_without_adapters(tmp_path, options, cuda):
    found = []
    for callbacks in ([], [lora(**options)]):
        watch, data = Watch(), bright(batch=4)
        fit(tmp_path, cuda, Quiet(tiny_vit()), *callbacks, watch, max_epochs=15, data=data)
        found.append(sorted(watch.found[1:]))
    # Of 60 steps 13 prune.
    assert found[1][len(found[1]) // 2] <= found[0][len(found[0]) // 2]


def test_the_trainer_finds_the_device(tmp_path, cuda):
    one = trainer(tmp_path, accelerator="auto", devices=1)
    assert one.strategy.root_device.type == "cuda"
