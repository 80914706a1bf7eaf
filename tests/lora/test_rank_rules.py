"""Ranks from the data: the rules, the allocation of a budget, and the adapters."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging

from lora_lightning import (
    LoRACallback,
    adapters,
    choose_ranks,
    inject,
    load_adapter,
    merge,
    read_header,
    remove,
    save_adapter,
    verify,
)
from lora_lightning.errors import AdapterError, ConfigError, DataError
from lora_lightning.lora.config import LoRAConfig
from lora_lightning.lora.rank_rules import RULES, Spectrum, choose, spectrum_of
from lora_lightning.model.probing import difference, run
from lora_lightning.model.state import named_factors
from tests.helpers.training import Late, Module, fitted, fresh, loader, randomise, tiny_vit, trainer
from tests.helpers.zoo import ZOO, crossed, targets


def spectrum(values, limit=32, cost=10) -> Spectrum:
    v = torch.tensor(values, dtype=torch.float64)
    return Spectrum(v, (100, len(v)), limit, cost)


def test_rules_propose_what_their_equations_say():
    s = spectrum([8.0, 4.0, 2.0, 1.0])  # energies 64, 16, 4, 1 of 85
    found = [choose({"a": s}, energy=e)["a"] for e in (0.5, 0.76, 0.94, 0.99, 1.0)]
    assert found == [1, 2, 2, 4, 4]
    assert choose({"a": spectrum([1.0] * 6)}, "effective-rank") == {"a": 6}
    assert choose({"a": spectrum([5.0, 0, 0, 0])}, "effective-rank") == {"a": 1}
    assert choose({"a": spectrum([0.0, 0.0])}, "effective-rank") == {"a": 1}  # never none


def test_the_hard_threshold_finds_the_rank_under_noise():
    g = torch.Generator().manual_seed(0)
    signal = torch.randn(200, 5, generator=g) @ torch.randn(5, 40, generator=g)
    noisy = signal + 0.3 * torch.randn(200, 40, generator=g) + 7  # the mean is no direction
    assert choose({"a": spectrum_of(noisy, 32, 1)}, "hard-threshold") == {"a": 5}


spectra = st.lists(
    st.tuples(
        st.lists(st.floats(0.01, 100), min_size=1, max_size=8),
        st.integers(1, 8),
        st.integers(1, 50),
    ),
    min_size=1,
    max_size=6,
)


@given(spectra, st.integers(0, 400), st.floats(0.1, 1.0))
@settings(max_examples=200, deadline=None)
def test_a_budget_is_kept_and_used_up(layers, spare, energy):
    known = {
        str(i): spectrum(sorted(v, reverse=True), min(limit, len(v)), cost)
        for i, (v, limit, cost) in enumerate(layers)
    }
    budget = sum(s.cost for s in known.values()) + spare
    free = choose(known, energy=energy)
    ranks = choose(known, energy=energy, budget=budget)
    spent = sum(known[p].cost * r for p, r in ranks.items())
    assert spent <= budget
    assert all(1 <= r <= free[p] for p, r in ranks.items())
    # Nothing that is still wanted would fit into what is left.
    assert all(known[p].cost > budget - spent for p, r in ranks.items() if r < free[p])


def test_a_budget_goes_where_it_explains_most():
    known = {"flat": spectrum([2.0, 2.0, 2.0, 2.0]), "steep": spectrum([9.0, 1.0, 0.1, 0.1])}
    assert choose(known, energy=1.0, budget=40) == {"flat": 3, "steep": 1}
    with pytest.raises(ConfigError, match=r"parameter_budget=19 is too small.* takes 20"):
        choose(known, budget=19)


def batches(size=32):
    g = torch.Generator().manual_seed(3)
    return [torch.randn(4, 3, size, size, generator=g) for _ in range(3)]


@pytest.mark.parametrize("rule", RULES)
def test_a_network_gets_ranks_that_differ_and_stays_what_it_is(rule):
    base, model = tiny_vit(), tiny_vit()
    model.load_state_dict(base.state_dict())
    report = inject(model, rank=rule, rank_energy=0.9, max_rank=48, data=batches(), alpha=16.0)
    ranks = [row.rank for row in report.rows]
    assert len(set(ranks)) > 1
    assert 1 <= min(ranks) <= max(ranks) <= 48
    factors = named_factors(model, "default")
    assert [f.spec.rank for f in factors.values()] == ranks
    assert all(f.lora_A.shape[0] == f.spec.rank == f.lora_B.shape[1] for f in factors.values())
    for f in factors.values():
        assert f.spec.scaling * (8 * f.spec.rank) ** 0.5 == pytest.approx(16.0)
    x = batches()[0]
    with torch.no_grad():
        assert difference(run(model, x), run(base, x)) == 0
    verify(model, x)


def test_a_network_keeps_to_its_budget_and_to_fixed_ranks():
    model = tiny_vit()
    options = {"data": batches(), "rank_energy": 1.0, "trainable": []}
    report = inject(
        model,
        rank="explained-variance",
        parameter_budget=4000,
        rank_pattern={"blocks.0.attn.qkv": 3},
        **options,
    )
    ranks = {row.module: row.rank for row in report.rows}
    assert ranks["blocks.0.attn.qkv"] == 3
    left = 4000 - report.factor_parameters
    assert 0 <= left < max(row.parameters // row.rank for row in report.rows)
    with pytest.raises(ConfigError, match="too small"):
        inject(model, rank="explained-variance", parameter_budget=100, name="other", **options)
    assert adapters(model) == ["default"]


@pytest.mark.filterwarnings("ignore:.* tensors start as 'zero' does")
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported")
@pytest.mark.parametrize(("kind", "init"), crossed(["zero", "eva", "pissa"]))
def test_every_kind_of_layer(kind, init, tmp_path):
    make, x = ZOO[kind]
    model = make().eval().requires_grad_(False)
    with torch.no_grad():
        before = run(model, x)
    try:
        inject(
            model, rank="effective-rank", max_rank=2, target_modules=targets(kind), trainable=[],
            init=init, data=[x], forward=run,
        )  # fmt: skip
    except DataError as error:  # embeddings and transposed convolutions alone
        assert "no layer's inputs were seen" in str(error)  # noqa: PT017
        return
    with torch.no_grad():
        assert difference(run(model, x), before) <= 1e-6
        verify(model, x, tolerance=1e-5)
        randomise(model)
        adapted = run(model, x)
        merge(model)
        assert difference(run(model, x), adapted) < 1e-5
        save_adapter(model, tmp_path / "a.safetensors")
        fresh = make().eval()
        remove(model)
        fresh.load_state_dict(model.state_dict())
        load_adapter(fresh, tmp_path / "a.safetensors")
        assert difference(run(fresh, x), adapted) < 1e-5


def test_auto_is_accepted_and_says_its_rule_and_the_rank_to_take():
    """A file of an older version, which names its rule, is read without a word."""
    with pytest.warns(FutureWarning, match='now called rank="explained-variance".*take rank=8'):
        assert LoRAConfig(rank="auto") == LoRAConfig(rank="explained-variance")
    old = {"rank": "auto", "rank_rule": "effective-rank"}
    assert LoRAConfig.make(old) == LoRAConfig(rank="effective-rank")
    assert LoRAConfig.make({"rank": 8, "rank_rule": "effective-rank"}) == LoRAConfig()


def test_what_cannot_be_chosen_is_said():
    model = tiny_vit()
    with pytest.raises(
        ConfigError, match=r'rank="explained-variance" looks at the inputs.*pass data='
    ):
        inject(model, rank="explained-variance")
    inject(model, rank=4)
    with pytest.raises(ConfigError, match="rank=4, which no rule is to choose"):
        choose_ranks(model, batches())
    for bad, message in (
        ({"rank": "large"}, "rank must be a whole number.*'large'"),
        (
            {"rank": 4, "parameter_budget": 100},
            "parameter_budget limits a rule such as 'explained-variance'; rank is 4",
        ),
        (
            {"rank": "auto", "rank_rule": "best"},
            "got 'best'; or a rule.*: explained-variance, hard",
        ),
        ({"rank": "explained-variance", "rank_energy": 0}, "rank_energy must lie in"),
        ({"rank": "explained-variance", "max_rank": 0}, "max_rank must be a whole number"),
    ):
        with pytest.raises(ConfigError, match=message):
            LoRACallback(**bad)
    model = tiny_vit()
    with pytest.raises(DataError, match="no batch"):
        inject(model, rank="explained-variance", data=[])
    assert not adapters(model)
    inject(model, rank="explained-variance", data=batches())
    merge(model)
    with pytest.raises(AdapterError, match="merged"):
        choose_ranks(model, batches())


# ---- in a trainer ---------------------------------------------------------------------------


def auto(tmp_path, **options) -> LoRACallback:
    settings = {"rank": "explained-variance", "rank_energy": 0.9, "max_rank": 12, "seed": 0}
    return LoRACallback(**settings | options, output_dir=tmp_path)


def test_a_fit_chooses_ranks_before_the_optimizer_and_writes_them(tmp_path):
    module, callback = fresh(), auto(tmp_path)
    fitted(tmp_path, module, callback)
    factors = named_factors(module.model, "default")
    ranks = [f.spec.rank for f in factors.values()]
    assert len(set(ranks)) > 1
    assert all(bool(f.lora_B.any()) for f in factors.values())  # all were trained
    assert [row.rank for row in callback.report_.rows] == ranks
    targets = read_header(callback.adapter_path_)["targets"]
    assert [t["rank"] for t in targets] == ranks


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("prune", [{}, {"prune_to": 2}])
def test_a_resumed_fit_has_the_checkpoints_ranks_and_ends_the_same(tmp_path, prune):
    whole, again = fresh(), fresh()
    saves = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    fitted(tmp_path, whole, auto(tmp_path, **prune), saves, max_epochs=4, enable_checkpointing=True)
    fitted(tmp_path, again, auto(tmp_path, **prune), max_epochs=4, ckpt=tmp_path / "epoch=1.ckpt")
    for path, factors in named_factors(whole.model, "default").items():
        other = named_factors(again.model, "default")[path]
        assert factors.spec == other.spec
        assert torch.equal(factors.lora_A, other.lora_A)
        assert torch.equal(factors.lora_B, other.lora_B)


def test_an_average_of_weights_has_the_chosen_ranks(tmp_path):
    module = fresh()
    trainer(tmp_path, auto(tmp_path), WeightAveraging(), max_epochs=1).fit(module, loader())
    assert len({f.spec.rank for f in named_factors(module.model, "default").values()}) > 1


def test_a_network_built_late_gets_its_ranks_too(tmp_path):
    module = Late()
    trainer(tmp_path, auto(tmp_path), max_epochs=1).fit(module, loader())
    factors = named_factors(module.model, "default").values()
    assert len({f.spec.rank for f in factors}) > 1
    assert all(bool(f.lora_B.any()) for f in factors)


class Loads(Module):
    """A module whose own loader exists only after its `setup`."""

    def setup(self, stage):
        self.ready = True

    def train_dataloader(self):
        assert self.ready
        return loader()


def test_a_loader_that_comes_late_asks_for_data(tmp_path):
    with pytest.raises(ConfigError, match=r"Give LoRACallback\(data="):
        trainer(tmp_path, auto(tmp_path), max_epochs=1).fit(Loads(tiny_vit()))
    module = Loads(tiny_vit())
    trainer(tmp_path, auto(tmp_path, data=batches()), max_epochs=1).fit(module)
    assert len({f.spec.rank for f in named_factors(module.model, "default").values()}) > 1
