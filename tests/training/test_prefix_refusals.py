"""What `PrefixCache` refuses in words, and the arguments with which it stands aside."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
import torch
import torchaudio.models as ta
from torch import nn

from lora_lightning import PrefixCache, inject
from lora_lightning.errors import ConfigError
from tests.helpers.audio_zoo import _WAV2VEC2, noise
from tests.helpers.frozen_net import OTHER, Net, X, attached, exact, exact_first, plainly

# ---- other arguments -----------------------------------------------------------------------------


@pytest.mark.parametrize("lengths_first", [False, True])
def test_an_argument_that_brings_another_output(lengths_first):
    torch.manual_seed(0)
    model = ta.wav2vec2_model(
        **{**_WAV2VEC2, "encoder_num_layers": 3, "encoder_layer_drop": 0.0}
    ).eval()
    inject(model, rank=2, blocks=[-1])
    x, lengths = noise(6, 1200), torch.tensor([1200, 900, 800, 1200, 1000, 1100])
    first, later = ((x, lengths), (x,)) if lengths_first else ((x,), (x, lengths))
    with attached(model) as cache:
        model(*first)
        model(*first)
        assert cache._forward.hits == 6
        for index in ([0, 1, 2], [3, 4, 5], [5, 0]):
            args = [a[index] for a in later]
            with torch.no_grad():
                for now, plain in zip(model(*args), model.forward(*args), strict=True):
                    assert (now is plain is None) or torch.allclose(now, plain, atol=1e-5)
        assert cache._forward.lookups == 12, "left alone"


def test_a_shared_tensor_with_as_many_rows_as_items():
    class Mixes(Net):
        def forward(self, x, mask):
            return self.c(self.b(mask @ self.a(x)))

    x, mask, other = noise(5, 4, 8), torch.ones(4, 4), torch.ones(4, 4).tril()
    model = Mixes()
    with attached(model) as cache:
        assert exact(model, x, mask)
        with pytest.warns(UserWarning, match="has the batch's size by chance"):
            assert exact(model, x[:4], mask)
        assert exact(model, x[:4], other)
        assert exact(model, x[:3], other)
        assert cache._forward.lookups == 5 + 3
    with attached(Mixes()) as cache, pytest.raises(ConfigError, match="no telling which part"):
        cache._forward.root(x[:4], mask)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_lengths_in_a_list(size):
    class Cuts(nn.Linear):
        def forward(self, x, lengths):
            rows = [torch.cat([row[:n], 0 * row[n:]]) for row, n in zip(x, lengths, strict=True)]
            return super().forward(torch.stack(rows).cumsum(1))

    class Takes(Net):
        def forward(self, x, lengths):
            return self.c(self.b(self.a(x, lengths)))

    x, model = noise(4, 5, 8), Takes(Cuts(8, 8))
    with attached(model) as cache:
        with pytest.warns(UserWarning, match=rf"a list of {size} values for {size} items"):
            assert exact(model, x[:size], [5, 3, 4, 2][:size])
        assert exact(model, x[:size], [2, 2, 1, 1][:size])
        cache.end_epoch()
        assert "a list of" in cache.summary()


def test_another_path_by_mode_or_argument():
    class Branches(Net):
        def forward(self, x, more=False):
            x = self.a(x)
            x = self.mid(x) if self.training or more else x
            return self.c(self.b(x))

    model = Branches().train()
    with attached(model) as cache:
        assert exact(model, X)
        model.eval()
        with torch.no_grad():
            assert torch.equal(model(X), plainly(model, X))
        with pytest.warns(UserWarning, match="mid was to be called, and Linear was called"):
            assert exact(model, X)
        assert exact(model, X, more=True)
        model.train()
        assert exact(model, X)
        assert cache._forward.hits >= 4


def test_an_argument_without_a_hash_is_said():
    class Takes(Net):
        def forward(self, x, meta):
            return super().forward(x)

    model = Takes()
    with attached(model) as cache:
        with pytest.warns(UserWarning, match="holds a object, of which no hash"):
            model(X, object())
        model(X, object())
        cache.end_epoch()
        assert cache.summary().startswith("nothing stored: an argument holds a object")


def test_an_argument_that_is_another_in_each_step():
    class Takes(Net):
        def forward(self, x, step):
            return super().forward(x)

    model = Takes()
    with attached(model) as cache:
        for i in range(50):
            model(X, i)
        with pytest.warns(UserWarning, match="is another each time"):
            model(X, 50)
        model(X, 51)
        assert len(cache._forward._refusals) == 50


def test_items_of_more_windows_than_in_the_first_batch():
    class Windows(nn.Module):
        def forward(self, x):
            return x.reshape(-1, 2, 8)

    model = Net(mid=Windows())
    with attached(model) as cache:
        for x in (noise(3, 4, 8), noise(3, 8, 8), noise(3, 8, 8).flip(0), noise(3, 4, 8)[1:]):
            assert exact(model, x)
        assert cache._forward.hits == 5


# ---- random numbers and order --------------------------------------------------------------------


class Drops(nn.Module):
    """Stochastic depth that hardly ever drops."""

    def __init__(self, draw):
        super().__init__()
        self.draw = draw

    def forward(self, x):
        return x if not self.training or self.draw() > 1e-4 else 0 * x


@pytest.mark.parametrize("draw", [lambda: torch.rand(1), random.random])
def test_noise_is_seen_where_it_is_drawn(draw):
    with pytest.raises(ConfigError, match="mid draws random numbers"):
        exact_first(Net(mid=Drops(draw)).train())
    assert exact_first(Net(mid=Drops(draw)).eval())
    assert exact_first(Net(mid=Drops(draw)).train(), eval_prefix=True)


def test_noise_between_the_modules():
    class Between(Net):
        def forward(self, x):
            noise = torch.rand(len(x), 1)
            x = self.a(x)
            x = self.b(torch.where(noise < 1e-4, x * 0, x)) if self.training else self.b(x)
            return self.c(x + noise)

    with pytest.raises(ConfigError, match="what b is given is random"):
        exact_first(Between().train())
    model = Between().eval()
    with attached(model) as cache:
        for _ in range(2):
            torch.manual_seed(0)
            now = model(X)
            torch.manual_seed(0)
            assert torch.allclose(now, plainly(model, X)), "noise behind the prefix is fresh"
        assert cache._forward.hits == 4


def test_another_path_at_random_between_the_modules():
    class Flips(Net):
        def forward(self, x):
            x = self.a(x)
            return self.c(self.b(x.flip(1) if random.random() < 0.5 else x))

    with pytest.raises(ConfigError, match="b gives other features each time"):
        exact_first(Flips())


def test_numbers_drawn_between_the_modules_are_those_without():
    class Draws(Net):
        def forward(self, x):
            if torch.rand(1) < 0 or random.random() < 0:
                return x
            return super().forward(x)

    model = Draws()
    with attached(model) as cache:
        random.seed(3)
        torch.manual_seed(3)
        model(X)
        after = random.random(), torch.rand(1)
    random.seed(3)
    torch.manual_seed(3)
    model(X)
    assert after == (random.random(), torch.rand(1))
    assert cache._forward is None


@pytest.mark.parametrize("x", [noise(10, 1, 8), noise(10, 8)])
def test_time_before_the_batch_is_refused_though_it_is_causal(x):
    class Causal(nn.Module):
        def __init__(self):
            super().__init__()
            self.gru = nn.GRU(8, 8)

        def forward(self, x):
            return self.gru(x)[0]

    with pytest.raises(ConfigError, match="a batch dimension that is not the first"):
        exact_first(Net(a=Causal()), x)


# ---- errors that say what to do ------------------------------------------------------------------


def test_a_prefix_that_is_gone_is_said_and_left_alone():
    model = Net()
    with attached(model) as cache:
        assert exact(model, X)
        model.requires_grad_(True)
        with pytest.warns(UserWarning, match="since weights, .* there is nothing to store"):
            assert exact(model, X)
        assert exact(model, X)
        seconds = cache._forward.seconds
        with torch.no_grad():
            model.a.weight.mul_(0.9)
        assert exact(model, X)
        assert cache._forward.seconds == seconds, "there is no look at every step"
        model.a.requires_grad_(False)
        assert exact(model, X)
        assert exact(model, X)
        assert cache._forward.hits == 4
        assert cache._forward.end == "b"


@dataclass
class Pair:
    one: torch.Tensor
    two: torch.Tensor


class Gives(nn.Linear):
    def __init__(self, change):
        super().__init__(8, 8)
        self.change = change

    def forward(self, *args):
        return self.change(super().forward(args[0]), *args)


def total(value) -> torch.Tensor:
    if isinstance(value, Pair):
        return value.one + value.two
    return torch.stack(value) if isinstance(value, list) else value


class Joins(Net):
    def forward(self, x):
        return self.c(self.b(total(self.a(x))))


class Collects(Net):
    def forward(self, x):
        features = []
        self.a(x, features)
        return self.c(self.b(features[0]))


class Views(Net):
    def forward(self, x):
        return self.c(self.b(self.a(x).view(-1, 4, 8).roll(1, 1).view(-1, 8)))


class Writes(Net):
    def forward(self, x):
        return super().forward(x.sub_(0.5))


@pytest.mark.parametrize(
    ("model", "x", "message"),
    [
        (Joins(Gives(lambda y, x: list(y))), X, "a gives 3 values here and 2"),
        (Joins(Gives(lambda y, x: Pair(y, y))), X, "a gives Pair beside tensors"),
        (Joins(Gives(lambda y, x: y.squeeze())), X[:1], r"a gives a tensor of shape \(8,\) for 1"),
        (Collects(Gives(lambda y, x, f: f.append(y))), X, "trial forward of Collects.*IndexError"),
        (Views(), X, "trial forward of Views, with two items.*RuntimeError: shape"),
        (Writes(), X, "Writes writes into its input before b is over"),
        (Net(a=nn.ReLU(inplace=True), mid=nn.Linear(8, 8)), X, "writes into its input"),
    ],
)
def test_what_cannot_be_tried_is_a_config_error(model, x, message):
    with attached(model), pytest.raises(ConfigError, match=message):
        model(x.clone())


def test_no_numbers_that_the_model_masks_are_stored():
    class Model(Net):
        def forward(self, x):
            return self.c(self.b(torch.nan_to_num(self.a(x))))

    model = Model(Gives(lambda y, x: y.masked_fill(y < 0, torch.nan)))
    with attached(model) as cache:
        for x in (X, OTHER, X[[2, 0]]):
            assert exact(model, x)
        assert cache._forward.hits == 2


def test_compiled_in_place():
    model = Net()
    with attached(model) as cache:
        model.compile(backend="eager")
        with pytest.warns(UserWarning, match="was compiled in place"):
            cache.end_epoch()
        assert "was compiled in place" in cache.summary()
    with pytest.raises(ConfigError, match=r"before torch\.compile"):
        cache.attach(model)


# ---- room ----------------------------------------------------------------------------------------


class Positions(Net):
    """A table for each length, which belongs to no item."""

    def __init__(self):
        super().__init__(mid=nn.Linear(1, 8))

    def forward(self, x):
        places = torch.arange(x.shape[1], dtype=x.dtype)[:, None]
        return self.c(self.a(x) + self.mid(places))


def test_tables_for_many_lengths_stay_within_the_budget():
    model = Positions()
    with PrefixCache(0.02).attach(model) as cache:
        for _ in range(2):
            for length in range(10, 40):
                assert exact(model, noise(1, length, 8))
                held = cache._forward.found.prefix.layouts.nbytes
                assert held + cache._forward.store.used <= 20_000
        assert cache._forward.store.refused
        prefix = cache._forward.found.prefix
        assert 1 < len(prefix.layouts._known) < 30
    assert cache._forward is None


def test_a_folder_that_is_a_file_and_a_budget_without_end(tmp_path):
    path = tmp_path / "file"
    path.touch()
    with pytest.raises(ConfigError, match="is a file, and features go into a folder"):
        PrefixCache(1, path).attach(Net())
    with pytest.raises(ConfigError, match="above 0 and finite"):
        PrefixCache(float("inf"))
