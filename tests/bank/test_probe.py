"""Batches of other lengths and masks than those of the probed batch."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.helpers.bank_cases import Layer, check, same


class Unpadded(Layer):
    def forward(self, x, mask):
        out = x.new_zeros(*x.shape[:2], 4)
        out[mask.bool()] = self.inner(x[mask.bool()])
        return out


class Packed(Layer):
    def __init__(self):
        super().__init__()
        self.rnn = nn.GRU(4, 4)

    def forward(self, x, lengths):
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True)
        packed = packed._replace(data=self.inner(packed.data))
        y = nn.utils.rnn.pad_packed_sequence(self.rnn(packed)[0], True, total_length=x.shape[1])
        return y[0]


class Sorted(Layer):
    falling = True

    def forward(self, x, lengths):
        order = lengths.argsort(descending=self.falling, stable=True)
        return self.inner(x[order])[order.argsort()]


class SortedUp(Sorted):
    falling = False


def mask(*lengths: int, dtype=torch.bool) -> torch.Tensor:
    return (torch.arange(4) < torch.tensor(lengths)[:, None]).to(dtype)


@pytest.mark.parametrize(
    ("make", "first", "then"),
    [
        (Unpadded, mask(4, 4), mask(4, 2)),
        (Unpadded, mask(4, 4, dtype=torch.int64), mask(1, 3, dtype=torch.int64)),
        (Packed, torch.tensor([4, 4]), torch.tensor([4, 2])),
        (Sorted, torch.tensor([4, 3]), torch.tensor([3, 4])),
        (SortedUp, torch.tensor([3, 4]), torch.tensor([4, 3])),
        (Sorted, torch.tensor([4, 4]), torch.tensor([3, 4])),
    ],
)
def test_layouts_hold_for_other_lengths_or_are_not_used(make, first, then, tmp_path):
    torch.manual_seed(0)
    base, names = make(), ["a", "b"]
    options = {"target_modules": ["inner"], "names": names}
    bank, paths = check(base, tmp_path, (torch.randn(2, 4, 6), first), **options)
    assert bank.places["inner.weight"] == "in groups, by the whole model"
    same(bank, paths, names, (torch.randn(2, 4, 6), then))


class Exact(Layer):
    """Takes two lengths in an unusual form, and sorts by them."""

    def forward(self, x, lengths):
        if not set(lengths.tolist()) <= {3, 4}:
            raise KeyError(lengths)
        order = lengths.argsort(descending=True, stable=True)
        return self.inner(x[order])[order.argsort()]


def test_lengths_that_cannot_be_varied_are_looked_at_each_time(tmp_path):
    names = ["a", "b"]
    x = torch.randn(2, 4, 6)
    bank, paths = check(
        Exact(), tmp_path, (x, torch.tensor([4, 3])), names=names, target_modules="all"
    )
    assert "groups" not in bank.places["inner.weight"]
    same(bank, paths, names, (x, torch.tensor([3, 4])))
    assert "groups" in bank.places["inner.weight"]
    same(bank, paths, names, (x, torch.tensor([4, 3])))
