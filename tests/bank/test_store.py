"""An adapter bank's files, and its cache in memory."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lora_lightning import AdapterBank, inject, save_adapter
from lora_lightning.bank import mix
from lora_lightning.errors import (
    AdapterError,
    AdapterExistsError,
    AdapterFileError,
    AdapterNotFoundError,
    BaseMismatchError,
    ConfigError,
)
from lora_lightning.model import owned_tensors
from lora_lightning.model.probing import difference
from tests.helpers.bank_cases import one_by_one, tiny, write
from tests.helpers.files import rewrite


def test_512_adapters_with_a_memory_of_ten(tmp_path):
    base = tiny()
    names = [f"s{i}" for i in range(512)]
    files = write(base, tmp_path, names[:16])
    paths = {name: files[names[i % 16]] for i, name in enumerate(names)}
    bank = AdapterBank(base, paths, capacity=10)
    assert len(bank) == 512
    assert bank.held == []
    x, draw = torch.randn(10, 6), torch.Generator().manual_seed(0)
    for _ in range(4):
        chosen = [names[i] for i in torch.randint(512, (10,), generator=draw)]
        with torch.no_grad(), bank[chosen]:
            mixed = base(x)
        assert difference([mixed], one_by_one(base, paths, chosen, (x,))) <= 1e-5
        assert set(chosen) <= set(bank.held)
        assert len(bank.held) <= 10
    with pytest.raises(AdapterError, match="11 different adapters and capacity is 10"):
        bank[names[:11]].__enter__()


def test_the_one_used_last_stays(tmp_path):
    base = tiny()
    paths = write(base, tmp_path, "abcd")
    bank = AdapterBank(base, paths, capacity=2)
    for name in "abac":
        with bank[name]:
            pass
    assert bank.held == ["a", "c"]
    one = bank.nbytes // 2
    small_bank = AdapterBank(base, paths, capacity_bytes=3 * one)
    for name in "abcd":
        with bank[name], torch.no_grad():
            pass
        with small_bank[name]:
            pass
    assert 0 < small_bank.nbytes <= 3 * one
    with pytest.raises(AdapterError, match="capacity_bytes"):
        AdapterBank(base, paths, capacity_bytes=10)["a"].__enter__()


def test_more_files_later(tmp_path):
    base, x = tiny(), torch.randn(3, 6)
    paths = write(base, tmp_path, "ab")
    bank = AdapterBank(base, tmp_path)
    with torch.no_grad(), bank[["a", "b", "a"]]:
        base(x)
    (tmp_path / "more").mkdir()
    more = write(base, tmp_path / "more", "cb", rank=3, target_modules=["2", "3"], trainable=["3"])
    with pytest.raises(AdapterExistsError, match="'b'"):
        bank.add(more)
    assert bank.add(more, overwrite=True) == ["c", "b"]
    paths |= more
    names = ["c", "b", "a"]
    with torch.no_grad(), bank[names]:
        mixed = base(x)
    assert difference([mixed], one_by_one(base, paths, names, (x,))) <= 1e-5


def test_errors_of_names_and_files(tmp_path):
    base = tiny()
    paths = write(base, tmp_path, ["alice", "bob"])
    bank = AdapterBank(base, [*paths.values()])
    assert bank.names == ["alice", "bob"]
    assert "alice" in bank
    with pytest.raises(AdapterNotFoundError, match="did you mean 'alice'"):
        bank["alise"]
    with pytest.raises(ConfigError, match="no names"):
        bank[[]]
    with pytest.raises(ConfigError, match="a text"):
        bank[["alice", 3]]
    with pytest.raises(ConfigError, match="not empty"):
        AdapterBank(base, {"": paths["bob"]})
    with pytest.raises(AdapterFileError, match="no such file"):
        AdapterBank(base, {"eve": tmp_path / "eve.safetensors"})
    with pytest.raises(AdapterFileError, match="does not exist"):
        AdapterBank(base, tmp_path / "nowhere")
    (tmp_path / "other").mkdir()
    with pytest.raises(AdapterFileError, match="holds no adapter"):
        AdapterBank(base, tmp_path / "other")
    twin = (tmp_path / "other" / "bob.safetensors").with_suffix(".safetensors")
    twin.write_bytes(paths["bob"].read_bytes())
    with pytest.raises(ConfigError, match="several files are called 'bob'"):
        AdapterBank(base, [paths["bob"], twin])
    with pytest.raises(ConfigError, match="capacity"):
        AdapterBank(base, paths, capacity=0)


def test_errors_of_files_that_do_not_fit(tmp_path):
    base = tiny()
    paths = write(base, tmp_path, "a")
    other = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 6), nn.Linear(6, 3)).eval()
    with pytest.raises(BaseMismatchError, match="shapes"):
        AdapterBank(other, paths)["a"].__enter__()
    with torch.no_grad():
        weights = copy.deepcopy(base)
        weights[0].weight.mul_(2)
    with pytest.raises(BaseMismatchError, match="other weights"):
        AdapterBank(weights, paths)["a"].__enter__()
    broken = copy.deepcopy(base)
    inject(broken, rank=1, trainable=[], target_modules="all")
    path = save_adapter(broken, tmp_path / "nan.safetensors")
    rewrite(path, lambda tensors, header: tensors["0.weight.lora_B"].fill_(float("nan")))
    with pytest.raises(AdapterFileError, match="NaN"):
        AdapterBank(base, {"nan": path})["nan"].__enter__()


def test_the_base_is_looked_at_once_for_all_files_of_a_batch(tmp_path, monkeypatch):
    base = tiny()
    bank, seen = AdapterBank(base, write(base, tmp_path, "abcd"), capacity=4), []
    real = owned_tensors.statistics
    monkeypatch.setattr(owned_tensors, "statistics", lambda *a: seen.append(a) or real(*a))
    with bank[[*"abcd"]]:
        assert len(seen) == 1


def test_each_stream_of_a_device_stacks_in_memory_of_its_own(monkeypatch):
    room, parts, now = mix.Room(), [torch.zeros(2), torch.ones(2)], 0
    monkeypatch.setattr(mix, "stream_of", lambda tensor: now)
    with torch.no_grad():
        first = room.stack(("a", "lora_A"), parts)
        now = 1
        second = room.stack(("a", "lora_A"), parts[::-1])
        now = 0
        assert room.stack(("a", "lora_A"), parts) is first
    assert second.data_ptr() != first.data_ptr()


def test_a_file_that_cannot_be_read_leaves_no_others_behind(tmp_path):
    base = tiny()
    paths = write(base, tmp_path, "abcd")
    paths["broken"] = tmp_path / "broken.safetensors"
    paths["broken"].write_bytes(b"z" * 16)
    bank = AdapterBank(base, paths, capacity=2)
    for name in "abcd":
        with pytest.raises(AdapterFileError, match="damaged"):
            bank[[name, "broken"]].__enter__()
    assert len(bank.held) <= 2
