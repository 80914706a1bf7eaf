"""Rank pruning in training: ranks fall, important directions stay, BA is unchanged."""

from __future__ import annotations

import pytest
import timm
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    StochasticWeightAveraging,
)
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from lora_lightning import LoRACallback, disabled, inject, load_adapter, read_header, verify
from lora_lightning.errors import ConfigError
from lora_lightning.linalg.decompose import product_svd
from lora_lightning.model.data_driven.prune import Pruner, alive, orthogonalise
from lora_lightning.model.probing import difference, run
from lora_lightning.model.state import named_factors
from tests.helpers.audio_zoo import wav2vec2
from tests.helpers.training import Module, fresh, loader, randomise, tiny_vit, trainer


def teacher(rank=2, seed=0, width=12):
    """A layer, and the same with a change of this rank, to be learnt."""
    g = torch.Generator().manual_seed(seed)
    base = nn.Sequential(nn.Linear(width, width, bias=False))
    wanted = torch.randn(width, rank, generator=g) @ torch.randn(rank, width, generator=g)
    return base, base[0].weight.detach() + wanted / width


def learn(optimizer_class, to=2, steps=200, rank=6, overflows=(), **options):
    base, wanted = teacher()
    inject(base, rank=rank, target_modules="all", trainable=[], seed=0)
    factors = named_factors(base, "default")
    optimizer = optimizer_class([p for p in base.parameters() if p.requires_grad], **options)
    pruner = Pruner(factors, to, steps // 10, steps * 7 // 10)
    g = torch.Generator().manual_seed(1)
    courses, scaler = [], torch.amp.GradScaler("cpu", growth_interval=1000)
    for step in range(steps):
        x = torch.randn(32, 12, generator=g)
        loss = (base(x) - x @ wanted.T).square().mean()
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        if step in overflows:
            factors["0.weight"].lora_B.grad[3:, :2] = torch.inf
        scaler.unscale_(optimizer)
        pruner.observe(step)
        scaler.step(optimizer)
        scaler.update()
        pruner.act(step + 1, [optimizer])
        courses.append((loss.item(), sum(pruner.ranks().values())))
    return base, factors, pruner, courses


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        (torch.optim.AdamW, {"lr": 3e-2}),
        (torch.optim.SGD, {"lr": 0.3, "momentum": 0.9}),
        (torch.optim.RMSprop, {"lr": 1e-2}),
    ],
)
def test_ranks_fall_to_what_is_needed_and_the_task_is_still_learnt(optimizer, options):
    _, factors, pruner, courses = learn(optimizer, **options)
    ranks = [rank for _, rank in courses]
    assert ranks[0] == 6
    assert ranks[-1] == 2
    assert ranks == sorted(ranks, reverse=True)
    assert len(set(ranks)) >= 3  # by and by
    assert courses[-1][0] < 0.02 * courses[0][0]
    assert pruner.finish() == {"0.weight": 2}
    assert factors["0.weight"].lora_A.shape == (2, 12)


@pytest.mark.parametrize("overflows", [(20,), (21, 22), (40, 80)])  # scoring begins at step 20
def test_overflowing_steps_are_not_counted(overflows):
    """GradScaler skips these steps; the scores were NaN from then on, which won every place."""
    _, _, pruner, courses = learn(torch.optim.AdamW, lr=3e-2, overflows=overflows)
    assert courses[-1][0] < 0.02 * courses[0][0]
    assert pruner.finish() == {"0.weight": 2}
    pruner.observe(pruner.first)
    assert all(score.isfinite().all() for score in pruner.importance.values())


def test_a_dropped_direction_stays_dropped():
    _, factors, pruner, _ = learn(torch.optim.AdamW, lr=3e-2, weight_decay=0.1)
    f = factors["0.weight"]
    gone = ~alive(f)
    assert gone.sum() == 4
    assert not f.lora_B[:, gone].any()
    before = product_svd(f.lora_B, f.lora_A).product()
    pruner.finish()
    torch.testing.assert_close(f.lora_B @ f.lora_A, before, atol=1e-6, rtol=1e-5)


def test_what_matters_is_kept_wherever_it_lies():
    """The budget moves to the layer that needs it."""
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    inject(model, rank=4, target_modules="all", trainable=[], seed=0)
    factors = named_factors(model, "default")
    randomise(model)
    pruner = Pruner(factors, 2.5, 0, 1)
    worth = {"0.weight": [9.0, 8.0, 7.0, 6.0], "1.weight": [3.0, 2.0, 1.0, 0.5]}
    pruner._mean = {p: torch.tensor(w) for p, w in worth.items()}
    pruner._spread = {p: torch.ones(4) for p in worth}
    assert pruner.act(1, [])
    assert pruner.ranks() == {"0.weight": 4, "1.weight": 1}


def test_importance_is_the_first_order_change_of_the_loss():
    base, wanted = teacher()
    inject(base, rank=3, target_modules="all", trainable=[], seed=0)
    randomise(base)
    base.double()
    f = named_factors(base, "default")["0.weight"]
    x = torch.randn(64, 12, dtype=torch.float64)

    def loss():
        return (base(x) - x @ wanted.double().T).square().mean()

    loss().backward()
    pruner = Pruner({"0.weight": f}, 1, 0, 10)
    pruner.observe(0)
    eps = 1e-6
    for i, found in enumerate(pruner._mean["0.weight"]):
        kept = f.lora_B.data.clone()
        f.lora_B.data[:, i] *= 1 - eps  # a little less of this direction
        changed = loss().item()
        f.lora_B.data.copy_(kept)
        assert abs(changed - loss().item()) / eps == pytest.approx(float(found), rel=1e-3, abs=1e-7)


def test_turning_leaves_the_product_and_the_next_step_of_sgd():
    torch.manual_seed(0)
    left, right = torch.randn(10, 4, dtype=torch.float64), torch.randn(4, 8, dtype=torch.float64)
    model = nn.Sequential(nn.Linear(8, 10, bias=False)).double()
    inject(model, rank=4, target_modules="all", trainable=[], alpha=8.0)
    f = named_factors(model, "default")["0.weight"]
    f.lora_B.data.copy_(left), f.lora_A.data.copy_(right)
    optimizer = torch.optim.SGD([f.lora_A, f.lora_B], lr=0.0, momentum=0.9)
    (f.delta((10, 8)) * torch.randn(10, 8, dtype=torch.float64)).sum().backward()
    optimizer.step()
    moment = {k: optimizer.state[p]["momentum_buffer"].clone() for k, p in f.named_parameters()}
    product = f.lora_B @ f.lora_A
    orthogonalise(f, [optimizer])
    torch.testing.assert_close(f.lora_B @ f.lora_A, product, rtol=1e-5, atol=1e-5)
    for gram in (f.lora_B.T @ f.lora_B, f.lora_A @ f.lora_A.T):
        assert (gram - gram.diagonal().diag()).abs().max() < 1e-4 * gram.max()
    # To first order <gradient, change of the product> does not depend on the basis:
    # g_B A' = G A'ᵀ A' and so on; in numbers, both ways to write G on the factors agree.
    now = {k: optimizer.state[p]["momentum_buffer"] for k, p in f.named_parameters()}
    G = moment["lora_B"] @ torch.linalg.pinv(right).T
    torch.testing.assert_close(now["lora_B"], G @ f.lora_A.T, rtol=1e-3, atol=1e-3)
    G = torch.linalg.pinv(left).T @ moment["lora_A"]
    torch.testing.assert_close(now["lora_A"], f.lora_B.T @ G, rtol=1e-3, atol=1e-3)


def test_factors_that_have_not_moved_are_left_alone():
    model = nn.Sequential(nn.Linear(8, 8))
    inject(model, rank=3, target_modules="all", trainable=[])
    f = named_factors(model, "default")["0.weight"]
    before = f.lora_A.clone()
    orthogonalise(f, [])
    assert torch.equal(f.lora_A, before)
    assert not f.lora_B.any()


# ---- in a trainer ---------------------------------------------------------------------------


def fit(module, tmp_path, epochs=5, **options):
    callback = LoRACallback(output_dir=tmp_path, seed=0, **options)
    trainer(tmp_path, callback, max_epochs=epochs).fit(module, loader(items=16))
    return callback


def test_a_fit_ends_at_the_mean_rank_and_writes_it(tmp_path):
    module = Module(tiny_vit())
    callback = fit(module, tmp_path, rank=6, prune_to=2)
    ranks = [row.rank for row in callback.report_.rows]
    assert sum(ranks) == 2 * len(ranks)
    assert len(set(ranks)) > 1
    header = read_header(callback.adapter_path_)
    assert [t["rank"] for t in header["targets"]] == ranks
    x = next(iter(loader()))[0]
    verify(module.model, x)
    with torch.no_grad():
        adapted = run(module.model.eval(), x)
        fresh = tiny_vit()
        with disabled(module.model):
            fresh.load_state_dict(
                {k: v for k, v in module.model.state_dict().items() if ".lora." not in k}
            )
        load_adapter(fresh, callback.adapter_path_)
        assert difference(run(fresh.eval(), x), adapted) < 1e-6


class Recogniser(Module):
    """wav2vec2: where ranks never changed in another library."""

    def __init__(self):
        super().__init__(wav2vec2())

    def training_step(self, batch, batch_idx):
        logits, _ = self.model(batch[0])
        return nn.functional.cross_entropy(logits.mean(1), batch[1])


def test_ranks_fall_in_wav2vec2_too(tmp_path):
    x = torch.randn(16, 2400, generator=torch.Generator().manual_seed(0))
    data = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(x, torch.arange(16) % 5), batch_size=4
    )
    module = Recogniser()
    callback = LoRACallback(
        output_dir=tmp_path, rank=4, prune_to=1.5, target_modules=["q_proj", "v_proj"]
    )
    trainer(tmp_path, callback, max_epochs=4).fit(module, data)
    ranks = [row.rank for row in callback.report_.rows]
    assert sum(ranks) == round(1.5 * len(ranks))


def test_convolutions_with_every_option_that_goes_along(tmp_path):
    module = Module(timm.create_model("test_convnext", num_classes=4))
    callback = fit(
        module, tmp_path, epochs=2, rank=4, prune_to=2, clamp_rank=True, dropout=0.1, dora=True
    )
    assert sum(r.rank for r in callback.report_.rows) <= 2 * len(callback.report_.rows)


class ByHand(Module):
    """Two optimizers, several steps in each batch."""

    def __init__(self, rounds=1):
        super().__init__(tiny_vit())
        self.automatic_optimization = False
        self.rounds = rounds

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers() * self.rounds:
            optimizer.zero_grad()
            self.manual_backward(nn.functional.cross_entropy(self(batch[0]), batch[1]))
            optimizer.step()

    def configure_optimizers(self):
        chosen = [p for p in self.parameters() if p.requires_grad]
        return [torch.optim.AdamW(chosen[i::2], lr=1e-3) for i in range(2)]


@pytest.mark.parametrize(
    ("rounds", "limit"),
    [
        (1, {"max_epochs": 11}),
        (2, {"max_epochs": 10}),
        (1, {"max_steps": 21}),
        (2, {"max_steps": 21}),
        pytest.param(1, {"max_epochs": 10}, marks=pytest.mark.slow),
        pytest.param(2, {"max_epochs": 11}, marks=pytest.mark.slow),
    ],
)
def test_ranks_fall_by_batches_however_often_optimizers_step(tmp_path, rounds, limit):
    courses = []

    class Watch(LoRACallback):
        def on_train_batch_end(self, *args):
            super().on_train_batch_end(*args)
            courses.append(sum(self._ranks._pruner.ranks().values()))

    callback = Watch(output_dir=tmp_path, seed=0, rank=4, prune_to=1.5)
    options = {"max_epochs": 30, "accumulate_grad_batches": 1, **limit}
    trainer(tmp_path, callback, **options).fit(ByHand(rounds), loader())
    ranks = [row.rank for row in callback.report_.rows]
    assert sum(ranks) == 1.5 * len(ranks)
    assert len(set(courses)) > 1
    fallen = next(i for i, c in enumerate(courses, 1) if c == courses[-1])
    assert 0.4 < fallen / len(courses) <= 0.8  # not by the optimizers' steps, twice as fast


@pytest.mark.parametrize("groups", [{0: 1, 2: 4}, {0: 4, 2: 1}])
def test_ranks_fall_however_gradients_are_gathered(tmp_path, groups):
    callback = LoRACallback(output_dir=tmp_path, seed=0, rank=4, prune_to=1.5)
    gathers = GradientAccumulationScheduler(groups)
    trainer(tmp_path, callback, gathers, max_epochs=10).fit(Module(), loader())
    assert sum(r.rank for r in callback.report_.rows) == 1.5 * len(callback.report_.rows)


def test_events_that_are_passed_over_are_made_up_for():
    pruner = Pruner({}, 1, 5, 25)
    acts = [s for s in range(30) if pruner._events(s) > pruner._events(s - 1)]
    assert acts == [5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25]
    assert pruner.act(8, [], since=4)
    assert not pruner.act(8, [], since=7)
    assert pruner.act(40, [], since=24)
    assert not pruner.act(41, [], since=40)


def test_a_fit_that_ends_too_early_says_that_ranks_have_not_fallen(tmp_path):
    class Stop(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.should_stop = True

    callback = LoRACallback(output_dir=tmp_path, rank=4, prune_to=1.5)
    t = trainer(tmp_path, callback, Stop(), max_epochs=20)
    with pytest.warns(UserWarning, match="prune_to=1.5: the fit ended at a mean rank of 4. Ranks"):
        t.fit(Module(), loader(items=16))


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adafactor])
def test_a_finished_fit_is_saved_and_goes_on(tmp_path, kind):
    class Task(Module):
        def configure_optimizers(self):
            options = {"momentum": 0.9} if kind is torch.optim.SGD else {}
            return kind([p for p in self.parameters() if p.requires_grad], lr=1e-3, **options)

    def go(epochs, **options):
        callback = LoRACallback(output_dir=tmp_path, seed=0, rank=4, prune_to=1.5)
        t = trainer(tmp_path, callback, max_epochs=epochs)
        torch.manual_seed(0)  # the same base
        t.fit(Task(), loader(), **options)
        return t, [row.rank for row in callback.report_.rows]

    t, ranks = go(4)
    t.save_checkpoint(tmp_path / "after.ckpt")
    for parameter, state in t.optimizers[0].state.items():
        moments = [m for m in state.values() if m.ndim == 2 and 1 not in m.shape]
        assert all(m.shape == parameter.shape for m in moments)
    assert go(5, ckpt_path=tmp_path / "after.ckpt")[1] == ranks


@pytest.mark.parametrize("rank", [6, "explained-variance"])
def test_a_checkpoint_of_a_finished_fit_is_the_model(tmp_path, rank):
    def parts():
        options = {"rank": rank, "max_rank": 6, "prune_to": 2, "seed": 0}
        return fresh(), LoRACallback(output_dir=tmp_path, **options)

    module, callback = parts()
    t = trainer(tmp_path, callback, max_epochs=4)
    t.fit(module, loader())
    t.save_checkpoint(tmp_path / "after.ckpt")
    other, callback = parts()
    trainer(tmp_path, callback).test(other, loader(), ckpt_path=tmp_path / "after.ckpt")
    x = next(iter(loader()))[0]
    with torch.no_grad():
        torch.testing.assert_close(other.eval()(x), module.eval()(x))


def test_what_cannot_be_pruned_is_said(tmp_path):
    for bad, message in (
        ({"rank": 4, "prune_to": 4}, "prune_to=4 is no less than rank=4"),
        ({"rank": 4, "prune_to": 0}, "mean rank of at least 1, got 0"),
        ({"rank": 4, "prune_to": 2, "init": "pissa"}, "init='pissa'.*use init=\"zero\""),
    ):
        with pytest.raises(ConfigError, match=message):
            LoRACallback(**bad)
    callback = LoRACallback(rank=4, prune_to=2, output_dir=tmp_path)
    for average in (EMAWeightAveraging(), StochasticWeightAveraging(swa_lrs=1e-3)):
        with pytest.raises(ConfigError, match=f"{type(average).__name__} would average them with"):
            trainer(tmp_path, callback, average).fit(Module(tiny_vit()), loader())
    endless = trainer(tmp_path, callback, max_epochs=-1, max_time={"seconds": 1})
    with pytest.raises(ConfigError, match="give it max_steps or max_epochs"):
        endless.fit(Module(tiny_vit()), loader())

    class Endless(IterableDataset):
        def __iter__(self):
            return iter(loader().dataset)

    with pytest.raises(ConfigError, match="with max_epochs a loader that has a length"):
        trainer(tmp_path, callback).fit(Module(tiny_vit()), DataLoader(Endless(), batch_size=4))
