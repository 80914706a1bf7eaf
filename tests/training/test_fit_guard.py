"""Shrinking towards the source, L2-SP, and `FitGuard` on few items."""

from __future__ import annotations

import copy
import math

import pytest
import timm
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lora_lightning import (
    FitGuard,
    LoRACallback,
    compress,
    cross_fit,
    disabled,
    inject,
    load_adapter,
    merge,
    remove,
    save_adapter,
    shrink,
    unmerge,
)
from lora_lightning.errors import AdapterError, AdapterFileError, ConfigError, DataError
from lora_lightning.model.shrinkage import adapter_values, pull_to_source, restore, undone
from lora_lightning.model.state import named_factors
from lora_lightning.training.gain_test import Look, choose, diagnose
from lora_lightning.training.validation_losses import losses_of, one_by_one
from tests.helpers.training import Module, bright, fresh, randomise, tiny_vit, trainer
from tests.helpers.training import fitted as fit_with

KINDS = {
    "zero": {},
    "offset": {"init": "pissa"},
    "dora": {"dora": True},
    "all": {"target_modules": "all", "trainable": ["norms"]},
    "xs": {"xs": True},
}


@torch.no_grad()
def moved(kind: str) -> nn.Module:
    """A network whose adapter, head and statistics differ from the source's."""
    model = tiny_net() if kind == "batchnorm" else tiny_vit()
    inject(model, rank=2, **KINDS.get(kind, {}))
    randomise(model)
    for f in named_factors(model, "default").values():
        if f.magnitude is not None:
            f.magnitude.mul_(1.3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.05 * torch.randn_like(parameter))
    for name, buffer in model.named_buffers():
        if "running" in name:
            buffer.add_(0.1)
    return model.eval()


def tiny_net() -> nn.Module:
    return timm.create_model("test_resnet", num_classes=4).eval()


X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def source_output(model: nn.Module) -> torch.Tensor:
    with disabled(model):
        return model(X)


# ---- shrink --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*KINDS, "batchnorm"])
@torch.no_grad()
def test_no_share_is_the_source_and_a_whole_one_changes_nothing(kind):
    model = moved(kind)
    before, source = model(X), source_output(model)
    assert not torch.allclose(before, source, atol=1e-3)
    shrink(model, 1)
    assert torch.equal(model(X), before)
    shrink(model, 0)
    assert torch.equal(model(X), source)
    assert torch.equal(source_output(model), source)


@pytest.mark.parametrize("kind", ["zero", "offset", "all", "xs", "batchnorm"])
@torch.no_grad()
def test_a_share_lies_on_the_line_from_the_source(kind):
    model = moved(kind)
    whole, (source,) = effective(model), [effective(disabled_copy(model))]
    shrink(model, 0.25)
    for name, value in effective(model).items():
        expected = source[name] + 0.25 * (whole[name] - source[name])
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)


def disabled_copy(model: nn.Module) -> nn.Module:
    copied = copy.deepcopy(model)
    shrink(copied, 0)
    return copied


def effective(model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights that the network computes with, and its statistics."""
    copied = copy.deepcopy(model)
    merge(copied)
    return {k: v for k, v in copied.state_dict().items() if v.is_floating_point()}


@pytest.mark.parametrize("kind", [*KINDS, "batchnorm"])
@torch.no_grad()
def test_what_is_shrunk_merges_and_goes_through_a_file(kind, tmp_path):
    model = moved(kind)
    source = copy.deepcopy(model)
    shrink(model, 0.5)
    half = model(X)
    merge(model)
    torch.testing.assert_close(model(X), half, rtol=1e-4, atol=1e-4)
    unmerge(model)
    save_adapter(model, tmp_path / "half.safetensors")
    remove(source)
    load_adapter(source, tmp_path / "half.safetensors")
    torch.testing.assert_close(source(X), half, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_shares_multiply_and_a_trial_leaves_no_trace():
    model = moved("dora")
    before, other = model(X), copy.deepcopy(model)
    with undone(model):
        shrink(model, 0.1)
    assert torch.equal(model(X), before)
    shrink(model, 0.5)
    shrink(model, 0.5)
    shrink(other, 0.25)
    torch.testing.assert_close(model(X), other(X), rtol=1e-4, atol=1e-5)


def test_shrink_speaks_to_people():
    model = moved("zero")
    with pytest.raises(ConfigError, match=r"share must lie in \[0, 1\], got 1.5"):
        shrink(model, 1.5)
    merge(model)
    with pytest.raises(AdapterError, match=r"merged; call unmerge\(model\)"):
        shrink(model, 0.5)


@torch.no_grad()
def test_an_adapter_that_is_no_number_still_goes_back():
    model = moved("zero")
    source = source_output(model)
    values = adapter_values(model)
    for f in named_factors(model, "default").values():
        f.lora_A.fill_(math.nan)
        f.lora_B.fill_(math.nan)
    shrink(model, 0)
    assert torch.equal(model(X), source)
    restore(model, values)
    assert not torch.equal(model(X), source)


# ---- L2-SP ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*KINDS, "batchnorm"])
def test_the_pull_is_the_gradient_of_the_distance(kind):
    model = moved(kind).double()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    source = disabled_copy(model).state_dict()
    distance = torch.zeros((), dtype=torch.double)
    for f in named_factors(model, "default").values():
        distance = distance + f.delta(f.matrix).square().sum()
    for name, parameter in trained.items():
        if not name.endswith((".lora_A", ".lora_B", ".core")):
            distance = distance + (parameter - source[name]).square().sum()
    wanted = torch.autograd.grad(0.3 / 2 * distance, list(trained.values()))
    for parameter in trained.values():
        parameter.grad = torch.ones_like(parameter)
    pull_to_source(model, 0.3)
    for (name, parameter), gradient in zip(trained.items(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, 1 + gradient, msg=name)


class Fused(Module):
    def configure_optimizers(self):
        return torch.optim.AdamW(
            [p for p in self.parameters() if p.requires_grad], self.lr, weight_decay=0.0, fused=True
        )


@pytest.mark.parametrize("kind", [Module, Fused])
def test_the_pull_keeps_the_adapter_near_the_source(tmp_path, kind):
    """Gradients of a fused optimizer are still scaled, in float16, where the pull is added."""

    def distance(strength: float) -> float:
        torch.manual_seed(0)
        module = kind(tiny_vit())
        callbacks = LoRACallback(rank=2), FitGuard(l2_sp=strength, patience=9)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        plugin = MixedPrecision("16-mixed", "cpu", scaler)
        plugins = [plugin] if kind is Fused else []
        options = {"held_out": noise(8), "max_epochs": 1, "plugins": plugins}
        with pytest.warns(UserWarning, match="source model is kept"):
            fitted(tmp_path, module, *callbacks, **options)
        # Before it went back to the source.
        return sum(float(v.norm()) for k, v in callbacks[1]._best.items() if k.endswith("lora_B"))

    assert distance(100.0) < 0.9 * distance(0.0)


# ---- the callback --------------------------------------------------------------------------


def noise(items: int, seed: int = 7, classes: int = 4) -> DataLoader:
    """Labels independent of the images."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(items, 3, 32, 32, generator=generator)
    y = torch.randint(classes, (items,), generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=4)


def fitted(*given, **options):
    """A fit whose adapters are not verified first, which has tests of its own."""
    for callback in given:
        if isinstance(callback, LoRACallback):
            callback.verify = False
    return fit_with(*given, **{"data": noise(16, seed=1), **options})


def learning(tmp_path, module, guard, *more, rank=4, **options):
    """A fit to learnable labels."""
    options = {"data": bright(32, 1), "held_out": bright(12, 2), **options}
    return fitted(tmp_path, module, LoRACallback(rank=rank), guard, *more, **options)


def test_labels_at_random_are_overfitted_and_the_source_is_kept(tmp_path):
    module, guard = Module(lr=2e-3), FitGuard(patience=4)
    adapter = LoRACallback(rank=2)
    with pytest.warns(UserWarning, match="the source model is kept, there is no sure gain"):
        fitted(tmp_path, module, adapter, guard, held_out=noise(12), max_epochs=10)
    assert guard.verdict_.startswith("overfitting: since epoch")
    assert guard.shrinkage_ == 0
    assert len(guard.history_) < 13
    assert guard.termination_condition_ == "the held-out loss has not fallen for 4 epochs"
    with torch.no_grad():
        assert torch.equal(module.model.eval()(X), source_output(module.model))
    assert adapter.adapter_path_ is None
    assert not list(tmp_path.rglob("*.safetensors"))  # nobody takes the source for an adapter


@pytest.mark.parametrize(
    "precision",
    ["32-true", pytest.param("64-true", marks=pytest.mark.slow), "bf16-true", "bf16-mixed"],
)
def test_what_can_be_learnt_is_kept(tmp_path, precision):
    """Looks are in the precision of the fit."""
    module, guard = Module(), FitGuard()
    learning(tmp_path, module, guard, max_epochs=2, precision=precision)
    assert guard.shrinkage_ > 0
    held = losses_of(module, bright(12, 2), None).mean()
    assert held < guard.history_[0].held_out
    assert 1 <= guard.rank_ <= 4
    assert guard.rank_ == max(f.spec.rank for f in named_factors(module.model, "default").values())


def test_underfitting_is_said_in_words(tmp_path):
    module, guard = Module(lr=1e-7), FitGuard()
    learning(tmp_path, module, guard, rank=2, held_out=bright(8, 2))
    assert guard.verdict_.startswith("underfitting: the training loss is hardly below")
    assert "raise the learning rate" in guard.verdict_
    assert guard.termination_condition_ == "all epochs"


def test_the_best_epoch_comes_back(tmp_path):
    class Spoils(Module):
        """Learns, and in the third epoch forgets."""

        def on_train_epoch_start(self):
            self.values = self.current_epoch

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss if self.current_epoch < 2 or not self.training else -loss

    module, guard = Spoils(), FitGuard(patience=1, shares=[1], lower_rank=False)
    learning(tmp_path, module, guard, max_epochs=6)
    assert [look.epoch for look in guard.history_] == [0, 1, 2, 3]
    assert guard.shrinkage_ == 1
    held = float(losses_of(module, one_by_one(bright(12, 2)), None).mean())
    assert held == pytest.approx(guard.history_[2].held_out, rel=1e-5)


class Saves(Callback):
    """Writes a checkpoint after each epoch; at the end it would hold what the guard made of it."""

    def __init__(self, path):
        self.path = path

    def on_train_epoch_end(self, trainer, pl_module):
        trainer.save_checkpoint(self.path)


def test_a_resumed_fit_goes_on_where_it_was(tmp_path):
    def run(epochs: int, *callbacks, **options):
        module, guard = fresh(lr=3e-3), FitGuard(lower_rank=False)
        options |= {"rank": 2, "data": bright(16, 1), "max_epochs": epochs}
        learning(tmp_path, module, guard, *callbacks, **options)
        return module, guard

    whole, one = run(3)
    run(1, Saves(tmp_path / "half.ckpt"))
    resumed, two = run(3, ckpt=tmp_path / "half.ckpt")
    assert [look.epoch for look in two.history_] == [0, 1, 2, 3]
    assert one.history_ == two.history_
    assert one.shrinkage_ == two.shrinkage_
    with torch.no_grad():
        assert torch.equal(whole(X), resumed(X))


def test_a_look_leaves_no_trace(tmp_path):
    def run(*guard):
        module = fresh()
        fitted(tmp_path, module, LoRACallback(rank=2, batch_norm="adapt"), *guard, data=shuffled())
        return module.model.state_dict()

    class Watches(FitGuard):
        def on_train_end(self, *_):
            """Does nothing with what it saw."""

    def shuffled():
        return DataLoader(bright(16, 1).dataset, batch_size=4, shuffle=True)

    plain, watched = run(), run(Watches(bright(8, 2), l2_sp=0))
    assert all(torch.equal(v, watched[k]) for k, v in plain.items())


def test_a_loss_without_labels_on_unlabelled_batches(tmp_path):
    def spread(module, batch):
        """What a label-free score looks like: the whole set at once, lower is better."""
        return -torch.linalg.matrix_norm(module(batch[0]).softmax(1), "nuc")

    unlabelled = DataLoader(TensorDataset(bright(12, 2).dataset.tensors[0]), batch_size=24)
    guard = FitGuard(unlabelled, loss=spread)
    learning(tmp_path, Module(), guard, held_out=None, max_epochs=4)
    assert guard.shrinkage_ > 0
    assert guard.history_[-1].held_out < guard.history_[0].held_out < 0


def test_the_guard_speaks_to_people(tmp_path):
    with pytest.raises(ConfigError, match="nothing held out to judge by"):
        fitted(tmp_path, Module(), LoRACallback(rank=2), FitGuard())
    with pytest.raises(ConfigError, match="watches one LoRACallback, and 0 stand before it"):
        fitted(tmp_path, Module(), FitGuard(), LoRACallback(rank=2), held_out=noise(4))
    text = FitGuard(noise(4), loss=lambda module, batch: "low")
    for guard, said in (
        (FitGuard([noise(4), noise(4)]), "several held-out loaders"),
        (text, "function `loss` returns str; expected a loss of shape"),
    ):
        with pytest.raises(ConfigError, match=said):
            fitted(tmp_path, Module(), LoRACallback(rank=2), guard)
    for given, said in (
        ({"patience": 0}, "patience must be a whole number of at least 1 epoch, got 0"),
        ({"shares": [0, 1]}, r"shares must lie in \(0, 1\], got \[0, 1\]"),
        ({"l2_sp": -1}, "l2_sp must be 0 or more, got -1"),
    ):
        with pytest.raises(ConfigError, match=said):
            FitGuard(**given)


@pytest.mark.parametrize(
    "average", [EMAWeightAveraging(decay=0.5), StochasticWeightAveraging(swa_lrs=1e-3)]
)
@pytest.mark.parametrize("last", [False, True])
def test_an_average_and_the_guard_would_undo_each_other(tmp_path, average, last):
    callbacks = [LoRACallback(rank=2), FitGuard()]
    callbacks.insert(2 if last else 1, average)
    with pytest.raises(ConfigError, match="copies its average over the model that FitGuard has"):
        fitted(tmp_path, Module(), *callbacks, held_out=noise(4))


class Headed(Module):
    """A backbone that gives features, and the module's own head."""

    def __init__(self):
        super().__init__(tiny_vit(classes=0))
        self.norm = nn.BatchNorm1d(self.model.num_features, affine=False)
        self.head = nn.Linear(self.model.num_features, 4)

    def forward(self, x):
        return self.head(self.norm(self.model(x)))


def test_what_is_trained_outside_the_backbone_cannot_go_back_and_is_refused(tmp_path):
    message = "alone, and {} of the module's parts outside it would stay as trained {}"
    with pytest.raises(ConfigError, match="FitGuard.*" + message.format(3, r"\(head.weight …\)")):
        fitted(tmp_path, Headed(), LoRACallback(rank=2), FitGuard(), held_out=noise(4))
    module = Headed()
    module.head.requires_grad_(False)
    with pytest.raises(ConfigError, match="cross_fit.*" + message.format(1, r"\(norm\)")):
        cross_fit(module, noise(4).dataset, fit(tmp_path))
    module.norm.eval()
    with pytest.warns(UserWarning, match="the source model is kept"):
        fitted(tmp_path, module, LoRACallback(rank=2), FitGuard(), held_out=noise(4))


def test_a_head_of_the_module_goes_back_with_the_module_as_backbone(tmp_path):
    module, adapter = Headed().eval(), LoRACallback(rank=2, backbone="", batch_norm="adapt")
    before = module(X)
    with pytest.warns(UserWarning, match="the source model is kept"):
        fitted(tmp_path, module, adapter, FitGuard(), held_out=noise(12), max_epochs=3)
    assert torch.equal(module.eval()(X), before)


def test_validation_batches_are_found_before_their_epoch(tmp_path):
    guard = FitGuard()
    options = {"check_val_every_n_epoch": 2, "num_sanity_val_steps": 0, "held_out": bright(8, 2)}
    learning(tmp_path, Module(), guard, rank=2, data=bright(16, 1), **options)
    assert len(guard.history_) == 3


class Generous(FitGuard):
    """A lower rank may cost a little."""

    def _lower_rank(self, trainer, pl_module, loss):
        super()._lower_rank(trainer, pl_module, loss + 0.1)


@pytest.mark.filterwarnings("ignore:Checkpoint directory", "ignore:Be aware that when using")
@pytest.mark.parametrize("rank", [4, "explained-variance"])
def test_checkpoints_from_before_and_after_a_lowered_rank(tmp_path, rank):
    def adapter(rank):
        return LoRACallback(rank=rank, max_rank=6, seed=0, output_dir=tmp_path)

    one, guard, saver = fresh(), Generous(lower_rank=True), ModelCheckpoint(tmp_path / "c")
    t = fitted(
        tmp_path, one, adapter(rank), guard, saver, data=bright(32, 1), held_out=bright(12, 2),
        max_epochs=4, enable_checkpointing=True,
    )  # fmt: skip
    assert 0 < guard.rank_ < 4
    adapted, after = one.eval()(X), tmp_path / "after.ckpt"
    t.save_checkpoint(after)
    other = fresh()
    trainer(tmp_path, adapter(rank)).test(other, noise(4), ckpt_path=saver.best_model_path)
    t.test(one, noise(4), ckpt_path="best")
    assert torch.equal(one.eval()(X), other.eval()(X))
    # In a fresh module, at the rank that is left, and so does a fit that goes on.
    same = adapter(rank if isinstance(rank, str) else guard.rank_)
    other = fresh()
    trainer(tmp_path, same).test(other, noise(4), ckpt_path=after)
    torch.testing.assert_close(other.eval()(X), adapted, rtol=1e-5, atol=1e-5)
    again = Generous(lower_rank=False)
    fitted(
        tmp_path, fresh(), same, again, data=bright(32, 1), held_out=bright(12, 2), max_epochs=5,
        ckpt=after,
    )  # fmt: skip
    assert len(again.history_) == len(guard.history_) + 1


@torch.no_grad()
def test_a_checkpoint_that_is_refused_leaves_a_lowered_adapter_alone():
    model = moved("offset")
    state = model.state_dict()
    compress(model, rank=1)
    before = model(X)
    with pytest.raises(AdapterFileError, match="factors that this model has no place for"):
        model.load_state_dict(state)
    assert torch.equal(model(X), before)


# ---- what losses say -----------------------------------------------------------------------


def test_a_diagnosis_for_each_course():
    def said(*pairs: tuple[float, float]) -> str:
        return diagnose([Look(i, *pair) for i, pair in enumerate(pairs)])

    assert said((2, 2), (1, 1.2), (0.9, 1.15), (0.88, 1.15)).startswith("neither")
    assert "since epoch 1" in said((2, 2), (1, 1.2), (0.5, 1.4), (0.2, 1.9))
    assert "since epoch 0" in said((2, 2), (1, 2.2), (0.5, 2.4))
    assert said((2, 2), (1.99, 2), (1.99, 1.99)).startswith("underfitting: the training loss is")
    assert said((2, 2), (1.8, 1.8), (1.5, 1.5)).startswith("underfitting: the held-out loss still")
    assert said((2, 2), (math.nan, 2)).startswith("diverged in epoch 1")


def test_choose_wants_to_be_sure():
    source = torch.linspace(1, 3, 20, dtype=torch.double)
    flip = torch.tensor([1.0, -1.0], dtype=torch.double).repeat(10)
    better = choose(source, {0.5: source - 0.2 + 0.1 * flip, 1.0: source + 1})
    assert better.share == 0.5
    assert better.p_value < 0.01
    sure = {0.25: source - 0.2 + 0.1 * flip, 1.0: source - 0.4 + 3 * flip}
    assert choose(source, sure).share == 0.25, "what is sure goes before what is more"
    wrong = torch.arange(20).fmod(2).double()
    fewer = (wrong, {0.5: wrong * (source < 2), 1.0: wrong})
    gain = {0.5: source - 0.2, 1.0: source - 0.4}
    assert choose(source, gain, fewer).share == 0.5, "the other is as often wrong as before"
    assert choose(source, gain).share == 1
    assert choose(source[:5], {1.0: source[:5] - 1}).share == 0, "five items are never enough"
    assert choose(source[:6], {1.0: source[:6] - 1}).share == 1
    assert choose(source, {0.5: source - 0.05 + flip}).share == 0, "more noise than gain"
    assert choose(source, {1.0: source}).share == 0, "no gain at all"
    assert choose(source, {1.0: source * math.nan}).share == 0
    assert choose(source[:1], {1.0: source[:1] - 1}).share == 1, "one pair cannot be tested"
    with pytest.raises(DataError, match=r"expected losses of shape \(20,\) for each share"):
        choose(source, {1.0: source[:3]})


# ---- cross-fitting -------------------------------------------------------------------------


def doubt(module, batch):
    return 1 - module(batch[0]).softmax(1).gather(1, batch[1][:, None])[:, 0]


def fit(tmp_path, epochs=6):
    def run(module, items):
        adapter = LoRACallback(rank=2, output_dir=tmp_path)
        data = DataLoader(items, batch_size=8, shuffle=True)
        fitted(tmp_path, module, adapter, data=data, max_epochs=epochs)

    return run


def test_every_item_is_judged_by_who_has_not_seen_it(tmp_path):
    seen = []

    def run(module, items):
        seen.append(set(getattr(items, "indices", range(len(items)))))
        fit(tmp_path)(module, items)

    module, data = Module(), bright(12, 1).dataset
    source = losses_of(module, DataLoader(data), None)
    choice = cross_fit(module, data, run, folds=3, mistakes=doubt)
    assert [len(s) for s in seen] == [8, 8, 8, 12]
    assert set.union(*({*range(12)} - s for s in seen[:3])) == {*range(12)}
    torch.testing.assert_close(choice.source, source)
    assert choice.share > 0
    assert choice.losses[choice.share].mean() < source.mean()
    assert "of what was learnt is kept" in choice.reason
    assert "mistakes" in choice.reason


def test_labels_at_random_leave_the_source_and_no_file(tmp_path):
    torch.manual_seed(0)
    module = Module()
    with torch.no_grad():
        before = module.model(X)
    with pytest.warns(UserWarning, match="cross_fit: the source model is kept"):
        choice = cross_fit(module, noise(10).dataset, fit(tmp_path), folds=2)
    assert choice.share == 0
    assert not list(tmp_path.rglob("*.safetensors"))
    with torch.no_grad():
        assert torch.equal(module.model.eval()(X), before)


def test_too_few_items_are_not_dealt(tmp_path):
    module, seen = Module(), []

    def run(module, items):
        seen.append(len(items))
        fit(tmp_path, epochs=1)(module, items)

    with pytest.warns(UserWarning, match="expected at least 6, got 5"):
        assert cross_fit(module, bright(5, 1).dataset, run).share == 0
    assert seen == [5]
    with torch.no_grad():
        assert torch.equal(module.model.eval()(X), source_output(module.model))


def test_cross_fit_speaks_to_people(tmp_path):
    with pytest.raises(DataError, match="data hold 6 items and looked_at 5"):
        cross_fit(Module(), noise(6).dataset, fit(tmp_path), looked_at=noise(5).dataset)
    with pytest.raises(ConfigError, match="folds must be a whole number of at least 2, got 1"):
        cross_fit(Module(), noise(6).dataset, fit(tmp_path), folds=1)
    with pytest.raises(ConfigError, match="1 losses for 6 items: return one for each"):
        cross_fit(Module(), noise(6).dataset, fit(tmp_path), loss=lambda *_: torch.zeros(()))
