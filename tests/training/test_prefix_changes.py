"""`PrefixCache` when something changes or is left behind: never the features of before."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lora_lightning.errors import ConfigError
from tests.helpers.frozen_net import OTHER, Net, X, attached, exact, exact_first, plainly

# ---- who comes between ---------------------------------------------------------------------------


def test_a_hook_that_comes_later_and_changes_the_input():
    model = Net()
    with attached(model) as cache:
        model.register_forward_pre_hook(lambda module, args: (args[0] * 3,))
        expected = plainly(model, X * 3)
        for _ in range(3):
            assert torch.allclose(model(X), expected)
        assert cache._forward.hits == 4


@pytest.mark.parametrize("path", ["0", "0.mid"])
def test_compiled_modules_in_the_prefix_and_around_it(path):
    model = nn.Sequential(Net())
    model.get_submodule(path).compile(backend="eager")
    with attached(model) as cache:
        for x in (X, OTHER, X):
            assert exact(model, x)
        assert cache._forward.hits == 4


class Leaves(nn.Module):
    """Gives more than it returns."""

    def __init__(self, place):
        super().__init__()
        self.place = place

    def forward(self, x):
        where = self if self.place == "attribute" else self.place
        where.seen = x * 2
        return x.tanh()


def test_a_tensor_left_in_an_attribute_ends_the_prefix():
    model = Net(mid=Leaves("attribute"))
    with attached(model) as cache:
        for x in (X, OTHER, X):
            assert exact(model, x)
            assert torch.equal(model.mid.seen, model.a(x) * 2)
        assert cache._forward.end == "mid"
        assert cache._forward.hits == 4
    with pytest.raises(ConfigError, match="a leaves a tensor in an attribute, and no layer comes"):
        exact_first(Net(a=Leaves("attribute")))


def test_a_table_that_is_made_once_is_no_end():
    class Table(nn.Module):
        table = None

        def forward(self, x):
            if self.table is None:
                self.table = torch.arange(8.0)
            return x + self.table

    model = Net(mid=Table())
    with attached(model) as cache:
        model(X)
        assert cache._forward.end == "c"


def test_a_tensor_left_elsewhere_is_refused():
    class Context:
        seen = None

    place = Context()

    class Reads(Net):
        def forward(self, x):
            return super().forward(x) + place.seen.sum(1, keepdim=True)

    with pytest.raises(ConfigError, match="the model's output is not what it is without"):
        exact_first(Reads(mid=Leaves(place)))


def test_what_the_model_itself_leaves_in_an_attribute_is_stored():
    class Model(Net):
        def forward(self, x):
            self.early = self.a(x)
            return self.c(self.b(self.early))

    model = Model()
    with attached(model) as cache:
        for x in (X, X):
            assert exact(model, x)
            assert torch.allclose(model.early, model.a.forward(x))
        assert cache._forward.hits == 4


# ---- what changes past the counters --------------------------------------------------------------


@pytest.mark.parametrize("write", [lambda w: w * 2, lambda w: w.flip(0), lambda w: w.flip(1)])
def test_weights_written_to_between_epochs(write):
    model = Net()
    with attached(model) as cache:
        assert exact(model, X)
        cache.end_epoch()
        model.a.weight.data.copy_(write(model.a.weight.data.clone()))
        assert exact(model, X)
        assert cache._forward.hits == 0
        assert exact(model, X)
        assert cache._forward.hits == 4


def test_weights_of_a_validation_only():
    model, other = Net(), Net()
    other.a.weight.data.mul_(2)

    def swap():
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            kept = p.data.clone()
            p.data.copy_(q.data)
            q.data.copy_(kept)

    with attached(model) as cache:
        assert exact(model, X)
        swap()
        model.eval()
        with torch.no_grad():
            for x in (X, OTHER):
                assert torch.equal(model(x), plainly(model, x))
        swap()
        model.train()
        for x in (X, OTHER):
            assert exact(model, x)
        assert cache._forward.hits == 4, "what was stored before is still there"


class Scales(nn.Module):
    shift = 0.0

    def __init__(self):
        super().__init__()
        self.factor, self.weight = 1.0, torch.ones(8)

    def forward(self, x):
        return x * self.factor * self.weight + self.shift


def set_to(name, value):
    return lambda module: setattr(module, name, value)


@pytest.mark.parametrize(
    "change",
    [
        set_to("factor", 2.0),
        set_to("shift", 1.0),
        set_to("weight", torch.full((8,), 2.0)),
        lambda module: module.weight.mul_(3),
    ],
)
def test_plain_attributes_count(change):
    model = Net(mid=Scales())
    with attached(model) as cache:
        assert exact(model, X)
        change(model.mid)
        assert exact(model, X)
        assert cache._forward.hits == 0
        assert exact(model, X)
        assert cache._forward.hits == 4


def test_attributes_and_mode_of_a_module_around_the_prefix():
    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.factor, self.calls = Net(), 1.0, 0

        def forward(self, x):
            self.calls += 1  # its own business
            x = self.net.a(x) * self.factor
            return self.net.c(self.net.b(x * 2 if self.training else x))

    model = nn.Sequential(Around()).train()
    with attached(model) as cache:
        assert exact(model, X)
        assert exact(model, X)
        assert cache._forward.hits == 4
        model[0].factor = 2.0
        assert exact(model, X)
        model[0].training = False
        with pytest.warns(UserWarning, match="features differ between training and eval mode"):
            assert exact(model, X)


def test_dropout_that_is_switched_on():
    model = Net(mid=nn.Dropout(0.0)).train()
    with attached(model) as cache:
        assert exact(model, X)
        model.mid.p = 0.5
        with pytest.warns(UserWarning, match="drops with probability 0.5"):
            one = model(X)
        assert not torch.equal(one, model(X))
        model.mid.p = 0.0
        assert exact(model, X)
        assert exact(model, X)
        assert cache._forward.hits == 4


# ---- eval_prefix ---------------------------------------------------------------------------------


def test_statistics_that_the_check_moves_do_not_end_the_first_epoch():
    model = Net(mid=nn.BatchNorm1d(8)).train()
    before = copy.deepcopy(model.state_dict())
    with attached(model, eval_prefix=True) as cache:
        for _ in range(2):
            model(X)
            cache.end_epoch()
        assert (cache._forward.hits, cache._forward.renewals) == (4, 0)
    assert all(map(torch.equal, before.values(), model.state_dict().values()))


def test_modes_stay_those_of_the_user():
    model = Net(mid=nn.Sequential(nn.BatchNorm1d(8), nn.Dropout(0.5))).train()
    model.mid[0].eval()
    modes = [m.training for m in model.modules()]
    with attached(model, eval_prefix=True) as cache:
        assert torch.equal(model(X), model(X))
        assert [m.training for m in model.modules()] == modes
        model.a.weight.requires_grad_(True)  # all else is behind it now
        with pytest.warns(UserWarning, match="compute the prefix in the model's own mode"):
            one = model(X)
        assert not torch.equal(one, model(X))
        assert cache._forward.found is None
    assert [m.training for m in model.modules()] == modes


def test_a_dropout_within_the_prefix_and_behind_it():
    class Twice(Net):
        def forward(self, x):
            return self.mid(self.c(self.b(self.mid(self.a(x)))))

    model = Twice(mid=nn.Dropout(0.5)).train()
    with attached(model, eval_prefix=True) as cache:
        one, other = model(X), model(X)
        assert cache._forward.hits == 4
    assert (one == 0).any()
    assert not torch.equal(one, other)
