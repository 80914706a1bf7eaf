"""The callback through the real Trainer: hooks, optimizers, checkpoints, resume, files."""

from __future__ import annotations

import copy
import itertools
import math
import operator
from pathlib import Path

import pytest
import timm
import torch
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from torch import nn
from torch.multiprocessing import ProcessRaisedException
from torch.utils.data import DataLoader

from lora_lightning import (
    AdapterBank,
    FitGuard,
    LoRACallback,
    LoRAConfig,
    PrefixCache,
    adapters,
    combine,
    disabled,
    inject,
    load_adapter,
    parameter_groups,
    read_header,
)
from lora_lightning.errors import (
    AdapterError,
    AdapterFileError,
    BaseMismatchError,
    ConfigError,
    TargetError,
    VerificationError,
)
from lora_lightning.lora.factors import Factors
from lora_lightning.model.shrinkage import adapter_values
from lora_lightning.model.state import named_factors
from lora_lightning.training.checkpoint_hooks import frozen_names
from tests.helpers.training import (
    Late,
    Module,
    TwoBackbones,
    alike,
    fitted,
    fresh,
    loader,
    lora,
    same,
    saved,
    tiny_vit,
    trainer,
    weights,
)


def test_factors_and_head_train_and_the_base_stays(tmp_path):
    module = Module()
    before = weights(module)
    t = fitted(tmp_path, module, callback := lora())
    held = {id(p) for g in t.optimizers[0].param_groups for p in g["params"]}
    factors = [p for f in module.modules() if isinstance(f, Factors) for p in f.parameters()]
    assert len(factors) == 16
    assert all(id(p) in held for p in factors)
    after = weights(module)
    moved = {k for k in before if not torch.equal(before[k], after[k])}
    assert moved == {"model.head.weight", "model.head.bias"}
    assert all(f.lora_B.any() for f in named_factors(module.model, "default").values())
    trainable = sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert trainable == callback.report_.trainable_parameters


@pytest.mark.parametrize("hook", ["configure_model", "setup"])
def test_network_built_late(tmp_path, hook):
    class Built(Module):
        def __init__(self):
            super().__init__()
            del self.model

    def build(self, *_, **__):
        if not hasattr(self, "model"):
            torch.manual_seed(0)
            self.model = tiny_vit()

    setattr(Built, hook, build)
    module, callback = Built(), lora()
    fitted(tmp_path, module, callback)
    assert len(callback.report_.rows) == 8
    assert all(f.lora_B.any() for f in named_factors(module.model, "default").values())
    assert "configure_model" not in module.__dict__, "the module's hooks are its own again"


def swa() -> StochasticWeightAveraging:
    return StochasticWeightAveraging(swa_lrs=1e-6, swa_epoch_start=1, device=None)


REFUSED = {
    r"no module there; its modules are \['model'\]": lambda: [lora(backbone="network")],
    "BackboneFinetuning unfreezes": lambda: [lora(), BackboneFinetuning()],
    "two LoRACallbacks for backbone='model'": lambda: [lora(name="a"), lora(name="b")],
    "name of its own": lambda: [lora(), lora(backbone="other")],
    "put LoRACallback before EMAWeightAveraging": lambda: [EMAWeightAveraging(), lora()],
    "put LoRACallback before StochasticWeightAveraging": lambda: [swa(), lora()],
}


@pytest.mark.parametrize("message", REFUSED)
def test_callbacks_that_are_refused(tmp_path, message):
    error = TargetError if "no module" in message else ConfigError
    with pytest.raises(error, match=message):
        fitted(tmp_path, Module(), *REFUSED[message]())


def test_optimizer_without_factors_is_an_error(tmp_path):
    class Head(Module):
        def configure_optimizers(self):
            return torch.optim.SGD(self.model.head.parameters(), lr=0.1)

    with pytest.raises(AdapterError, match="holds 0 of 16 factors"):
        fitted(tmp_path, Head(), lora())


@pytest.mark.filterwarnings("default:.*captured.*")
def test_optimizer_with_frozen_parameters_warns(tmp_path):
    class All(Module):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    with pytest.warns(UserWarning, match=r"captured \d+ frozen parameters"):
        fitted(tmp_path, All(), lora())


def test_parameter_groups(tmp_path):
    class Groups(Module):
        def configure_optimizers(self):
            return torch.optim.AdamW(
                parameter_groups(self, lr=1e-3, weight_decay=0.1, lora_plus_ratio=16)
            )

    t = fitted(tmp_path, Groups(), lora(trainable=["head", "norms"]))
    groups = {g["name"]: g for g in t.optimizers[0].param_groups}
    assert groups["lora_B"]["lr"] == pytest.approx(16 * groups["lora_A"]["lr"])
    assert groups["no_decay"]["weight_decay"] == 0
    assert all(p.dim() < 2 for p in groups["no_decay"]["params"])


def test_an_unfrozen_base_is_noticed(tmp_path):
    class Unfreezes(Module):
        def on_train_start(self):
            self.model.blocks.requires_grad_(True)

    with pytest.raises(AdapterError, match="unfroze the base"):
        fitted(tmp_path, Unfreezes(), lora())


def test_first_batch_finds_a_dead_adapter(tmp_path):
    class Skips(nn.Module):
        def __init__(self):
            super().__init__()
            self.used = nn.Linear(3 * 32 * 32, 4)
            self.unused = nn.Linear(4, 4)

        def forward(self, x):
            return self.used(x.flatten(1))

    module = Module(Skips())
    with pytest.raises(VerificationError, match=r"unused\.weight: in training: the model never"):
        fitted(tmp_path, module, lora(target_modules="all", trainable=[]))


def test_first_batch_without_a_call_of_the_backbone(tmp_path):
    class Features(Module):
        def forward(self, x):
            return self.model.forward_head(self.model.forward_features(x))

    fitted(tmp_path, Features(), lora())


class Calls(nn.Module):
    """Notes what it is called with: number of items, autocast, precision of the products."""

    def __init__(self, least: int = 1):
        super().__init__()
        self.layer, self.least, self.seen = nn.Linear(3 * 32 * 32, 4), least, []

    def forward(self, x, scales, given=None):
        if len(x) < self.least:
            raise ValueError("too few")
        out = self.layer(x.flatten(1)) * scales["by"] + given[0]
        self.seen.append((len(x), len(given[0]), torch.is_autocast_enabled("cpu"), out.dtype))
        return out


@pytest.mark.parametrize("least", [1, 4])
@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true", "own"])
def test_first_batch_takes_two_items_in_the_steps_precision(tmp_path, precision, least):
    class Keywords(Module):
        def forward(self, x):
            ones = torch.ones(len(x), 1)
            with torch.autocast("cpu", enabled=precision != "32-true"):
                return self.model(x, {"by": ones}, given=(ones, "a name"))

    module = Keywords(Calls(least))
    adapter = lora(target_modules="all", trainable=[])
    options = {"precision": "32-true" if precision == "own" else precision, "max_steps": 1}
    fitted(tmp_path, module, adapter, **options)
    assert module.model.seen[0][:2] == (4, 4)
    items, more = (2, 2) if least == 1 else (4, 4)
    mixed = precision != "32-true"
    assert set(module.model.seen[1:]) == {(items, more, mixed, torch.float32)}


def test_verification_leaves_no_trace(tmp_path):
    def run(verify: bool):
        torch.manual_seed(0)
        module = Module()
        fitted(tmp_path, module, lora(verify=verify))
        return weights(module)

    assert same(run(True), run(False))


def efficientnet() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_efficientnet", num_classes=4)


@pytest.mark.parametrize("policy", ["frozen", "adapt", "reset"])
def test_batchnorm_statistics_are_saved(tmp_path, policy):
    """Train, save the adapter, load into a fresh base: the same output."""
    module, callback = Module(efficientnet()), lora(batch_norm=policy, output_dir=tmp_path)
    fitted(tmp_path, module, callback)
    moved = not torch.equal(module.model.bn1.running_mean, efficientnet().bn1.running_mean)
    assert moved == (policy != "frozen")
    header = read_header(callback.adapter_path_)
    assert bool(header["buffers"]) == moved
    fresh = efficientnet()
    load_adapter(fresh, callback.adapter_path_)
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(fresh.eval()(x), module.model.eval()(x))
    with disabled(module.model):
        assert torch.equal(module.model(x), efficientnet().eval()(x))


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_checkpoint_holds_no_base_weight_and_resumes_bit_for_bit(tmp_path):
    straight, half, resumed = alike(3)
    fitted(tmp_path, straight, lora(), max_epochs=4)
    saver = ModelCheckpoint(tmp_path / "c", filename="half", every_n_epochs=2, save_top_k=-1)
    fitted(tmp_path, half, lora(), saver, enable_checkpointing=True)
    path = Path(saver.best_model_path)
    keys = saved(torch.load(path, weights_only=True)).keys()
    assert keys
    assert all(".lora." in k or ".head." in k for k in keys)
    fitted(tmp_path, resumed, lora(), saver, ckpt=path, enable_checkpointing=True, max_epochs=4)
    assert same(weights(straight), weights(resumed))


@pytest.mark.parametrize("policy", ["adapt", "reset"])
def test_a_resumed_fit_keeps_its_checkpoints_statistics(tmp_path, policy):
    def fit(module, epochs, ckpt=None):
        return fitted(tmp_path, module, lora(batch_norm=policy), max_epochs=epochs, ckpt=ckpt)

    straight, half, resumed = (Module(efficientnet()) for _ in range(3))
    fit(straight, 3)
    fit(half, 2).save_checkpoint(tmp_path / "half.ckpt")
    fit(resumed, 3, tmp_path / "half.ckpt")
    assert same(weights(straight), weights(resumed))


def test_checkpoint_of_another_rank_is_refused(tmp_path):
    module, other = alike(2)
    fitted(tmp_path, module, lora()).save_checkpoint(path := tmp_path / "last.ckpt")
    with pytest.raises(AdapterFileError, match="another rank"):
        fitted(tmp_path, other, lora(rank=3), max_epochs=3, ckpt=path)


class Aliased(Module):
    """Has parts of its network under other names too, before it or after."""

    def __init__(self, model, parts, first=False):
        super().__init__(model)
        if first:
            del self.model
        for name, part in parts.items():
            setattr(self, name, operator.attrgetter(part)(model) if part else model)
        if first:
            self.model = model


ALIASES = {
    "none": {},
    "the backbone": {"encoder": ""},
    "a part": {"stem": "patch_embed"},
    "adapted parts": {"stages": "blocks", "one": "blocks.1"},
    "a parameter": {"token": "cls_token"},
}


@pytest.mark.parametrize(
    ("name", "first"),
    [
        *((name, False) for name in ALIASES),
        *(
            pytest.param(name, True, marks=[] if name == "adapted parts" else pytest.mark.slow)
            for name in ALIASES
        ),
    ],
)
def test_weights_only_checkpoint_and_test_from_a_fresh_module(tmp_path, name, first):
    """Under a second name of the backbone, or of a part, the base is not saved either."""
    model = tiny_vit()
    module, fresh = (Aliased(copy.deepcopy(model), ALIASES[name], first) for _ in range(2))
    t, path = fitted(tmp_path, module, lora()), tmp_path / "small.ckpt"
    t.save_checkpoint(path, weights_only=True)
    keys = saved(torch.load(path, weights_only=True))
    assert all(".lora." in k or ".head." in k for k in keys), "a base weight in a checkpoint"
    expected = t.test(module, loader(), verbose=False)
    got = trainer(tmp_path, lora()).test(fresh, loader(), ckpt_path=path, verbose=False)
    assert got == expected


@pytest.mark.parametrize("strict", [True, False])
def test_what_was_a_second_name_is_no_tensor_of_its_own(tmp_path, strict):
    model = tiny_vit()
    module = Aliased(model, {"stem": "patch_embed", "token": "cls_token"})
    fitted(tmp_path, module, lora()).save_checkpoint(path := tmp_path / "last.ckpt")
    other = Aliased(model, {"stem": "patch_embed", "token": "cls_token"})
    other.stem = tiny_vit().patch_embed
    held = torch.load(path, weights_only=True)["state_dict"]
    with pytest.raises(RuntimeError, match="another name of a frozen weight") as raised:
        other.load_state_dict(held, strict=strict)
    assert "stem.proj.weight" in str(raised.value)
    assert "token" not in str(raised.value)
    with pytest.raises(RuntimeError, match="assign=False"):
        module.load_state_dict(held, assign=True)


def test_a_layer_shared_within_the_backbone_and_between_two(tmp_path):
    class Two(Module):
        def __init__(self):
            super().__init__()
            self.second = tiny_vit()
            self.second.blocks[1] = self.model.blocks[1]
            self.second.blocks.append(self.second.blocks[0])

        def forward(self, x):
            return self.model(x) + self.second(x)

    torch.manual_seed(0)
    module, path = Two(), tmp_path / "two.ckpt"
    fresh = copy.deepcopy(module)

    def callbacks():
        own = {"exclude_modules": "blocks.1.*", "verify": False}
        return lora(**own), lora(backbone="second", name="b", **own)

    t = fitted(tmp_path, module, *callbacks())
    t.save_checkpoint(path)
    keys = saved(torch.load(path, weights_only=True))
    assert all(".lora." in k or ".head." in k for k in keys), "a base weight in a checkpoint"
    expected = t.test(module, loader(), verbose=False)
    got = trainer(tmp_path, *callbacks()).test(fresh, loader(), ckpt_path=path, verbose=False)
    assert got == expected


def test_source_checkpoint_loads_strictly_before_and_after_injection(tmp_path):
    source, module = Module(), Module()
    fitted(tmp_path, source, max_epochs=1)
    fitted(tmp_path, module, lora(), max_epochs=0)
    module.load_state_dict(source.state_dict(), strict=True)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(module.eval()(x), source.eval()(x))
    with disabled(module.model):
        assert torch.equal(module(x), source(x))


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_weight_averaging(tmp_path):
    """EMA copies the module; the checkpoint holds no copy of the base, and resumes."""
    saver = ModelCheckpoint(tmp_path / "c", filename="ema", every_n_epochs=2, save_top_k=-1)
    module, resumed, straight = alike(3)

    def fit(module, *more, **options):
        fitted(tmp_path, module, lora(), EMAWeightAveraging(decay=0.5), *more, **options)

    fit(module, saver, enable_checkpointing=True)
    checkpoint = torch.load(saver.best_model_path, weights_only=True)
    for part in ("state_dict", "current_model_state"):
        assert all(".lora." in k or ".head." in k for k in saved(checkpoint, part))
    fit(resumed, saver, enable_checkpointing=True, max_epochs=3, ckpt=saver.best_model_path)
    fit(straight, max_epochs=3)
    assert same(weights(resumed), weights(straight))


def test_stochastic_averaging_leaves_no_batchnorm_without_statistics(tmp_path):
    def run(policy: str):
        module = Module(timm.create_model("test_efficientnet", num_classes=4))
        adapter = lora(batch_norm=policy, verify=False)
        fitted(tmp_path, module, adapter, swa(), max_epochs=3)
        return module.model

    with pytest.raises(ConfigError, match=r"forgets the statistics of BatchNorm \(bn1 …\)"):
        run("frozen")
    assert run("adapt").bn1.running_mean.all()
    module = Module()
    fitted(tmp_path, module, lora(), swa())  # has none to forget
    assert all(f.lora_B.any() for f in named_factors(module.model, "default").values())


def test_stochastic_averaging_needs_the_network_in_time(tmp_path):
    with pytest.raises(ConfigError, match="before backbone='model' is built: build it in"):
        fitted(tmp_path, Late(), lora(), swa())


def test_gradient_accumulation_and_mixed_precision(tmp_path):
    module = Module()
    fitted(tmp_path, module, lora(), accumulate_grad_batches=2, precision="bf16-mixed")
    assert all(f.lora_B.any() for f in named_factors(module.model, "default").values())


def test_two_callbacks_of_one_class(tmp_path):
    module = TwoBackbones()
    callbacks = [lora(output_dir=tmp_path), lora(backbone="second", name="b", output_dir=tmp_path)]
    assert callbacks[0].state_key != callbacks[1].state_key
    fitted(tmp_path, module, *callbacks).save_checkpoint(tmp_path / "two.ckpt")
    keys = saved(torch.load(tmp_path / "two.ckpt", weights_only=True))
    assert all(".lora." in k or ".head." in k for k in keys)
    assert (tmp_path / "b.safetensors").exists()


def test_the_callbacks_adapter_is_the_one_that_trains(tmp_path):
    module = Module()
    for name in ("a", "b"):
        inject(module.model, rank=2, seed=0, name=name)
    fitted(tmp_path, module, lora(name="a"))
    assert all(f.lora_B.any() for f in named_factors(module.model, "a").values())
    assert not any(f.lora_B.any() for f in named_factors(module.model, "b").values())


def test_a_failed_fit_leaves_no_hook_behind(tmp_path):
    class Fails(Module):
        def training_step(self, batch, batch_idx):
            raise RuntimeError("on purpose")

    module = Fails(efficientnet())
    momentum = module.model.bn1.momentum
    with pytest.raises(RuntimeError, match="on purpose"):
        fitted(tmp_path, module, lora(batch_norm="reset"))
    assert module.model.bn1.momentum == momentum
    assert not module.model._forward_pre_hooks


def test_setup_is_idempotent_over_stages(tmp_path):
    module = Module()
    t = fitted(tmp_path, module, lora())
    before = weights(module)
    t.validate(module, loader(), verbose=False)
    t.test(module, loader(), verbose=False)
    assert same(before, weights(module))


def test_config_object_and_bad_values():
    assert LoRACallback(LoRAConfig(rank=3), alpha=3.0).config.rank == 3
    with pytest.raises(ConfigError, match="did you mean 'rank'"):
        LoRACallback(rnk=3)
    with pytest.raises(ConfigError, match="batch_norm must be one of"):
        LoRACallback(batch_norm="train")


class Diverges(Module):
    """Its loss is infinite in one step, in one gradient or as a whole."""

    def __init__(self, model, at: int, value: float):
        super().__init__(model)
        self.at, self.value = at, value

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * self.value if self.global_step == self.at else loss


@pytest.mark.parametrize(("value", "prune_to"), [(math.nan, None), (math.inf, 1)])
def test_a_fit_that_diverges_stops_and_keeps_its_last_finite_values(tmp_path, value, prune_to):
    settings = {"max_epochs": 8, "limit_train_batches": 2}
    plain, bad = alike(2)
    bad = Diverges(bad.model, 10, value)
    fitted(tmp_path, plain, lora(prune_to=prune_to), max_steps=10, **settings)
    callback = lora(prune_to=prune_to, output_dir=tmp_path)
    with pytest.warns(UserWarning, match="NaN or infinity after step 11: the fit has diverged"):
        run = fitted(tmp_path, bad, callback, **settings)
    assert run.global_step <= 12
    assert all(tensor.isfinite().all() for tensor in adapter_values(bad.model).values())
    moments = [value for state in run.optimizers[0].state.values() for value in state.values()]
    assert all(moment.isfinite().all() for moment in moments)
    assert read_header(callback.adapter_path_)["name"] == "default"  # it was written
    if prune_to is None:
        expected = adapter_values(plain.model)
        for key, tensor in adapter_values(bad.model).items():
            assert torch.equal(tensor, expected[key]), key


def test_infinity_in_a_mask_is_no_divergence(tmp_path):
    module = fresh()
    module.model.register_buffer("mask", torch.full((3, 3), -math.inf).triu(1))
    run = fitted(tmp_path, module, lora(), max_epochs=1, limit_train_batches=2)
    assert run.global_step == 2
    assert not run.should_stop


def test_names_that_differ_in_case_alone_would_share_a_file(tmp_path):
    pair = [lora(name=name, backbone=path) for name, path in (("a", "model"), ("A", "model.norm"))]
    with pytest.raises(ConfigError, match="would write the same adapter file"):
        fitted(tmp_path, fresh(), *pair)


class Injected(Module):
    """With the adapter in ``__init__``, as for loading without a callback; a seed for the base."""

    def __init__(self, seed: int = 0, **options):
        torch.manual_seed(seed)
        super().__init__()
        inject(self.model, **{"rank": 2, "seed": 0, **options})


def _load_by_hand(cls, path, **options):
    module = cls(**{k: v for k, v in options.items() if k != "strict"})
    state = torch.load(path, weights_only=True)["state_dict"]
    module.load_state_dict(state, strict=options.get("strict", True))
    return module


def _load_and_test(cls, path, strict=True, **options):
    module = cls(**options)
    module.strict_loading = strict
    trainer(path.parent).test(module, loader(), ckpt_path=path, verbose=False)
    return module


def _load_and_fit(cls, path, strict=True, **options):
    module = cls(**options)
    module.strict_loading = strict
    fitted(path.parent, module, ckpt=path, max_epochs=1)
    return module


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    "load",
    [
        lambda cls, path, **options: cls.load_from_checkpoint(path, **options),
        _load_by_hand,
        _load_and_test,
        _load_and_fit,
    ],
    ids=["load_from_checkpoint", "load_state_dict", "test", "fit"],
)
def test_every_way_to_load_checks_the_base(tmp_path, load, strict):
    module, path = fresh(), tmp_path / "c.ckpt"
    fitted(tmp_path, module, lora(), max_epochs=1).save_checkpoint(path)
    assert same(load(Injected, path, strict=strict).state_dict(), module.state_dict())
    with pytest.raises(BaseMismatchError, match="Checkpoints hold no base weights"):
        load(Injected, path, strict=strict, seed=77)
    with pytest.raises(AdapterError, match=r"call inject\(self.model, ...\) in the mod"):
        load(Module, path, strict=strict)
    with pytest.raises(AdapterFileError, match="no place for"):
        load(Injected, path, strict=strict, name="other")


def _of_the_source(module, batch):
    """A loss that only the source model has."""
    acting = any(getattr(layer, "lora_active", None) for layer in module.modules())
    return torch.full((len(batch[0]),), float(not acting))


class Lowers(FitGuard):
    """Keeps what was learnt, and lowers the rank to 1."""

    def __init__(self):
        super().__init__(loss=_of_the_source, lower_rank=True)


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize(
    ("options", "guard"),
    [
        ({"rank": "explained-variance", "max_rank": 6, "init": "eva", "prune_to": 1.5}, None),
        ({"init": "pissa"}, None),
        ({"dora": True, "batch_norm": "reset", "name": "b"}, FitGuard(lower_rank=False)),
        ({"init": "pissa", "rank": 4}, Lowers()),
        ({"xs": True, "rank": 4}, Lowers()),
        pytest.param({"rank": 4}, Lowers(), marks=pytest.mark.slow),
    ],
    ids=["auto", "pissa", "dora", "pissa lowered", "xs lowered", "lowered"],
)
def test_what_processes_of_the_trainer_learnt_is_in_the_one_that_started_them(
    tmp_path, options, guard
):
    module, base = (fresh(model=efficientnet()) for _ in range(2))
    adapter, data = lora(output_dir=tmp_path, **options), loader()
    callbacks = [c for c in (adapter, guard) if c]
    started = {"strategy": "ddp_spawn" if options == {"rank": 4} else "ddp_fork", "devices": 1}
    t = fitted(tmp_path, module, *callbacks, data=data, held_out=data, **started)
    load_adapter(base.model, adapter.adapter_path_)
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(module.eval()(x), base.eval()(x))
    assert adapters(module.model) == [adapter.name]
    ranks = {p: f.spec.rank for p, f in named_factors(base.model, adapter.name).items()}
    assert ranks == {f"{r.module}.{r.tensor}": r.rank for r in adapter.report_.rows}
    assert guard is None or len(guard.history_) == 3
    assert guard is None or guard.rank_ == (1 if guard.lower_rank else max(ranks.values()))
    assert guard is None or guard.keeps_source is False
    (got,) = t.test(module, data, verbose=False)
    (expected,) = trainer(tmp_path).test(base, data, verbose=False)
    assert got == pytest.approx(expected)
    t.save_checkpoint(path := tmp_path / "here.ckpt")  # without the base, as after any other fit
    held = torch.load(path, weights_only=False)["state_dict"]
    assert frozen_names(module).isdisjoint(k for k, v in held.items() if torch.is_tensor(v))
    if guard is None:  # which would have to be there again, and lowers ranks
        other = fresh(model=efficientnet())
        again = trainer(tmp_path, lora(output_dir=tmp_path, **options))
        (found,) = again.test(other, data, ckpt_path=path, verbose=False)
        assert found == pytest.approx(expected)


class Configures(Module):
    """Has callbacks that are made where it is trained."""

    def __init__(self, *own):
        super().__init__()
        self.own = own

    def configure_callbacks(self):
        return list(self.own)


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize(
    ("module", "callbacks", "says"),
    [
        (Late(), [lora()], "build the network in its"),
        (Configures(lora()), [], "LoRACallback comes from configure_callbacks"),
        (Configures(FitGuard()), [lora()], "FitGuard comes from configure_callbacks"),
        (Configures(PrefixCache()), [lora()], "PrefixCache comes from configure_callbacks"),
    ],
)
def test_processes_that_could_not_give_back_what_they_find_are_refused(
    tmp_path, module, callbacks, says
):
    with pytest.raises(ProcessRaisedException, match=f"ConfigError: .*{says}"):
        fitted(tmp_path, module, *callbacks, strategy="ddp_fork", devices=1)


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize("callbacks", [[lora(init="eva")], [lora(), FitGuard(lower_rank=False)]])
def test_a_pass_before_the_training_takes_no_batch_from_it(tmp_path, callbacks):
    """Persistent workers serve one pass at a time: the first epoch would be lost."""
    module, data = fresh(), loader()
    lasting = DataLoader(data.dataset, batch_size=4, num_workers=1, persistent_workers=True)
    t = fitted(tmp_path, module, *callbacks, data=lasting, held_out=data)
    assert t.global_step == 4
    with pytest.raises(ConfigError, match="the training loader is an iterator"):
        fitted(tmp_path, fresh(), *callbacks, data=iter([*data]), held_out=data)


def _blocks_compiled(model):
    for i, block in enumerate(model.blocks):
        model.blocks[i] = torch.compile(block, backend="eager")
    return model


WRAPS = {
    "compile": lambda model: torch.compile(model, backend="eager"),
    "data parallel": nn.DataParallel,
    "both": lambda model: torch.compile(nn.DataParallel(model), backend="eager"),
    "blocks": _blocks_compiled,
}


@torch.compiler.set_stance("force_eager")  # names are what matters
@pytest.mark.parametrize("wrap", WRAPS)
def test_what_a_wrapper_adds_to_names_is_no_part_of_files_and_checkpoints(tmp_path, wrap):
    base, x = tiny_vit(), torch.randn(2, 3, 32, 32)
    kinds = {"plain": lambda m: m, wrap: WRAPS[wrap]}
    made = {k: lambda k=k: kinds[k](copy.deepcopy(base)).eval() for k in kinds}
    for kind, other in itertools.permutations(kinds):
        module, path = Module(made[kind]()), tmp_path / f"{kind}.ckpt"
        adapter = lora(output_dir=tmp_path / kind)
        fitted(tmp_path, module, adapter, max_epochs=1).save_checkpoint(path)
        stored, file = torch.load(path, weights_only=True), tmp_path / kind / "default.safetensors"
        assert all(".lora." in k or ".head." in k for k in saved(stored))
        learnt = module.model.eval()(x)
        load_adapter(model := made[other](), file)
        assert torch.allclose(model(x), learnt, atol=1e-6)
        assert len(combine(model, {"default": 1.0}, "sum").rows) == 8
        if other == "plain":
            with AdapterBank(model := made[other](), {"a": file})[["a", "a"]], torch.no_grad():
                assert torch.allclose(model(x), learnt, atol=1e-6)
        inject(model := made[other](), rank=2, seed=0)
        Module(model).load_state_dict(stored["state_dict"])
        assert torch.allclose(model(x), learnt, atol=1e-6)
        tested = Module(made[other]())
        trainer(tmp_path, lora()).test(tested, loader(), ckpt_path=path, verbose=False)
        assert torch.allclose(tested.model.eval()(x), learnt, atol=1e-6)
