"""Differences between calls of one model: in-place writes, sizes, and arguments."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lora_lightning import AdapterBank, load_adapter
from lora_lightning.errors import AdapterError, ConfigError
from lora_lightning.model.probing import difference
from tests.helpers.bank_cases import Layer, check, same, tiny, write

# ---- what the model writes into --------------------------------------------------------------


class Writes(Layer):
    def forward(self, x, lengths, cache):
        x -= 0.5
        lengths -= 1
        cache.append(self.inner(x))
        valid = torch.arange(x.shape[1]) < lengths[:, None]
        return torch.stack(cache).sum(0) * valid[..., None]


def test_a_model_may_write_into_what_it_is_given(tmp_path):
    base = Writes().eval()
    paths = write(base, tmp_path, target_modules="all")
    x, lengths, names = torch.randn(2, 5, 6), torch.tensor([5, 4]), ["a", "b"]
    cache: list = []
    with torch.no_grad(), AdapterBank(base, paths)[names]:
        mixed = base(x.clone(), lengths.clone(), cache)
    assert len(cache) == 1
    for i, name in enumerate(names):
        alone = copy.deepcopy(base)
        load_adapter(alone, paths[name])
        with torch.no_grad():
            assert difference([mixed[i]], [alone(x.clone(), lengths.clone(), [])[i]]) <= 1e-5


# ---- sizes and kinds -------------------------------------------------------------------------


class Middle(Layer):
    """Items between time and width."""

    def forward(self, x):
        y = x.transpose(0, 1)
        return self.inner(y.flatten(0, 2)).view(*y.shape[:3], 4).transpose(0, 1)


def test_a_dimension_of_one_entry_hides_the_order(tmp_path):
    names = ["a", "b"]
    bank, paths = check(
        Middle(), tmp_path, torch.randn(2, 1, 3, 6), names=names, target_modules="all"
    )
    assert "groups" not in bank.places["inner.weight"]
    same(bank, paths, names, (torch.randn(2, 2, 3, 6),))
    same(bank, paths, names, (torch.randn(2, 1, 3, 6),))


class ItemsLast(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(6, 4, 1)

    def forward(self, x):
        return self.conv(x.permute(1, 2, 0)).permute(2, 0, 1)


@pytest.mark.parametrize("form", [{}, {"dora": True}, {"owned": True}])
def test_convolutions_along_the_items(form, tmp_path):
    torch.manual_seed(0)
    base, options = ItemsLast(), {"target_modules": "all", **form}
    if "owned" in form:
        base = nn.Sequential(nn.Linear(6, 6), base)
        options = {"target_modules": ["0"], "trainable": ["1.conv"]}
    bank, _ = check(base, tmp_path, torch.randn(2, 4, 6), names=["a", "b"], **options)
    assert any("groups" in place for place in bank.places.values())


class Sized(nn.Module):
    """Is told how many items there are."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Parameter(torch.randn(6, 6))

    def forward(self, x, n):
        return (x.view(n, -1, 6) @ self.mix).mean(1)


class Table(nn.Module):
    """Is told nothing else."""

    def __init__(self):
        super().__init__()
        self.table = nn.Linear(6, 6)

    def forward(self, n, size):
        return self.table(torch.ones(1, size, 6).cumsum(1)).expand(n, -1, -1)


class Around(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        if isinstance(self.inner, Sized):
            return self.inner(x.flatten(0, 1), len(x))
        return x + self.inner(len(x), x.shape[1])


@pytest.mark.parametrize(("inner", "target"), [(Sized, "*mix"), (Table, "*table")])
def test_a_module_that_counts_items_does_not_run_in_groups_itself(inner, target, tmp_path):
    torch.manual_seed(0)
    names = ["a", "b", "a"]
    base = Around(inner())
    bank, paths = check(base, tmp_path, torch.randn(3, 4, 6), names=names, target_modules=[target])
    assert set(bank.places.values()) == {"in groups, by the whole model"}
    same(bank, paths, ["b", "a"], (torch.randn(2, 5, 6),))


class Turned(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.inner = nn.Embedding(7, 6), nn.Linear(6, 4)

    def forward(self, tokens):
        return self.inner(self.embed(tokens).transpose(0, 1).flatten(0, 1))


def test_an_order_that_one_batch_hides_the_next_may_show(tmp_path):
    base = Turned().eval()
    paths = write(base, tmp_path, target_modules=["inner"])
    bank, tokens = AdapterBank(base, paths), torch.randint(0, 7, (2, 4))
    with pytest.raises(AdapterError, match=r"bank\.probe"), bank[["a", "b"]]:
        base(torch.full((2, 4), 3))
    with torch.no_grad(), bank[["a", "b"]]:
        mixed = base(tokens).view(4, 2, 4)
    for i, name in enumerate("ab"):
        alone = copy.deepcopy(base)
        load_adapter(alone, paths[name])
        with torch.no_grad():
            assert difference([mixed[:, i]], [alone(tokens).view(4, 2, 4)[:, i]]) <= 1e-5


class Cropped(Layer):
    """Crops to the longest item, beside a tensor that all items share."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.randn(1, 1, 6))

    def forward(self, x, lengths):
        valid = torch.arange(int(lengths.max())) < lengths[:, None]
        return self.inner(x + self.shift) * valid[..., None]


def test_a_group_that_fails_alone_is_named(tmp_path):
    base = Cropped().eval()
    paths = write(base, tmp_path, target_modules=["inner"], trainable=["shift"])
    bank, x = AdapterBank(base, paths), torch.randn(2, 5, 6)
    with pytest.raises(AdapterError, match="fails with the items of b alone"), bank[["a", "b"]]:
        base(x, torch.tensor([5, 3]))


# ---- how it is called ------------------------------------------------------------------------


class Method(Layer):
    def features(self, x):
        return self.inner(x.flatten(0, 1)).view(*x.shape[:2], 4)

    def forward(self, x):
        return self.features(x)


def test_the_items_are_counted_however_the_model_is_called(tmp_path):
    base = Method().eval()
    bank = AdapterBank(
        base, write(base, tmp_path, target_modules="all"), example=torch.randn(2, 3, 6)
    )
    x = torch.randn(4, 3, 6)
    with torch.no_grad(), bank[["a", "b"]]:
        for call in (base, base.forward):
            with pytest.raises(AdapterError, match="2 names for a batch of 4"):
                call(x)
        with pytest.raises(AdapterError, match="call the model itself"):
            base.features(x)
        assert torch.equal(base.forward(x[:2]), base(x[:2]))
    with torch.no_grad(), bank["a"]:
        assert torch.equal(base.features(x), base(x))


class Listed(Layer):
    def forward(self, items):
        return torch.stack([self.inner(x).mean(0) for x in items])


def test_a_list_of_items_is_no_batch(tmp_path):
    base = Listed().eval()
    bank = AdapterBank(base, write(base, tmp_path, target_modules="all"))
    with pytest.raises(AdapterError, match="Pad the items"), bank[["a", "b"]]:
        base([torch.randn(2, 6), torch.randn(2, 6)])


def test_names(tmp_path):
    base = tiny()
    bank = AdapterBank(base, write(base, tmp_path, ["alice", "bob"]))
    assert list(bank) == ["alice", "bob"]
    with pytest.raises(ConfigError, match="not 0"):
        bank[0]
    bank.probe(torch.randn(2, 6), names="bob")
    assert bank.held == ["bob"]
