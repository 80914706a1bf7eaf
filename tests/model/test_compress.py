"""`compress`: exact where possible, the nearest product otherwise, and a complete adapter."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lora_lightning import (
    compress,
    disabled,
    inject,
    load_adapter,
    merge,
    remove,
    save_adapter,
    unmerge,
    verify,
)
from lora_lightning.errors import AdapterError, AdapterNotFoundError, ConfigError
from lora_lightning.model.probing import difference, run
from lora_lightning.model.state import named_factors, state_of
from tests.helpers.training import randomise, tiny_vit
from tests.helpers.zoo import ZOO, targets

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported")


@torch.no_grad()
def outputs(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    return run(model.eval(), x)


@pytest.mark.parametrize("init", ["zero", "pissa"])
@pytest.mark.parametrize("kind", sorted(ZOO))
def test_all_of_the_energy_loses_nothing(kind, init, tmp_path):
    make, x = ZOO[kind]
    model = make()
    inject(model, rank=2, target_modules=targets(kind), trainable=[], init=init, seed=0)
    randomise(model)
    before = outputs(model, x)
    found = compress(model, energy=1.0)
    assert difference(outputs(model, x), before) < 1e-4
    assert all(c.lost < 1e-3 for c in found.layers)
    if init == "zero":
        assert all(c.before == 2 for c in found.layers)
        assert found.parameters <= found.parameters_before
    verify(model, x, tolerance=1e-4)
    small = outputs(model, x)
    merge(model)
    unmerge(model)
    save_adapter(model, tmp_path / "a.safetensors")
    remove(model)
    report = load_adapter(model, tmp_path / "a.safetensors")
    assert difference(outputs(model, x), small) == 0
    assert {r.rank for r in report.rows} == {c.after for c in found.layers}


def test_a_rank_is_the_nearest_of_that_rank():
    model = tiny_vit()
    inject(model, rank=6, trainable=[], seed=0)
    randomise(model)
    before = {p: f.delta(f.matrix).detach() for p, f in named_factors(model, "default").items()}
    found = compress(model, rank=2)
    for layer in found.layers:
        f = named_factors(model, "default")[layer.path]
        assert (layer.before, layer.after, f.spec.rank) == (6, 2, 2)
        values = torch.linalg.svdvals(before[layer.path])
        lost = values[2:].norm() / values.norm()
        gone = (before[layer.path] - f.delta(f.matrix).detach()).norm() / before[layer.path].norm()
        assert layer.lost == pytest.approx(float(lost), rel=1e-3)
        assert float(gone) == pytest.approx(float(lost), rel=1e-3)
    assert found.parameters * 3 == found.parameters_before
    assert state_of(model).reports["default"].factor_parameters == found.parameters


def test_energy_gives_each_layer_its_own_rank():
    model = tiny_vit()
    inject(model, rank=6, trainable=[], seed=0)
    randomise(model)
    strong = next(iter(named_factors(model, "default").values()))
    with torch.no_grad():
        strong.lora_B[:, 1:] *= 1e-3
    found = compress(model, energy=0.95)
    ranks = [c.after for c in found.layers]
    assert ranks[0] == 1
    assert max(ranks) > 1
    assert all(c.lost**2 <= 0.05 + 1e-6 for c in found.layers)


def test_an_adapter_that_learnt_nothing_stays_without_effect():
    model = tiny_vit()
    x = torch.rand(1, 3, 32, 32)
    inject(model, rank=4, trainable=[], init="pissa")
    with disabled(model):
        before = outputs(model, x)
    compress(model, energy=0.9)
    assert difference(outputs(model, x), before) < 1e-5


def test_training_goes_on_and_flags_stay():
    model = tiny_vit()
    inject(model, rank=4, trainable=[], freeze_a=True, dora=True)
    randomise(model)
    compress(model, rank=2)
    for f in named_factors(model, "default").values():
        assert f.lora_B.requires_grad
        assert not f.lora_A.requires_grad
        assert f.magnitude.requires_grad
    model(torch.rand(2, 3, 32, 32)).sum().backward()
    assert all(f.lora_B.grad is not None for f in named_factors(model, "default").values())


def test_misuse():
    model = tiny_vit()
    with pytest.raises(AdapterNotFoundError):
        compress(model, rank=1)
    inject(model, rank=2, trainable=[])
    for given, said in (
        ({}, "either rank or energy"),
        ({"rank": 1, "energy": 0.5}, "either rank or energy"),
        ({"rank": 0}, "at least 1"),
        ({"energy": 1.5}, "energy must lie in"),
    ):
        with pytest.raises(ConfigError, match=said):
            compress(model, **given)
    merge(model)
    with pytest.raises(AdapterError, match="merged"):
        compress(model, rank=1)


def test_a_state_dict_of_a_compressed_model_means_the_same_elsewhere():
    """It holds ranks, and no scalings: these are what a fresh adapter of that rank has."""
    model, fresh = tiny_vit(), tiny_vit()
    fresh.load_state_dict(model.state_dict())
    inject(model, rank=4, alpha=6)
    randomise(model)
    compress(model, rank=2)
    inject(fresh, rank=2, alpha=6)
    fresh.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 32, 32)
    assert difference(outputs(fresh, x), outputs(model, x)) < 1e-6
