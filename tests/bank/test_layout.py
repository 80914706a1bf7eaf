"""Layouts of the items of a batch, and batches whose items interact."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lora_lightning import AdapterBank, load_adapter, set_active
from lora_lightning.bank.layout import Layout, Seen, locate
from lora_lightning.errors import AdapterError
from lora_lightning.model.probing import difference
from tests.helpers.bank_cases import SWIN, images, one_by_one, small, tiny, write


def test_errors_of_batches(tmp_path):
    base = tiny()
    bank = AdapterBank(base, write(base, tmp_path))
    with pytest.raises(AdapterError, match="2 names for a batch of 3"), bank[["a", "b"]]:
        base(torch.randn(3, 6))
    with pytest.raises(AdapterError, match="2 names for a batch of 3"), bank[["a", "a"]]:
        base(torch.randn(3, 6))
    with pytest.raises(AdapterError, match="block already: leave"), bank["a"], bank["b"]:
        pass
    with pytest.raises(AdapterError, match="two items"):
        bank.probe(torch.randn(1, 6))
    base.train()
    with pytest.raises(AdapterError, match=r"model.eval\(\)"), bank["a"]:
        pass


class Mean(nn.Module):
    """Each item is seen relative to the batch: a model in which items interact."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        x = self.first(x)
        return self.last(x - x.mean(0))


class Shared(nn.Module):
    """A layer whose input does not depend on the items, for a single number."""

    def __init__(self):
        super().__init__()
        self.table, self.last = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.last(x).sum() + self.table.weight.pow(2).sum()


@pytest.mark.parametrize(("make", "why"), [(Mean, "interact"), (Shared, "used by pow")])
def test_models_whose_items_cannot_be_told_apart(make, why, tmp_path):
    base = make().eval()
    paths = write(base, tmp_path, target_modules="all")
    bank = AdapterBank(base, paths)
    x = torch.randn(3, 6)
    with pytest.raises(AdapterError, match=f"(?s)cannot each have.*{why}"), bank[["a", "b", "c"]]:
        base(x)
    with torch.no_grad(), bank["a"]:
        alone = base(x)
    twin = copy.deepcopy(base)
    load_adapter(twin, paths["a"])
    assert difference([alone], [twin(x)]) <= 1e-5


def test_an_order_that_did_not_show_is_asked_for(tmp_path):
    """With one window an item the order of windows and items is unknown."""
    base = small("swin_tiny_patch4_window7_224", **SWIN, window_size=4, strict_img_size=False)
    paths = write(base, tmp_path)
    bank = AdapterBank(base, paths, example=images(16, 2))
    names = ["a", "b", "c"]
    with pytest.raises(AdapterError, match=r"bank\.probe"), bank[names]:
        base(images(32, 3))
    bank.probe(images(64, 2))
    with torch.no_grad(), bank[names]:
        mixed = base(images(32, 3))
    assert difference([mixed], one_by_one(base, paths, names, (images(32, 3),))) <= 1e-5


def test_set_active_afterwards_is_what_it_was(tmp_path):
    base, x = tiny(), torch.randn(3, 6)
    paths = write(base, tmp_path)
    load_adapter(base, paths["a"], "mine")
    set_active(base, None)
    bank = AdapterBank(base, paths)
    with torch.no_grad(), bank[["a", "b", None]]:
        mixed = base(x)
    set_active(base, "mine")
    assert difference([mixed[:1]], [base(x)[:1]]) <= 1e-5


# ---- layouts ---------------------------------------------------------------------------------


def seen(layout: Layout, k: int, n: int, changed: tuple[int, ...] = ()) -> Seen:
    """A tensor of rows that hold their item's value, laid out by `layout` along dimension 1."""
    value = torch.arange(n, dtype=torch.float32)
    for item in changed:
        value[item] += 100
    rows = layout.each(value[:, None], n * k)
    return Seen.of(rows[None].expand(3, -1, -1), n)


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("minor", [False, True])
def test_locate(k, minor):
    layout, n = Layout(1, minor), 4
    rows = Layout(0, minor)
    moved = {i: seen(rows, k, n, (i,)) for i in (0, n - 1)}
    found = locate(seen(rows, k, n), seen(rows, k, n + 1), moved, n)
    assert found == (Layout(1, None) if k == 1 else layout)
    interacting = {i: seen(rows, k, n, (i, 1)) for i in (0, n - 1)}
    assert "interact" in locate(seen(rows, k, n), seen(rows, k, n + 1), interacting, n)


@pytest.mark.parametrize("layout", [Layout(0), Layout(1), Layout(1, True), Layout(0, True)])
def test_views_are_undone(layout):
    x = torch.randn(6, 6, 5)
    assert torch.equal(layout.back(layout.items(x, 3)), x)
    chosen = [torch.tensor([2, 0]), torch.tensor([1])]
    parts = [(c, layout.select(x, c, 3)) for c in chosen]
    assert torch.equal(layout.gather(parts, 3), x)
    owner = layout.each(torch.arange(3)[:, None], 6)[:, 0]
    assert torch.equal(parts[1][1], x.index_select(layout.dim, (owner == 1).nonzero()[:, 0]))
