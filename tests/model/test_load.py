"""Adding and loading adapters copies no base weights, and keeps no reference to a file."""

from __future__ import annotations

import copy
import math
import zlib
from collections.abc import Callable

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.profiler import ProfilerActivity, profile

from lora_lightning import adapters, inject, load_adapter, remove, save_adapter
from lora_lightning.errors import ConfigError, TargetError
from lora_lightning.lora.module_tree import find, walk
from lora_lightning.model.adapter_file.format import read
from lora_lightning.model.fingerprint import fingerprint
from lora_lightning.model.state import named_factors
from lora_lightning.model.view import View
from tests.helpers.training import randomise, tiny_vit

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(5))


def vit() -> nn.Module:
    torch.manual_seed(0)
    return tiny_vit()


@pytest.fixture
def trained(tmp_path):
    """A tiny ViT with an adapter and a head of its own, and the adapter's file."""
    model = vit()
    inject(model, rank=2, seed=0)
    randomise(model)
    with torch.no_grad():
        model.head.weight.add_(0.1)
    return model, save_adapter(model, tmp_path / "a.safetensors")


def load(path) -> nn.Module:
    model = vit()
    load_adapter(model, path)
    return model


def wide() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(512, 512) for _ in range(4)))


def allocated(work: Callable[[], object]) -> int:
    """Bytes that torch took for tensors while `work` ran."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    return sum(max(e.self_cpu_memory_usage, 0) for e in seen.key_averages())


def bytes_of(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def places(model: nn.Module) -> dict[str, int]:
    return {n: p.data_ptr() for n, p in model.named_parameters() if ".lora." not in n}


@pytest.mark.parametrize("loads", [False, True])
@pytest.mark.parametrize("options", [{}, {"dropout": 0.1}, {"freeze_a": True}])
def test_memory_is_taken_for_the_factors_alone(tmp_path, options, loads):
    def put(model):
        inject(model, rank=1, target_modules="all", trainable=[], **options)

    model, work = wide(), put
    if loads:
        put(trained := wide())
        path = save_adapter(trained, tmp_path / "a.safetensors")
        work = lambda model: load_adapter(model, path)  # noqa: E731
    before, size = places(model), bytes_of(model)
    used = allocated(lambda: work(model))
    factors = bytes_of(model) - size
    assert places(model) == before
    assert factors <= used < 4 * factors < size / 8


def test_the_measure_of_memory_sees_a_copy_of_the_base():
    model = wide()
    assert allocated(lambda: copy.deepcopy(model)) >= bytes_of(model)


def test_what_happens_to_the_file_afterwards_changes_nothing(trained):
    model, path = trained
    loaded = load(path)
    with path.open("r+b") as file:  # in place, as no write of ours would
        file.write(bytes(path.stat().st_size))
    assert torch.equal(loaded(X), model(X))
    path.unlink()
    again = save_adapter(loaded, path)
    assert torch.equal(load(again)(X), model(X))


def test_writing_to_what_was_read_does_not_reach_the_file(trained):
    _, path = trained
    before = path.read_bytes()
    for tensor in read(path)[1].values():
        tensor.zero_()
    assert path.read_bytes() == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_each_precision_is_read_as_safetensors_reads_it(tmp_path, dtype):
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6)).to(dtype)
    inject(model, rank=2, target_modules=["0"], trainable=["1"])
    with torch.no_grad():
        model[1].running_mean.add_(1)
        model[1].num_batches_tracked.add_(3)  # int64 beside the others
    path = save_adapter(model, tmp_path / "a.safetensors")
    found, expected = read(path)[1], load_file(path)
    assert found.keys() == expected.keys()
    wide = torch.promote_types(dtype, torch.float32)  # the factors'
    assert {t.dtype for t in found.values()} == {wide, dtype, torch.int64}
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor)


def test_a_type_that_we_do_not_map_is_read_all_the_same(tmp_path):
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model.register_buffer("steps", torch.zeros(3, dtype=torch.int32))
    inject(model, rank=2, target_modules=["0"])
    model.steps.add_(7)
    path = save_adapter(model, tmp_path / "a.safetensors")
    assert torch.equal(read(path)[1]["steps"], torch.full((3,), 7, dtype=torch.int32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_start_is_the_documented_one(dtype):
    """Seeds must go on meaning what they meant."""
    model = tiny_vit().to(dtype)
    inject(model, rank=3, seed=11)
    for path, factors in named_factors(model, "default").items():
        seed = (11 * 0x9E3779B1 + zlib.crc32(path.encode())) % 2**63
        bound = 1 / math.sqrt(factors.matrix[1])
        drawn = torch.empty(3, factors.matrix[1]).uniform_(
            -bound, bound, generator=torch.Generator().manual_seed(seed)
        )
        assert torch.equal(factors.lora_A, drawn)
        assert not factors.lora_B.any()


def test_loading_draws_no_numbers(trained):
    model = vit()
    before = torch.get_rng_state()
    load_adapter(model, trained[1])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("training", [True, False])
def test_factors_are_in_the_mode_of_their_layer(trained, training):
    model = vit().train(training)
    load_adapter(model, trained[1], "one")
    inject(model, rank=1, name="two")
    factors = [f for n in ("one", "two") for f in named_factors(model, n).values()]
    assert len(factors) > 8
    assert {f.training for f in factors} == {training}


def test_a_name_that_cannot_be_is_said_on_a_model_with_adapters_too(trained):
    model = load(trained[1])
    with pytest.raises(ConfigError, match="cannot name an adapter"):
        load_adapter(model, trained[1], name="a.b")
    assert torch.equal(model(X), trained[0](X))


def test_a_base_in_another_memory_layout_is_the_same_base():
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(3, 1))
    other = copy.deepcopy(model).to(memory_format=torch.channels_last)
    assert not other[0].weight.is_contiguous()
    assert fingerprint(other) == fingerprint(model)


def test_walking_is_named_modules():
    shared = nn.Linear(2, 2)
    model = nn.Sequential(nn.Sequential(shared, nn.ReLU()), shared, nn.ModuleDict({"a": shared}))
    model.register_module("none", None)
    assert walk(model) == list(model.named_modules())
    before = [name for name, _ in walk(tiny_vit())]
    model = tiny_vit()
    inject(model, rank=1)
    assert [name for name, _ in View(model).modules] == before
    remove(model)
    assert [name for name, _ in walk(model)] == before


def test_finding_is_get_submodule():
    model = tiny_vit()
    for name, module in model.named_modules():
        assert find(model, name) is module
    for name in ("blocks.99", "blocks.0.nothing.more", "head.weight"):
        with pytest.raises(AttributeError):
            find(model, name)


class Head(nn.Linear):
    """A class that the other model's head is not of."""


def test_what_trains_in_full_is_looked_for_before_the_model_is_touched(tmp_path):
    def network(head: type[nn.Linear]) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 6), head(6, 3))

    model = network(Head)
    inject(model, rank=1, target_modules=["0"], trainable=["type:Head"])
    path = save_adapter(model, tmp_path / "a.safetensors")
    other = network(nn.Linear)
    keys = list(other.state_dict())
    with pytest.raises(TargetError, match="trainable: 'type:Head' matches no module"):
        load_adapter(other, path)
    assert not adapters(other)
    assert type(other[0]) is nn.Linear
    assert list(other.state_dict()) == keys
